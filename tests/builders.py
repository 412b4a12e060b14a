"""Small samples, truths and data sets that several tests build on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from perception.datasets.nuscenes_writer import NuScenesWriter
from perception.errors import PerceptionError
from perception.evaluation.detection_results import likely_attribute
from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.synthetic.city import CityConfig
from perception.types import Boxes3D, CameraImage, PointCloud, Pose, Sample, Truth

CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer",
    "barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone",
)  # fmt: skip

EGO_FROM_LIDAR = Pose.from_yaw(-np.pi / 2, (0.94, 0.0, 1.84))
FRONT = Pose(np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]), np.array([1.7, 0.0, 1.5]))
"""ego_from_camera of a camera that looks along x."""


def camera(width: int = 160, height: int = 90, stamp_ns: int = 0, level: int = 90) -> CameraImage:
    """A grey image of a camera that looks along x, 90 degrees wide."""
    intrinsic = np.array([[width / 2, 0.0, width / 2 - 0.5], [0.0, width / 2, height / 2 - 0.5], [0.0, 0.0, 1.0]])
    return CameraImage(np.full((height, width, 3), level, np.uint8), intrinsic, FRONT, stamp_ns)


def boxes(stamp_ns: int = 0, velocity: tuple[float, float] = (0.0, 0.0), classes: tuple[str, ...] = CLASSES) -> Boxes3D:
    """One box a class, in a fan ahead of ego within every class range, with all that a truth has."""
    m = len(classes)
    angle = np.linspace(-1.0, 1.0, m)
    return Boxes3D(
        np.stack([14 * np.cos(angle), 14 * np.sin(angle), np.full(m, 0.75)], 1),
        np.tile([[2.0, 1.0, 1.5]], (m, 1)),
        angle.copy(),
        np.tile(np.asarray(velocity, np.float64), (m, 1)),
        np.ones(m),
        np.arange(m),
        classes,
        stamp_ns,
        attribute=np.array([likely_attribute(name, float(np.hypot(*velocity))) for name in classes]),
        track_id=np.array([f"track-{i}" for i in range(m)]),
        num_points=np.full(m, 5),
        num_radar_points=np.zeros(m, np.int64),
        visibility=np.full(m, 4),
    )


def cloud(stamp_ns: int = 0, points: int = 500, seed: int = 0) -> PointCloud:
    """Random points of `top`, with intensity and ring."""
    rng = np.random.default_rng(seed)
    fields = {
        "intensity": rng.integers(0, 255, points).astype(np.float32),
        "ring": rng.integers(0, 32, points).astype(np.float32),
    }
    return PointCloud(rng.uniform(-40, 40, (points, 3)).astype(np.float32), fields, EGO_FROM_LIDAR, stamp_ns)


def write_small_nuscenes(root: Path, frames: int = 3) -> Path:
    """v1.0-mini of two scenes of `mini_val`, LiDAR, one camera and boxes that stand still while ego drives at 2 m/s."""
    with NuScenesWriter(root, "v1.0-mini") as writer:
        for s, name in enumerate(("scene-0103", "scene-0916")):
            start_ns = 1_600_000_000_000_000_000 + s * 100_000_000_000

            def map_from_ego(stamp_ns: int, start_ns: int = start_ns) -> Pose:
                return Pose(np.eye(3), np.array([100.0 + 2.0 * (stamp_ns - start_ns) / 1e9, 50.0, 0.0]))

            writer.start_scene(name, map_from_ego)
            for k in range(frames):
                stamp_ns = start_ns + k * 500_000_000
                moved = np.array([2.0 * k * 0.5, 0.0, 0.0])
                standing = boxes(stamp_ns)
                found = replace(standing, center=standing.center - moved)
                sample = Sample(
                    stamp_ns, lidars={"top": cloud(stamp_ns, seed=k)}, cameras={"front": camera(stamp_ns=stamp_ns)}
                )
                writer.add_sample(sample, Truth(boxes=found, map_from_ego=map_from_ego(stamp_ns)))
    return root


class BrokenCityConfig(CityConfig):
    """A city that cannot be simulated: the process that tries raises, or dies. Here, where a new process finds it."""

    def model_copy(self, **_: object) -> CityConfig:
        if self.seed:
            os._exit(7)
        raise PerceptionError(f"no street at seed {self.seed}", "ask for another")


def tiny_sparsefusion(**keys: Any) -> SparseFusionConfig:
    """The whole network in a size that a test runs in milliseconds: 16 x 16 cells of 3.2 m, two cameras of 160 x 96."""
    lidar = {
        "range_m": (-25.6, -25.6, -5.0, 25.6, 25.6, 3.0),
        "voxel_size_m": (0.4, 0.4, 0.2),
        "encoder_channels": (4, 4, 8, 8),
        "out_channels": 8,
        "backbone_channels": (8, 8),
        "backbone_layers": 1,
        "neck_channels": 8,
    }
    image = {"backbone": "efficientnet_lite0", "canvas_px": (160, 96), "neck_channels": 8}
    size = {"channels": 16, "heads": 2, "feedforward_channels": 16, "queries": 10, "cameras": ("front", "back")}
    return SparseFusionConfig.model_validate({"lidar": lidar, "image": image, **size, **keys})
