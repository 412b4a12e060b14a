"""Fusion: candidates of both modalities, now in one space, attend each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.tensors import BoxPrediction
from perception.networks.sparsefusion.transformer import BoxHeads, PositionEmbedding, Projection, SelfLayer


class Fusion(nn.Module):
    """Brings the features of both modalities into one space; query and key positions share one embedding."""

    def __init__(self, config: SparseFusionConfig) -> None:
        super().__init__()
        self.lidar_projection = Projection(config.channels)
        self.image_projection = Projection(config.channels)
        self.layer = SelfLayer(config, PositionEmbedding(2, config.channels, norm=True))
        self.heads = BoxHeads(config)

    def forward(self, lidar: Tensor, image: Tensor, position: Tensor, present: Tensor) -> BoxPrediction:
        """Boxes of all 2 Q candidates, LiDAR first.

        Args:
            lidar, image: (B, Q, C) features.
            position: (B, 2 Q, 2) BEV cells.
            present: (B, 2 Q) bool: False for candidates of a missing camera, which nothing attends.
        """
        x = torch.cat((self.lidar_projection(lidar), self.image_projection(image)), 1)
        return self.heads(self.layer(x, position, present[:, None]), position)
