"""What a bag holds, found in one pass: stamps, transforms, calibrations, and which messages make a sample.

Clouds and images are not decoded; of each only the header is read. The set of each sample comes from the Synchronizer,
fed in the order of the log as the live node is fed by its topics. A clock that jumps back (a bag recorded of a looping
one) begins a new epoch, and stamps of different epochs never meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from perception.assembly import covered_readings
from perception.datasets.rosbag_file import (
    GNSS,
    IMU,
    ODOMETRY,
    TF_STATIC_TOPIC,
    TF_TOPIC,
    BagFile,
    read_header,
)
from perception.datasets.rosbag_transforms import TimedEdge, Transforms
from perception.decode import decode_camera_info, stamp_ns
from perception.errors import DataError
from perception.frames import FrameError
from perception.readings import decode_gnss, decode_imu, decode_odometry, decode_transform
from perception.rectify import CameraModel
from perception.sync import ClockJump, Counts, SyncedSet, Synchronizer
from perception.types import Array, Gnss, Imu, Odometry, Pose
from perception.vehicle import VehicleConfig


@dataclass(frozen=True)
class Readings:
    """One sensor's messages in the order of the log.

    Attributes:
        topic: theirs.
        frame: of their headers, or what the configuration puts in its place.
        log_ns, stamp_ns: (N,) int64, when recorded and the headers' stamps.
    """

    topic: str
    frame: str
    log_ns: Array
    stamp_ns: Array


class CameraCalibration(NamedTuple):
    """A camera's model from a log time on."""

    log_ns: int
    model: CameraModel


@dataclass(frozen=True)
class SmallReadings:
    """Odometry, IMU and GNSS of one epoch, in order of stamps; `imu` along its own axes, in `imu_frame`."""

    odometry: Odometry | None = None
    imu: Imu | None = None
    imu_frame: str = ""
    gnss: tuple[Gnss, ...] = ()


@dataclass(frozen=True)
class BagIndex:
    """A bag without its clouds and images.

    Attributes:
        stamp_ns, epoch: (S,) int64, of each sample.
        rows: channel -> (S, k) int64, the sensor's messages in a sample, newest first; -1 where there is none.
        readings: channel -> its messages.
        transforms: of /tf and /tf_static.
        cameras: channel -> its calibrations.
        small: by epoch.
        counts: channel -> what became of its messages in the Synchronizer.
        no_transform: channel -> sets that it is missing from because no transform covers its stamp; of the anchor,
            sets that are no samples for this reason.
    """

    stamp_ns: Array
    epoch: Array
    rows: Mapping[str, Array]
    readings: Mapping[str, Readings]
    transforms: Transforms
    cameras: Mapping[str, tuple[CameraCalibration, ...]]
    small: Mapping[int, SmallReadings]
    counts: Mapping[str, Counts]
    no_transform: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.stamp_ns)


@dataclass
class _Scan:
    """What the pass over the bag has gathered."""

    sets: list[SyncedSet] = field(default_factory=list)
    log_ns: dict[str, list[int]] = field(default_factory=dict)  # by channel, as the next two
    stamps: dict[str, list[int]] = field(default_factory=dict)
    frames: dict[str, str] = field(default_factory=dict)
    static: dict[str, tuple[str, Pose]] = field(default_factory=dict)
    timed: dict[tuple[str, str], list[tuple[int, int, tuple[float, ...]]]] = field(default_factory=dict)
    newest_ns: dict[str, int] = field(default_factory=dict)  # of /tf, by child
    infos: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)  # by topic
    small: dict[tuple[int, str], list[bytes]] = field(default_factory=dict)  # by epoch and message type


def small_topics(config: VehicleConfig) -> dict[str, str]:
    """Message type -> topic of the small readings, whether or not a bag has it."""
    topics = {ODOMETRY: config.odometry_topic, IMU: config.imu_topic, GNSS: config.gnss_topic}
    return {kind: topic for kind, topic in topics.items() if topic is not None}


