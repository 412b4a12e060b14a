"""Motion between samples: each reading is given once, a late one with the next sample."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from perception.backlog import Backlog
from perception.frames import FrameTree
from perception.types import Pose
from perception.vehicle import VehicleConfig


def vector(x: float = 0.0) -> Any:
    return SimpleNamespace(x=x, y=0.0, z=0.0)


def imu(stamp_ns: int) -> Any:
    header = SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=stamp_ns), frame_id="imu")
    return SimpleNamespace(header=header, angular_velocity=vector(), linear_acceleration=vector(float(stamp_ns)))


def frames() -> FrameTree:
    tree = FrameTree()
    tree.add_static("base_link", "imu", Pose.from_yaw(np.pi / 2))
    return tree


def test_a_late_reading_comes_with_the_next_sample():
    backlog, tree, vehicle = Backlog(), frames(), VehicleConfig()
    for stamp in (10, 30, 20):
        backlog.add_imu(imu(stamp))
    assert backlog.take(vehicle, tree, 25)[0].stamp_ns.tolist() == [10]  # 20 came behind one that is newer
    backlog.add_imu(imu(40))
    found, odometry, gnss = backlog.take(vehicle, tree, 40)
    assert found.stamp_ns.tolist() == [20, 30, 40] and odometry is None and gnss is None
    np.testing.assert_allclose(found.linear_acceleration[:, 1], [20, 30, 40])  # turned into ego
    assert backlog.take(vehicle, tree, 99) == (None, None, None)


def test_what_has_ever_come_is_waited_for():
    backlog = Backlog()
    assert backlog.reaches(50)
    backlog.add_imu(imu(49))
    assert not backlog.reaches(50)
    backlog.add_imu(imu(51))
    assert backlog.reaches(50)
    backlog.clear()
    assert backlog.reaches(99) and backlog.take(VehicleConfig(), frames(), 99)[0] is None


def test_without_its_transform_there_is_no_imu():
    backlog = Backlog()
    backlog.add_imu(imu(1))
    assert backlog.take(VehicleConfig(), FrameTree(), 5)[0] is None
