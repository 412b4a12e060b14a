"""Sparse convolution in plain torch: sorted integer keys find the neighbours, then gather and multiply.

A *neighbour table* (taps, outputs) says which input row each tap of the kernel reads for each output row. Sums over it
run in a fixed order, without atomic additions, so that results are equal to the bit from run to run:

* On CUDA all inputs are multiplied by all taps at once, (inputs, in) @ (in, taps * out), and each output row sums the
  products of its neighbours (an embedding bag). Products that nobody reads are cheaper there than many small ones.
* On the CPU they are dearer: the neighbours that a tap does have are gathered, multiplied by its matrix and added to
  their output rows, none of which occurs twice within a tap. Half types are summed over taps in float32.

Finding neighbours: each site has one int64 key that grows with (batch, z, y, x) in a grid widened by the kernel's
reach, so that a neighbour is the key plus a constant and never wraps into the next row. Within a row of the kernel the
positions in the sorted keys follow from one another, and half of a submanifold kernel mirrors the other half: 3x3x3
taps take five binary searches per site.

Works on CPU and CUDA, float64, float32, float16 and bfloat16, forward and backward, with any number of sites.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Triple = tuple[int, int, int]
"""One number per axis (z, y, x)."""

# Numbers made at once on CUDA, to bound memory: 512 MiB of float32.
_AT_ONCE = 2**27


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
    row = torch.cat([order, order.new_full((1,), num)])  # of a position in the sorted keys; `num` past the last
    across = (range(-r, r + 1, d) for r, d in zip(reach[:2], dilation[:2], strict=True))
    starts = [(dz * extent[1] + dy) * extent[2] - reach[2] for dz, dy in itertools.product(*across)]
    later = _find_runs(keys, starts[len(starts) // 2 :], kernel_size[2], dilation[2])
    neighbour = row.take(later[kernel_size[2] // 2 + 1 :])  # (half, V) of the taps after the centre, in the keys' order
    after = torch.empty_like(neighbour).index_copy_(1, order, neighbour)
    # The taps before it are their mirror image; what has no neighbour writes to a spare column.
    before = order.new_full((len(after), num + 1), num).scatter_(1, neighbour, order.expand_as(neighbour))
    centre = torch.arange(num, device=indices.device)[None]
    table = torch.cat([before[:, :num].flip(0), centre, after])
    return KernelMap(Neighbours(table, num, len(after)), Neighbours(table.flip(0), num, len(after)))


def _find_runs(keys: Tensor, starts: Sequence[int], length: int, stride: int) -> Tensor:
    """For each start, the positions of `key + start`, `key + start + stride`, ... in the sorted unique keys (V,).

    Returns:
        (starts * length, V), V where a key is not there.
    """
    num = len(keys)
    fenced = torch.cat([keys, keys.new_full((1,), torch.iinfo(torch.int64).max)])  # a search may end past the last key
    wanted = keys + keys.new_tensor(starts)[:, None]  # (starts, V)
    position = torch.searchsorted(keys, wanted)
    positions = []
    for _ in range(length):
        found = fenced.take(position) == wanted
        positions.append(position.where(found, num))
        wanted = wanted + stride
        # A search for the next key ends where this one did, or just after what it found.
        position = position + found if stride == 1 else torch.searchsorted(keys, wanted)
    return torch.stack(positions, 1).flatten(0, 1)


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
        return _multiply(features, weight.flatten(1, 3).permute(1, 2, 0), there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        features, weight = ctx.saved_tensors
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_features = _multiply(grad_out, weight.flatten(1, 3).transpose(0, 1), ctx.back)
        if ctx.needs_input_grad[1]:
            gradient = _weight_gradient_at_once if _at_once(features.device) else _weight_gradient_by_tap
            grad_weight = gradient(features, grad_out, ctx.there).view_as(weight)
        return grad_features, grad_weight, None, None


def _at_once(device: torch.device) -> bool:
    return device.type == "cuda"


def _multiply(features: Tensor, taps: Tensor, neighbours: Neighbours) -> Tensor:
    """(outputs, out): the sum over taps (taps, in, out) of the neighbours' features (inputs, in) times the tap."""
    total_dtype = torch.float32 if features.dtype in (torch.float16, torch.bfloat16) else features.dtype
    multiply = _multiply_at_once if _at_once(features.device) else _multiply_by_tap
    return multiply(features, taps, neighbours, total_dtype).to(features.dtype)


def _multiply_at_once(features: Tensor, taps: Tensor, neighbours: Neighbours, total_dtype: torch.dtype) -> Tensor:
    num_in, num_out, out = neighbours.num_in, neighbours.table.shape[1], taps.shape[2]
    step = max(1, _AT_ONCE // ((num_in + 1) * out))  # taps
    padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
    total = features.new_zeros(num_out, out, dtype=total_dtype)
    for part, table in zip(taps.split(step), neighbours.table.split(step), strict=True):
        n = len(part)
        products = (padded @ part.transpose(0, 1).flatten(1)).view(-1, out)  # ((inputs + 1) * taps, out)
        none = num_in * n
        read = (table * n + torch.arange(n, device=table.device)[:, None]).clamp_(max=none).t()  # (outputs, taps)
        total += F.embedding_bag(read, products, mode="sum", padding_idx=none)
    return total


def _multiply_by_tap(features: Tensor, taps: Tensor, neighbours: Neighbours, total_dtype: torch.dtype) -> Tensor:
    if neighbours.identity is not None:
        total = (features @ taps[neighbours.identity]).to(total_dtype)
    else:
        total = features.new_zeros(neighbours.table.shape[1], taps.shape[2], dtype=total_dtype)
    for tap, (in_row, out_row) in zip(taps, neighbours.pairs, strict=True):
        if len(in_row):
            total.index_add_(0, out_row, (features.index_select(0, in_row) @ tap).to(total_dtype))
    return total


def _weight_gradient_at_once(features: Tensor, grad_out: Tensor, neighbours: Neighbours) -> Tensor:
    """(out, taps * in): the products of output gradients (outputs, out) with the inputs of each tap, summed."""
    width = len(neighbours.table) * features.shape[1]
    step = max(1, _AT_ONCE // width)  # output rows
    padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
    total = grad_out.new_zeros(grad_out.shape[1], width)
    for grad, table in zip(grad_out.split(step), neighbours.table.split(step, 1), strict=True):
        total += grad.t() @ padded.index_select(0, table.t().flatten()).view(-1, width)
    return total


def _weight_gradient_by_tap(features: Tensor, grad_out: Tensor, neighbours: Neighbours) -> Tensor:
    """(out, taps, in): the same."""
    taps = [
        grad_out.t() @ features
        if i == neighbours.identity
        else grad_out.index_select(0, out_row).t() @ features.index_select(0, in_row)
        for i, (in_row, out_row) in enumerate(neighbours.pairs)
    ]
    return torch.stack(taps, 1)
