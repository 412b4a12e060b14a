"""Imu, Odometry, NavSatFix and transform messages to readings, by their attributes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from perception.decode import stamp_ns
from perception.errors import DataError
from perception.types import Array, Gnss, Imu, Odometry, Pose


def decode_imu(messages: Sequence[Any], ego_from_imu: Array) -> Imu:
    """sensor_msgs/Imu in order of their stamps.

    Args:
        messages: T of them.
        ego_from_imu: (3, 3) rotation of the sensor in ego. Its lever arm is not applied: the force is that at the
            sensor's place.
    """
    return Imu(
        _stamps(messages),
        _vectors([m.angular_velocity for m in messages]) @ ego_from_imu.T,
        _vectors([m.linear_acceleration for m in messages]) @ ego_from_imu.T,
    )


def decode_odometry(messages: Sequence[Any], base: str, where: str = "Odometry") -> Odometry:
    """nav_msgs/Odometry in order of their stamps; its twist is in child_frame_id.

    Raises:
        DataError: the child frame is not the vehicle's own.
    """
    for message in messages:
        if message.child_frame_id.lstrip("/") != base:
            raise DataError(
                f"{where}: child_frame_id is {message.child_frame_id!r}, so its twist is not that of {base!r}",
                f"publish it for {base}, or set base_frame",
            )
    twists = [m.twist.twist for m in messages]
    return Odometry(_stamps(messages), _vectors([t.linear for t in twists]), _vectors([t.angular for t in twists]))


def decode_gnss(message: Any) -> Gnss | None:
    """A sensor_msgs/NavSatFix; None where it says that there is no fix."""
    numbers = np.array([message.latitude, message.longitude, message.altitude, *message.position_covariance])
    if message.status.status < 0 or not np.isfinite(numbers).all():
        return None
    latitude, longitude, altitude = numbers[:3].tolist()
    return Gnss(latitude, longitude, altitude, numbers[3:].reshape(3, 3), stamp_ns(message.header))


class StampedTransform(NamedTuple):
    """A geometry_msgs/TransformStamped: translation x y z and unit quaternion x y z w of `parent_from_child`."""

    parent: str
    child: str
    stamp_ns: int
    numbers: tuple[float, ...]

    @property
    def pose(self) -> Pose:
        return Pose.from_quaternion(self.numbers[3:], self.numbers[:3])


def decode_transform(transform: Any, where: str = "/tf") -> StampedTransform:
    """A geometry_msgs/TransformStamped.

    Raises:
        DataError: numbers that are no transform.
    """
    parent, child = transform.header.frame_id.lstrip("/"), transform.child_frame_id.lstrip("/")
    t, q = transform.transform.translation, transform.transform.rotation
    numbers = (t.x, t.y, t.z, q.x, q.y, q.z, q.w)
    if not np.isfinite(numbers).all() or abs(math.hypot(*numbers[3:]) - 1) > 0.005:  # as tf2 has it
        raise DataError(
            f"{where} has {parent!r} -> {child!r} with translation {numbers[:3]} and rotation {numbers[3:]}",
            "mend its publisher; a rotation is a unit quaternion (x, y, z, w)",
        )
    return StampedTransform(parent, child, stamp_ns(transform.header), numbers)


def _stamps(messages: Sequence[Any]) -> Array:
    return np.array([stamp_ns(m.header) for m in messages], np.int64)


def _vectors(vectors: Sequence[Any]) -> Array:
    """(T, 3) float64."""
    return np.array([(v.x, v.y, v.z) for v in vectors], np.float64).reshape(-1, 3)
