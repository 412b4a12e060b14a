"""Sparse convolution in plain torch: sorted integer keys find the neighbours, then gather, multiply, scatter.

A convolution is a sum over kernel taps. For each tap, a *kernel map* lists the pairs (input row, output row) that it
joins; the input rows of the pairs are gathered, multiplied by the tap's matrix, and added to their output rows::

    indices (V, 4) --map--> pairs per tap --gather--> (P, in) --GEMM--> (P, out) --add--> (V_out, out)

* **Finding pairs.** Each site has one int64 key that grows with (batch, z, y, x) in a grid widened by the kernel's
  reach, so that a neighbour is the key plus a constant and never wraps into the next row. Within a row of the kernel
  the positions in the sorted keys follow from one another, and half of a submanifold kernel mirrors the other half:
  3x3x3 taps take four binary searches per site.
* **Deterministic.** An output row occurs at most once per tap, and taps are added in order: no two additions race, so
  results are equal to the bit from run to run, on CUDA too.
* **Precision.** Half types are multiplied as they are and summed over taps in float32.

Works on CPU and CUDA, float64, float32, float16 and bfloat16, forward and backward, with any number of sites.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Triple = tuple[int, int, int]
"""One number per axis (z, y, x)."""


@dataclass(frozen=True, slots=True, eq=False)
class KernelMap:
    """Which input row meets which output row, through which kernel tap.

    Attributes:
        pairs: per tap, in row-major (z, y, x) order, the int64 rows (P,) of inputs and (P,) of outputs, output rows
            unique.
        identity: the tap that joins every row with itself (its `pairs` are empty), or None.
        num_in: input rows.
        num_out: output rows.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    identity: int | None
    num_in: int
    num_out: int

    def inverse(self) -> KernelMap:
        """The map from outputs to inputs, each pair through the same tap."""
        swapped = tuple((out_row, in_row) for in_row, out_row in self.pairs)
        return KernelMap(swapped, self.identity, self.num_out, self.num_in)


def site_keys(indices: Tensor, extent: Triple) -> Tensor:
    """(V,) int64 keys of sites (V, 4) in a grid of `extent`, growing with (batch, z, y, x)."""
    batch, z, y, x = indices.long().unbind(1)
    return ((batch * extent[0] + z) * extent[1] + y) * extent[2] + x


