"""Predictions of one system on one source as one JSON file, written frame by frame and read back to the bit.

    {
      "format": "perception predictions", "version": 1,
      "system": name, "source": what was predicted on,
      "config": the predictor's resolved configuration,
      "weights": {"kind", "sha256", "note"}, "code": {"version", "commit", "modified"}, "versions": {library: version},
      "frames": [
        {"token": text, "stamp_ns": int, "used": {"lidar_top": [stamp of each message, newest first], ...},
         "degraded": what it had to do without (left out where nothing),
         one of "boxes", "occupancy", "localization"}, ...
      ]
    }

Everything is in ego at `stamp_ns`; units and shapes are those of `perception.types`:

* boxes: {"classes": [name], "center": [[x, y, z]], "size": [[length, width, height]], "yaw": [], "velocity": [[vx, vy]]
  or [null, null] where unknown, "score": [], "label": [index into classes], and where known "attribute", "track_id"};
* occupancy: {"classes", "free_label", "shape", "min_corner", "voxel_size", "ego_from_grid": 4x4, "label", and where
  known "score"}; `label` and `score` are voxels in C order, uint8 and little-endian float32, zlib, base64. A label of
  255 is unknown;
* localization: {"map_from_ego": 4x4, "covariance": 6x6, "inliers", "status"}.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from perception.config import Config
from perception.errors import DataError
from perception.evaluation.result import library_versions, source
from perception.types import Array, Boxes3D, Localization, OccupancyGrid3D, Pose, Prediction, VoxelGrid
from perception.weights import WeightsProvenance

_FORMAT, _VERSION = "perception predictions", 1
_MAX_VOXELS = 1 << 28


@dataclass(frozen=True, slots=True, eq=False)
class PredictedFrame:
    """One prediction.

    Attributes:
        token: the sample's.
        used: channel (`lidar_top`, `cam_front`) -> stamps of the messages that were used, newest first.
        prediction: in ego at its `stamp_ns`.
        degraded: what it had to do without, as `Predictor.degraded`.
    """

    token: str
    used: Mapping[str, tuple[int, ...]]
    prediction: Prediction
    degraded: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class PredictionFile:
    """What a file holds; the keys are the module docstring's."""

    system: str
    source: str
    config: Mapping[str, Any]
    weights: WeightsProvenance
    frames: tuple[PredictedFrame, ...]


class PredictionWriter:
    """Writes one file; it appears under its name when it is whole.

    with PredictionWriter(path, "detection", "drive.mcap", config, predictor.weights) as writer:
        writer.add(frame)
    """

    def __init__(self, path: Path, system: str, of: str, config: Config, weights: WeightsProvenance) -> None:
        self._path, self._part = path, path.with_name(path.name + ".part")
        self._head = {
            "format": _FORMAT,
            "version": _VERSION,
            "system": system,
            "source": of,
            "config": config.model_dump(mode="json"),
            "weights": weights.model_dump(mode="json"),
            "code": source().model_dump(mode="json"),
            "versions": library_versions(),
        }
        self._file: TextIO
        self._count = 0

    def __enter__(self) -> PredictionWriter:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("w", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written: {error.strerror}", "choose another folder") from error
        self._file.write(json.dumps(self._head)[:-1] + ', "frames": [')
        return self

    def add(self, frame: PredictedFrame) -> None:
        entry = {
            "token": frame.token,
            "stamp_ns": frame.prediction.stamp_ns,
            "used": {channel: list(stamps) for channel, stamps in frame.used.items()},
            **({"degraded": frame.degraded} if frame.degraded else {}),
            **_entry(frame.prediction),
        }
        self._file.write((",\n" if self._count else "\n") + json.dumps(entry, allow_nan=False))
        self._count += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.write("\n]}\n")
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink()


def read_predictions(path: Path) -> PredictionFile:
    """The predictions in a file.

    Raises:
        DataError: no such file, another format or version, a value that is none of its kind.
    """
    do = "give a file that `perception predict` wrote"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", do) from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}", do) from error
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (_FORMAT, _VERSION):
        raise DataError(f"{path}: not {_FORMAT!r} of version {_VERSION}", do)
    try:
        frames = tuple(
            PredictedFrame(
                frame["token"],
                {channel: tuple(stamps) for channel, stamps in frame["used"].items()},
                _prediction(frame),
                frame.get("degraded", ""),
            )
            for frame in data["frames"]
        )
        weights = WeightsProvenance.model_validate(data["weights"])
        return PredictionFile(data["system"], data["source"], data["config"], weights, frames)
    except (KeyError, TypeError, AttributeError, ValueError, binascii.Error, zlib.error) as error:
        raise DataError(f"{path}: damaged: {type(error).__name__}: {error}", do) from error


