"""A columnar, memory-mapped index of one nuScenes version: row numbers in place of tokens, arrays in place of records.

The official tables are up to a gigabyte of JSON each. They are read once into columns whose references are resolved,
and saved one `.npy` per column in `{cache}/nuscenes/{version}-{root}/{tables}/`, where the last name is a digest of the
tables' sizes and times of change: other tables, another index. Opening maps the columns, so that DataLoader workers and
ranks on one machine share their pages. A lock lets one process build while the others wait, and a rename makes a
finished index appear at once.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from perception.cache import cache_dir
from perception.datasets.nuscenes_layout import (
    ANCHOR_CHANNEL,
    DETECTION_CLASSES,
    DETECTION_OF_CATEGORY,
    LIDARSEG_CLASSES,
    LIDARSEG_OF_CATEGORY,
    VELOCITY_MAX_GAP_S,
    VISIBILITY_LEVELS,
)
from perception.datasets.nuscenes_tables import COLUMNS, Rows, Tables, integers
from perception.errors import DataError
from perception.types import IGNORE_LABEL, Array

_INDEX_VERSION = 1
"""Part of the digest: raise it when a column changes."""


@dataclass(frozen=True)
class NuScenesIndex:
    """Columns of one version. Names and tokens are bytes ("S"), references are rows, -1 where there is none.

    Attributes:
        folder: where the columns lie; an index is pickled as this path.
        scene_name, scene_token: (scenes,).
        channel, modality: (C,) of the sensors.
        sample_token, sample_lidar_token: (N,) samples, scene by scene in time; the token of the anchor's sample_data.
        sample_scene: (N,) scene row.
        sample_data: (N, C) data row of each channel's key frame.
        sample_boxes: (N + 1,) rows `sample_boxes[n]` to `sample_boxes[n + 1]` of the boxes are sample n's.
        sample_lidarseg: (N,) file of the anchor's point labels, empty where there is none.
        data_file: (D,) sensor files, relative to the root.
        data_stamp_ns: (D,) int64.
        data_map_from_ego: (D, 7) float64, x y z and quaternion w x y z.
        data_calibration, data_previous: (D,) rows.
        data_image_size: (D, 2) width, height in pixels; 0 where the file is no image.
        calibration_ego_from_sensor: (K, 7) as above.
        calibration_intrinsic: (K, 3, 3); zero where the sensor is no camera.
        box_center: (M, 3) in the map frame.
        box_size: (M, 3) length, width, height.
        box_rotation: (M, 4) quaternion w x y z, map from box.
        box_velocity: (M, 3) m/s in the map frame, NaN where unknown.
        box_label: (M,) detection class, -1 for categories that belong to none.
        box_attribute, box_instance: (M,) rows.
        box_visibility: (M,) 1 to 4, 0 unknown.
        box_lidar_points, box_radar_points: (M,).
        attribute_name, instance_token: names of the rows.
        lidarseg_label: (256,) value in a lidarseg file -> lidarseg class, IGNORE_LABEL for values of no category.
    """

    folder: Path
    scene_name: Array
    scene_token: Array
    channel: Array
    modality: Array
    sample_token: Array
    sample_lidar_token: Array
    sample_scene: Array
    sample_data: Array
    sample_boxes: Array
    sample_lidarseg: Array
    data_file: Array
    data_stamp_ns: Array
    data_map_from_ego: Array
    data_calibration: Array
    data_previous: Array
    data_image_size: Array
    calibration_ego_from_sensor: Array
    calibration_intrinsic: Array
    box_center: Array
    box_size: Array
    box_rotation: Array
    box_velocity: Array
    box_label: Array
    box_attribute: Array
    box_instance: Array
    box_visibility: Array
    box_lidar_points: Array
    box_radar_points: Array
    attribute_name: Array
    instance_token: Array
    lidarseg_label: Array

    @staticmethod
    def open(folder: Path) -> NuScenesIndex:
        """Map the columns of a finished index."""
        columns = [field.name for field in fields(NuScenesIndex) if field.name != "folder"]
        try:
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in columns}
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder}: not a whole index: {error}", "delete this folder; the index is built anew"
            ) from error
        return NuScenesIndex(folder, **arrays)

    def __reduce__(self) -> tuple:
        return NuScenesIndex.open, (self.folder,)


def open_index(root: Path, version: str, cache: Path | None = None) -> NuScenesIndex:
    """The index of `{root}/{version}`, built first where the cache has none for the tables as they are now.

    Args:
        root: folder that holds the version's folder.
        version: `v1.0-mini`, `v1.0-trainval`, ...
        cache: where indices are kept; None is `perception.cache.cache_dir()`.

    Raises:
        DataError: a table is missing, is no JSON list of records, lacks a key, or refers to a record that is not there;
            or the cache cannot be written.
    """
    tables = {name: root / version / f"{name}.json" for name in COLUMNS}
    if not tables["lidarseg"].exists():
        del tables["lidarseg"]
    try:
        stats = [(name, path.stat()) for name, path in tables.items()]
    except OSError as error:
        raise DataError(
            f"{error.filename}: {error.strerror}",
            f"unpack all the tables of {version} into {root / version} (nuScenes calls them Metadata)",
        ) from error
    state = _digest(_INDEX_VERSION, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    home = (cache or cache_dir()) / "nuscenes" / f"{version}-{_digest(str(root.resolve()))}"
    folder = home / state
    if not folder.is_dir():
        try:
            home.mkdir(parents=True, exist_ok=True)
            with _one_process(home / "lock"):
                if not folder.is_dir():
                    _build_into(folder, tables, sum(stat.st_size for _, stat in stats))
        except OSError as error:
            raise DataError(
                f"{home}: the index of {root / version} cannot be written: {error.strerror or error}",
                "set cache_dir, or the environment's XDG_CACHE_HOME, to a folder with space that you may write",
            ) from error
    return NuScenesIndex.open(folder)


def _digest(*parts: object) -> str:
    return blake2b(repr(parts).encode(), digest_size=8).hexdigest()


@contextmanager
def _one_process(lock: Path) -> Iterator[None]:
    """Others wait here; the system releases the lock of a process that dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_into(folder: Path, tables: Mapping[str, Path], size_bytes: int) -> None:
    """Build next to `folder` and rename; what earlier tables or a killed process left there goes first."""
    for stale in folder.parent.iterdir():
        if stale.is_dir():
            shutil.rmtree(stale)
    console = Console(stderr=True)
    bar = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*bar, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("nuScenes index, built once", total=size_bytes)
        columns = _build(Tables(tables, lambda n: progress.advance(task, n)))
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    for name, array in columns.items():
        np.save(unfinished / f"{name}.npy", array, allow_pickle=False)
    unfinished.rename(folder)


