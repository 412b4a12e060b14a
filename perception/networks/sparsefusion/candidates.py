"""Heatmaps, and their peaks that become queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.networks.layers.attention import full_precision
from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.pyramid import Pyramid
from perception.networks.sparsefusion.tensors import Candidates


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell of a map (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConv(nn.Sequential):
    """3 x 3 convolution, norm over channels, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, channels, 3, padding=1), ChannelNorm(channels), nn.ReLU())


class LabelEmbedding(nn.Module):
    """A learned vector for each class: a 1 x 1 convolution of the one-hot label, and stored as such."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, classes, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, label: Tensor) -> Tensor:
        """(B, Q, C) of label (B, Q)."""
        return F.embedding(label, self.weight[..., 0].T) + self.bias


def local_maxima(heat: Tensor) -> Tensor:
    """`heat` (..., H, W) where it is the greatest of its 3 x 3 cells, zero elsewhere and in the outermost cells."""
    flat = heat.flatten(0, -3)
    peak = flat == F.max_pool2d(flat, 3, stride=1, padding=1)
    inner = F.pad(torch.ones_like(flat[:, 2:, 2:], dtype=torch.bool), (1, 1, 1, 1))
    return (flat * (peak & inner)).view_as(heat)


def lidar_candidates(logits: Tensor, config: SparseFusionConfig) -> Candidates:
    """The best `config.queries` cells and classes of a LiDAR heatmap, logits (B, C, Y, X)."""
    heat = full_precision(logits.detach()).sigmoid()
    suppressed = local_maxima(heat)
    kept = [name in config.unsuppressed for name in config.classes]
    maps = [(heat if keep else suppressed)[:, label] for label, keep in enumerate(kept)]
    heat = torch.stack(maps, 1).flatten(2)  # (B, C, Y X)
    best = heat.flatten(1).topk(config.queries).indices
    location = best % heat.shape[-1]
    score = heat.gather(2, location[:, None].expand(-1, heat.shape[1], -1))
    return Candidates(best.div(heat.shape[-1], rounding_mode="floor"), location, None, score)


def image_candidates(logits: Tensor, pyramid: Pyramid, present: Tensor, config: SparseFusionConfig) -> Candidates:
    """The best `config.queries` tokens and classes of the views' heatmaps.

    Args:
        logits: (B, C, K, T).
        pyramid: gives the levels' shapes; local maxima are those of a level.
        present: (B, K); a camera that is not has candidates only where all others have too few, with score zero.
        config: the number of queries.
    """
    heat = full_precision(logits.detach()).sigmoid()
    sizes = [height * width for height, width in pyramid.shapes]
    levels = zip(heat.split(sizes, dim=-1), pyramid.shapes, strict=True)
    heat = torch.cat([local_maxima(level.unflatten(-1, shape)).flatten(-2) for level, shape in levels], -1)
    tokens, places = heat.shape[-1], heat.shape[-1] * heat.shape[-2]
    heat = heat.masked_fill(~present[:, None, :, None], -1).flatten(2)  # (B, C, K T)
    best = heat.flatten(1).topk(config.queries).indices
    place = best % places
    score = heat.gather(2, place[:, None].expand(-1, heat.shape[1], -1)).clamp(min=0)
    label, view = (best.div(places, rounding_mode="floor"), place.div(tokens, rounding_mode="floor"))
    return Candidates(label, place % tokens, view, score)


def pick(maps: Tensor, index: Tensor) -> Tensor:
    """(B, Q, C) rows `index` (B, Q) of maps (B, N, C)."""
    return maps.gather(1, index[..., None].expand(-1, -1, maps.shape[-1]))
