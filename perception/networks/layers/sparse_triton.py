"""Sparse convolution by Triton kernels on CUDA: the fast path for inference. Interface as in `sparse_torch`.

Neighbours are looked up in a dense grid of row numbers, which a GPU clears and reads faster than it searches sorted
keys: 340 MB for 41 x 1440 x 1440 voxels. Sites of a strided convolution are the marked cells of its output grid, in
their order; finding how many there are is the one time that the host waits, and it need not where room for them is
given (`padded_strided_map`). A convolution is a matrix product whose left rows are gathered, one tap after the other,
and summed in float32; without atomic additions, so that results are equal to the bit from run to run.

There is no backward pass: gradients are the other backends'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor

from perception.errors import PerceptionError
from perception.networks.layers import sparse_torch
from perception.networks.layers.sparse_torch import Triple

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_ROWS = 256  # sites that a program of the kernels for maps takes
# Cells of the largest dense grid, 4 GiB of rows; larger ones are searched by `sparse_torch`.
_MOST_CELLS = 2**30


@dataclass(frozen=True)
class KernelMap:
    """Which input row each tap reads for each output row.

    Attributes:
        table: (taps, outputs) int32 input rows, taps in row-major (z, y, x) order; `num_in` where there is none.
        num_in: input rows.
    """

    table: Tensor
    num_in: int

    @cached_property
    def inverse(self) -> KernelMap:
        """Which output row each tap reads for each input row."""
        taps, num_out = self.table.shape
        rows = torch.arange(num_out, dtype=torch.int32, device=self.table.device).expand(taps, -1)
        table = self.table.new_full((taps, self.num_in + 1), num_out)
        return KernelMap(table.scatter_(1, self.table.long(), rows)[:, :-1].contiguous(), num_out)


def installed() -> bool:
    return find_spec("triton") is not None


def has_dense_tables(spatial_shape: Triple) -> bool:
    """Whether one grid of this size, and what its convolutions read around it, is looked up in dense tables."""
    return math.prod(n + 3 for n in spatial_shape) <= _MOST_CELLS


def check_usable(device: torch.device, dtype: torch.dtype) -> None:
    """Raise PerceptionError unless the kernels run for features of this kind."""
    if not installed():
        raise PerceptionError(
            "sparse convolution: backend 'triton' was asked for, and Triton is not installed",
            "PyTorch's wheels for CUDA on Linux bring it; or backend='torch'",
        )
    if device.type != "cuda" or dtype not in DTYPES:
        raise PerceptionError(
            f"sparse convolution: backend 'triton' has no kernels for {dtype} on {device}",
            "use float32, float16 or bfloat16 on CUDA, or backend='torch'",
        )


def submanifold_map(
    indices: Tensor, batch_size: int, spatial_shape: Triple, kernel_size: Triple, dilation: Triple
) -> KernelMap:
    """See `sparse_torch.submanifold_map`."""
    padding = _triple(k // 2 * d for k, d in zip(kernel_size, dilation, strict=True))
    if not len(indices) or batch_size * math.prod(spatial_shape) > _MOST_CELLS:
        found = sparse_torch.submanifold_map(indices, batch_size, spatial_shape, kernel_size, dilation)
        return KernelMap(found.forward.table.int(), len(indices))
    indices = indices.contiguous()
    return _neighbours(indices, indices, batch_size, spatial_shape, kernel_size, (1, 1, 1), padding, dilation)


def strided_map(
    indices: Tensor,
    batch_size: int,
    out_shape: Triple,
    kernel_size: Triple,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
) -> tuple[KernelMap, Tensor]:
    """See `sparse_torch.strided_map`."""
    geometry = (kernel_size, stride, padding, dilation)
    in_shape = _read_shape(out_shape, geometry)
    if not len(indices) or batch_size * max(math.prod(in_shape), math.prod(out_shape)) > _MOST_CELLS:
        found, sites = sparse_torch.strided_map(indices, batch_size, out_shape, *geometry)
        return KernelMap(found.forward.table.int(), len(indices)), sites
    indices = indices.contiguous()
    sites = _reached(indices, batch_size, out_shape, geometry).nonzero().int().contiguous()  # nonzero gives columns
    return _neighbours(indices, sites, batch_size, in_shape, *geometry), sites


def padded_strided_map(
    indices: Tensor,
    batch_size: int,
    out_shape: Triple,
    kernel_size: Triple,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    rows: int,
) -> tuple[KernelMap, Tensor, Tensor]:
    """`strided_map` without waiting for the device: for CUDA graphs.

    Args:
        indices: (V, 4) int32, one row or more; -1 in rows without a site.
        rows: sites that are given at most, the first ones.

    Returns:
        The map, the sites (rows, 4) with -1 in rows without one, and how many there are, () int64: more than `rows`
        where not all were given.

    Raises:
        PerceptionError: the grid is too large for a dense table.
    """
    geometry = (kernel_size, stride, padding, dilation)
    in_shape = _read_shape(out_shape, geometry)
    if (cells := batch_size * max(math.prod(in_shape), math.prod(out_shape))) > _MOST_CELLS:
        raise PerceptionError(
            f"sparse convolution: a grid of {cells:,} cells, and a dense table of at most {_MOST_CELLS:,}",
            "use larger voxels or a smaller range",
        )
    indices = indices.contiguous()
    reached = _reached(indices, batch_size, out_shape, geometry)
    sites = torch.nonzero_static(reached, size=rows, fill_value=-1).int().contiguous()
    found = _neighbours(indices, sites, batch_size, in_shape, *geometry)
    return found, sites, reached.sum()


_Geometry = tuple[Triple, Triple, Triple, Triple]  # kernel size, stride, padding, dilation


def _read_shape(out_shape: Triple, geometry: _Geometry) -> Triple:
    """The largest input cell that matters: inputs may lie beyond what the outputs read, but never before."""
    return _triple(
        max((o - 1) * s - p + (k - 1) * d + 1, 1) + s for o, k, s, p, d in zip(out_shape, *geometry, strict=True)
    )


def _reached(indices: Tensor, batch_size: int, out_shape: Triple, geometry: _Geometry) -> Tensor:
    """(B, Z, Y, X) bool: the cells that a site reaches."""
    from perception.networks.layers.sparse_triton_kernels import mark_reached

    kernel_size, stride, padding, dilation = geometry
    reached = torch.zeros((batch_size, *out_shape), dtype=torch.bool, device=indices.device)
    num = len(indices)
    with torch.cuda.device_of(indices):
        mark_reached[(-(-num // _ROWS), math.prod(kernel_size))](
            indices, reached.view(torch.uint8), num, *out_shape, *kernel_size[1:], *stride, *padding, *dilation,
            BLOCK=_ROWS,
        )  # fmt: skip
    return reached


def _neighbours(
    inputs: Tensor,
    outputs: Tensor,
    batch_size: int,
    in_shape: Triple,
    kernel_size: Triple,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
) -> KernelMap:
    from perception.networks.layers.sparse_triton_kernels import find_neighbours, number_sites

    num_in, num_out, taps = len(inputs), len(outputs), math.prod(kernel_size)
    grid = torch.full((batch_size * math.prod(in_shape),), num_in, dtype=torch.int32, device=inputs.device)
    table = inputs.new_empty((taps, num_out))
    if num_out:
        with torch.cuda.device_of(inputs):
            number_sites[(-(-num_in // _ROWS),)](inputs, grid, num_in, *in_shape, BLOCK=_ROWS)
            find_neighbours[(-(-num_out // _ROWS), taps)](
                outputs, grid, table, num_out, num_in, *in_shape, *kernel_size[1:], *stride, *padding, *dilation,
                BLOCK=_ROWS,
            )  # fmt: skip
    return KernelMap(table, num_in)


def convolve(features: Tensor, weight: Tensor, kernel_map: KernelMap, inverse: bool = False) -> Tensor:
    """See `sparse_torch.convolve`; without gradients."""
    from perception.networks.layers.sparse_triton_kernels import gather_multiply

    if torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad):
        raise PerceptionError(
            "sparse convolution: backend 'triton' has no backward pass",
            "use backend='auto', 'spconv' or 'torch' for training, or torch.no_grad() for inference",
        )
    found = kernel_map.inverse if inverse else kernel_map
    taps, num_out = found.table.shape
    channels_out, channels_in = weight.shape[0], weight.shape[-1]
    out = features.new_empty((num_out, channels_out))
    if not num_out:
        return out
    block_in, block_out = (max(16, 1 << (n - 1).bit_length()) for n in (channels_in, min(channels_out, 128)))
    block = 128 if block_in <= 64 else 64  # measured on an H200
    with torch.cuda.device_of(features):
        gather_multiply[(-(-num_out // block), -(-channels_out // block_out))](
            features.contiguous(), weight.contiguous(), found.table, out, found.num_in, num_out, taps,
            IN=channels_in, OUT=channels_out, BLOCK=block, BLOCK_IN=block_in, BLOCK_OUT=block_out,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


def _triple(values: Iterable[int]) -> Triple:
    z, y, x = values
    return z, y, x
