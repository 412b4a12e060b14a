"""The city written in the official layouts, by the writers of `perception.datasets`.

Training and validation scenes come of seeds far apart, so that no street is in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from perception.config import Config
from perception.datasets import occ3d, openoccupancy, surroundocc
from perception.datasets.nuscenes_layout import OccupancyLayout, official_splits
from perception.datasets.nuscenes_writer import NuScenesWriter
from perception.datasets.omnihd import OmniHDWriter
from perception.datasets.omnihd_occupancy import grid as omnihd_grid
from perception.datasets.semantickitti import EGO_FROM_LIDAR, SemanticKITTIWriter
from perception.datasets.semantickitti_voxels import grid as semantickitti_grid
from perception.errors import ConfigError
from perception.synthetic.city import City, CityConfig, GridConfig
from perception.types import PointCloud, Sample, VoxelGrid

VALIDATION_SEED = 100_000
"""Validation scenes are made of seeds from here on."""

Progress = Callable[[str, int, int], None]
"""Called with (what, done, of how many)."""


class ExportConfig(Config):
    """What is written.

    Attributes:
        layout: `nuscenes` (tables, lidarseg, occupancy), `semantickitti`, `omnihd`, or `rosbag` (MCAP).
        train, val: scenes of each split.
        key_frames: of a scene, 2 Hz (10 Hz in SemanticKITTI).
        seed: of the first training scene.
        image_size: (width, height) of the cameras; SemanticKITTI's is its rig's own.
        sweeps: images between key frames as well (12 Hz); a bag always has them. LiDAR and radar always are whole.
        occupancy: layouts of nuScenes occupancy written beside the tables.
        device: where the sensors are simulated.
    """

    layout: Literal["nuscenes", "semantickitti", "omnihd", "rosbag"] = "nuscenes"
    train: int = Field(1, ge=0)
    val: int = Field(1, ge=0)
    key_frames: int = Field(10, ge=1, le=200)
    seed: int = Field(0, ge=0, lt=VALIDATION_SEED)
    image_size: tuple[int, int] = (800, 450)
    sweeps: bool = False
    occupancy: tuple[OccupancyLayout, ...] = ("occ3d",)
    device: str = "cpu"