def _build(tables: Tables) -> dict[str, Array]:
    """All columns of an index. Tables are read one after the other; what is not kept is freed before the next."""
    scene, sample = tables.read("scene"), tables.read("sample")
    scene_row = Rows(tables.paths["scene"], scene["token"]).of(sample["scene_token"], "sample.scene_token")
    in_time = np.lexsort((sample["timestamp"], scene_row))
    sample_rows = Rows(tables.paths["sample"], sample["token"][in_time])
    columns = {
        "scene_name": scene["name"],
        "scene_token": scene["token"],
        "sample_token": sample["token"][in_time],
        "sample_scene": scene_row[in_time].astype(np.int32),
    }
    columns |= _sensors(tables)
    columns |= _sensor_data(tables, sample_rows, len(in_time), columns)
    return columns | _boxes(tables, sample_rows, sample["timestamp"][in_time])


def _sensors(tables: Tables) -> dict[str, Array]:
    """The rig: channels and calibrations."""
    sensor, calibrated = tables.read("sensor"), tables.read("calibrated_sensor")
    channel = Rows(tables.paths["sensor"], sensor["token"]).of(
        calibrated["sensor_token"], "calibrated_sensor.sensor_token"
    )
    return {
        "channel": sensor["channel"],
        "modality": sensor["modality"],
        "calibration_token": calibrated["token"],
        "calibration_channel": channel,
        "calibration_ego_from_sensor": np.concatenate([calibrated["translation"], calibrated["rotation"]], 1),
        "calibration_intrinsic": calibrated["camera_intrinsic"],
    }


