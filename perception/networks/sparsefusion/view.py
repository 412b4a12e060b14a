"""View transformation: camera candidates enter LiDAR space."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from perception.networks.layers.attention import full_precision
from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.decoders import of_view
from perception.networks.sparsefusion.pyramid import inverse_3x3, inverse_sigmoid
from perception.networks.sparsefusion.tensors import BoxPrediction, Calibration, ImagePrediction
from perception.networks.sparsefusion.transformer import BoxHeads, PositionEmbedding, Projection, SelfLayer


class MonocularBox(NamedTuple):
    """The image decoder's boxes in the network's frame, without gradients.

    Attributes:
        center: (B, Q, 2) BEV cells.
        height: (B, Q, 1) z of the geometric centre, m.
        rot: (B, Q, 2) sin, cos of theta.
        vel: (B, Q, 2) m/s.
    """

    center: Tensor
    height: Tensor
    rot: Tensor
    vel: Tensor


def monocular_box(image: ImagePrediction, calibration: Calibration, config: SparseFusionConfig) -> MonocularBox:
    """Image boxes by their cameras' extrinsics; theta = -yaw - pi/2 makes both components of the heading negative."""
    lidar_from_camera = inverse_3x3(of_view(calibration.rotation, image.view))  # (B, Q, 3, 3)
    translation = of_view(calibration.translation, image.view)

    def rotated(vector: Tensor) -> Tensor:
        return (lidar_from_camera @ vector[..., None])[..., 0]

    (sin, cos), (vx, vz) = image.rot.detach().unbind(1), image.vel.detach().unbind(1)
    point = rotated(image.center_camera.detach().transpose(1, 2) - translation)
    heading = rotated(torch.stack((cos, torch.zeros_like(cos), -sin), -1))
    velocity = rotated(torch.stack((vx, torch.zeros_like(vx), vz), -1))
    x = (point[..., 0] - config.lidar.range_m[0]) / config.lidar.cell_m
    y = (point[..., 1] - config.lidar.range_m[1]) / config.lidar.cell_m
    return MonocularBox(torch.stack((x, y), -1), point[..., 2:], -heading[..., :2], velocity[..., :2])


def camera_vector(calibration: Calibration, view: Tensor) -> Tensor:
    """(B, Q, 16) of each query's camera: rotation row by row, translation, fx, fy, cx, cy."""
    k = of_view(calibration.intrinsic, view)
    lens = torch.stack((k[..., 0, 0], k[..., 1, 1], k[..., 0, 2], k[..., 1, 2]), -1)
    return torch.cat(
        (of_view(calibration.rotation, view).flatten(-2), of_view(calibration.translation, view), lens), -1
    )


def box_vector(box: MonocularBox, logit_center: Tensor, config: SparseFusionConfig) -> Tensor:
    """(B, Q, 9) position of camera candidates in LiDAR space.

    Center and height as logits of their share of the range that detections are kept in, sin and cos as logits too,
    velocity as it is, and the logits (B, Q, 2) of the center in the image.
    """
    low, high = config.center_range_m[:3], config.center_range_m[3:]
    x = box.center[..., :1] * config.lidar.cell_m + config.lidar.range_m[0]
    y = box.center[..., 1:] * config.lidar.cell_m + config.lidar.range_m[1]
    shares = [(c - a) / (b - a) for c, a, b in zip((x, y, box.height), low, high, strict=True)]
    return torch.cat((inverse_sigmoid(torch.cat((*shares, (box.rot + 1) / 2), -1)), box.vel, logit_center), -1)


class CameraGate(nn.Module):
    """Scales a candidate's channels by what its camera is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.mlp = nn.Sequential(
            nn.Conv1d(16, channels, 1), nn.ReLU(), nn.Conv1d(channels, channels, 1), nn.ReLU(),
            nn.Conv1d(channels, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor, camera: Tensor) -> Tensor:
        """(B, Q, C) of x (B, Q, C) and camera (B, Q, 16); intrinsics are hundreds of pixels: full precision."""
        with torch.autocast(x.device.type, enabled=False):
            gate: Tensor = self.mlp(self.norm(full_precision(camera).transpose(1, 2))).sigmoid()
        return x * gate.transpose(1, 2)


class ViewTransformation(nn.Module):
    """Gates camera candidates by their camera, and lets those of all views attend each other in LiDAR space."""

    def __init__(self, config: SparseFusionConfig) -> None:
        super().__init__()
        channels = config.channels
        self.config = config
        self.gate = CameraGate(channels)
        self.projection = Projection(channels)
        self.layer = SelfLayer(config, PositionEmbedding(9, channels), PositionEmbedding(9, channels))
        self.heads = BoxHeads(config)

    def forward(
        self, x: Tensor, image: ImagePrediction, logit_center: Tensor, calibration: Calibration
    ) -> tuple[Tensor, BoxPrediction]:
        """Features (B, Q, C) and boxes of camera candidates x (B, Q, C), whose logits of the center are (B, Q, 2)."""
        with torch.autocast(x.device.type, enabled=False):  # half products would move boxes by decimetres
            box = monocular_box(image, calibration, self.config)
        x = self.projection(self.gate(x, camera_vector(calibration, image.view)))
        mask = of_view(calibration.present, image.view)[:, None]
        x = self.layer(x, box_vector(box, logit_center.detach(), self.config), mask)
        return x, self.heads(x, box.center)
