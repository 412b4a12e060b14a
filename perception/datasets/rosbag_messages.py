"""Samples' parts as ROS 2 messages (the classes of `rosbags`), for the bag writer. Stamps are split exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from perception.datasets.rosbag_file import (
    CAMERA_INFO,
    COMPRESSED_IMAGE,
    GNSS,
    IMU,
    ODOMETRY,
    POINT_CLOUD,
    POSE,
    TRANSFORMS,
    typestore,
)
from perception.types import Array, CameraImage, Gnss, PointCloud, Pose

_FLOAT32 = 7  # sensor_msgs/PointField.FLOAT32
_ACCUMULATED = ("time_lag", "sweep")  # of a single sweep they say nothing; a reader adds them again
_UNKNOWN = np.zeros(36)


def point_cloud(cloud: PointCloud, frame: str) -> Any:
    """PointCloud2 of x, y, z and all fields, each float32 as foxglove's nuscenes2mcap writes them."""
    columns = {axis: cloud.xyz[:, i] for i, axis in enumerate("xyz")}
    columns |= {name: values for name, values in cloud.fields.items() if name not in _ACCUMULATED}
    points = np.stack(list(columns.values()), 1).astype("<f4")  # (N, C)
    step = 4 * len(columns)
    fields = [_new("sensor_msgs/msg/PointField", name, 4 * i, _FLOAT32, 1) for i, name in enumerate(columns)]
    data = points.reshape(-1).view(np.uint8)
    return _new(POINT_CLOUD, header(cloud.stamp_ns, frame), 1, len(cloud), fields, False, step, len(data), data, True)


def compressed_image(image: CameraImage, frame: str, quality: int) -> Any:
    """CompressedImage in JPEG."""
    bgr = cv2.cvtColor(image.rgb, cv2.COLOR_RGB2BGR)
    jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return _new(COMPRESSED_IMAGE, header(image.stamp_ns, frame), "jpeg", jpeg.reshape(-1))


def camera_info(image: CameraImage, frame: str) -> Any:
    """CameraInfo of a rectified image: no distortion, P like K."""
    height, width = image.rgb.shape[:2]
    p = np.hstack([image.intrinsic, np.zeros((3, 1))]).reshape(-1)
    region = _new("sensor_msgs/msg/RegionOfInterest", 0, 0, 0, 0, False)
    k, r = image.intrinsic.reshape(-1), np.eye(3).reshape(-1)
    return _new(
        CAMERA_INFO, header(image.stamp_ns, frame), height, width, "plumb_bob", np.zeros(5), k, r, p, 0, 0, region
    )


def transforms(edges: Sequence[tuple[str, str, int, Pose]]) -> Any:
    """TFMessage of (parent, child, stamp_ns, parent_from_child)."""
    stamped = [
        _new(
            "geometry_msgs/msg/TransformStamped",
            header(stamp_ns, parent),
            child,
            _new("geometry_msgs/msg/Transform", _vector(pose.translation), _quaternion(pose)),
        )
        for parent, child, stamp_ns, pose in edges
    ]
    return _new(TRANSFORMS, stamped)


def pose_stamped(stamp_ns: int, frame: str, pose: Pose) -> Any:
    """PoseStamped."""
    return _new(POSE, header(stamp_ns, frame), _pose(pose))


def odometry(
    stamp_ns: int, odom: str, base: str, odom_from_base: Pose, linear_velocity: Array, angular_velocity: Array
) -> Any:
    """Odometry; the velocities (3,) are along the base's axes."""
    twist = _new("geometry_msgs/msg/Twist", _vector(linear_velocity), _vector(angular_velocity))
    return _new(
        ODOMETRY,
        header(stamp_ns, odom),
        base,
        _new("geometry_msgs/msg/PoseWithCovariance", _pose(odom_from_base), _UNKNOWN),
        _new("geometry_msgs/msg/TwistWithCovariance", twist, _UNKNOWN),
    )


def imu(stamp_ns: int, frame: str, angular_velocity: Array, linear_acceleration: Array) -> Any:
    """Imu without orientation, which a first covariance of -1 says."""
    no_orientation = np.array([-1.0, *[0.0] * 8])
    return _new(
        IMU,
        header(stamp_ns, frame),
        _new("geometry_msgs/msg/Quaternion", 0.0, 0.0, 0.0, 1.0),
        no_orientation,
        _vector(angular_velocity),
        np.zeros(9),
        _vector(linear_acceleration),
        np.zeros(9),
    )


def nav_sat_fix(gnss: Gnss, frame: str) -> Any:
    """NavSatFix of GPS, its covariance known."""
    status = _new("sensor_msgs/msg/NavSatStatus", 0, 1)
    covariance = gnss.covariance.astype(np.float64).reshape(-1)
    position = (float(gnss.latitude_deg), float(gnss.longitude_deg), float(gnss.altitude_m))
    return _new(GNSS, header(gnss.stamp_ns, frame), status, *position, covariance, 3)


def header(stamp_ns: int, frame: str) -> Any:
    """std_msgs/Header."""
    time = _new("builtin_interfaces/msg/Time", *divmod(stamp_ns, 1_000_000_000))
    return _new("std_msgs/msg/Header", time, frame)


def _new(message_type: str, *values: Any) -> Any:
    """A message of its fields in the order of the definition."""
    return typestore().types[message_type](*values)


def _vector(xyz: Array) -> Any:
    return _new("geometry_msgs/msg/Vector3", *(float(v) for v in xyz))


def _quaternion(pose: Pose) -> Any:
    return _new("geometry_msgs/msg/Quaternion", *pose.quaternion.tolist())


def _pose(pose: Pose) -> Any:
    return _new(
        "geometry_msgs/msg/Pose",
        _new("geometry_msgs/msg/Point", *pose.translation.tolist()),
        _quaternion(pose),
    )
