"""Writes nuScenes v1.0: tables and sensor files that the unmodified devkit loads and its evaluation scores.

What the format keeps: one pose of the car per reading, one mount per sensor, stamps to the microsecond, JPEG images,
boxes of the ten detection classes with instance, attribute, visibility and point counts, LiDAR point labels; beside it,
occupancy in the layout of one benchmark. It keeps no velocity (a reader differentiates positions), no odometry, depth,
image labels or other readings.

Tokens are digests of names, so that the same scenes always give the same files; a token that is 32 hexadecimal digits
already (a sample's, a track's) is kept.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np

from perception.datasets.nuscenes_files import RADAR_POINT, RADAR_STATES, write_lidar, write_radar
from perception.datasets.nuscenes_layout import (
    ANCHOR_CHANNEL,
    ATTRIBUTES,
    CATEGORIES,
    CHANNELS,
    DETECTION_CLASSES,
    DETECTION_OF_CATEGORY,
    LIDARSEG_CLASSES,
    LIDARSEG_OF_CATEGORY,
    OBJECT_CATEGORIES,
    VISIBILITY_LEVELS,
    KeyFrameNames,
    Modality,
    OccupancyLayout,
    channel_of,
    occupancy_path,
    role_of,
    write_occupancy,
)
from perception.datasets.sensor_files import write_image
from perception.errors import DataError
from perception.geometry import points_in_boxes
from perception.types import (
    IGNORE_LABEL,
    Array,
    Boxes3D,
    CameraImage,
    OccupancyGrid3D,
    PointCloud,
    Pose,
    Sample,
    Segmentation,
    Truth,
)

Record = dict[str, Any]
"""One record of a table; its keys are the schema's."""

# Of several categories the first is the one that is written.
_CATEGORY_OF_DETECTION = {label: category for category, label in reversed(DETECTION_OF_CATEGORY.items())}
_CATEGORY_OF_LIDARSEG = {label: category for category, label in reversed(LIDARSEG_OF_CATEGORY.items())}
_LIDARSEG_VALUE = np.array(
    [CATEGORIES.index(_CATEGORY_OF_LIDARSEG.get(label, CATEGORIES[0])) for label in LIDARSEG_CLASSES], np.uint8
)
_SAME_MOUNT = 1e-4
"""Metres, and entries of a rotation, by which a mount recovered from two samples may differ."""


def _token(*names: object) -> str:
    """32 hexadecimal digits of names."""
    return blake2b("/".join(map(str, names)).encode(), digest_size=16).hexdigest()


def _token_or_own(own: str, *names: object) -> str:
    return own if re.fullmatch("[0-9a-f]{32}", own) else _token(*names, own)


@dataclass
class _Scene:
    """The scene that is being written."""

    name: str
    token: str
    log: Record
    description: str
    map_from_ego: Callable[[int], Pose]
    samples: list[Record] = field(default_factory=list)
    data: dict[str, list[Record]] = field(default_factory=dict)  # by channel
    mounts: dict[str, tuple[Pose, Array]] = field(default_factory=dict)  # by channel: ego_from_sensor, intrinsic
    tracks: dict[str, list[Record]] = field(default_factory=dict)  # by instance token
    categories: dict[str, str] = field(default_factory=dict)  # by instance token
    key_frame: KeyFrameNames | None = None  # of the last sample