def _sensor_data(tables: Tables, sample_rows: Rows, samples: int, columns: dict[str, Array]) -> dict[str, Array]:
    """Sensor files with their poses, and each sample's key frames. Takes the calibrations' own columns out."""
    pose = tables.read("ego_pose")
    pose_rows = Rows(tables.paths["ego_pose"], pose.pop("token"))
    map_from_ego = np.concatenate([pose.pop("translation"), pose.pop("rotation")], 1)
    data = tables.read("sample_data")
    map_from_ego = map_from_ego[pose_rows.of(data.pop("ego_pose_token"), "sample_data.ego_pose_token")]
    calibration = Rows(tables.paths["calibrated_sensor"], columns.pop("calibration_token")).of(
        data.pop("calibrated_sensor_token"), "sample_data.calibrated_sensor_token"
    )
    data_rows = Rows(tables.paths["sample_data"], data["token"])

    key = np.flatnonzero(data["is_key_frame"])
    key_sample = sample_rows.of(data["sample_token"][key], "sample_data.sample_token")
    key_channel = columns.pop("calibration_channel")[calibration[key]]
    sample_data = np.full((samples, len(columns["channel"])), -1, np.int32)
    sample_data[key_sample, key_channel] = key

    lidar = np.isin(key_channel, np.flatnonzero(columns["channel"] == ANCHOR_CHANNEL.encode()))
    lidar_token = np.zeros(samples, data["token"].dtype)
    lidar_token[key_sample[lidar]] = data["token"][key[lidar]]
    return _point_labels(tables, lidar_token) | {
        "sample_data": sample_data,
        "sample_lidar_token": lidar_token,
        "data_file": data["filename"],
        "data_stamp_ns": data["timestamp"] * 1000,
        "data_map_from_ego": map_from_ego,
        "data_calibration": calibration.astype(np.int32),
        "data_previous": data_rows.of(data["prev"], "sample_data.prev", optional=True).astype(np.int32),
        "data_image_size": np.stack([data["width"], data["height"]], 1).astype(np.int32),
    }


def _point_labels(tables: Tables, lidar_token: Array) -> dict[str, Array]:
    """Files of the key frames' point labels, and what their values mean, where the version has lidarseg."""
    if "lidarseg" not in tables.paths:
        return {
            "sample_lidarseg": np.zeros(len(lidar_token), "S1"),
            "lidarseg_label": np.full(256, IGNORE_LABEL, np.uint8),
        }
    lidarseg, category = tables.read("lidarseg"), tables.read("category", index=integers)
    label = np.full(256, IGNORE_LABEL, np.uint8)
    for index, name in zip(category["index"], category["name"], strict=True):
        if not 0 <= index < len(label):
            raise DataError(
                f"{tables.paths['category']}: index {index} of {name.decode()!r} is no uint8",
                "use the category.json that comes with nuScenes-lidarseg",
            )
        label[index] = LIDARSEG_CLASSES.index(LIDARSEG_OF_CATEGORY.get(name.decode(), "noise"))
    labelled = np.isin(lidar_token, lidarseg["sample_data_token"])
    rows = Rows(tables.paths["lidarseg"], lidarseg["sample_data_token"]).of(lidar_token[labelled], "sample.data")
    file = np.zeros(len(lidar_token), lidarseg["filename"].dtype)
    file[labelled] = lidarseg["filename"][rows]
    return {"sample_lidarseg": file, "lidarseg_label": label}


