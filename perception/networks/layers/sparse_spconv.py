"""Sparse convolution by spconv 2.x, the fast path on CUDA. Interface as in `sparse_torch`.

spconv is imported when first used. What it cannot do is an error here, never a wrong result:

* on the CPU its forward pass races with more than one thread, and it has no backward pass;
* it has kernels for float32 and float16 alone: bfloat16 is computed in float32 and rounded, float64 is refused;
* it refuses a convolution that reaches no site: such maps are `sparse_torch`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from perception.errors import PerceptionError
from perception.networks.layers import sparse_torch
from perception.networks.layers.sparse_torch import Triple

# Above this many taps implicit GEMM has no fast path; spconv's own default is the same.
_IMPLICIT_GEMM_TAPS = 32


@dataclass(frozen=True, slots=True, eq=False)
class GatherPairs:
    """Pairs of spconv's "native" algorithm: rows (2, taps, V) int32 and how many each tap has, (taps,) int32."""

    pairs: Tensor
    counts: Tensor
    num_in: int
    num_out: int
    submanifold: bool


@dataclass(frozen=True, slots=True, eq=False)
class ImplicitGemmPairs:
    """Pairs of spconv's implicit GEMM, for the forward and the backward direction: (rows, masks, order of masks)."""

    forward: tuple[Tensor, list[Tensor], list[Tensor]]
    backward: tuple[Tensor, list[Tensor], list[Tensor]]
    masks: list[Any]
    num_in: int
    num_out: int
    submanifold: bool


KernelMap = GatherPairs | ImplicitGemmPairs | sparse_torch.KernelMap


def installed_for_cuda() -> bool:
    """Whether an spconv with CUDA kernels is installed; an installation that does not import raises its own error."""
    if find_spec("spconv") is None:
        return False
    from spconv.cppconstants import CPU_ONLY_BUILD

    return not CPU_ONLY_BUILD


def check_usable(device: torch.device, dtype: torch.dtype) -> None:
    """Raise PerceptionError unless spconv gives right results for features of this kind."""
    if find_spec("spconv") is None:
        raise PerceptionError(
            "sparse convolution: backend 'spconv' was asked for, and spconv is not installed",
            "pip install 'perception[cu126]' (on Python 3.11 or older also 'perception[cu120]'), or backend='torch'",
        )
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise PerceptionError(
            f"sparse convolution: backend 'spconv' has no kernels for {dtype}", "use float32, or backend='torch'"
        )
    if device.type == "cuda":
        if not installed_for_cuda():
            raise PerceptionError(
                f"sparse convolution: features on {device}, and the spconv installed is the CPU build",
                "pip uninstall spconv cumm; pip install 'perception[cu126]', or backend='torch'",
            )
    elif torch.get_num_threads() > 1:
        raise PerceptionError(
            f"sparse convolution: backend 'spconv' on {device} with {torch.get_num_threads()} threads; "
            "its CPU kernels race and return wrong features",
            "use backend='torch' (as fast on the CPU, and exact), or torch.set_num_threads(1)",
        )


def submanifold_map(
    indices: Tensor, batch_size: int, spatial_shape: Triple, kernel_size: Triple, dilation: Triple
) -> KernelMap:
    """See `sparse_torch.submanifold_map`."""
    if not len(indices):
        return sparse_torch.submanifold_map(indices, batch_size, spatial_shape, kernel_size, dilation)
    stride, padding = (1, 1, 1), (0, 0, 0)  # unread: spconv itself centres the kernel
    return _find_pairs(indices, batch_size, spatial_shape, kernel_size, stride, padding, dilation, submanifold=True)[0]


def strided_map(
    indices: Tensor,
    batch_size: int,
    out_shape: Triple,
    kernel_size: Triple,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
) -> tuple[KernelMap, Tensor]:
    """See `sparse_torch.strided_map`; the output sites' order is spconv's own."""
    # spconv pads both ends alike and derives the output's shape: this input shape makes it `out_shape`.
    in_shape = tuple(
        (o - 1) * s + d * (k - 1) + 1 - 2 * p
        for o, k, s, p, d in zip(out_shape, kernel_size, stride, padding, dilation, strict=True)
    )
    geometry = (kernel_size, stride, padding, dilation)
    if not len(indices):
        return sparse_torch.strided_map(indices, batch_size, out_shape, *geometry)
    try:
        return _find_pairs(indices, batch_size, in_shape, *geometry, submanifold=False)
    except (ValueError, RuntimeError):
        # Either no site is reached, which spconv refuses, or something is really wrong.
        empty, sites = sparse_torch.strided_map(indices, batch_size, out_shape, *geometry)
        if len(sites):
            raise
        return empty, sites


