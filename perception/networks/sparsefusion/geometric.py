"""Geometric transfer: the LiDAR's depth enters the image features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perception.networks.layers.folding import convolve_relu


class DepthBlock(nn.Module):
    """Residual block of two 3 x 3 convolutions; with stride 2 its shortcut is a 1 x 1 convolution."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1, stride), nn.BatchNorm2d(channels))
        self.downsample = shortcut if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = convolve_relu(self.conv1, self.bn1, x)
        return convolve_relu(self.conv2, self.bn2, out, residual=self.downsample(x))


class GeometricTransfer(nn.Module):
    """Sparse depth and image features to features of both, level after level.

    The features of a level, not its depth alone, go on to the next one.
    """

    def __init__(self, image_channels: int, channels: int, levels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.ModuleList(DepthBlock(channels, stride=1 if level == 0 else 2) for level in range(levels))
        fuse = [nn.Conv2d(channels + image_channels, channels, 3, padding=1) for _ in range(levels)]
        self.fuse = nn.ModuleList(fuse)

    def forward(self, sparse_depth: Tensor, levels: list[Tensor]) -> list[Tensor]:
        """Features of both, (B K, C, H / 2^l, W / 2^l).

        Args:
            sparse_depth: (B K, 2, H, W).
            levels: (B K, image_channels, H / 2^l, W / 2^l) each.
        """
        x, fused = self.stem(sparse_depth), []
        for block, fuse, level in zip(self.blocks, self.fuse, levels, strict=True):
            x = fuse(torch.cat((block(x), level), 1))
            fused.append(x)
        return fused