def submanifold_map(
    indices: Tensor, batch_size: int, spatial_shape: Triple, kernel_size: Triple, dilation: Triple
) -> KernelMap:
    """The map of a submanifold convolution: outputs are the inputs' sites, in their order.

    The kernel is odd on every axis; tap k of an axis reads the site at `(k - kernel_size // 2) * dilation`.
    """
    reach = [k // 2 * d for k, d in zip(kernel_size, dilation, strict=True)]
    extent = (spatial_shape[0] + reach[0], spatial_shape[1] + reach[1], spatial_shape[2] + reach[2])
    keys, order = site_keys(indices, extent).sort()
    offsets = [[k * d - r for k in range(size)] for size, d, r in zip(kernel_size, dilation, reach, strict=True)]
    steps = [(dz * extent[1] + dy) * extent[2] + dx for dz, dy, dx in itertools.product(*offsets)]
    centre = len(steps) // 2
    after = [(order.take(neighbour), order.take(site)) for neighbour, site in _find_neighbours(keys, steps[centre + 1 :])]
    before = [(site, neighbour) for neighbour, site in reversed(after)]
    itself = (order[:0], order[:0])
    return KernelMap((*before, itself, *after), centre, len(indices), len(indices))


def _find_neighbours(keys: Tensor, steps: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """For each step, the positions (P,) of `key + step` and of `key`, in sorted unique keys (V,) that hold both."""
    if not steps or not len(keys):
        return [(keys[:0], keys[:0]) for _ in steps]
    fenced = torch.cat([keys, keys.new_full((1,), torch.iinfo(torch.int64).max)])  # a search may end past the last key
    positions, hits = [], []
    last_step = 0
    position, hit = torch.arange(len(keys), device=keys.device), torch.ones_like(keys, dtype=torch.bool)
    for step in steps:
        wanted = keys + step
        # Where the last step was one less, a key at or after `wanted` is where the last search ended, or just after.
        position = position + hit if step == last_step + 1 else torch.searchsorted(keys, wanted)
        hit = fenced.take(position) == wanted
        last_step = step
        positions.append(position)
        hits.append(hit)
    hit = torch.stack(hits)  # (steps, V)
    flat = hit.flatten().nonzero().squeeze(1)
    counts = hit.sum(1).tolist()
    neighbour = torch.stack(positions).take(flat)
    return list(zip(neighbour.split(counts), (flat % len(keys)).split(counts), strict=True))


def strided_map(
    indices: Tensor,
    batch_size: int,
    out_shape: Triple,
    kernel_size: Triple,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
) -> tuple[KernelMap, Tensor]:
    """The map of a convolution whose outputs are all sites that an input reaches, and those sites.

    Input i feeds output o through tap k where `i = o * stride - padding + k * dilation` on each axis.

    Returns:
        the map and the output sites (V_out, 4) int32, sorted by (batch, z, y, x).
    """
    batch, *coordinates = indices.long().unbind(1)
    outs, valids = [], []
    for i, size, k, s, p, d in zip(coordinates, out_shape, kernel_size, stride, padding, dilation, strict=True):
        reached = i + p - torch.arange(k, device=i.device)[:, None] * d  # (k, V)
        out = reached.div(s, rounding_mode="floor")
        outs.append(out)
        valids.append((out * s == reached) & (out >= 0) & (out < size))
    valid = (valids[0][:, None, None] & valids[1][:, None] & valids[2]).flatten(0, 2)  # (taps, V)
    tap, in_row = valid.nonzero(as_tuple=True)
    kz, ky, kx = _unravel(tap, kernel_size)
    reached_site = torch.stack([batch[in_row], outs[0][kz, in_row], outs[1][ky, in_row], outs[2][kx, in_row]], 1)
    keys, out_row = site_keys(reached_site, out_shape).unique(return_inverse=True)
    counts = valid.sum(1).tolist()
    pairs = tuple(zip(in_row.split(counts), out_row.split(counts), strict=True))
    out_indices = torch.stack(_unravel(keys, (batch_size, *out_shape)), 1).int()
    return KernelMap(pairs, None, len(indices), len(keys)), out_indices


def _unravel(flat: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """The coordinates of row-major positions in a grid of `shape`."""
    coordinates = []
    for size in reversed(shape):
        coordinates.append(flat % size)
        flat = flat.div(size, rounding_mode="floor")
    return coordinates[::-1]


def convolve(features: Tensor, weight: Tensor, kernel_map: KernelMap, inverse: bool = False) -> Tensor:
    """Features (num_in, in) to (num_out, out) by weight (out, kz, ky, kx, in) over a map, or its inverse."""
    result: Tensor = _Convolution.apply(features, weight, kernel_map.inverse() if inverse else kernel_map)
    return result


class _Convolution(torch.autograd.Function):
    # Written out because autograd would keep every tap's gathered rows alive until the backward pass.

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.kernel_map = kernel_map
        taps = weight.flatten(1, 3).unbind(1)  # taps x (out, in)
        return _gather_multiply_add(features, [tap.t() for tap in taps], kernel_map)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        kernel_map: KernelMap = ctx.kernel_map
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_features = _gather_multiply_add(grad_out, weight.flatten(1, 3).unbind(1), kernel_map.inverse())
        if ctx.needs_input_grad[1]:
            taps = [
                grad_out.t() @ features
                if tap == kernel_map.identity
                else grad_out.index_select(0, out_row).t() @ features.index_select(0, in_row)
                for tap, (in_row, out_row) in enumerate(kernel_map.pairs)
            ]
            grad_weight = torch.stack(taps, 1).view_as(weight)
        return grad_features, grad_weight, None


def _gather_multiply_add(features: Tensor, taps: Sequence[Tensor], kernel_map: KernelMap) -> Tensor:
    """Rows (num_out, out): the sum over taps (in, out) of the gathered features (num_in, in) times the tap."""
    half = features.dtype in (torch.float16, torch.bfloat16)
    total_dtype = torch.float32 if half else features.dtype
    if kernel_map.identity is not None:
        total = (features @ taps[kernel_map.identity]).to(total_dtype)
    else:
        total = features.new_zeros(kernel_map.num_out, taps[0].shape[1], dtype=total_dtype)
    for (in_row, out_row), tap in zip(kernel_map.pairs, taps, strict=True):
        if len(in_row):
            total.index_add_(0, out_row, (features.index_select(0, in_row) @ tap).to(total_dtype))
    return total.to(features.dtype)
