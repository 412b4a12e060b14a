"""Samples written in the layout of OmniHD-Scenes; the layout itself is told in `omnihd.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from perception.datasets import omnihd_occupancy
from perception.datasets.omnihd_layout import (
    CAMERAS,
    CLASS_OF_CATEGORY,
    CLASSES,
    DOUBLED_CAMERAS,
    IMU_TABLES,
    LIDAR,
    LIDAR_COLUMNS,
    RADAR_FIELDS,
    RADARS,
    STANDARD_GRAVITY,
    TABLES,
    Motion,
    Sensor,
    doubled_intrinsic,
    row_of_motion,
)
from perception.datasets.sensor_files import check_single_sweep, write_floats, write_image
from perception.errors import DataError
from perception.types import Array, Boxes3D, CameraImage, PointCloud, Pose, Sample, Truth

_STEP_NS = 1_000_000
"""Half the interval over which motion is a difference of poses."""


@dataclass(eq=False)
class _Clip:
    """What is remembered of a clip while it is written."""

    name: str
    map_from_ego: Callable[[int], Pose]
    frames: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    calib: dict[str, dict[str, Any]] = field(default_factory=dict)
    stamps_ns: set[int] = field(default_factory=set)
    angular_velocity: dict[int, Array] = field(default_factory=dict)
    linear_acceleration: dict[int, Array] = field(default_factory=dict)
    linear_velocity: dict[int, Array] = field(default_factory=dict)


class OmniHDWriter:
    """Writes samples in OmniHD-Scenes' layout, for `OmniHD` to read. The tables are written at the end.

    Images are rectified already and are written with zero distortion. `imu_data` has a row for every sensor's stamp:
    the readings of the samples, and where there are none the motion that `map_from_ego` tells. Not kept, since the
    layout has no place for them: velocities of boxes (what is read follows from the tracks), scores and attributes,
    point fields beyond the layout's, and `odom_from_ego` (what is read starts with the clip). Where an `Imu` and an
    `Odometry` give an angular velocity for one stamp, the former's is kept.

        with OmniHDWriter(root) as writer:
            writer.start_clip(name, map_from_ego, split="train")
            writer.add_sweep(sample)           # a synchronised frame that is no key frame
            writer.add_sample(sample, truth)   # a key frame

    Raises:
        DataError: the version's folder is there already.
    """

    def __init__(self, root: Path, version: str = "v1.0-trainval") -> None:
        self._root, self._tables = root, root / version
        if self._tables.exists():
            raise DataError(f"{self._tables}: is there already", "write to an empty folder")
        self._clips: list[_Clip] = []
        self._splits: dict[str, list[str]] = {}
        self._annotations: list[dict[str, Any]] = []
        self._tokens: set[str] = set()

    def __enter__(self) -> OmniHDWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write_tables()

    def start_clip(self, name: str, map_from_ego: Callable[[int], Pose], split: str = "train") -> None:
        """The following frames are of one drive; `map_from_ego(stamp_ns)` is its true pose, at any stamp."""
        if name in (clip.name for clip in self._clips) or "/" in name or not name:
            raise ValueError(f"OmniHDWriter: {name!r} is no new name of a folder")
        self._clips.append(_Clip(name, map_from_ego))
        self._splits.setdefault(split, []).append(name)

    def add_sweep(self, sample: Sample) -> None:
        """Write a frame that is no key frame: earlier sweeps for the key frames after it. Raises as `add_sample`."""
        self._add_frame(sample, is_key=False)

    def add_sample(self, sample: Sample, truth: Truth | None = None) -> None:
        """Write a key frame: LiDAR `top`, the cameras and radars that there are, annotations, occupancy.

        Raises:
            ValueError: no clip was started, the LiDAR is missing or not at the sample's stamp, stamps are not in order
                or not whole microseconds or of an earlier clip, a cloud is accumulated or lacks the layout's fields, a
                calibration changes within the clip, or a class has no place in the layout.
        """
        boxes = truth.boxes if truth is not None else None
        annotations = None if boxes is None else _annotations(boxes, _token(sample.stamp_ns))
        token = self._add_frame(sample, is_key=True)
        clip = self._clips[-1]
        if annotations is not None:
            self._annotations.append({"token": token, "scene_token": clip.name, "annotations": annotations})
        if truth is not None and truth.occupancy is not None:
            lidar_file = clip.frames[-1][LIDAR.kind][LIDAR.key]
            omnihd_occupancy.write(omnihd_occupancy.file_path(self._root, lidar_file), truth.occupancy)

    def _add_frame(self, sample: Sample, is_key: bool) -> str:
        if not self._clips:
            raise ValueError("OmniHDWriter: start_clip comes before add_sample")
        clip, token = self._clips[-1], _token(sample.stamp_ns)
        lidar = sample.lidars.get(LIDAR.role)
        if lidar is None or lidar.stamp_ns != sample.stamp_ns:
            at = "is missing" if lidar is None else f"is at {lidar.stamp_ns} ns"
            raise ValueError(f"OmniHDWriter: LiDAR 'top' {at}; it gives the frame its stamp, {sample.stamp_ns} ns")
        if token in self._tokens or (clip.frames and int(token) <= int(clip.frames[-1]["token"])):
            raise ValueError(
                f"OmniHDWriter: stamp {sample.stamp_ns} ns is not later than the last of clip {clip.name}, or is of an "
                "earlier clip: a stamp names a frame among all clips"
            )
        for kind, clouds in (("LiDAR", sample.lidars), ("radar", sample.radars)):
            for role, cloud in clouds.items():
                check_single_sweep(cloud, f"OmniHDWriter: {kind} {role}")
        frame: dict[str, Any] = {"token": token, "prev": clip.frames[-1]["token"] if clip.frames else "", "next": ""}
        frame |= {"timestamp": token, "is_key_frame": is_key, "lidar": {}, "cameras": {}, "radars": {}, "ego_pose": {}}
        self._write_lidar(clip, frame, lidar)
        for sensor in CAMERAS:
            if sensor.role in sample.cameras:
                self._write_camera(clip, frame, sensor, sample, sample.cameras[sensor.role])
        for sensor in RADARS:
            if sensor.role in sample.radars:
                self._write_radar(clip, frame, sensor, sample, sample.radars[sensor.role])
        _remember_motion(clip, sample)
        if clip.frames:
            clip.frames[-1]["next"] = token
        clip.frames.append(frame)
        if is_key:
            clip.keys.append(token)
        self._tokens.add(token)
        return token

    def _path(self, clip: _Clip, frame: dict[str, Any], sensor: Sensor, stamp_ns: int, suffix: str) -> Path:
        """Where a sensor's file goes; enters it and its pose in the frame's row."""
        token = _token(stamp_ns)
        file = f"{clip.name}/{sensor.kind}/{sensor.key}/{token}{suffix}"
        frame[sensor.kind][sensor.key] = file
        frame["ego_pose"][sensor.key] = token
        clip.stamps_ns.add(stamp_ns)
        return self._root / file

    def _write_lidar(self, clip: _Clip, frame: dict[str, Any], cloud: PointCloud) -> None:
        columns = [cloud.xyz_ego(), cloud.field("intensity"), np.zeros((len(cloud), LIDAR_COLUMNS - 4))]
        write_floats(self._path(clip, frame, LIDAR, cloud.stamp_ns, ".bin"), columns)

    def _write_radar(
        self, clip: _Clip, frame: dict[str, Any], sensor: Sensor, sample: Sample, cloud: PointCloud
    ) -> None:
        columns = [cloud.xyz, *(cloud.field(name) for name in RADAR_FIELDS)]
        mount = _mount(clip, sample.stamp_ns, cloud.stamp_ns, cloud.ego_from_sensor)
        _calibrate(clip, sensor, {"radar2ego": mount.matrix.ravel().tolist()})
        write_floats(self._path(clip, frame, sensor, cloud.stamp_ns, ".bin"), columns)

    def _write_camera(
        self, clip: _Clip, frame: dict[str, Any], sensor: Sensor, sample: Sample, image: CameraImage
    ) -> None:
        rgb, intrinsic = image.rgb, image.intrinsic
        if sensor.role in DOUBLED_CAMERAS:
            rgb, intrinsic = rgb.repeat(2, 0).repeat(2, 1), doubled_intrinsic(intrinsic)
        mount = _mount(clip, sample.stamp_ns, image.stamp_ns, image.ego_from_camera)
        calib = {"intrinsic": intrinsic.tolist(), "distortion": [0.0] * 5, "camera2ego": mount.matrix.ravel().tolist()}
        _calibrate(clip, sensor, calib)
        write_image(self._path(clip, frame, sensor, image.stamp_ns, ".jpg"), rgb)

    def _write_tables(self) -> None:
        rows: dict[str, Any] = {name: [] for name in TABLES}
        rows["annotations"] = self._annotations
        rows["scene_split"] = {split: self._splits.get(split, []) for split in {"train", "val", "test", *self._splits}}
        for number, clip in enumerate(self._clips):
            rows["sample_data"] += clip.frames
            rows["sample"] += _samples(clip, number)
            rows["ego_pose"] += [
                {"token": _token(s), "scene_token": clip.name, "pose": clip.map_from_ego(s).matrix.ravel().tolist()}
                for s in sorted(clip.stamps_ns)
            ]
            rows[IMU_TABLES[0]] += _motion_rows(clip)
            rows["sensor_calibration"].append({"token": clip.name, "calib": clip.calib})
            rows["meta"].append({"token": clip.name, "meta": {}})
        self._tables.mkdir(parents=True)
        for name, table in rows.items():
            (self._tables / f"{name}.json").write_text(json.dumps(table))


def _token(stamp_ns: int) -> str:
    if stamp_ns % 1000 or stamp_ns < 0:
        raise ValueError(f"OmniHDWriter: stamp {stamp_ns} ns is no whole microsecond since 1970, as the layout keeps")
    return str(stamp_ns // 1000)


def _mount(clip: _Clip, sample_stamp_ns: int, stamp_ns: int, ego_from_sensor: Pose) -> Pose:
    """A sensor's static place on ego: the motion between its stamp and the sample's taken out again."""
    return clip.map_from_ego(stamp_ns).inverse() @ clip.map_from_ego(sample_stamp_ns) @ ego_from_sensor


def _calibrate(clip: _Clip, sensor: Sensor, calib: dict[str, Any]) -> None:
    """Enter a sensor's calibration, or check that it is still the clip's."""
    known = clip.calib.setdefault(sensor.key, calib)
    for key, value in calib.items():
        if not np.allclose(value, known[key], atol=1e-5):
            raise ValueError(
                f"OmniHDWriter: {key} of {sensor.key} changes within clip {clip.name}, from {known[key]} to {value}"
            )


def _samples(clip: _Clip, number: int) -> list[dict[str, Any]]:
    beside = ["", *clip.keys, ""]
    return [
        {
            "token": token,
            "frame_idx": k,
            "prev": beside[k],
            "next": beside[k + 2],
            "timestamp": token,
            "scene_token": clip.name,
            "scene_name": f"scene-{number:04d}",
        }
        for k, token in enumerate(clip.keys)
    ]


def _remember_motion(clip: _Clip, sample: Sample) -> None:
    for readings in (sample.imu, sample.odometry):
        if readings is not None and (wrong := readings.stamp_ns[readings.stamp_ns % 1000 != 0]).size:
            _token(int(wrong[0]))
    if sample.odometry is not None:
        stamps = sample.odometry.stamp_ns.tolist()
        clip.linear_velocity |= zip(stamps, sample.odometry.linear_velocity, strict=True)
        given = zip(stamps, sample.odometry.angular_velocity, strict=True)
        clip.angular_velocity = {**dict(given), **clip.angular_velocity}
    if sample.imu is not None:
        stamps = sample.imu.stamp_ns.tolist()
        clip.angular_velocity |= zip(stamps, sample.imu.angular_velocity, strict=True)
        clip.linear_acceleration |= zip(stamps, sample.imu.linear_acceleration, strict=True)


def _motion_rows(clip: _Clip) -> list[dict[str, Any]]:
    """The rows of imu_data: a reading where one was given, else what the poses tell."""
    given = (clip.linear_velocity, clip.angular_velocity, clip.linear_acceleration)
    stamps = sorted(clip.stamps_ns.union(*given))
    motions = []
    for stamp_ns in stamps:
        readings = [readings.get(stamp_ns) for readings in given]
        if any(reading is None for reading in readings):
            derived = _motion_at(clip.map_from_ego, stamp_ns)
            readings = [d if r is None else r for r, d in zip(readings, derived, strict=True)]
        motions.append(readings)
    motion = Motion(*(np.array([m[k] for m in motions], np.float64).reshape(-1, 3) for k in range(3)))
    columns = row_of_motion(motion)
    east_north_up = [
        (clip.map_from_ego(s).rotation @ v).tolist() for s, v in zip(stamps, motion.linear_velocity, strict=True)
    ]
    return [
        {
            "token": _token(stamp_ns),
            "scene_token": clip.name,
            **{key: values[k].tolist() for key, values in columns.items()},
            "velocity_enu": east_north_up[k],
        }
        for k, stamp_ns in enumerate(stamps)
    ]


def _motion_at(map_from_ego: Callable[[int], Pose], stamp_ns: int) -> Motion:
    """Ego's motion, (3,) each, by central differences of its poses."""
    before, now, after = (map_from_ego(stamp_ns + k * _STEP_NS) for k in (-1, 0, 1))
    step_s = _STEP_NS * 1e-9
    ego_from_map = now.rotation.T
    turn = Rotation.from_matrix(before.rotation.T @ after.rotation).as_rotvec()
    acceleration = (after.translation - 2 * now.translation + before.translation) / step_s**2
    acceleration[2] += STANDARD_GRAVITY
    return Motion(
        ego_from_map @ (after.translation - before.translation) / (2 * step_s),
        turn / (2 * step_s),
        ego_from_map @ acceleration,
    )


