"""Attention, dense and deformable.

`Attention` is multi-head attention whose keys and values come from one memory (Vaswani et al., 2017): in the detectors
here the position embedding is part of both. `DeformableAttention` is multi-scale deformable attention (Zhu et al.,
Deformable DETR, 2021): a query looks at a few points around its reference in every level of an image pyramid.

Tokens of a view: all levels of its pyramid one after the other, finest first, each row by row. A pyramid has K views;
a query looks into one of them.

The sampling runs as a fused Triton kernel on CUDA devices where Triton is installed, else (and in float64) in PyTorch;
both give the same result up to rounding (see `deformable_triton`).
"""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = tuple[tuple[int, int], ...]
"""(height, width) of every level of a pyramid."""

_TRITON = importlib.util.find_spec("triton") is not None

_HALF = (torch.float16, torch.bfloat16)


def full_precision(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it has 16 bits, else as it is. A bfloat16 knows the coordinate 180.5 as 180."""
    return tensor.float() if tensor.dtype in _HALF else tensor


class Attention(nn.Module):
    """Multi-head attention of queries to a memory that gives keys and values; parameters as nn.MultiheadAttention."""

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C) of query (B, N, C) and memory (B, M, C), positions included in both.

        Args:
            query, memory: as above.
            mask: broadcastable to (B, N, M) bool, True where a query may attend. One that may attend nowhere gets some
                finite value, never NaN.
        """
        channels = query.shape[-1]
        q = F.linear(query, self.in_proj_weight[:channels], self.in_proj_bias[:channels])
        k, v = F.linear(memory, self.in_proj_weight[channels:], self.in_proj_bias[channels:]).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, h, N | M, d)
        if mask is not None:
            mask = (mask | ~mask.any(-1, keepdim=True))[:, None]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention; parameters as in Deformable DETR's MSDeformAttn."""

    def __init__(self, channels: int, heads: int, levels: int = 4, points: int = 4) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every head starts with a direction of its own, point i at i + 1 cells along it, all with the same weight."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
        offsets = (direction[:, None, None] * steps[:, None]).expand(-1, self.levels, -1, -1)  # (h, L, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, reference: Tensor, tokens: Tensor, shapes: Shapes, valid: Tensor, view: Tensor
    ) -> Tensor:
        """(B, N, C) of queries that look at their views.

        Args:
            query: (B, N, C), position included.
            reference: (B, N, 2) x, y in the view as shares of its width and height.
            tokens: (B, K, T, C), position included.
            shapes: of the pyramid's levels; T is the sum of height x width.
            valid: (B, K, T) bool; a token that is not counts as zero.
            view: (B, N) int64, where each query looks.
        """
        value = self.value_proj(tokens).masked_fill(~valid[..., None], 0).unflatten(-1, (self.heads, -1))
        offsets = full_precision(self.sampling_offsets(query)).unflatten(-1, (self.heads, self.levels, self.points, 2))
        weights = full_precision(self.attention_weights(query)).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))
        sampled = sample_pyramid(value, shapes, full_precision(reference), offsets, weights, view)
        return self.output_proj(sampled.to(value.dtype))


def sample_pyramid(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, weights: Tensor, view: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples, zero outside of the maps.

    Args:
        value: (B, K, T, h, D) tokens of K views, h heads.
        shapes: (height, width) of the L levels.
        reference: (B, N, 2) x, y as shares of the map; 0 is the outer edge of the first cell.
        offsets: (B, N, h, L, P, 2) from the reference, x, y in cells of the level.
        weights: (B, N, h, L, P).
        view: (B, N) int64 which view each query samples.

    Returns:
        (B, N, h * D) in the type of `weights`.
    """
    if value.is_cuda and value.dtype != torch.float64 and _TRITON:
        from perception.networks.layers.deformable_triton import sample_pyramid_triton

        return sample_pyramid_triton(value, shapes, reference, offsets, weights, view)
    return sample_pyramid_torch(value, shapes, reference, offsets, weights, view)


def sample_pyramid_torch(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, weights: Tensor, view: Tensor
) -> Tensor:
    """See `sample_pyramid`. Every query samples every view, then the samples of its own view are picked."""
    views, heads = value.shape[1], value.shape[3]
    levels = value.to(weights.dtype).permute(0, 1, 3, 4, 2).flatten(0, 2).split([h * w for h, w in shapes], dim=-1)

    def in_every_view(x: Tensor) -> Tensor:  # (B, N, h, ...) -> (B K h, N, ...)
        return x.transpose(1, 2)[:, None].expand(-1, views, *[-1] * (x.ndim - 1)).flatten(0, 2)

    parts = []
    for level, (tokens, (height, width)) in enumerate(zip(levels, shapes, strict=True)):
        x = reference[:, :, None, None, 0] + offsets[:, :, :, level, :, 0] / width  # (B, N, h, P)
        y = reference[:, :, None, None, 1] + offsets[:, :, :, level, :, 1] / height
        grid = in_every_view(2 * torch.stack((x, y), -1) - 1)
        sampled = F.grid_sample(tokens.unflatten(-1, (height, width)), grid, align_corners=False)  # (B K h, D, N, P)
        parts.append((sampled * in_every_view(weights[:, :, :, level])[:, None]).sum(-1))
    total = (
        torch.stack(parts).sum(0).unflatten(0, (-1, views, heads)).permute(0, 1, 4, 2, 3).flatten(3)
    )  # (B, K, N, h D)
    return total.gather(1, view[:, None, :, None].expand(-1, -1, -1, total.shape[-1]))[:, 0]
