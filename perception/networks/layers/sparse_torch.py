"""Sparse convolution in plain torch: sorted integer keys find the neighbours, then gather and multiply.

A *neighbour table* (taps, outputs) says which input row each tap of the kernel reads for each output row. Sums over it
run in a fixed order, without atomic additions, so that results are equal to the bit from run to run:

* On CUDA the rows are gathered side by side, zeros where there is no neighbour, and multiplied at once:
  (outputs, taps * in) @ (taps * in, out). Multiplying zeros is cheaper there than many small products.
* On the CPU it is dearer: the neighbours that a tap does have are gathered, multiplied by its matrix and added to their
  output rows, none of which occurs twice within a tap. Half types are summed over taps in float32.

Finding neighbours: each site has one int64 key that grows with (batch, z, y, x) in a grid widened by the kernel's
reach, so that a neighbour is the key plus a constant and never wraps into the next row. Within a row of the kernel the
positions in the sorted keys follow from one another, and half of a submanifold kernel mirrors the other half: 3x3x3
taps take four binary searches per site.

Works on CPU and CUDA, float64, float32, float16 and bfloat16, forward and backward, with any number of sites.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Triple = tuple[int, int, int]
"""One number per axis (z, y, x)."""

# Numbers gathered at a time on CUDA, to bound memory: 256 MiB of float32.
_GATHER_LIMIT = 2**26


class Neighbours:
    """Which input row each tap reads for each output row.

    Attributes:
        table: (taps, outputs) int64 input rows, taps in row-major (z, y, x) order; `num_in` where there is none.
        num_in: input rows.
        identity: the tap that reads row i for row i, or None.
    """

    def __init__(self, table: Tensor, num_in: int, identity: int | None = None) -> None:
        self.table = table
        self.num_in = num_in
        self.identity = identity

    @cached_property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Per tap, the rows (P,) of inputs and (P,) of outputs that it joins; none for `identity`, where all are."""
        num_out = self.table.shape[1]
        table = self.table.flatten()
        exists = self.table < self.num_in
        if self.identity is not None:
            exists[self.identity] = False
        counts = exists.sum(1).tolist()
        at = exists.flatten().nonzero().squeeze(1)
        return list(zip(table.take(at).split(counts), (at % max(1, num_out)).split(counts), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class KernelMap:
    """The neighbours of outputs among inputs and, for gradients and inverse convolutions, the other way round."""

    forward: Neighbours
    backward: Neighbours

    @property
    def num_out(self) -> int:
        return self.backward.num_in


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
    num = len(indices)
    reach = [k // 2 * d for k, d in zip(kernel_size, dilation, strict=True)]
    extent = (spatial_shape[0] + reach[0], spatial_shape[1] + reach[1], spatial_shape[2] + reach[2])
    keys, order = site_keys(indices, extent).sort()
    offsets = [[k * d - r for k in range(size)] for size, d, r in zip(kernel_size, dilation, reach, strict=True)]
    steps = [(dz * extent[1] + dy) * extent[2] + dx for dz, dy, dx in itertools.product(*offsets)]
    centre = len(steps) // 2
    row = torch.cat([order, order.new_full((1,), num)])  # of a position in the sorted keys; `num` past the last
    table = order.new_full(
        (len(steps), num + 1), num
    )  # one column more than rows: sites without the neighbour write there
    table[centre, :num] = torch.arange(num, device=indices.device)
    for i, position in enumerate(_find_neighbours(keys, steps[centre + 1 :]), start=1):
        neighbour = row.take(position)
        table[centre + i].index_copy_(0, order, neighbour)
        table[centre - i].index_copy_(0, neighbour, order)
    table = table[:, :num]
    return KernelMap(Neighbours(table, num, centre), Neighbours(table.flip(0), num, centre))


def _find_neighbours(keys: Tensor, steps: Sequence[int]) -> Iterator[Tensor]:
    """For each step, the position (V,) of `key + step` in the sorted unique keys (V,), or V where it is not there."""
    num = len(keys)
    fenced = torch.cat([keys, keys.new_full((1,), torch.iinfo(torch.int64).max)])  # a search may end past the last key
    last_step = 0
    position, found = torch.arange(num, device=keys.device), torch.ones_like(keys, dtype=torch.bool)
    for step in steps:
        wanted = keys + step
        # If the last step was one less, the search ends where the last one did, or just after what that one found.
        position = position + found if step == last_step + 1 else torch.searchsorted(keys, wanted)
        found = fenced.take(position) == wanted
        last_step = step
        yield position.where(found, num)


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
    num_in, num_out = len(indices), len(keys)
    forward = in_row.new_full((len(valid), num_out), num_in).index_put_((tap, out_row), in_row)
    backward = in_row.new_full((len(valid), num_in), num_out).index_put_((tap, in_row), out_row)
    out_indices = torch.stack(_unravel(keys, (batch_size, *out_shape)), 1).int()
    return KernelMap(Neighbours(forward, num_in), Neighbours(backward, num_out)), out_indices


def _unravel(flat: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """The coordinates of row-major positions in a grid of `shape`."""
    coordinates = []
    for size in reversed(shape):
        coordinates.append(flat % size)
        flat = flat.div(size, rounding_mode="floor")
    return coordinates[::-1]


def convolve(features: Tensor, weight: Tensor, kernel_map: KernelMap, inverse: bool = False) -> Tensor:
    """Features (num_in, in) to (num_out, out) by weight (out, kz, ky, kx, in) over a map, or its inverse."""
    there, back = (kernel_map.backward, kernel_map.forward) if inverse else (kernel_map.forward, kernel_map.backward)
    result: Tensor = _Convolution.apply(features, weight, there, back)
    return result


class _Convolution(torch.autograd.Function):
    # Written out because autograd would keep every tap's gathered rows alive until the backward pass.

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, there: Neighbours, back: Neighbours) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.there, ctx.back = there, back
        return _multiply(features, weight.flatten(1).t(), there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        features, weight = ctx.saved_tensors
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:
            matrix = weight.flatten(1, 3).transpose(0, 1).flatten(0, 1)  # (taps * out, in)
            grad_features = _multiply(grad_out, matrix, ctx.back)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(features, grad_out, ctx.there).view_as(weight)
        return grad_features, grad_weight, None, None


def _multiply(features: Tensor, matrix: Tensor, neighbours: Neighbours) -> Tensor:
    """(outputs, out): the neighbours' features (inputs, in), tap after tap, times the matrix (taps * in, out)."""
    if _side_by_side(features.device):
        return torch.cat([gathered @ matrix for gathered, _ in _gather_side_by_side(features, neighbours)])
    taps = matrix.split(features.shape[1])
    total_dtype = torch.float32 if features.dtype in (torch.float16, torch.bfloat16) else features.dtype
    if neighbours.identity is not None:
        total = (features @ taps[neighbours.identity]).to(total_dtype)
    else:
        total = features.new_zeros(neighbours.table.shape[1], matrix.shape[1], dtype=total_dtype)
    for tap, (in_row, out_row) in zip(taps, neighbours.pairs, strict=True):
        if len(in_row):
            total.index_add_(0, out_row, (features.index_select(0, in_row) @ tap).to(total_dtype))
    return total.to(features.dtype)


def _weight_gradient(features: Tensor, grad_out: Tensor, neighbours: Neighbours) -> Tensor:
    """(out, taps, in): the products of each tap's output gradients with its inputs, summed over pairs."""
    if _side_by_side(features.device):
        parts = [grad_out[rows].t() @ gathered for gathered, rows in _gather_side_by_side(features, neighbours)]
        return torch.stack(parts).sum(0).unflatten(1, (len(neighbours.table), -1))
    taps = [
        grad_out.t() @ features
        if i == neighbours.identity
        else grad_out.index_select(0, out_row).t() @ features.index_select(0, in_row)
        for i, (in_row, out_row) in enumerate(neighbours.pairs)
    ]
    return torch.stack(taps, 1)


def _side_by_side(device: torch.device) -> bool:
    return device.type == "cuda"


def _gather_side_by_side(features: Tensor, neighbours: Neighbours) -> Iterator[tuple[Tensor, slice]]:
    """The neighbours' features (rows, taps * in) of output rows, zero where there is none, and which rows these are."""
    width = len(neighbours.table) * features.shape[1]
    padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
    step = max(1, _GATHER_LIMIT // width)
    for start in range(0, max(1, neighbours.table.shape[1]), step):
        rows = slice(start, start + step)
        table = neighbours.table[:, rows].t().flatten()  # (rows * taps,)
        yield padded.index_select(0, table).view(-1, width), rows