class NuScenesWriter:
    """Writes scenes; the tables when it closes.

        with NuScenesWriter(root, "v1.0-city") as writer:
            writer.start_scene("scene-0001", map_from_ego, split="val_city")
            writer.add_sweep(sample)
            writer.add_sample(sample, truth)

    Args:
        root: the data set's folder; several versions may share it.
        version: the tables' folder. The devkit maps its own splits to names that end in mini, trainval and test.
        occupancy: the layout in which `Truth.occupancy` is written under `root`; None writes none.

    Raises:
        DataError: the version is there already.
    """

    def __init__(self, root: Path, version: str, occupancy: OccupancyLayout | None = None) -> None:
        self._root, self._version, self._occupancy = root, version, occupancy
        if (root / version).exists():
            raise DataError(f"{root / version}: is there already", "choose another folder, or delete this one")
        self._scene: _Scene | None = None
        self._splits: dict[str, list[str]] = {}
        names = ("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "instance", "sample_annotation")
        self._tables: dict[str, list[Record]] = {name: [] for name in (*names, "log", "map", "lidarseg")}
        self._channels: dict[str, Modality] = dict(CHANNELS)

    def __enter__(self) -> NuScenesWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def start_scene(
        self,
        name: str,
        map_from_ego: Callable[[int], Pose],
        split: str | None = None,
        location: str = "",
        description: str = "",
        map_mask: Array | None = None,
    ) -> None:
        """Samples and sweeps that follow belong to this scene.

        Args:
            name: unique in the version, as `scene-0103`.
            map_from_ego: the car's true pose at any stamp in nanoseconds.
            split: entered in `splits.json`, which this reader and the devkit (1.2) know; None enters none.
            location: written to the log.
            description: written to the scene.
            map_mask: (H, W) uint8 picture of the drivable surface, 0.1 m a pixel, 255 drivable, its lower left corner
                the map's origin; None is a blank one.
        """
        self._end_scene()
        if any(scene["name"] == name for scene in self._tables["scene"]):
            raise ValueError(f"scene {name!r} is written already")
        log = {"token": _token("log", name), "logfile": name, "vehicle": "ego", "location": location}
        self._add_map(log["token"], np.zeros((64, 64), np.uint8) if map_mask is None else map_mask)
        self._scene = _Scene(name, _token("scene", name), log, description, map_from_ego)
        if split is not None:
            self._splits.setdefault(split, []).append(name)

    def add_sample(self, sample: Sample, truth: Truth | None = None) -> None:
        """A key frame: single-sweep clouds and images whose `ego_from_sensor` maps into ego at the sample's stamp.

        Raises:
            ValueError: samples out of order, a stamp that is not LIDAR_TOP's, an accumulated cloud, a mount that moves
                within the scene, boxes without `track_id`, names that nuScenes does not have.
        """
        scene = self._open_scene()
        lidar = sample.lidars.get(role_of(ANCHOR_CHANNEL))
        if lidar is not None and lidar.stamp_ns != sample.stamp_ns:
            raise ValueError(f"sample stamp {sample.stamp_ns} is not its LiDAR's, {lidar.stamp_ns}")
        stamp_us = _microseconds(sample.stamp_ns)
        if scene.samples and stamp_us <= scene.samples[-1]["timestamp"]:
            raise ValueError(f"sample at {stamp_us} us after one at {scene.samples[-1]['timestamp']} us")
        token = _token_or_own(sample.token, "sample", scene.name, stamp_us)
        scene.samples.append({"token": token, "timestamp": stamp_us, "scene_token": scene.token})
        scene.key_frame = None
        readings = self._add_readings(sample, token)
        if truth is None:
            return
        if truth.boxes is not None:
            self._add_boxes(truth.boxes, sample, token)
        if ANCHOR_CHANNEL in readings:
            self._add_lidar_truth(truth, readings[ANCHOR_CHANNEL], token)

    def add_occupancy(self, layout: OccupancyLayout, occupancy: OccupancyGrid3D) -> None:
        """Occupancy of the sample just added, in one more benchmark's layout. ValueError for a sample without LiDAR."""
        names = self._open_scene().key_frame
        if names is None:
            raise ValueError("occupancy files are named after a sample's LiDAR: add a sample that has one first")
        write_occupancy(layout, occupancy_path(layout, self._root, names), occupancy)

    def add_sweep(self, sample: Sample) -> None:
        """Readings between key frames; they belong to the key frame that follows, the last ones to the last."""
        self._open_scene()
        self._add_readings(sample, None)

    def close(self) -> None:
        """End the last scene and write the tables and `splits.json`."""
        self._end_scene()
        self._check_tokens()
        tables = self._tables | _constant_tables(self._channels, bool(self._tables["lidarseg"]))
        if not tables["lidarseg"]:
            del tables["lidarseg"]
        folder = self._root / self._version
        folder.mkdir(parents=True)
        for name, records in tables.items():
            (folder / f"{name}.json").write_text(json.dumps(records, indent=0), encoding="utf-8")
        if self._splits:
            (folder / "splits.json").write_text(json.dumps(self._splits, indent=0), encoding="utf-8")

    def _add_map(self, log_token: str, mask: Array) -> None:
        """The picture of one log's map, and its record."""
        token = _token("map", self._version, log_token)
        path = self._root / "maps" / f"{token}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", mask)[1].tobytes())
        filename = path.relative_to(self._root).as_posix()
        self._tables["map"].append(
            {"token": token, "category": "semantic_prior", "filename": filename, "log_tokens": [log_token]}
        )

    def _open_scene(self) -> _Scene:
        if self._scene is None:
            raise ValueError("no scene is open: call start_scene first")
        return self._scene

    def _add_readings(self, sample: Sample, sample_token: str | None) -> dict[str, Record]:
        """Every sensor's file, pose and mount; channel -> its record of sample_data."""
        readings: dict[str, Record] = {}
        for role, cloud in sample.lidars.items():
            record = self._add_reading("lidar", role, cloud.ego_from_sensor, cloud.stamp_ns, sample, sample_token)
            single = _single_sweep(cloud)
            write_lidar(self._root / record["filename"], single.xyz, single.field("intensity"), single.field("ring"))
            readings[channel_of("lidar", role)] = record
        for role, cloud in sample.radars.items():
            record = self._add_reading("radar", role, cloud.ego_from_sensor, cloud.stamp_ns, sample, sample_token)
            write_radar(self._root / record["filename"], _radar_points(_single_sweep(cloud)))
            readings[channel_of("radar", role)] = record
        for role, image in sample.cameras.items():
            record = self._add_reading(
                "camera", role, image.ego_from_camera, image.stamp_ns, sample, sample_token, image
            )
            write_image(self._root / record["filename"], image.rgb)
            readings[channel_of("camera", role)] = record
        return readings

    def _add_reading(
        self,
        modality: Modality,
        role: str,
        ego_from_sensor: Pose,
        stamp_ns: int,
        sample: Sample,
        sample_token: str | None,
        image: CameraImage | None = None,
    ) -> Record:
        """The record of one sensor file, with the car's pose when it was read and the sensor's mount."""
        scene, channel = self._open_scene(), channel_of(modality, role)
        stamp_us = _microseconds(stamp_ns)
        map_from_ego = scene.map_from_ego(stamp_ns)
        mount = map_from_ego.inverse() @ scene.map_from_ego(sample.stamp_ns) @ ego_from_sensor
        self._check_mount(scene, channel, mount, np.zeros((0, 0)) if image is None else image.intrinsic)
        self._channels[channel] = modality
        suffix = {"lidar": "pcd.bin", "radar": "pcd", "camera": "jpg"}[modality]
        folder = "sweeps" if sample_token is None else "samples"
        token = _token("sample_data", scene.name, channel, stamp_us)
        height, width = (0, 0) if image is None else image.rgb.shape[:2]
        record = {
            "token": token,
            "sample_token": sample_token or "",
            "ego_pose_token": token,
            "calibrated_sensor_token": _token("calibrated_sensor", scene.name, channel),
            "timestamp": stamp_us,
            "fileformat": suffix.split(".")[0],
            "is_key_frame": sample_token is not None,
            "height": height,
            "width": width,
            "filename": f"{folder}/{channel}/{scene.log['logfile']}__{channel}__{stamp_us}.{suffix}",
        }
        scene.data.setdefault(channel, []).append(record)
        self._tables["ego_pose"].append({"token": token, "timestamp": stamp_us, **_pose_record(map_from_ego)})
        return record

    def _check_mount(self, scene: _Scene, channel: str, mount: Pose, intrinsic: Array) -> None:
        """The mount of a channel's first reading stands for the scene; a later one must agree."""
        if channel not in scene.mounts:
            scene.mounts[channel] = mount, intrinsic
            return
        known, known_intrinsic = scene.mounts[channel]
        moved = float(np.abs(known.matrix - mount.matrix).max())
        if moved > _SAME_MOUNT or not np.array_equal(known_intrinsic, intrinsic):
            raise ValueError(
                f"{scene.name}: {channel} moved on the car by {moved:.3g} m (or its intrinsic changed) since its first "
                "reading: ego_from_sensor must hold the motion between the sensor's and the sample's stamp that "
                "map_from_ego gives"
            )

    def _add_boxes(self, boxes: Boxes3D, sample: Sample, sample_token: str) -> None:
        scene = self._open_scene()
        map_from_ego = scene.map_from_ego(sample.stamp_ns)
        if not len(boxes):
            return
        if boxes.track_id is None:
            raise ValueError("boxes have no track_id; nuScenes links the annotations of an object")
        lidar_points = _counts(boxes.num_points, boxes, sample.lidars)
        radar_points = _counts(boxes.num_radar_points, boxes, sample.radars)
        for m in range(len(boxes)):
            instance = _token_or_own(str(boxes.track_id[m]), "instance", scene.name)
            name = boxes.classes[boxes.label[m]]
            if name not in DETECTION_CLASSES:
                raise ValueError(f"class {name!r} is none of {', '.join(DETECTION_CLASSES)}")
            if scene.categories.setdefault(instance, name) != name:
                raise ValueError(f"track {boxes.track_id[m]} is {name!r} and was {scene.categories[instance]!r}")
            attribute = "" if boxes.attribute is None else str(boxes.attribute[m])
            if attribute and attribute not in ATTRIBUTES:
                raise ValueError(f"attribute {attribute!r} is none of {', '.join(ATTRIBUTES)}")
            length, width, height = boxes.size[m].tolist()
            level = 0 if boxes.visibility is None else int(boxes.visibility[m])
            scene.tracks.setdefault(instance, []).append(
                {
                    "token": _token("annotation", sample_token, instance),
                    "sample_token": sample_token,
                    "instance_token": instance,
                    "visibility_token": str(level) if level else "",
                    "attribute_tokens": [_token("attribute", attribute)] if attribute else [],
                    "size": [width, length, height],
                    **_pose_record(map_from_ego @ Pose.from_yaw(float(boxes.yaw[m]), boxes.center[m])),
                    "num_lidar_pts": int(lidar_points[m]),
                    "num_radar_pts": int(radar_points[m]),
                }
            )

    def _add_lidar_truth(self, truth: Truth, lidar: Record, sample_token: str) -> None:
        """Point labels and occupancy, whose files are named after the LiDAR's key frame."""
        scene = self._open_scene()
        if (label := truth.point_label.get(role_of(ANCHOR_CHANNEL))) is not None:
            path = self._root / "lidarseg" / self._version / f"{lidar['token']}_lidarseg.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_lidarseg_values(label).tobytes())
            self._tables["lidarseg"].append(
                {
                    "token": lidar["token"],
                    "sample_data_token": lidar["token"],
                    "filename": path.relative_to(self._root).as_posix(),
                }
            )
        scene.key_frame = KeyFrameNames(scene.name, scene.token, sample_token, lidar["token"], lidar["filename"])
        if self._occupancy is not None and truth.occupancy is not None:
            self.add_occupancy(self._occupancy, truth.occupancy)

    def _end_scene(self) -> None:
        """Link the scene's records and put them into the tables."""
        if (scene := self._scene) is None:
            return
        if not scene.samples:
            raise ValueError(f"scene {scene.name!r} has no sample")
        self._scene = None
        _link(scene.samples)
        stamps = [sample["timestamp"] for sample in scene.samples]
        for records in scene.data.values():
            records.sort(key=lambda record: record["timestamp"])
            for record in records:
                following = min(int(np.searchsorted(stamps, record["timestamp"])), len(stamps) - 1)
                record["sample_token"] = record["sample_token"] or scene.samples[following]["token"]
            _link(records)
            self._tables["sample_data"] += records
        for track in scene.tracks.values():
            _link(track)
            self._tables["sample_annotation"] += track
        self._tables["instance"] += [_instance(scene.categories[token], track) for token, track in scene.tracks.items()]
        self._tables["sample"] += scene.samples
        date = datetime.fromtimestamp(stamps[0] * 1e-6, timezone.utc).date().isoformat()
        self._tables["log"].append(scene.log | {"date_captured": date})
        self._tables["scene"].append(
            {
                "token": scene.token,
                "log_token": scene.log["token"],
                "nbr_samples": len(scene.samples),
                "first_sample_token": scene.samples[0]["token"],
                "last_sample_token": scene.samples[-1]["token"],
                "name": scene.name,
                "description": scene.description,
            }
        )
        self._tables["calibrated_sensor"] += [
            {
                "token": _token("calibrated_sensor", scene.name, channel),
                "sensor_token": _token("sensor", channel),
                **_pose_record(mount),
                "camera_intrinsic": intrinsic.tolist(),
            }
            for channel, (mount, intrinsic) in scene.mounts.items()
        ]

    def _check_tokens(self) -> None:
        """Tokens are made of names; the same name twice (a stamp, a caller's token) would merge two records."""
        for name, records in self._tables.items():
            token, times = Counter(record["token"] for record in records).most_common(1)[0] if records else ("", 1)
            if times > 1:
                raise ValueError(f"{times} records of {name} have the token {token}: the same reading or token twice")


