"""The tables of OmniHD-Scenes as columns of numpy: small, and shared by forked DataLoader workers without copies.

200 clips are 60,000 synchronised frames of 13 sensors, 420,000 poses and half a million boxes. Each JSON table is
parsed once, reduced to the clips of the split and let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perception.datasets.omnihd_layout import (
    CAMERAS,
    CLASS_OF_CATEGORY,
    CLASSES,
    IMU_TABLES,
    LIDAR,
    RADARS,
    SENSORS,
    SOURCE,
    Motion,
    Sensor,
    motion_of_row,
)
from perception.datasets.sensor_files import read_json
from perception.errors import DataError
from perception.geometry import wrap_angle
from perception.types import Array, Pose


@dataclass(frozen=True, eq=False)
class CameraCalibration:
    """One camera of one clip, as stored: `intrinsic` (3, 3) in pixels of the stored image, OpenCV's `distortion`."""

    intrinsic: Array
    distortion: tuple[float, ...]
    ego_from_camera: Pose


@dataclass(frozen=True, eq=False)
class ClipCalibration:
    """The sensors of one clip by role."""

    cameras: dict[str, CameraCalibration]
    ego_from_radar: dict[str, Pose]


@dataclass(frozen=True, eq=False)
class Frames:
    """Synchronised frames, by clip and then time.

    Attributes:
        stamp_us: (F,) int64.
        clip: (F,) int64 index into the clips.
        previous: (F,) int64 frame before it in its clip, -1 at the clip's start.
        file: (F, 13) bytes, each sensor's file below the root; empty where the frame lacks it. Columns as `SENSORS`.
        pose: (F, 13) int64 row of `OmniHDIndex.map_from_ego` at the sensor's stamp, -1 where none is given.
    """

    stamp_us: Array
    clip: Array
    previous: Array
    file: Array
    pose: Array


@dataclass(frozen=True, eq=False)
class Annotations:
    """The boxes of all samples; those of sample i are rows `start[i]` to `start[i + 1]`.

    Attributes:
        start: (S + 1,) int64.
        known: (S,) bool: the sample was annotated.
        center, size: (M, 3) float64, in ego; size is length, width, height.
        yaw: (M,) float64; label: (M,) int64; track_id: (M,) str; visible: (M,) bool, to a camera.
    """

    start: Array
    known: Array
    center: Array
    size: Array
    yaw: Array
    label: Array
    track_id: Array
    visible: Array


@dataclass(frozen=True, eq=False)
class OmniHDIndex:
    """All that the tables say about the clips of a split.

    Attributes:
        calibrations: of each clip.
        frames: every synchronised frame, key or not.
        map_from_ego: (P, 4, 4) float64.
        motion_of_pose: (P,) int64 row of `motion` at that pose's stamp, -1 where none is given.
        motion, motion_stamp_us, motion_clip: (Q, ...) readings, by clip and then time.
        sample_frame, sample_previous, sample_next: (S,) int64: a sample's frame, and the samples beside it (-1: none).
        annotations: the boxes.
    """

    calibrations: tuple[ClipCalibration, ...]
    frames: Frames
    map_from_ego: Array
    motion_of_pose: Array
    motion: Motion
    motion_stamp_us: Array
    motion_clip: Array
    sample_frame: Array
    sample_previous: Array
    sample_next: Array
    annotations: Annotations


def read_index(tables: Path, clips: Sequence[str]) -> OmniHDIndex:
    """Read the tables of a version's folder.

    Raises:
        DataError: a table is missing, is not JSON, or lacks a key or a clip.
    """
    place = {clip: k for k, clip in enumerate(clips)}
    poses = _clip_rows(tables, "ego_pose", place)
    map_from_ego = _numbers(tables, "ego_pose", poses, "pose", 16).reshape(-1, 4, 4)
    pose_of = {(row["scene_token"], row["token"]): k for k, row in enumerate(poses)}
    imu = next((name for name in IMU_TABLES if (tables / f"{name}.json").is_file()), IMU_TABLES[0])
    rows = sorted(_clip_rows(tables, imu, place), key=lambda row: (place[row["scene_token"]], int(row["token"])))
    motion = motion_of_row(*(_numbers(tables, imu, rows, key, 3) for key in ("gyro_xyz", "acc_xyz", "velocity_ego")))
    motion_of = {(row["scene_token"], row["token"]): k for k, row in enumerate(rows)}
    frames = _read_frames(tables, place, pose_of)
    samples = sorted(_clip_rows(tables, "sample", place), key=lambda row: int(row["token"]))
    previous, following = (_neighbours(samples, key) for key in ("prev", "next"))
    return OmniHDIndex(
        _read_calibrations(tables, clips),
        frames,
        map_from_ego,
        np.array([motion_of.get((row["scene_token"], row["token"]), -1) for row in poses], np.int64),
        motion,
        np.array([int(row["token"]) for row in rows], np.int64),
        np.array([place[row["scene_token"]] for row in rows], np.int64),
        _frames_of_samples(tables, samples, frames),
        previous,
        following,
        _read_annotations(tables, place, [row["token"] for row in samples]),
    )


