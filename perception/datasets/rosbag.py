"""rosbag2 (MCAP or sqlite3) as a data set: a sample for each message of the anchor sensor, as the live node makes them.

Opening reads the bag once, headers only (`rosbag_index`); then a sample is read by the log times of its own messages,
and nothing of the bag is kept in memory but stamps, transforms, calibrations, odometry, IMU and GNSS readings.
Matching is the Synchronizer's, decoding `perception.assembly`'s: the ones that the node uses.

The truth is the pose in the map, where /tf has one, and the boxes and voxels that may lie beside the bag.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from perception.assembly import assemble
from perception.datasets.rosbag_file import (
    CAMERA_INFO,
    COMPRESSED_IMAGE,
    GNSS,
    IMAGE,
    IMU,
    ODOMETRY,
    POINT_CLOUD,
    BagFile,
    read_header,
)
from perception.datasets.rosbag_index import BagIndex, index_bag, small_topics
from perception.datasets.rosbag_truth import read_truth
from perception.datasets.rosbag_writer import RosbagWriter as RosbagWriter
from perception.datasets.sensor_files import select_roles
from perception.errors import ConfigError, DataError
from perception.frames import FrameError, FrameTree
from perception.sync import Counts
from perception.types import Array, Gnss, Imu, Odometry, Sample, Truth
from perception.vehicle import CameraSensor, Sensors, VehicleConfig

_IMAGES = (IMAGE, COMPRESSED_IMAGE)
_NAMED = {
    "lidars": (re.compile(r"/lidar_(\w+)", re.IGNORECASE), (POINT_CLOUD,)),
    "radars": (re.compile(r"/radar_(\w+)", re.IGNORECASE), (POINT_CLOUD,)),
    "cameras": (re.compile(r"/cam_(\w+)/image_rect_compressed", re.IGNORECASE), (COMPRESSED_IMAGE,)),
}
"""Names of foxglove's nuscenes2mcap (older ones in capitals), which the writer has too."""


class RosbagConfig(VehicleConfig):
    """What of a bag is read.

    Attributes:
        root: the bag's folder, or its .mcap or .db3 file.
        sensors: topics by role; without any, those named as the writer names them.
        lidars, cameras, radars: roles to read; None is all of them, () none.
    """

    name: Literal["rosbag"] = "rosbag"
    root: Path
    lidars: tuple[str, ...] | None = None
    cameras: tuple[str, ...] | None = None
    radars: tuple[str, ...] | None = None