def index_bag(bag: BagFile, config: VehicleConfig) -> BagIndex:
    """One pass over a bag whose topics are known to be those of `config`.

    Raises:
        DataError: a damaged message, a sensor whose frame changes, no calibration, or no sample at all.
        FrameError: a sensor that no transform connects to the vehicle.
    """
    sync = Synchronizer(config.sync)
    scan = _scan(bag, config, sync)
    channels = config.sensors.channels
    readings = {
        channel: Readings(
            sensor.topic,
            sensor.frame or scan.frames.get(channel, ""),
            np.array(scan.log_ns.get(channel, ()), np.int64),
            np.array(scan.stamps.get(channel, ()), np.int64),
        )
        for channel, sensor in channels.items()
    }
    sets = scan.sets
    stamps = np.array([synced.stamp_ns for synced in sets], np.int64)
    epoch = np.array([synced.epoch for synced in sets], np.int64)
    rows = {channel: _rows(sets, channel, config.sweeps) for channel in channels}
    transforms = Transforms(scan.static, tuple(_edges(scan)))
    covered = _mask_uncovered(config, transforms, readings, stamps, epoch, rows)
    no_transform = {channel: int(lost.sum()) for channel, lost in covered.items()}
    keep = ~covered[config.sync.anchor]
    if not keep.any():
        raise _no_sample(bag, config, sync)
    return BagIndex(
        stamps[keep],
        epoch[keep],
        {channel: values[keep] for channel, values in rows.items()},
        readings,
        transforms,
        _calibrations(bag, config, scan),
        _small_readings(bag, config, scan),
        sync.counts,
        no_transform,
    )


def _scan(bag: BagFile, config: VehicleConfig, sync: Synchronizer) -> _Scan:
    scan = _Scan()
    channel_of = {sensor.topic: channel for channel, sensor in config.sensors.channels.items()}
    infos = {camera.camera_info for camera in config.sensors.cameras.values()}
    small = {topic: kind for kind, topic in small_topics(config).items() if topic in bag.topics}
    epoch = 0
    for topic, log_ns, raw in bag.messages({TF_TOPIC, TF_STATIC_TOPIC, *channel_of, *infos, *small}):
        if topic in (TF_TOPIC, TF_STATIC_TOPIC):
            _take_transforms(bag, topic, raw, scan, sync)
        elif topic in channel_of:
            scan.sets += _take_reading(bag, channel_of[topic], topic, log_ns, raw, scan, sync)
        elif topic in infos:
            known = scan.infos.setdefault(topic, [])
            if not known or known[-1][1][12:] != raw[12:]:  # all but the stamp
                known.append((log_ns, raw))
        else:
            scan.small.setdefault((sync.epoch, small[topic]), []).append(raw)
        if sync.epoch != epoch:
            epoch = sync.epoch
            scan.newest_ns.clear()
    scan.sets += sync.flush()
    return scan


def _take_reading(
    bag: BagFile, channel: str, topic: str, log_ns: int, raw: bytes, scan: _Scan, sync: Synchronizer
) -> list[SyncedSet]:
    """Enter a cloud or image by its row; the sets that it completes."""
    try:
        header = read_header(raw)
    except ValueError as error:
        raise DataError(
            f"{bag.path}: a message of {topic} is damaged: {error}", "record or copy the bag again"
        ) from None
    frame = scan.frames.setdefault(channel, header.frame)
    if header.frame != frame:
        raise DataError(
            f"{bag.path}: messages of {topic} come from frames {frame!r} and {header.frame!r}",
            f"a topic is one sensor; where the frame_id is wrong, set the frame of {channel}",
        )
    stamps = scan.stamps.setdefault(channel, [])
    stamps.append(header.stamp_ns)
    scan.log_ns.setdefault(channel, []).append(log_ns)
    return sync.push(channel, header.stamp_ns, len(stamps) - 1)


def _take_transforms(bag: BagFile, topic: str, raw: bytes, scan: _Scan, sync: Synchronizer) -> None:
    """Enter the transforms of a message; one that falls far back is a jump of the clock."""
    for transform in bag.decode(topic, raw).transforms:
        parent, child, stamp, numbers = decode_transform(transform, f"{bag.path}: {topic}")
        if topic == TF_STATIC_TOPIC:
            scan.static[child] = parent, Pose.from_quaternion(numbers[3:], numbers[:3])
            continue
        newest = scan.newest_ns.get(child, stamp)
        if newest - stamp > sync.config.clock_jump_s * 1e9:
            sync.clock_jumped(ClockJump(topic, newest, stamp))
            scan.newest_ns.clear()
        scan.newest_ns[child] = max(stamp, scan.newest_ns.get(child, stamp))
        scan.timed.setdefault((parent, child), []).append((sync.epoch, stamp, numbers))