def clips_of_split(path: Path, split: str) -> tuple[str, ...]:
    """The clips that a split table lists. DataError names the splits there are."""
    table = read_json(path, SOURCE)
    if not isinstance(table, dict) or not isinstance(table.get(split), list) or not table[split]:
        known = ", ".join(f"{name} ({len(clips)})" for name, clips in table.items()) if isinstance(table, dict) else ""
        raise DataError(
            f"{path}: has no split {split!r}; it has {known or 'none'}",
            "set dataset.split, or dataset.split_file to a table that has it (the development kit suggests one)",
        )
    return tuple(str(clip) for clip in table[split])


def _rows(tables: Path, name: str) -> list[dict[str, Any]]:
    path = tables / f"{name}.json"
    rows = read_json(path, SOURCE)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "token" in row for row in rows):
        raise DataError(f"{path}: expected a list of rows with a token each", f"is it a table of {SOURCE}?")
    return rows


def _clip_rows(tables: Path, name: str, place: dict[str, int]) -> list[dict[str, Any]]:
    """The rows of a table that belong to the clips; each token is a stamp."""
    rows = _rows(tables, name)
    _require(tables, name, rows, "scene_token")
    _require_stamps(tables, name, rows)
    return [row for row in rows if row["scene_token"] in place]


def _require_stamps(tables: Path, name: str, rows: list[dict[str, Any]]) -> None:
    if foreign := [row["token"] for row in rows if not str(row["token"]).isdecimal()]:
        raise DataError(
            f"{tables / name}.json: token {foreign[0]!r} is no stamp in microseconds", f"is it a table of {SOURCE}?"
        )


def _require(tables: Path, name: str, rows: list[dict[str, Any]], *keys: str) -> None:
    for key in keys:
        if lacking := [row["token"] for row in rows if key not in row]:
            raise DataError(
                f"{tables / name}.json: {len(lacking)} of {len(rows)} rows have no {key!r}, first {lacking[0]!r}",
                f"is it a table of {SOURCE}?",
            )


def _numbers(tables: Path, name: str, rows: list[dict[str, Any]], key: str, count: int) -> Array:
    """A key of `count` finite numbers, flat or nested, of all rows -> (len(rows), count) float64."""
    _require(tables, name, rows, key)
    try:
        values = np.array([row[key] for row in rows], np.float64).reshape(len(rows), count)
    except (ValueError, TypeError) as error:
        raise DataError(f"{tables / name}.json: {key!r}: {error}", f"expected {count} numbers in each row") from error
    if not np.isfinite(values).all():
        raise DataError(f"{tables / name}.json: {key!r} holds values that are not finite", f"copy it from {SOURCE}")
    return values


def _read_frames(tables: Path, place: dict[str, int], pose_of: dict[tuple[str, str], int]) -> Frames:
    table = _rows(tables, "sample_data")
    _require_stamps(tables, "sample_data", table)
    _require(tables, "sample_data", table, "prev", "ego_pose", LIDAR.kind)
    rows = []
    for row in table:
        # sample_data has no scene_token: the clip is the first folder of every file.
        clip = _file(row, LIDAR).partition("/")[0]
        if clip in place:
            rows.append((place[clip], int(row["token"]), clip, row))
    rows.sort(key=lambda r: r[:2])
    frame_of = {row["token"]: k for k, (*_, row) in enumerate(rows)}
    poses = [[pose_of.get((clip, row["ego_pose"].get(s.key, "")), -1) for s in SENSORS] for _, _, clip, row in rows]
    return Frames(
        np.array([stamp_us for _, stamp_us, _, _ in rows], np.int64),
        np.array([k for k, _, _, _ in rows], np.int64),
        np.array([frame_of.get(row["prev"], -1) for *_, row in rows], np.int64),
        np.array([[_file(row, s).encode() for s in SENSORS] for *_, row in rows], np.bytes_).reshape(-1, len(SENSORS)),
        np.array(poses, np.int64).reshape(-1, len(SENSORS)),
    )


