"""A ring of cameras around the LiDAR, and a network small enough for unit tests."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from perception.networks.sparsefusion.config import ImageConfig, LidarConfig, SparseFusionConfig
from perception.networks.sparsefusion.tensors import Calibration

VIEWS = 6


def small_config(modality: Literal["fusion", "lidar", "camera"] = "fusion", **overrides: object) -> SparseFusionConfig:
    """30 x 30 BEV cells of 3.6 m, images of 96 x 64, 12 queries of each modality."""
    return SparseFusionConfig(
        modality=modality,
        channels=32,
        heads=4,
        feedforward_channels=48,
        queries=12,
        lidar=LidarConfig(neck_channels=8, voxel_size_m=(0.45, 0.45, 0.2)),
        image=ImageConfig(neck_channels=24, canvas_px=(96, 64)),
        **overrides,
    )


def ring(batch: int, canvas_px: tuple[int, int], dtype: torch.dtype = torch.float64) -> Calibration:
    """View 0 looks along y, each next one 60 degrees further to the left; all 0.5 m ahead, 64 degrees wide."""
    width, height = canvas_px
    camera_from_forward = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)
    rotations = []
    for view in range(VIEWS):
        sin, cos = math.sin(view * math.pi / 3), math.cos(view * math.pi / 3)
        turn = torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=torch.float64)
        rotations.append(camera_from_forward @ turn)
    rotation = torch.stack(rotations).expand(batch, -1, -1, -1).to(dtype)
    translation = torch.tensor([0, 0, -0.5], dtype=dtype).expand(batch, VIEWS, 3)
    focal = 0.8 * width
    intrinsic = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=dtype)
    size = torch.tensor(canvas_px, dtype=dtype).expand(batch, VIEWS, 2)
    present = torch.ones(batch, VIEWS, dtype=torch.bool)
    return Calibration(rotation, translation, intrinsic.expand(batch, VIEWS, 3, 3), size, size, present)


def on_cuda(value: Any) -> Any:
    """A tensor, a list of them or a NamedTuple of them on the GPU."""
    if isinstance(value, Tensor):
        return value.cuda()
    return [x.cuda() for x in value] if isinstance(value, list) else type(value)(*(x.cuda() for x in value))


def head_inputs(config: SparseFusionConfig, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Arguments of the head: noise for features, points in two thirds of the cells."""
    rows, columns = config.lidar.bev_shape
    width, height = config.image.canvas_px
    filled = torch.rand(batch, rows, columns) < 2 / 3
    low = torch.where(filled, torch.rand(batch, rows, columns) * 2 - 2, 100.0).to(dtype)
    high = torch.where(filled, low + 1, -200.0).to(dtype)
    shapes = [(config.image.neck_channels, height // 4 // 2**level, width // 4 // 2**level) for level in range(4)]
    levels: list[Tensor] = [torch.randn(batch * VIEWS, *shape, dtype=dtype) for shape in shapes]
    return {
        "lidar_features": torch.randn(batch, 2 * config.lidar.neck_channels, rows, columns, dtype=dtype),
        "height_min": low,
        "height_max": high,
        "image_levels": levels,
        "sparse_depth": torch.randn(batch, VIEWS, 2, height // 4, width // 4, dtype=dtype),
        "calibration": ring(batch, config.image.canvas_px, dtype),
    }