def _boxes(tables: Tables, sample_rows: Rows, sample_stamp_us: Array) -> dict[str, Array]:
    """Annotations in the order of their samples, with class and velocity."""
    category, attribute, visibility = (tables.read(name) for name in ("category", "attribute", "visibility"))
    names = [DETECTION_OF_CATEGORY.get(name.decode()) for name in category["name"]]
    category_label = np.array([DETECTION_CLASSES.index(name) if name else -1 for name in names], np.int8)
    levels = [_visibility(tables, level.decode()) for level in visibility["level"]]

    instance = tables.read("instance")
    instance_category = Rows(tables.paths["category"], category["token"]).of(
        instance["category_token"], "instance.category_token"
    )
    box = tables.read("sample_annotation")

    def rows(table: str, tokens: Array, key: str, optional: bool = False) -> Array:
        return Rows(tables.paths[table], tokens).of(box[key], f"sample_annotation.{key}", optional)

    sample = sample_rows.of(box["sample_token"], "sample_annotation.sample_token")
    velocity = _velocity(
        box["translation"],
        sample_stamp_us[sample],
        rows("sample_annotation", box["token"], "prev", True),
        rows("sample_annotation", box["token"], "next", True),
    )
    instance_row = rows("instance", instance["token"], "instance_token")
    columns = {
        "box_center": box["translation"],
        "box_size": box["size"][:, [1, 0, 2]],
        "box_rotation": box["rotation"],
        "box_velocity": velocity,
        "box_label": category_label[instance_category[instance_row]],
        "box_attribute": rows("attribute", attribute["token"], "attribute_tokens", True).astype(np.int8),
        "box_instance": instance_row.astype(np.int32),
        "box_visibility": np.array([*levels, 0], np.int8)[
            rows("visibility", visibility["token"], "visibility_token", True)
        ],
        "box_lidar_points": box["num_lidar_pts"].astype(np.int32),
        "box_radar_points": box["num_radar_pts"].astype(np.int32),
    }
    by_sample = np.argsort(sample, kind="stable")
    starts = np.searchsorted(sample[by_sample], np.arange(len(sample_stamp_us) + 1))
    return {name: column[by_sample] for name, column in columns.items()} | {
        "sample_boxes": starts,
        "attribute_name": attribute["name"],
        "instance_token": instance["token"],
    }


def _visibility(tables: Tables, level: str) -> int:
    if level not in VISIBILITY_LEVELS:
        raise DataError(
            f"{tables.paths['visibility']}: level {level!r} is none of {', '.join(VISIBILITY_LEVELS)}",
            "is it a table of another data set?",
        )
    return VISIBILITY_LEVELS.index(level) + 1


def _velocity(center: Array, stamp_us: Array, previous: Array, following: Array) -> Array:
    """(M, 3) m/s between an object's previous and next annotation, as the devkit's `box_velocity`.

    Args:
        center: (M, 3) metres, map frame.
        stamp_us: (M,) stamps of the annotations.
        previous, following: (M,) rows of the same object's annotations before and after, -1 where there is none: its
            own takes that place. Where both are missing or lie too far apart in time, the velocity is NaN.
    """
    own = np.arange(len(center))
    first, last = np.where(previous < 0, own, previous), np.where(following < 0, own, following)
    elapsed_s = (stamp_us[last] - stamp_us[first]) * 1e-6
    central = (previous >= 0) & (following >= 0)
    known = (elapsed_s > 0) & (elapsed_s <= np.where(central, 2, 1) * VELOCITY_MAX_GAP_S)
    velocity = np.full(center.shape, np.nan)
    velocity[known] = (center[last[known]] - center[first[known]]) / elapsed_s[known, None]
    return velocity
