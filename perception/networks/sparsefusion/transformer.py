"""Transformer layers of the decoders, and the heads that read boxes off queries.

All layers are post-norm, and positions enter keys and values alike: with x the queries' features and p their positions
embedded, self-attention is Attention(x + p, x + p). Features are (B, N, C).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perception.networks.layers.attention import Attention, DeformableAttention, full_precision
from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.pyramid import Pyramid, inverse_sigmoid
from perception.networks.sparsefusion.tensors import BoxPrediction


class PositionEmbedding(nn.Sequential):
    """Positions (B, N, in) to features (B, N, C) by a small network; raw BEV cells ask for a norm of it.

    Always in full precision: cells have halves, and a bfloat16 no bits for them.
    """

    def __init__(self, in_channels: int, channels: int, norm: bool = False) -> None:
        between: list[nn.Module] = [nn.BatchNorm1d(channels)] if norm else []
        super().__init__(nn.Conv1d(in_channels, channels, 1), *between, nn.ReLU(), nn.Conv1d(channels, channels, 1))

    def forward(self, position: Tensor) -> Tensor:
        with torch.autocast(position.device.type, enabled=False):
            embedded: Tensor = super().forward(full_precision(position).transpose(1, 2))
            return embedded.transpose(1, 2)


class FeedForward(nn.Sequential):
    """Linear, ReLU, linear of each query's features (B, N, C)."""

    def __init__(self, config: SparseFusionConfig) -> None:
        channels, hidden = config.channels, config.feedforward_channels
        super().__init__(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(hidden, channels)
        )


class Projection(nn.Sequential):
    """Brings features of another space into this one: a linear map and a norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Linear(channels, channels), nn.LayerNorm(channels))


class SelfLayer(nn.Module):
    """Queries attend to each other and pass a feed-forward network.

    `key_position` is the embedding of the keys' positions, the queries' own one where None is given.
    """

    def __init__(
        self, config: SparseFusionConfig, position: PositionEmbedding, key_position: PositionEmbedding | None = None
    ) -> None:
        super().__init__()
        channels = config.channels
        self.query_position, self.key_position = position, key_position
        self.attention = Attention(channels, config.heads, config.dropout)
        self.feed_forward = FeedForward(config)
        self.norm_attention, self.norm_feed_forward = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """(B, N, C) of x (B, N, C), position (B, N, in) and mask, broadcastable to (B, N, N): who may attend whom."""
        query = x + self.query_position(position)
        if self.key_position is not None:
            memory = x + self.key_position(position)
        else:
            memory = query
            if self.training:
                # The released models embed the keys' positions once more: it moves the norm's statistics.
                with torch.no_grad():
                    self.query_position(position)
        x = self.norm_attention(x + self.dropout(self.attention(query, memory, mask)))
        return self.norm_feed_forward(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(nn.Module):
    """Queries attend to each other, then to a memory, and pass a feed-forward network."""

    def __init__(self, config: SparseFusionConfig, position_channels: int) -> None:
        super().__init__()
        channels = config.channels
        self.query_position = PositionEmbedding(position_channels, channels, norm=True)
        self.key_position = PositionEmbedding(position_channels, channels, norm=True)
        self.self_attention = Attention(channels, config.heads, config.dropout)
        self.cross_attention = Attention(channels, config.heads, config.dropout)
        self.feed_forward = FeedForward(config)
        self.norm_self, self.norm_cross = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.norm_feed_forward = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor) -> Tensor:
        """(B, N, C) of x (B, N, C) at position (B, N, in), and memory (B, M, C) at memory_position (B, M, in)."""
        embedded = self.query_position(position)
        x = self.norm_self(x + self.dropout(self.self_attention(x + embedded, x + embedded)))
        attended = self.cross_attention(x + embedded, memory + self.key_position(memory_position))
        x = self.norm_cross(x + self.dropout(attended))
        return self.norm_feed_forward(x + self.dropout(self.feed_forward(x)))


class DeformableLayer(nn.Module):
    """Queries attend to each other, then each to some points of its view, and pass a feed-forward network."""

    def __init__(self, config: SparseFusionConfig, position_channels: int) -> None:
        super().__init__()
        channels = config.channels
        self.query_position = PositionEmbedding(position_channels, channels)
        self.key_position = PositionEmbedding(2, channels)
        self.self_attention = Attention(channels, config.heads, config.dropout)
        self.cross_attention = DeformableAttention(channels, config.heads)
        self.feed_forward = FeedForward(config)
        self.norm_self, self.norm_cross = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.norm_feed_forward = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, mask: Tensor, pyramid: Pyramid, view: Tensor
    ) -> Tensor:
        """(B, N, C) of the queries.

        Args:
            x: (B, N, C).
            position: (B, N, in).
            reference: (B, N, 2) in the view, shares of the canvas.
            mask: broadcastable to (B, N, N), True where a query may attend another.
            pyramid: whose tokens' positions are embedded as the logits of their place.
            view: (B, N) of each query.
        """
        embedded = self.query_position(position)
        x = self.norm_self(x + self.dropout(self.self_attention(x + embedded, x + embedded, mask)))
        tokens = pyramid.tokens + self.key_position(inverse_sigmoid(pyramid.position)[None])
        attended = self.cross_attention(x + embedded, reference, tokens, pyramid.shapes, pyramid.valid, view)
        x = self.norm_cross(x + self.dropout(attended))
        return self.norm_feed_forward(x + self.dropout(self.feed_forward(x)))


class BoxHeads(nn.ModuleDict):
    """Boxes in the network's frame from queries; always in full precision."""

    def __init__(self, config: SparseFusionConfig) -> None:
        channels, hidden = config.channels, config.channels // 2
        sizes = {"center": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "logit": len(config.classes)}

        def head(size: int) -> nn.Module:
            first = nn.Conv1d(channels, hidden, 1, bias=False)
            return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(), nn.Conv1d(hidden, size, 1))

        super().__init__({name: head(size) for name, size in sizes.items()})

    def forward(self, x: Tensor, position: Tensor) -> BoxPrediction:
        """Boxes of x (B, Q, C); their centers are offsets from position (B, Q, 2), BEV cells."""
        with torch.autocast(x.device.type, enabled=False):
            x, position = full_precision(x).transpose(1, 2), full_precision(position).transpose(1, 2)
            boxes = BoxPrediction(**{name: head(x) for name, head in self.items()})
            return boxes._replace(center=boxes.center + position)