def _edges(scan: _Scan) -> Iterator[TimedEdge]:
    for (parent, child), readings in scan.timed.items():
        readings.sort(key=lambda reading: reading[:2])
        epoch, stamps, numbers = zip(*readings, strict=True)
        yield TimedEdge(parent, child, np.array(epoch), np.array(stamps, np.int64), np.array(numbers))


def _rows(sets: list[SyncedSet], channel: str, sweeps: int) -> Array:
    """(S, sweeps) rows of a channel's messages in each set, -1 where there is none."""
    rows = np.full((len(sets), sweeps), -1, np.int64)
    for i, synced in enumerate(sets):
        if channel in synced.matches:
            found = [synced.matches[channel], *synced.past[channel]][:sweeps]
            rows[i, : len(found)] = [match.payload for match in found]
    return rows


def _mask_uncovered(
    config: VehicleConfig,
    transforms: Transforms,
    readings: Mapping[str, Readings],
    stamps: Array,
    epoch: Array,
    rows: Mapping[str, Array],
) -> dict[str, Array]:
    """Set to -1, in place, the rows that no transform covers; channel -> (S,) sets that lost their key reading so.

    Raises:
        FrameError: a channel that no transform covers at any stamp.
    """
    lost = {}
    for channel, mine in rows.items():
        used = mine >= 0
        errors: list[FrameError] = []
        good = np.zeros_like(used)
        for one in np.unique(epoch).tolist():
            here = epoch == one
            taken = readings[channel].stamp_ns[mine[here]] if used.any() else mine[here]
            good[here] = covered_readings(
                config, transforms.tree(one), readings[channel].frame, stamps[here], taken, used[here], errors
            )
        if used.any() and not good.any():
            first = errors[0]
            raise FrameError(
                f"{channel} (frame {readings[channel].frame!r}): {first.what}", _do(config, first), first.reason
            )
        good &= good[:, :1]  # without its key reading a channel is missing
        mine[~good] = -1
        lost[channel] = used[:, 0] & ~good[:, 0]
    return lost


def _do(config: VehicleConfig, error: FrameError) -> str:
    stands = f"if the vehicle stood still, set odom_frame to {config.base_frame}"
    return f"{error.do}; {stands}" if config.odom_frame in error.what else error.do


def _calibrations(bag: BagFile, config: VehicleConfig, scan: _Scan) -> dict[str, tuple[CameraCalibration, ...]]:
    found = {}
    for role, camera in config.sensors.cameras.items():
        topic = camera.camera_info
        found[f"cam_{role}"] = tuple(
            CameraCalibration(
                log_ns, decode_camera_info(bag.decode(topic, raw), camera.rectified, camera.balance, topic)
            )
            for log_ns, raw in scan.infos.get(topic, ())
        )
        if not found[f"cam_{role}"]:
            raise DataError(f"{bag.path}: {topic} has no messages", f"set sensors.cameras.{role}.info_topic")
    return found


def _small_readings(bag: BagFile, config: VehicleConfig, scan: _Scan) -> dict[int, SmallReadings]:
    topics = small_topics(config)
    found = {}
    for epoch in {epoch for epoch, _ in scan.small}:
        decoded = {
            kind: sorted(
                (bag.decode(topic, raw) for raw in scan.small.get((epoch, kind), ())),
                key=lambda message: stamp_ns(message.header),
            )
            for kind, topic in topics.items()
        }
        imu, odometry, fixes = (decoded.get(kind, []) for kind in (IMU, ODOMETRY, GNSS))
        found[epoch] = SmallReadings(
            decode_odometry(odometry, config.base_frame, config.odometry_topic or "") if odometry else None,
            decode_imu(imu, np.eye(3)) if imu else None,
            imu[0].header.frame_id.lstrip("/") if imu else "",
            tuple(fix for message in fixes if (fix := decode_gnss(message)) is not None),
        )
    return found


def _no_sample(bag: BagFile, config: VehicleConfig, sync: Synchronizer) -> DataError:
    anchor = config.sync.anchor
    counts = sync.counts[anchor]
    why = [f"{anchor} has {counts.received} messages"]
    if counts.incomplete:
        absent = sync.last_incomplete.absent if sync.last_incomplete else {}
        why += [
            f"{channel} is required and {reason}"
            for channel, reason in absent.items()
            if config.sensors.channels[channel].required
        ]
    return DataError(
        f"{bag.path}: no sample: {'; '.join(why)}",
        "choose another anchor, or widen the tolerance_s of what is required",
    )