def _entry(prediction: Prediction) -> dict[str, Any]:
    if isinstance(prediction, Boxes3D):
        return {"boxes": _of_boxes(prediction)}
    if isinstance(prediction, OccupancyGrid3D):
        return {"occupancy": _of_occupancy(prediction)}
    return {
        "localization": {
            "map_from_ego": prediction.map_from_ego.matrix.tolist(),
            "covariance": prediction.covariance.tolist(),
            "inliers": prediction.inliers,
            "status": prediction.status,
        }
    }


def _prediction(frame: Mapping[str, Any]) -> Prediction:
    stamp_ns = frame["stamp_ns"]
    if "boxes" in frame:
        return _to_boxes(frame["boxes"], stamp_ns)
    if "occupancy" in frame:
        return _to_occupancy(frame["occupancy"], stamp_ns)
    entry = frame["localization"]
    covariance = np.array(entry["covariance"], np.float64)
    return Localization(
        Pose.from_matrix(np.array(entry["map_from_ego"])), covariance, entry["inliers"], entry["status"], stamp_ns
    )


def _of_boxes(boxes: Boxes3D) -> dict[str, Any]:
    velocity = [[None if np.isnan(v) else v for v in row] for row in boxes.velocity.tolist()]
    entry = {
        "classes": list(boxes.classes),
        "center": boxes.center.tolist(),
        "size": boxes.size.tolist(),
        "yaw": boxes.yaw.tolist(),
        "velocity": velocity,
        "score": boxes.score.tolist(),
        "label": boxes.label.tolist(),
    }
    known = {"attribute": boxes.attribute, "track_id": boxes.track_id}
    return entry | {name: values.tolist() for name, values in known.items() if values is not None}


def _to_boxes(entry: Mapping[str, Any], stamp_ns: int) -> Boxes3D:
    def numbers(name: str, width: int) -> Array:
        return np.array(entry[name], np.float64).reshape(-1, width)  # null becomes NaN

    def texts(name: str) -> Array | None:
        return np.array(entry[name], np.str_) if name in entry else None

    return Boxes3D(
        numbers("center", 3),
        numbers("size", 3),
        numbers("yaw", 1)[:, 0],
        numbers("velocity", 2),
        numbers("score", 1)[:, 0],
        np.array(entry["label"], np.int64),
        tuple(entry["classes"]),
        stamp_ns,
        attribute=texts("attribute"),
        track_id=texts("track_id"),
    )


def _of_occupancy(occupancy: OccupancyGrid3D) -> dict[str, Any]:
    grid = occupancy.grid
    entry = {
        "classes": list(occupancy.classes),
        "free_label": occupancy.free_label,
        "shape": list(grid.shape),
        "min_corner": list(grid.min_corner),
        "voxel_size": list(grid.voxel_size),
        "ego_from_grid": grid.ego_from_grid.matrix.tolist(),
        "label": _packed(occupancy.label),
    }
    return entry if occupancy.score is None else entry | {"score": _packed(occupancy.score.astype("<f4"))}


def _to_occupancy(entry: Mapping[str, Any], stamp_ns: int) -> OccupancyGrid3D:
    nx, ny, nz = entry["shape"]
    if min(nx, ny, nz) < 1 or nx * ny * nz > _MAX_VOXELS:
        raise ValueError(f"a grid of {nx} x {ny} x {nz} voxels")
    (x, y, z), (dx, dy, dz) = entry["min_corner"], entry["voxel_size"]
    pose = Pose.from_matrix(np.array(entry["ego_from_grid"]))
    label = _unpacked(entry["label"], (nx, ny, nz), np.dtype(np.uint8))
    score = _unpacked(entry["score"], (nx, ny, nz), np.dtype("<f4")) if "score" in entry else None
    return OccupancyGrid3D(
        VoxelGrid((x, y, z), (dx, dy, dz), (nx, ny, nz), pose),
        label,
        tuple(entry["classes"]),
        entry["free_label"],
        stamp_ns,
        score,
    )


def _packed(values: Array) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 6)).decode()


def _unpacked(text: str, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> Array:
    """The values; ValueError where there are not as many, told without unpacking more."""
    size = int(np.prod(shape)) * dtype.itemsize
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text, validate=True), size + 1)
    if len(data) != size:
        raise ValueError(f"{'more than ' if len(data) > size else ''}{min(len(data), size)} bytes for {size}")
    return np.frombuffer(data, dtype).reshape(shape)