def _annotations(boxes: Boxes3D, token: str) -> list[dict[str, Any]]:
    """The boxes as entries of an annotations row; a box without a track gets one of its own."""
    category_of = {c: category for category, c in reversed(CLASS_OF_CATEGORY.items())}
    names = [boxes.classes[k] for k in boxes.label]
    if strange := sorted(set(names) - set(CLASS_OF_CATEGORY) - set(category_of)):
        known = ", ".join(dict.fromkeys([*CLASSES, *CLASS_OF_CATEGORY]))
        raise ValueError(f"OmniHDWriter: no class {', '.join(strange)}; the layout has {known}")
    tracks = boxes.track_id if boxes.track_id is not None else [f"{token}_{m}" for m in range(len(boxes))]
    # A class of the benchmark is written as its first category; a category as itself.
    return [
        {
            "center": dict(zip("xyz", boxes.center[m].tolist(), strict=True)),
            "size": dict(zip("xyz", boxes.size[m].tolist(), strict=True)),
            "rotation": {"x": 0.0, "y": 0.0, "z": float(boxes.yaw[m])},
            "category": name if name in CLASS_OF_CATEGORY else category_of[name],
            "id": str(tracks[m]),
            "visibility": int(boxes.visibility is None or boxes.visibility[m] > 1),
        }
        for m, name in enumerate(names)
    ]
