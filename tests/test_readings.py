from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from perception.errors import DataError
from perception.readings import decode_gnss, decode_imu, decode_odometry

STAMPS = (1_700_000_000_123_456_789, 1_700_000_000_133_456_789)


def header(stamp_ns: int, frame: str = "imu_link") -> SimpleNamespace:
    time = SimpleNamespace(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)
    return SimpleNamespace(stamp=time, frame_id=frame)


def vector(x: float, y: float, z: float) -> SimpleNamespace:
    return SimpleNamespace(x=x, y=y, z=z)


def test_imu_is_turned_into_ego_and_keeps_exact_stamps():
    messages = [
        SimpleNamespace(header=header(s), angular_velocity=vector(0.1, 0.2, i), linear_acceleration=vector(9.81, 0, 0))
        for i, s in enumerate(STAMPS)
    ]
    # The sensor lies on its side: its x axis points up, its z axis backwards.
    ego_from_imu = np.array([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])
    imu = decode_imu(messages, ego_from_imu)
    assert imu.stamp_ns.tolist() == list(STAMPS)
    np.testing.assert_allclose(imu.linear_acceleration, [[0, 0, 9.81]] * 2)
    np.testing.assert_allclose(imu.angular_velocity, [[0, 0.2, 0.1], [-1, 0.2, 0.1]])
    assert decode_imu([], ego_from_imu).angular_velocity.shape == (0, 3)


def odometry(child: str) -> SimpleNamespace:
    twist = SimpleNamespace(twist=SimpleNamespace(linear=vector(1, 2, 3), angular=vector(4, 5, 6)))
    return SimpleNamespace(header=header(STAMPS[0], "odom"), child_frame_id=child, twist=twist)


def test_odometry_is_the_vehicles_own():
    got = decode_odometry([odometry("base_link"), odometry("/base_link")], "base_link")
    np.testing.assert_array_equal(got.linear_velocity, [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(got.angular_velocity, [[4, 5, 6]] * 2)
    with pytest.raises(DataError, match=r"/odom: child_frame_id is 'wheel', so its twist is not that of 'base_link'"):
        decode_odometry([odometry("wheel")], "base_link", "/odom")


def fix(status: int = 0, altitude: float = 12.0) -> SimpleNamespace:
    return SimpleNamespace(
        header=header(STAMPS[1], "gps"),
        status=SimpleNamespace(status=status),
        latitude=1.25,
        longitude=103.5,
        altitude=altitude,
        position_covariance=np.arange(9.0),
    )


def test_a_fix_and_none():
    got = decode_gnss(fix())
    assert got is not None
    assert (got.latitude_deg, got.longitude_deg, got.altitude_m, got.stamp_ns) == (1.25, 103.5, 12.0, STAMPS[1])
    np.testing.assert_array_equal(got.covariance, np.arange(9.0).reshape(3, 3))
    assert decode_gnss(fix(status=-1)) is None
    assert decode_gnss(fix(altitude=np.nan)) is None