def _microseconds(stamp_ns: int) -> int:
    return (stamp_ns + 500) // 1000


def _pose_record(pose: Pose) -> Record:
    x, y, z, w = pose.quaternion.tolist()
    return {"translation": pose.translation.tolist(), "rotation": [w, x, y, z]}


def _link(records: list[Record]) -> None:
    """`prev` and `next` of records in time order."""
    tokens = ["", *(record["token"] for record in records), ""]
    for record, previous, following in zip(records, tokens, tokens[2:], strict=False):
        record |= {"prev": previous, "next": following}


def _instance(label: str, track: list[Record]) -> Record:
    return {
        "token": track[0]["instance_token"],
        "category_token": _token("category", _CATEGORY_OF_DETECTION[label]),
        "nbr_annotations": len(track),
        "first_annotation_token": track[0]["token"],
        "last_annotation_token": track[-1]["token"],
    }


def _single_sweep(cloud: PointCloud) -> PointCloud:
    if "sweep" in cloud.fields and cloud.fields["sweep"].any():
        raise ValueError(f"a cloud of {cloud.fields['sweep'].max() + 1} sweeps: sweeps are written one by one")
    return cloud


def _radar_points(cloud: PointCloud) -> Array:
    """(N,) RADAR_POINT; ValueError for a missing field, or a value that its type cannot hold."""
    points = np.zeros(len(cloud), RADAR_POINT)
    points["x"], points["y"], points["z"] = cloud.xyz.T
    for name in (RADAR_POINT.names or ())[3:]:
        states = name in RADAR_STATES and name not in cloud.fields
        values = np.full(len(cloud), RADAR_STATES[name]) if states else cloud.field(name)
        points[name] = values
        if RADAR_POINT[name].kind == "i" and (points[name] != values).any():
            raise ValueError(f"radar field {name!r} has values that are no {RADAR_POINT[name]}")
    return points


