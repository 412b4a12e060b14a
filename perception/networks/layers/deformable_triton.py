"""`sample_pyramid` of multi-scale deformable attention as one Triton kernel a level, forward and backward.

PyTorch's form samples each (view, head) as an image of its own and keeps all samples before it sums them. Here a
program takes some (query, head) pairs, reads the four cells around every point and sums in registers, in float32
whatever the values are in. In the backward pass the values' gradient is summed by atomic additions, so its last bits
may change from run to run, as those of grid_sample do.

Rows are (batch, query, head) counted through; all tensors are contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perception.networks.layers.attention import Shapes

_ROWS = 32  # of a program


def sample_pyramid_triton(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, weights: Tensor, view: Tensor
) -> Tensor:
    """See `attention.sample_pyramid`; float32 result, float64 is not computed in."""
    sampled: Tensor = _SamplePyramid.apply(value, reference, offsets, weights, view, shapes)
    return sampled


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    value, reference, offsets, weights, view, out, rows, queries, views, tokens, level, start, height, width,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    channel = tl.arange(0, D2)
    query, head = row // HEADS, row % HEADS
    first = ((query // queries) * views + tl.load(view + query, mask=inside, other=0)).to(tl.int64) * tokens + start
    x0 = tl.load(reference + 2 * query, mask=inside, other=0) * width - 0.5
    y0 = tl.load(reference + 2 * query + 1, mask=inside, other=0) * height - 0.5
    at_out = row[:, None] * D + channel[None, :]
    mask_out = inside[:, None] & (channel < D)[None, :]
    total = tl.load(out + at_out, mask=mask_out, other=0)
    for point in tl.static_range(POINTS):
        at = (row * LEVELS + level) * POINTS + point
        x = x0 + tl.load(offsets + 2 * at, mask=inside, other=0)
        y = y0 + tl.load(offsets + 2 * at + 1, mask=inside, other=0)
        weight = tl.load(weights + at, mask=inside, other=0)
        left, top = tl.floor(x), tl.floor(y)
        for corner in tl.static_range(4):
            column, line = left + corner % 2, top + corner // 2
            share = (1 - tl.abs(x - column)) * (1 - tl.abs(y - line))
            seen = inside & (column >= 0) & (column < width) & (line >= 0) & (line < height)
            cell = first + (line * width + column).to(tl.int64)
            here = value + (cell * HEADS + head)[:, None] * D + channel[None, :]
            found = tl.load(here, mask=seen[:, None] & mask_out, other=0).to(tl.float32)
            total += found * (weight * share)[:, None]
    tl.store(out + at_out, total, mask=mask_out)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    value, reference, offsets, weights, view, grad_out, grad_value, grad_offsets, grad_weights,
    rows, queries, views, tokens, level, start, height, width,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    channel = tl.arange(0, D2)
    query, head = row // HEADS, row % HEADS
    first = ((query // queries) * views + tl.load(view + query, mask=inside, other=0)).to(tl.int64) * tokens + start
    x0 = tl.load(reference + 2 * query, mask=inside, other=0) * width - 0.5
    y0 = tl.load(reference + 2 * query + 1, mask=inside, other=0) * height - 0.5
    mask_out = inside[:, None] & (channel < D)[None, :]
    gradient = tl.load(grad_out + row[:, None] * D + channel[None, :], mask=mask_out, other=0).to(tl.float32)
    for point in tl.static_range(POINTS):
        at = (row * LEVELS + level) * POINTS + point
        x = x0 + tl.load(offsets + 2 * at, mask=inside, other=0)
        y = y0 + tl.load(offsets + 2 * at + 1, mask=inside, other=0)
        weight = tl.load(weights + at, mask=inside, other=0)
        left, top = tl.floor(x), tl.floor(y)
        by_weight = tl.zeros((ROWS,), tl.float32)
        by_x = tl.zeros((ROWS,), tl.float32)
        by_y = tl.zeros((ROWS,), tl.float32)
        for corner in tl.static_range(4):
            column, line = left + corner % 2, top + corner // 2
            across, along = 1 - tl.abs(x - column), 1 - tl.abs(y - line)
            seen = inside & (column >= 0) & (column < width) & (line >= 0) & (line < height)
            cell = first + (line * width + column).to(tl.int64)
            here = (cell * HEADS + head)[:, None] * D + channel[None, :]
            found = tl.load(value + here, mask=seen[:, None] & mask_out, other=0).to(tl.float32)
            product = tl.sum(gradient * found, axis=1)
            by_weight += product * across * along
            by_x += product * along * (2 * (corner % 2) - 1)
            by_y += product * across * (2 * (corner // 2) - 1)
            share = gradient * (weight * across * along)[:, None]
            tl.atomic_add(grad_value + here, share, mask=seen[:, None] & mask_out)
        tl.store(grad_weights + at, by_weight, mask=inside)
        tl.store(grad_offsets + 2 * at, by_x * weight, mask=inside)
        tl.store(grad_offsets + 2 * at + 1, by_y * weight, mask=inside)


class _SamplePyramid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, reference: Tensor, offsets: Tensor, weights: Tensor, view: Tensor, shapes: Shapes
    ) -> Tensor:
        value, view = value.contiguous(), view.contiguous()
        reference, offsets, weights = (x.float().contiguous() for x in (reference, offsets, weights))
        ctx.save_for_backward(value, reference, offsets, weights, view)
        ctx.shapes = shapes
        batch, queries, heads = weights.shape[:3]
        out = weights.new_zeros(batch, queries, heads * value.shape[-1])
        _each_level(_forward, (value, reference, offsets, weights, view, out), shapes)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value, reference, offsets, weights, view = ctx.saved_tensors
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        grad_offsets, grad_weights = torch.zeros_like(offsets), torch.zeros_like(weights)
        tensors = (value, reference, offsets, weights, view, grads[0].contiguous())
        _each_level(_backward, (*tensors, grad_value, grad_offsets, grad_weights), ctx.shapes)
        grad_reference = None
        if ctx.needs_input_grad[1]:
            by_level = grad_offsets.sum((2, 4)).unbind(2)  # (B, N, 2) each
            x = torch.stack([grad[..., 0] * width for grad, (_, width) in zip(by_level, ctx.shapes, strict=True)])
            y = torch.stack([grad[..., 1] * height for grad, (height, _) in zip(by_level, ctx.shapes, strict=True)])
            grad_reference = torch.stack((x.sum(0), y.sum(0)), -1)
        return grad_value.to(value.dtype), grad_reference, grad_offsets, grad_weights, None, None


def _each_level(kernel: Any, tensors: tuple[Tensor, ...], shapes: Shapes) -> None:
    value, weights = tensors[0], tensors[3]
    _, views, tokens, heads, size = value.shape
    batch, queries, _, levels, points = weights.shape
    rows, start = batch * queries * heads, 0
    for level, (height, width) in enumerate(shapes):
        kernel[(triton.cdiv(rows, _ROWS),)](
            *tensors, rows, queries, views, tokens, level, start, height, width,
            HEADS=heads, LEVELS=levels, POINTS=points, D=size, D2=triton.next_power_of_2(size), ROWS=_ROWS,
        )  # fmt: skip
        start += height * width