class Rosbag:
    """The samples of a bag in the order of its log.

    Clouds carry `time_lag` and `sweep`, even of one sweep. A sample has what its `index.rows` has; why a sensor is
    absent is counted in `counts` (stale, missing, out of order) and `no_transform`.

    Attributes:
        config: with the sensors that were found.
        index: all but clouds and images.
        dropped_nonfinite: channel -> points dropped in this process because a number was not finite.
        tokens: each sample's stamp in nanoseconds as text; after a clock jump followed by `-` and the epoch.

    Raises:
        ConfigError: a role or an anchor that is not there.
        DataError: a bag that is missing, damaged or unfinished, a topic that it does not have or of another type.
        FrameError: a sensor that no transform connects to the vehicle.
    """

    def __init__(self, config: RosbagConfig) -> None:
        self._bag = BagFile(config.root)
        self.config = _with_sensors(self._bag, config)
        _check_topics(self._bag, self.config)
        self.index: BagIndex = index_bag(self._bag, self.config)
        self.dropped_nonfinite: Counter[str] = Counter()
        self.tokens = tuple(
            f"{stamp}-{epoch}" if epoch else str(stamp)
            for stamp, epoch in zip(self.index.stamp_ns.tolist(), self.index.epoch.tolist(), strict=True)
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        messages: dict[str, list[Any]] = {}
        for channel, row in self._rows(i):
            readings = self.index.readings[channel]
            raw = self._read(readings.topic, int(readings.log_ns[row]), int(readings.stamp_ns[row]))
            messages.setdefault(channel, []).append(self._bag.decode(readings.topic, raw))
        return self._sample(i, messages)

    def truth(self, i: int) -> Truth | None:
        """The pose in the map, where the transforms reach from there to the vehicle at this stamp, and what lies beside
        the bag; None where there is nothing at all.
        """
        stamp = int(self.index.stamp_ns[i])
        known = read_truth(self.config.root, stamp)
        tree = self.index.transforms.tree(int(self.index.epoch[i]), stamp, stamp)
        try:
            return replace(known, map_from_ego=tree.lookup(self.config.map_frame, self.config.base_frame, stamp))
        except FrameError:
            return known if known.boxes is not None or known.occupancy is not None else None

    def scene_name(self, i: int) -> str:
        """The bag's name; after a clock jump followed by `-` and the epoch."""
        epoch = int(self.index.epoch[i])
        return f"{self.config.root.stem}-{epoch}" if epoch else self.config.root.stem

    def used(self, i: int) -> dict[str, tuple[int, ...]]:
        """Channel -> stamps of its messages in sample i, newest first."""
        found: dict[str, tuple[int, ...]] = {}
        for channel, row in self._rows(i):
            found[channel] = (*found.get(channel, ()), int(self.index.readings[channel].stamp_ns[row]))
        return found

    def play(self) -> Iterator[Sample]:
        """All samples in one pass over the bag: every message is read once, however many sweeps overlap."""
        last_use = {channel: _last_use(rows) for channel, rows in self.index.rows.items()}
        channels = {readings.topic: channel for channel, readings in self.index.readings.items()}
        seen = dict.fromkeys(last_use, -1)
        held: dict[tuple[str, int], Any] = {}
        i = 0
        for topic, _, raw in self._bag.messages(channels):
            channel = channels[topic]
            seen[channel] += 1
            if last_use[channel].get(seen[channel], -1) < i:
                continue
            held[channel, seen[channel]] = self._bag.decode(topic, raw)
            while i < len(self) and all(key in held for key in self._rows(i)):
                messages: dict[str, list[Any]] = {}
                for key in self._rows(i):
                    messages.setdefault(key[0], []).append(held[key])
                yield self._sample(i, messages)
                i += 1
                held = {key: message for key, message in held.items() if last_use[key[0]][key[1]] >= i}

    @property
    def counts(self) -> Mapping[str, Counts]:
        """Channel -> what became of its messages, by reason."""
        return self.index.counts

    @property
    def no_transform(self) -> Mapping[str, int]:
        """Channel -> how often its reading was of no use because no transform covers its stamp."""
        return self.index.no_transform

    def _rows(self, i: int) -> list[tuple[str, int]]:
        """The messages of a sample as channel and row, newest first within a channel."""
        return [(channel, row) for channel, rows in self.index.rows.items() for row in rows[i].tolist() if row >= 0]

    def _read(self, topic: str, log_ns: int, stamp_ns: int) -> bytes:
        for _, _, raw in self._bag.messages({topic}, log_ns, log_ns + 1):
            if read_header(raw).stamp_ns == stamp_ns:
                return raw
        raise DataError(
            f"{self.config.root}: the message of {topic} stamped {stamp_ns} ns is not there any more",
            "the bag has changed since it was opened: open it again",
        )

    def _sample(self, i: int, messages: Mapping[str, Sequence[Any]]) -> Sample:
        stamp, epoch = int(self.index.stamp_ns[i]), int(self.index.epoch[i])
        stamps = [stamp, *(int(self.index.readings[channel].stamp_ns[row]) for channel, row in self._rows(i))]
        tree = self.index.transforms.tree(epoch, min(stamps), max(stamps))
        cameras = {}
        for channel, calibrations in self.index.cameras.items():
            if channel in messages:
                log_ns = self.index.readings[channel].log_ns[self.index.rows[channel][i, 0]]
                known = [c.model for c in calibrations if c.log_ns <= log_ns]
                cameras[channel] = known[-1] if known else calibrations[0].model
        sample, dropped = assemble(self.config, stamp, messages, tree, cameras)
        self.dropped_nonfinite.update(dropped)
        imu, odometry, gnss = self._small_readings(i, tree)
        return replace(sample, imu=imu, odometry=odometry, gnss=gnss, token=self.tokens[i])

    def _small_readings(self, i: int, tree: FrameTree) -> tuple[Imu | None, Odometry | None, Gnss | None]:
        """What came after the previous sample of the epoch, up to this one."""
        stamp, epoch = int(self.index.stamp_ns[i]), int(self.index.epoch[i])
        small = self.index.small.get(epoch)
        if small is None:
            return None, None, None
        follows = i > 0 and self.index.epoch[i - 1] == epoch
        after = int(self.index.stamp_ns[i - 1]) if follows else np.iinfo(np.int64).min

        def between(stamps: Array) -> slice:
            begin, end = np.searchsorted(stamps, [after, stamp], "right").tolist()
            return slice(begin, end)

        imu = odometry = None
        if (
            small.odometry is not None
            and (found := small.odometry.stamp_ns[span := between(small.odometry.stamp_ns)]).size
        ):
            odometry = Odometry(found, small.odometry.linear_velocity[span], small.odometry.angular_velocity[span])
        if small.imu is not None and (found := small.imu.stamp_ns[span := between(small.imu.stamp_ns)]).size:
            to_ego = tree.lookup(self.config.base_frame, small.imu_frame, stamp).rotation.T
            imu = Imu(found, small.imu.angular_velocity[span] @ to_ego, small.imu.linear_acceleration[span] @ to_ego)
        fixes = [fix for fix in small.gnss if after < fix.stamp_ns <= stamp]
        return imu, odometry, fixes[-1] if fixes else None


def _last_use(rows: Array) -> dict[int, int]:
    """Row -> the last sample that needs it."""
    return {row: i for i, mine in enumerate(rows.tolist()) for row in mine if row >= 0}


def _with_sensors(bag: BagFile, config: RosbagConfig) -> RosbagConfig:
    """The configuration with the sensors that are read, told from the topics' names where it has none."""
    sensors = config.sensors if config.sensors.channels else _named_sensors(bag)
    asked = {"lidars": config.lidars, "radars": config.radars, "cameras": config.cameras}
    chosen = {}
    for kind, roles in asked.items():
        known = getattr(sensors, kind)
        chosen[kind] = {role: known[role] for role in select_roles(roles, tuple(known), kind)}
    found = config.model_copy(update={"sensors": Sensors(**chosen)})
    if not found.sensors.channels:
        raise ConfigError(f"{bag.path}: no sensor is to be read", f"there are: {', '.join(sensors.channels)}")
    return found


def _named_sensors(bag: BagFile) -> Sensors:
    found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in _NAMED}
    for kind, (pattern, types) in _NAMED.items():
        for topic in bag.topics_of(*types):
            if named := pattern.fullmatch(topic):
                rectified = {"rectified": True} if kind == "cameras" else {}
                found[kind][named[1].lower()] = {"topic": topic, **rectified}
    sensors = Sensors.model_validate(found)
    if not sensors.channels:
        clouds, images = bag.topics_of(POINT_CLOUD), bag.topics_of(*_IMAGES)
        parts = [f"lidars: {{top: {{topic: {clouds[0]}}}}}"] if clouds else []
        parts += [f"cameras: {{front: {{topic: {images[0]}}}}}"] if images else []
        raise DataError(
            f"{bag.path}: no topic is named like /lidar_top, /radar_front or /cam_front/image_rect_compressed; "
            f"clouds: {', '.join(clouds) or 'none'}; images: {', '.join(images) or 'none'}",
            f"say which is what, e.g.  sensors: {{{', '.join(parts)}}}" if parts else "record the sensors' topics",
        )
    return sensors