def _find_pairs(
    indices: Tensor,
    batch_size: int,
    in_shape: tuple[int, ...],
    kernel_size: Triple,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    submanifold: bool,
) -> tuple[GatherPairs | ImplicitGemmPairs, Tensor]:
    """spconv's pairs and output sites (V_out, 4) of at least one input site."""
    from spconv.core import ConvAlgo
    from spconv.pytorch import ops

    native = not indices.is_cuda or math.prod(kernel_size) > _IMPLICIT_GEMM_TAPS
    algorithm = ConvAlgo.Native if native else ConvAlgo.MaskImplicitGemm
    no_out_padding = (0, 0, 0)
    geometry = [list(v) for v in (kernel_size, stride, padding, dilation, no_out_padding)]
    call = (indices, batch_size, list(in_shape), algorithm, *geometry, submanifold)
    if native:
        with torch.cuda.device_of(indices):
            out, rows, counts = ops.get_indice_pairs(*call)
        return GatherPairs(rows, counts, len(indices), len(out), submanifold), out
    # Both directions, whether or not gradients are wanted now: the map is kept, and may be run backwards later.
    with torch.cuda.device_of(indices):
        found = ops.get_indice_pairs_implicit_gemm(*call, is_train=True)
    out, _, rows, back_rows, row_masks, back_row_masks, order, back_order, masks = found
    forward, backward = (rows, row_masks, order), (back_rows, back_row_masks, back_order)
    return ImplicitGemmPairs(forward, backward, masks, len(indices), len(out), submanifold), out


def convolve(features: Tensor, weight: Tensor, kernel_map: KernelMap, inverse: bool = False) -> Tensor:
    """See `sparse_torch.convolve`."""
    if isinstance(kernel_map, sparse_torch.KernelMap):
        return sparse_torch.convolve(features, weight, kernel_map, inverse)
    if not features.is_cuda and torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad):
        raise PerceptionError(
            "sparse convolution: backend 'spconv' on the CPU has no backward pass",
            "use backend='torch', or torch.no_grad() for inference",
        )
    if features.dtype == torch.bfloat16:
        return convolve(features.float(), weight.float(), kernel_map, inverse).bfloat16()
    with torch.cuda.device_of(features):  # spconv launches on the current device
        if isinstance(kernel_map, ImplicitGemmPairs):
            return _implicit_gemm(features.contiguous(), weight.contiguous(), kernel_map, inverse)
        return _gather_gemm(features.contiguous(), weight.contiguous(), kernel_map, inverse)


def _implicit_gemm(features: Tensor, weight: Tensor, pairs: ImplicitGemmPairs, inverse: bool) -> Tensor:
    from spconv.pytorch import functional

    there, back = (pairs.backward, pairs.forward) if inverse else (pairs.forward, pairs.backward)
    (rows, row_masks, order), (back_rows, back_row_masks, back_order) = there, back
    num_out = pairs.num_in if inverse else pairs.num_out
    training = torch.is_grad_enabled()
    result: Tensor = functional.implicit_gemm(
        features, weight, rows, back_rows, row_masks, back_row_masks, order, back_order, num_out, pairs.masks,
        training, pairs.submanifold,
    )  # fmt: skip
    return result


def _gather_gemm(features: Tensor, weight: Tensor, pairs: GatherPairs, inverse: bool) -> Tensor:
    from spconv.core import ConvAlgo
    from spconv.pytorch import functional

    num_out = pairs.num_in if inverse else pairs.num_out
    run = functional.indice_subm_conv if pairs.submanifold else functional.indice_conv
    run = functional.indice_inverse_conv if inverse else run
    result: Tensor = run(features, weight, pairs.pairs, pairs.counts, num_out, ConvAlgo.Native)
    return result