def _file(row: dict[str, Any], sensor: Sensor) -> str:
    return str(row.get(sensor.kind, {}).get(sensor.key, ""))


def _neighbours(samples: list[dict[str, Any]], key: str) -> Array:
    place = {row["token"]: k for k, row in enumerate(samples)}
    return np.array([place.get(row.get(key, ""), -1) for row in samples], np.int64)


def _frames_of_samples(tables: Path, samples: list[dict[str, Any]], frames: Frames) -> Array:
    frame_of = {stamp_us: k for k, stamp_us in enumerate(frames.stamp_us.tolist())}
    if lacking := [row["token"] for row in samples if int(row["token"]) not in frame_of]:
        raise DataError(
            f"{tables / 'sample_data.json'}: has no frame for {len(lacking)} of {len(samples)} samples, "
            f"first {lacking[0]!r}",
            "sample.json and sample_data.json must be of one release",
        )
    return np.array([frame_of[int(row["token"])] for row in samples], np.int64)


def _read_calibrations(tables: Path, clips: Sequence[str]) -> tuple[ClipCalibration, ...]:
    path = tables / "sensor_calibration.json"
    of_clip = {row["token"]: row.get("calib", {}) for row in _rows(tables, "sensor_calibration")}
    calibrations = []
    for clip in clips:
        try:
            calib = of_clip[clip]
            cameras = {s.role: _camera(calib[s.key]) for s in CAMERAS if s.key in calib}
            radars = {s.role: _pose(calib[s.key]["radar2ego"]) for s in RADARS if s.key in calib}
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"{path}: clip {clip}: {type(error).__name__}: {error}",
                f"a clip needs intrinsic, distortion, camera2ego and radar2ego; is it of {SOURCE}?",
            ) from error
        calibrations.append(ClipCalibration(cameras, radars))
    return tuple(calibrations)


def _pose(values: Any) -> Pose:
    return Pose.from_matrix(np.array(values, np.float64).reshape(4, 4))


def _camera(calib: dict[str, Any]) -> CameraCalibration:
    return CameraCalibration(
        np.array(calib["intrinsic"], np.float64).reshape(3, 3),
        tuple(np.array(calib["distortion"], np.float64).ravel().tolist()),
        _pose(calib["camera2ego"]),
    )


def _read_annotations(tables: Path, place: dict[str, int], tokens: list[str]) -> Annotations:
    path = tables / "annotations.json"
    rows = _clip_rows(tables, "annotations", place)
    _require(tables, "annotations", rows, "annotations")
    of_token = {row["token"]: row["annotations"] for row in rows}
    boxes = [box for token in tokens for box in of_token.get(token, [])]
    if strange := {box.get("category") for box in boxes} - set(CLASS_OF_CATEGORY):
        raise DataError(
            f"{path}: unknown category {', '.join(sorted(map(str, strange)))}; known: {', '.join(CLASS_OF_CATEGORY)}",
            f"is it of {SOURCE}?",
        )
    try:
        values = np.array(
            [[*(b[k][axis] for k in ("center", "size") for axis in "xyz"), b["rotation"]["z"]] for b in boxes],
            np.float64,
        ).reshape(-1, 7)
        track_id = np.array([str(b["id"]) for b in boxes], np.str_)
        visible = np.array([int(b["visibility"]) == 1 for b in boxes], bool)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: a box: {type(error).__name__}: {error}", f"is it of {SOURCE}?") from error
    return Annotations(
        np.cumsum([0, *(len(of_token.get(token, [])) for token in tokens)]),
        np.array([token in of_token for token in tokens], bool),
        values[:, :3],
        values[:, 3:6],
        wrap_angle(values[:, 6]),
        np.array([CLASSES.index(CLASS_OF_CATEGORY[b["category"]]) for b in boxes], np.int64),
        track_id,
        visible,
    )