def _check_topics(bag: BagFile, config: RosbagConfig) -> None:
    """DataError for a topic that is not there or is of another type, with those that would do."""
    topics = [sensor.topic for sensor in config.sensors.channels.values()]
    if twice := [topic for topic in topics if topics.count(topic) > 1]:
        raise ConfigError(f"sensors: topic {twice[0]!r} stands twice", "each sensor has a topic of its own")
    keys = {"lidars": (POINT_CLOUD,), "radars": (POINT_CLOUD,), "cameras": _IMAGES}
    for kind, types in keys.items():
        for role, sensor in getattr(config.sensors, kind).items():
            _check_topic(bag, sensor.topic, types, f"sensors.{kind}.{role}.topic")
            if isinstance(sensor, CameraSensor):
                _check_topic(bag, sensor.camera_info, (CAMERA_INFO,), f"sensors.{kind}.{role}.info_topic")
    small = {ODOMETRY: "odometry_topic", IMU: "imu_topic", GNSS: "gnss_topic"}
    for kind, topic in small_topics(config).items():
        if topic in bag.topics:
            _check_topic(bag, topic, (kind,), small[kind])


def _check_topic(bag: BagFile, topic: str, types: tuple[str, ...], key: str) -> None:
    if topic in bag.topics and bag.topics[topic].type in types:
        return
    wrong = f"has {bag.topics[topic].type}" if topic in bag.topics else "is not in the bag"
    good = bag.topics_of(*types)
    listed = "\n  ".join(f"--set dataset.{key}={name}" for name in good)
    raise DataError(
        f"{bag.path}: topic {topic!r} {wrong}; {key} needs {' or '.join(types)}",
        f"choose one:\n  {listed}" if good else f"no topic has it; there are: {', '.join(bag.topics) or 'none'}",
    )
