"""A short drive as a bag, the vehicle that it is of, and a predictor that remembers: for the tests of the live half."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import builders
import numpy as np

from perception.datasets.rosbag import RosbagWriter
from perception.evaluation.result import WeightsProvenance
from perception.types import Boxes3D, CameraImage, Imu, Needs, Odometry, PointCloud, Pose, Sample, Truth
from perception.vehicle import VehicleConfig

START_NS = 1_600_000_000_000_000_000
PERIOD_NS = 50_000_000
COUNT = 16
LOOK_AHEAD = Pose(np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]), np.array([1.5, 0, 1.2]))


def drive(stamp_ns: int) -> Pose:
    t = (stamp_ns - START_NS) * 1e-9
    return Pose.from_yaw(0.3 * t, (10 * t, t * t, 0.1))


def sample(k: int) -> Sample:
    stamp, rng = START_NS + k * PERIOD_NS, np.random.default_rng(k)
    xyz = rng.uniform(-20, 20, (200, 3)).astype(np.float32)
    lidar = PointCloud(xyz, {"intensity": xyz[:, 0] + 50}, Pose.from_yaw(0.1, (1, 0, 1.8)), stamp)
    taken = stamp - 20_000_000
    moved = drive(stamp).inverse() @ drive(taken) @ LOOK_AHEAD
    intrinsic = np.array([[30.0, 0, 16], [0, 30, 8], [0, 0, 1]])
    image = CameraImage(rng.integers(0, 255, (16, 32, 3), np.uint8), intrinsic, moved, taken)
    fast = stamp - np.arange(4, -1, -1) * 10_000_000
    return Sample(
        stamp,
        {"top": lidar},
        cameras={"front": image},
        imu=Imu(fast, rng.normal(size=(5, 3)), rng.normal(size=(5, 3))),
        odometry=Odometry(fast[::2].copy(), rng.normal(size=(3, 3)), rng.normal(size=(3, 3))),
    )


def write_drive(path: Path) -> Path:
    """A bag of COUNT sweeps, each with the truth of some boxes."""
    with RosbagWriter(path) as writer:
        writer.start(drive)
        for k in range(COUNT):
            writer.add(sample(k), Truth(builders.boxes(START_NS + k * PERIOD_NS)))
    return path


VEHICLE = VehicleConfig.model_validate(
    {
        "clock_jump_s": 0.3,
        "sensors": {
            "lidars": {"top": {"topic": "/lidar_top"}},
            "cameras": {"front": {"topic": "/cam_front/image_rect_compressed", "rectified": True}},
        },
    }
)
NEEDS = Needs(lidar=("x", "y", "z", "intensity", "time_lag"), cameras=("front",), sweeps=10, motion=True)


class Recorder:
    """Remembers the samples that it is given, but for the noise that warms it up (stamp 0)."""

    output = "boxes"
    degraded = ""
    weights = WeightsProvenance.not_needed("a recorder")

    def __init__(self, needs: Needs = NEEDS, act: Callable[[Sample], None] = lambda sample: None) -> None:
        self.needs, self.samples, self.resets, self._act = needs, [], 0, act

    def predict(self, sample: Sample) -> Boxes3D:
        if sample.stamp_ns:
            self.samples.append(sample)
            self._act(sample)
        return Boxes3D.empty(("car",), sample.stamp_ns)

    def reset(self) -> None:
        self.resets += bool(self.samples)
