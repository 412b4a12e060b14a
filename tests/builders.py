"""Small samples, truths and data sets that several tests build on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from perception.config import Config
from perception.datasets.nuscenes_writer import NuScenesWriter
from perception.datasets.rosbag import RosbagWriter
from perception.errors import PerceptionError
from perception.evaluation.detection_results import likely_attribute
from perception.evaluation.result import WeightsProvenance
from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.synthetic.city import CityConfig
from perception.types import Boxes3D, CameraImage, Imu, Needs, Odometry, PointCloud, Pose, Sample, Truth

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


class FingerprintConfig(Config):
    """See Fingerprint."""

    name: Literal["fingerprint"] = "fingerprint"


class Fingerprint:
    """Predicts a box for each reading, made of all its numbers: another sample gives other boxes.

    A test that wants it sets PREDICTORS["fingerprint"] = "builders:Fingerprint".
    """

    output = "boxes"
    degraded = ""
    needs = Needs(
        lidar=("x", "y", "z", "intensity", "time_lag"), radar=("rcs",), cameras=("front", "back"), sweeps=3, motion=True
    )

    def __init__(self, config: FingerprintConfig, device: object) -> None:
        self.weights = WeightsProvenance.not_needed("it has nothing to learn")

    def predict(self, sample: Sample) -> Boxes3D:
        rows = [
            _row(f"{kind}_{role}", cloud.xyz_ego(), cloud.ego_from_sensor, cloud.stamp_ns, *cloud.fields.values())
            for kind, clouds in (("lidar", sample.lidars), ("radar", sample.radars))
            for role, cloud in clouds.items()
        ]
        rows += [
            _row(f"cam_{role}", image.rgb.reshape(-1, 3), image.ego_from_camera, image.stamp_ns, image.intrinsic)
            for role, image in sample.cameras.items()
        ]
        for name, small in (("imu", sample.imu), ("odometry", sample.odometry)):
            if small is not None:
                rows.append(
                    _row(name, small.angular_velocity, sample.odom_from_ego or Pose.identity(), 0, small.stamp_ns)
                )
        names, numbers = tuple(name for name, _ in rows), np.array([row for _, row in rows]).reshape(-1, 8)
        size = np.abs(numbers[:, 3:6]) + 0.1
        count = len(rows)
        return Boxes3D(
            numbers[:, :3], size, numbers[:, 6], numbers[:, 6:8], np.linspace(0.2, 0.9, count), np.arange(count),
            names or ("nothing",), sample.stamp_ns,
        )  # fmt: skip

    def reset(self) -> None:
        """It remembers nothing."""


def _row(name: str, xyz: np.ndarray, pose: Pose, stamp_ns: int, *more: np.ndarray) -> tuple[str, list[float]]:
    first = xyz.astype(np.float64).mean(0) + pose.translation if len(xyz) else pose.translation
    spread = xyz.astype(np.float64).std(0) + pose.rotation[0] if len(xyz) else pose.rotation[0]
    rest = sum(float(np.asarray(values, np.float64).sum()) for values in more)
    return name, [*first.tolist(), *spread.tolist(), rest + len(xyz), stamp_ns % 10**9 / 1e9]


BAG_START_NS = 1_700_000_000_000_000_000
BAG_PERIOD_NS = 50_000_000


def write_small_bag(root: Path, frames: int = 6, storage: Literal["mcap", "sqlite3"] = "mcap") -> Path:
    """A bag of a turning vehicle: `top` at 20 Hz, two cameras (one in every other frame), a radar, IMU, odometry."""

    def map_from_ego(stamp_ns: int) -> Pose:
        t = (stamp_ns - BAG_START_NS) / 1e9
        return Pose.from_yaw(0.3 * t, (100.0 + 8 * t, 50.0 + t * t, 0.2))

    with RosbagWriter(root, storage) as writer:
        writer.start(map_from_ego)
        for k in range(frames):
            stamp_ns = BAG_START_NS + k * BAG_PERIOD_NS
            rng = np.random.default_rng(k)

            def mounted(taken_ns: int, mount: Pose, stamp_ns: int = stamp_ns) -> Pose:
                return map_from_ego(stamp_ns).inverse() @ map_from_ego(taken_ns) @ mount

            def image(
                lag_ns: int, mount: Pose, stamp_ns: int = stamp_ns, rng: np.random.Generator = rng
            ) -> CameraImage:
                view, taken = camera(stamp_ns=stamp_ns - lag_ns), stamp_ns - lag_ns
                rgb = rng.integers(0, 256, view.rgb.shape, np.uint8)
                return replace(view, rgb=rgb, ego_from_camera=mounted(taken, mount))

            cameras = {"front": image(15_000_000, FRONT)}
            if k % 2 == 0:
                cameras["back"] = image(5_000_000, Pose.from_yaw(np.pi) @ FRONT)
            xyz = rng.uniform(-30, 30, (40, 3)).astype(np.float32)
            rcs = rng.uniform(-5, 30, 40).astype(np.float32)
            taken = stamp_ns - 21_000_000
            radar = PointCloud(xyz, {"rcs": rcs}, mounted(taken, Pose.from_yaw(0.0, (3.4, 0.0, 0.5))), taken)
            stamps = stamp_ns - np.arange(40_000_000, -1, -10_000_000)
            turning = np.tile([[0.0, 0.0, 0.3]], (len(stamps), 1)) + rng.normal(0, 0.01, (len(stamps), 3))
            sample = Sample(
                stamp_ns,
                {"top": cloud(stamp_ns, 300, k)},
                {"front": radar},
                cameras,
                imu=Imu(stamps, turning, np.tile([[0.0, 0.0, 9.81]], (len(stamps), 1))),
                odometry=Odometry(stamps, np.tile([[8.0, 0.0, 0.0]], (len(stamps), 1)), turning),
            )
            writer.add(sample)
    return root


BAG_VEHICLE = """
sensors:
  lidars: {top: {topic: /lidar_top}}
  radars: {front: {topic: /radar_front}}
  cameras:
    front: {topic: /cam_front/image_rect_compressed, rectified: true}
    back: {topic: /cam_back/image_rect_compressed, rectified: true, tolerance_s: 0.03}
systems:
  fingerprint: {predictor: {name: fingerprint}}
"""
"""The vehicle of `write_small_bag`; its second camera is now and then missing from a sample."""