def _counts(given: Array | None, boxes: Boxes3D, clouds: Mapping[str, PointCloud]) -> Array:
    """(M,) points inside each box: as given, or counted in the clouds."""
    if given is not None:
        return given
    counts = [points_in_boxes(cloud.xyz_ego(), boxes).sum(1) for cloud in clouds.values()]
    return np.sum(counts, axis=0, dtype=np.int64) if counts else np.zeros(len(boxes), np.int64)


def _lidarseg_values(label: Segmentation) -> Array:
    """(N,) uint8 category indices; what is ignored is noise."""
    unknown = [name for name in label.classes if name not in LIDARSEG_CLASSES]
    if unknown:
        raise ValueError(f"point label class {unknown[0]!r} is none of {', '.join(LIDARSEG_CLASSES)}")
    value = np.zeros(256, np.uint8)
    value[: len(label.classes)] = _LIDARSEG_VALUE[[LIDARSEG_CLASSES.index(name) for name in label.classes]]
    value[IGNORE_LABEL] = _LIDARSEG_VALUE[0]
    return value[label.label]


def _constant_tables(channels: Mapping[str, Modality], lidarseg: bool) -> dict[str, list[Record]]:
    """The tables that say the same in every version; with lidarseg the category table carries its indices."""
    return {
        "category": [
            {"token": _token("category", name), "name": name, "description": ""}
            | ({"index": CATEGORIES.index(name)} if lidarseg else {})
            for name in (CATEGORIES if lidarseg else OBJECT_CATEGORIES)
        ],
        "attribute": [{"token": _token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES],
        "visibility": [
            {"token": str(i), "level": level, "description": f"{level[1:]} % of the object are visible"}
            for i, level in enumerate(VISIBILITY_LEVELS, 1)
        ],
        "sensor": [
            {"token": _token("sensor", channel), "channel": channel, "modality": modality}
            for channel, modality in channels.items()
        ],
    }
