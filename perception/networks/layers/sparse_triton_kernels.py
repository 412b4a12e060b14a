# mypy: allow-untyped-defs
"""Triton kernels of `sparse_triton`. This module needs Triton and is imported when first used."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number_sites(sites, grid, num, size_z, size_y, size_x, BLOCK: tl.constexpr):
    """Write each site's row into its cell of the grid (batch, z, y, x). In all kernels a batch of -1 is no site."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < num
    batch = tl.load(sites + row * 4, mask=valid, other=0).to(tl.int64)
    z = tl.load(sites + row * 4 + 1, mask=valid, other=0)
    y = tl.load(sites + row * 4 + 2, mask=valid, other=0)
    x = tl.load(sites + row * 4 + 3, mask=valid, other=0)
    tl.store(grid + ((batch * size_z + z) * size_y + y) * size_x + x, row, mask=valid & (batch >= 0))


@triton.jit
def find_neighbours(
    sites, grid, table, num_out, num_in,
    size_z, size_y, size_x, kernel_y, kernel_x,
    stride_z, stride_y, stride_x, pad_z, pad_y, pad_x, step_z, step_y, step_x,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """table[tap, row] = the input row that the tap reads for the output site of that row; num_in where none is."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.program_id(1)
    valid = row < num_out
    batch = tl.load(sites + row * 4, mask=valid, other=0).to(tl.int64)
    z = tl.load(sites + row * 4 + 1, mask=valid, other=0)
    y = tl.load(sites + row * 4 + 2, mask=valid, other=0)
    x = tl.load(sites + row * 4 + 3, mask=valid, other=0)
    z = z * stride_z - pad_z + tap // (kernel_y * kernel_x) * step_z
    y = y * stride_y - pad_y + tap // kernel_x % kernel_y * step_y
    x = x * stride_x - pad_x + tap % kernel_x * step_x
    inside = valid & (batch >= 0) & (z >= 0) & (z < size_z) & (y >= 0) & (y < size_y) & (x >= 0) & (x < size_x)
    found = tl.load(grid + ((batch * size_z + z) * size_y + y) * size_x + x, mask=inside, other=num_in)
    tl.store(table + tap.to(tl.int64) * num_out + row, found, mask=valid)


@triton.jit
def mark_reached(
    sites, reached, num,
    size_z, size_y, size_x, kernel_y, kernel_x,
    stride_z, stride_y, stride_x, pad_z, pad_y, pad_x, step_z, step_y, step_x,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the cells of the output grid that an input site reaches through the tap of this program."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.program_id(1)
    valid = row < num
    batch = tl.load(sites + row * 4, mask=valid, other=0).to(tl.int64)
    z = tl.load(sites + row * 4 + 1, mask=valid, other=0) + pad_z - tap // (kernel_y * kernel_x) * step_z
    y = tl.load(sites + row * 4 + 2, mask=valid, other=0) + pad_y - tap // kernel_x % kernel_y * step_y
    x = tl.load(sites + row * 4 + 3, mask=valid, other=0) + pad_x - tap % kernel_x * step_x
    on_stride = (z % stride_z == 0) & (y % stride_y == 0) & (x % stride_x == 0) & (z >= 0) & (y >= 0) & (x >= 0)
    z = z // stride_z
    y = y // stride_y
    x = x // stride_x
    inside = valid & (batch >= 0) & on_stride & (z < size_z) & (y < size_y) & (x < size_x)
    tl.store(reached + ((batch * size_z + z) * size_y + y) * size_x + x, 1, mask=inside)


@triton.jit
def gather_multiply(
    features, weight, table, out, num_in, num_out, taps,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """out (num_out, OUT) = the sum over taps of the neighbours' features (num_in, IN) by weight (OUT, taps, IN)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < num_out
    to = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    of = tl.arange(0, BLOCK_IN)
    total = tl.zeros((BLOCK, BLOCK_OUT), dtype=tl.float32)
    reads = table + row
    for tap in range(taps):
        source = tl.load(reads, mask=valid, other=num_in)
        reads += num_out
        there = (source < num_in)[:, None] & (of < IN)[None, :]
        x = tl.load(features + source.to(tl.int64)[:, None] * IN + of[None, :], mask=there, other=0.0)
        known = (of < IN)[:, None] & (to < OUT)[None, :]
        w = tl.load(weight + (to[None, :] * taps + tap) * IN + of[:, None], mask=known, other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    kept = valid[:, None] & (to < OUT)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * OUT + to[None, :], total.to(out.dtype.element_ty), mask=kept)
