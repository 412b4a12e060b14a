"""Configuration of SparseFusion. The defaults are the released LiDAR-camera configuration with a ResNet-50."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from perception.config import Config
from perception.types import Pose

CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer",
    "barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone",
)  # fmt: skip
"""The released models' order of classes."""

CAMERAS = ("front_left", "front", "front_right", "back_right", "back", "back_left")
"""Roles in the released models' order of views."""


class LidarConfig(Config):
    """Points to the bird's-eye-view (BEV) feature map."""

    role: str = "top"
    range_m: tuple[float, float, float, float, float, float] = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
    """Least x, y, z, then greatest, in the network's frame."""
    voxel_size_m: tuple[float, float, float] = (0.075, 0.075, 0.2)
    max_points: int = Field(10, gt=0)
    """Points kept of a voxel: the first ones."""
    max_voxels: int = Field(160_000, gt=0)
    max_voxels_training: int = Field(120_000, gt=0)
    encoder_channels: tuple[int, ...] = (16, 32, 64, 128)
    """Of each stage of the sparse encoder; every stage but the first halves the grid."""
    out_channels: int = 128
    """Of the encoder's last convolution, for each of its layers of height."""
    backbone_channels: tuple[int, ...] = (128, 256)
    backbone_layers: int = 5
    """3 x 3 convolutions of a stage of SECOND after its first."""
    neck_channels: int = 256

    @property
    def stride(self) -> int:
        """Voxels along a BEV cell."""
        return int(2 ** (len(self.encoder_channels) - 1))

    @property
    def cell_m(self) -> float:
        return self.voxel_size_m[0] * self.stride

    @property
    def grid(self) -> tuple[int, int, int]:
        """Voxels along x, y, z."""
        low, high = self.range_m[:3], self.range_m[3:]
        nx, ny, nz = (round((b - a) / s) for a, b, s in zip(low, high, self.voxel_size_m, strict=True))
        return nx, ny, nz

    @model_validator(mode="after")
    def _fits(self) -> LidarConfig:
        if min(self.voxel_size_m) <= 0:
            raise ValueError(f"voxel_size_m {self.voxel_size_m} must be greater than 0")
        low, high = self.range_m[:3], self.range_m[3:]
        for axis, a, b, size, cells in zip("xyz", low, high, self.voxel_size_m, self.grid, strict=True):
            if cells < 1 or abs(cells * size - (b - a)) > 1e-3 * size:
                raise ValueError(f"range_m {a:g} to {b:g} m along {axis} is no whole number of voxel_size_m {size:g}")
        least = self.stride * 2 ** (len(self.backbone_channels) - 1)
        if any(cells % least for cells in self.grid[:2]):
            raise ValueError(
                f"range_m and voxel_size_m give {self.grid[0]} x {self.grid[1]} voxels; {len(self.encoder_channels)} "
                f"encoder_channels and {len(self.backbone_channels)} backbone_channels need multiples of {least}"
            )
        return self

    @property
    def bev_shape(self) -> tuple[int, int]:
        """BEV cells along y (rows) and x (columns)."""
        return self.grid[1] // self.stride, self.grid[0] // self.stride


class ImageConfig(Config):
    """Images to the feature pyramid; its first level has a quarter of the canvas' resolution, each next one half."""

    backbone: Literal["resnet50", "swin_tiny", "efficientnet_lite0"] = "resnet50"
    coarse_blocks: int = Field(5, ge=1, le=5)
    """Of EfficientNet-Lite0's five blocks of stride 32, how many there are; no other backbone reads it."""
    canvas_px: tuple[int, int] = (800, 448)
    """Width and height: an image is resized to fit it, keeping its shape, and padded at the right and bottom."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """RGB, 0 to 255."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    neck_channels: int = 256

    @model_validator(mode="after")
    def _fits(self) -> ImageConfig:
        if any(size < 1 or size % 32 for size in self.canvas_px):
            raise ValueError(f"canvas_px {self.canvas_px}: the backbones' last stride needs multiples of 32")
        return self


class Mounting(Config):
    """Where the network's frame (x right, y forward, z up) is on the vehicle; by default as nuScenes' LIDAR_TOP."""

    translation_m: tuple[float, float, float] = (0.94, 0.0, 1.84)
    yaw_rad: float = -math.pi / 2

    @property
    def ego_from_network(self) -> Pose:
        return Pose.from_yaw(self.yaw_rad, self.translation_m)


class SparseFusionConfig(Config):
    """SparseFusion; see LidarConfig and ImageConfig for the two branches."""

    name: Literal["sparsefusion"] = "sparsefusion"
    weights: Path | None = None
    """A .safetensors file of this project (see `perception weights convert`, `perception train`)."""
    modality: Literal["fusion", "lidar", "camera"] = "fusion"
    """`lidar` and `camera` are the ablations: each detector alone, without any transfer."""
    classes: tuple[str, ...] = CLASSES
    cameras: tuple[str, ...] = CAMERAS
    mounting: Mounting | None = None
    """None: the network's frame is the LiDAR's own, as official evaluation has it (with modality `camera`, that of the
    default mounting). A rig whose LiDAR sits or is turned otherwise names the place where nuScenes' would be."""
    lidar: LidarConfig = LidarConfig()
    image: ImageConfig = ImageConfig()
    sweeps: int = Field(11, ge=1)
    """LiDAR sweeps of a cloud, the key sweep included."""
    channels: int = 128
    """Of queries and of both feature maps that they attend to."""
    heads: int = 8
    feedforward_channels: int = 256
    queries: int = 200
    """Candidates of each modality."""
    dropout: float = Field(0.1, ge=0, lt=1)
    class_prior: float | None = Field(None, gt=0, lt=1)
    """Training from scratch: probability of every class that heatmaps and class logits start with. None: no such start,
    as the released models."""
    raw_queries: bool = True
    """Training reads boxes off the undecoded LiDAR queries too and drops them, as in the released models' training. It
    moves the norms' statistics away from those of the decoded queries, which predictions need: from scratch, do not."""
    heatmap_weight: float = Field(0.1, gt=0)
    """Of both heatmaps' losses beside those of the boxes."""
    nms_radius_squared_m2: dict[str, float] = Field(
        default_factory=lambda: {
            "car": 0.35, "truck": 0.35, "construction_vehicle": 0.35, "bus": 0.35, "trailer": 0.35, "barrier": 0.175,
            "motorcycle": 0.1, "pedestrian": 0.1, "traffic_cone": 0.1,
        }
    )  # fmt: skip
    """Class -> squared distance of centres within which the weaker box is dropped; a class left out keeps all."""
    unsuppressed: tuple[str, ...] = ("pedestrian", "traffic_cone")
    """Classes whose LiDAR heatmap keeps all its values, not the local maxima alone."""
    center_range_m: tuple[float, float, float, float, float, float] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    """Boxes with their centre (at the bottom face) outside are dropped."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of predictions on a GPU, by autocast; what is sensitive stays float32."""
    score_threshold: float = Field(0.0, ge=0, le=1)
    """Boxes below are dropped."""

    @model_validator(mode="after")
    def _fits(self) -> SparseFusionConfig:
        if self.channels % self.heads:
            raise ValueError(f"channels {self.channels} cannot be shared by {self.heads} heads")
        return self
