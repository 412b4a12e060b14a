"""Facts of the OmniHD-Scenes layout that its reader, index and writer share; `omnihd.py` tells where they are from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from perception.types import Array

CLASSES = ("car", "pedestrian", "rider", "large_vehicle")
"""The classes of the detection benchmark, in its order."""

CLASS_OF_CATEGORY = {
    "car": "car",
    "suv": "car",
    "van": "car",
    "tricyclist": "car",
    "handcart": "car",
    "pedestrian": "pedestrian",
    "rider": "rider",
    "truck": "large_vehicle",
    "light_truck": "large_vehicle",
    "bus": "large_vehicle",
    "engineering_vehicle": "large_vehicle",
    "trailer": "large_vehicle",
}
"""The annotators' category -> class. The first category of a class is the one that is written for it."""


class Sensor(NamedTuple):
    """One of the 13 sensors of a synchronised frame: its role, and the two keys of its file in sample_data."""

    role: str
    kind: str
    key: str


LIDAR = Sensor("top", "lidar", "lidar_top_compensation")
CAMERAS = tuple(
    Sensor(role, "cameras", f"camera_{name}")
    for role, name in (
        ("front", "front"),
        ("front_left", "left_front"),
        ("front_right", "right_front"),
        ("back", "back"),
        ("back_left", "left_back"),
        ("back_right", "right_back"),
    )
)
RADARS = tuple(Sensor(s.role, "radars", s.key.replace("camera", "radar")) for s in CAMERAS)
SENSORS = (LIDAR, *CAMERAS, *RADARS)
"""The order of the index' columns."""

DOUBLED_CAMERAS = ("front", "back")
"""Stored, with their intrinsic, at twice the resolution of the others."""

LIDAR_COLUMNS = 6
RADAR_FIELDS = ("radial_velocity", "power", "motion_state", "snr", "valid")
"""The columns of a radar file after x, y, z."""

TABLES = ("sample", "sample_data", "annotations", "ego_pose", "imu_data", "sensor_calibration", "meta", "scene_split")
IMU_TABLES = ("imu_data", "imu")
"""The kit opens imu_data.json, the manual lists imu.json: both are found, the first is written."""

SOURCE = "OmniHD-Scenes"

STANDARD_GRAVITY = 9.80665

# The IMU's axes are x right, y forward, z up.
_EGO_FROM_IMU = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


class Motion(NamedTuple):
    """Ego's motion at T stamps, along ego's axes: m/s, rad/s and m/s^2 (specific force), each (T, 3) float64."""

    linear_velocity: Array
    angular_velocity: Array
    linear_acceleration: Array


def motion_of_row(gyro_xyz: Array, acc_xyz: Array, velocity_ego: Array) -> Motion:
    """What imu_data holds (deg/s and g along the IMU's axes, m/s along ego's), each (T, 3) -> SI units along ego's."""
    return Motion(velocity_ego, np.deg2rad(gyro_xyz) @ _EGO_FROM_IMU.T, STANDARD_GRAVITY * acc_xyz @ _EGO_FROM_IMU.T)


def row_of_motion(motion: Motion) -> dict[str, Array]:
    """The inverse of `motion_of_row`, by the keys of imu_data."""
    return {
        "gyro_xyz": np.rad2deg(motion.angular_velocity) @ _EGO_FROM_IMU,
        "acc_xyz": motion.linear_acceleration @ _EGO_FROM_IMU / STANDARD_GRAVITY,
        "velocity_ego": motion.linear_velocity,
    }


def halved_intrinsic(intrinsic: Array) -> Array:
    """The intrinsic (3, 3) after 2 x 2 pixels became one: the centre of the first lies at (0.5, 0.5) before."""
    halved = intrinsic.copy()
    halved[:2] /= 2
    halved[:2, 2] -= 0.25
    return halved


def doubled_intrinsic(intrinsic: Array) -> Array:
    """The inverse of `halved_intrinsic`."""
    doubled = intrinsic.copy()
    doubled[:2, 2] += 0.25
    doubled[:2] *= 2
    return doubled
