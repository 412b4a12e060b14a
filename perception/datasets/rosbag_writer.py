"""Writes a rosbag2 (MCAP with zstd chunks, or sqlite3) under the topic names of foxglove's nuscenes2mcap.

===============================  =====================================  ===========
/lidar_top, /radar_front, ...    sensor_msgs/PointCloud2, all float32   best effort
/cam_front/image_rect_compressed sensor_msgs/CompressedImage, JPEG      best effort
/cam_front/camera_info           sensor_msgs/CameraInfo, no distortion  best effort
/odom, /imu, /gps                Odometry, Imu, NavSatFix               reliable
/pose                            geometry_msgs/PoseStamped in map       reliable
/tf                              map -> odom -> base_link               reliable
/tf_static                       base_link -> lidar_top, cam_front, ... latched
===============================  =====================================  ===========

Frames follow REP 105. nuscenes2mcap has map -> base_link alone; here odom stands between, because a frame has one
parent: a vehicle's odometry owns odom -> base_link, and a localizer under test must be free to own map -> odom.

Every message is logged at its own stamp. /tf has a reading at every sensor's stamp beside those of its rate, so that a
reader's interpolation gives back the exact pose there. Metadata are of version 8, which Humble reads too.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np

from perception.datasets import rosbag_messages as messages
from perception.datasets.rosbag_file import (
    CAMERA_INFO,
    COMPRESSED_IMAGE,
    GNSS,
    IMU,
    ODOMETRY,
    POINT_CLOUD,
    POSE,
    TF_STATIC_TOPIC,
    TF_TOPIC,
    TRANSFORMS,
    OfferedQos,
    typestore,
)
from perception.datasets.rosbag_truth import write_truth
from perception.datasets.sensor_files import check_single_sweep
from perception.errors import DataError
from perception.types import CameraImage, PointCloud, Pose, Sample, Truth

MAP, ODOM, BASE = "map", "odom", "base_link"

_HORIZON_NS = 1_000_000_000
"""Messages wait this long for older ones: a sample's readings go back to the sample before it."""

_SAME_POSE = 1e-4
"""Metres, and entries of a rotation, by which two statements of one pose may differ."""

PoseAt = Callable[[int], Pose]


_OFFERED_BY_TYPE = dict.fromkeys((POINT_CLOUD, COMPRESSED_IMAGE, CAMERA_INFO), OfferedQos(5, reliable=False))
_OFFERED_BY_TOPIC = {TF_TOPIC: OfferedQos(100), TF_STATIC_TOPIC: OfferedQos(1, latched=True)}
_MOTION = (ODOMETRY, IMU, GNSS)
"""Readings up to a sample's stamp belong to it: a listener has them when the sensor's message comes."""
_NEEDS_EXACT_POSE = (POINT_CLOUD, COMPRESSED_IMAGE, POSE)


class _Waiting(NamedTuple):
    """A serialised message; they are written by stamp, of one stamp motion first, then as they came."""

    stamp_ns: int
    after_motion: bool
    order: int
    topic: str
    type: str
    raw: memoryview


class RosbagWriter:
    """Writes one drive.

        with RosbagWriter(folder) as writer:
            writer.start(map_from_ego)
            writer.add(sample)

    Args:
        path: the bag's folder; it must not exist.
        storage: `mcap` or `sqlite3`.
        jpeg_quality: 0 to 100.
        transform_rate_hz: of /tf.

    Raises:
        DataError: the folder is there already.
    """

    def __init__(
        self,
        path: Path,
        storage: Literal["mcap", "sqlite3"] = "mcap",
        jpeg_quality: int = 95,
        transform_rate_hz: float = 50.0,
    ) -> None:
        if path.exists():
            raise DataError(f"{path}: is there already", "choose another folder, or delete this one")
        self._path = path
        self._quality = jpeg_quality
        self._period_ns = round(1e9 / transform_rate_hz)
        self._bag = _open(path, storage)
        self._connections: dict[str, Any] = {}  # by topic
        self._poses: tuple[PoseAt, PoseAt] | None = None  # map_from_ego, odom_from_ego
        self._mounts: dict[str, Pose] = {}  # by channel, which is its frame too
        self._mounts_written = 0
        self._stamps: dict[str, set[int]] = {}  # by topic
        self._waiting: list[_Waiting] = []
        self._order = count()
        self._first_sample_ns: int | None = None
        self._last_sample_ns: int | None = None
        self._last_transform_ns: int | None = None

    def __enter__(self) -> RosbagWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._bag.abort()

    def start(self, map_from_ego: PoseAt, odom_from_ego: PoseAt | None = None) -> None:
        """Say where the vehicle is; once, before the first sample.

        Args:
            map_from_ego: its true pose at any stamp in nanoseconds.
            odom_from_ego: its pose by its own odometry; None is a perfect one that starts where the first sample is.
        """
        if self._poses is not None:
            raise ValueError("the drive has started: a bag holds one, write the next into a bag of its own")

        def perfect_odometry(stamp_ns: int) -> Pose:
            assert self._first_sample_ns is not None
            return map_from_ego(self._first_sample_ns).inverse() @ map_from_ego(stamp_ns)

        self._poses = map_from_ego, odom_from_ego or perfect_odometry

    def add(self, sample: Sample, truth: Truth | None = None) -> None:
        """All that a sample holds: a key frame, or one sensor's sweep. A reading that was written is not again.

        Boxes and occupancy of a truth lie beside the bag (`rosbag_truth`), by the sample's stamp.

        Raises:
            ValueError: `start` was not called, samples out of order, an accumulated cloud, a sensor that moves on the
                vehicle, or a sample's odometry that is not the one given to `start`.
        """
        map_from_ego, odom_from_ego = self._begin(sample)
        if truth is not None and (truth.boxes is not None or truth.occupancy is not None):
            write_truth(self._path, sample.stamp_ns, truth)
        for role, cloud in sample.lidars.items():
            self._add_cloud(sample, f"lidar_{role}", cloud)
        for role, cloud in sample.radars.items():
            self._add_cloud(sample, f"radar_{role}", cloud)
        for role, image in sample.cameras.items():
            self._add_image(sample, f"cam_{role}", image)
        if (wheels := sample.odometry) is not None:
            readings = zip(wheels.stamp_ns.tolist(), wheels.linear_velocity, wheels.angular_velocity, strict=True)
            for stamp_ns, linear, angular in readings:
                moving = messages.odometry(stamp_ns, ODOM, BASE, odom_from_ego(stamp_ns), linear, angular)
                self._put("/odom", ODOMETRY, stamp_ns, moving)
        if (inertial := sample.imu) is not None:
            readings = zip(
                inertial.stamp_ns.tolist(), inertial.angular_velocity, inertial.linear_acceleration, strict=True
            )
            for stamp_ns, angular, force in readings:
                self._put("/imu", IMU, stamp_ns, messages.imu(stamp_ns, BASE, angular, force))
        if sample.gnss is not None:
            self._put("/gps", GNSS, sample.gnss.stamp_ns, messages.nav_sat_fix(sample.gnss, BASE))
        pose = messages.pose_stamped(sample.stamp_ns, MAP, map_from_ego(sample.stamp_ns))
        self._put("/pose", POSE, sample.stamp_ns, pose)
        self._write_before(sample.stamp_ns - _HORIZON_NS)

    def close(self) -> None:
        """Write what waits, the index and metadata.yaml."""
        if self._waiting:
            self._write_before(max(message.stamp_ns for message in self._waiting) + 1)
        self._bag.close()

    def _begin(self, sample: Sample) -> tuple[PoseAt, PoseAt]:
        """Check a sample's place in the drive; `map_from_ego` and `odom_from_ego`."""
        if self._poses is None:
            raise ValueError("no drive has started: call start first")
        if self._last_sample_ns is None:
            self._first_sample_ns = sample.stamp_ns
        elif sample.stamp_ns < self._last_sample_ns:
            raise ValueError(f"sample at {sample.stamp_ns} ns after one at {self._last_sample_ns} ns")
        self._last_sample_ns = sample.stamp_ns
        if sample.odom_from_ego is not None:
            difference = _difference(self._poses[1](sample.stamp_ns), sample.odom_from_ego)
            if difference > _SAME_POSE:
                raise ValueError(
                    f"sample {sample.stamp_ns}: its odom_from_ego differs by {difference:.3g} from the drive's "
                    "odometry: give that to start(map_from_ego, odom_from_ego)"
                )
        return self._poses

    def _add_cloud(self, sample: Sample, channel: str, cloud: PointCloud) -> None:
        check_single_sweep(cloud, channel)
        self._check_mount(sample, channel, cloud.ego_from_sensor, cloud.stamp_ns)
        if self._is_new(f"/{channel}", cloud.stamp_ns):
            self._put(f"/{channel}", POINT_CLOUD, cloud.stamp_ns, messages.point_cloud(cloud, channel))

    def _add_image(self, sample: Sample, channel: str, image: CameraImage) -> None:
        self._check_mount(sample, channel, image.ego_from_camera, image.stamp_ns)
        topic = f"/{channel}/image_rect_compressed"
        if self._is_new(topic, image.stamp_ns):
            info = messages.camera_info(image, channel)
            self._put(f"/{channel}/camera_info", CAMERA_INFO, image.stamp_ns, info)
            picture = messages.compressed_image(image, channel, self._quality)
            self._put(topic, COMPRESSED_IMAGE, image.stamp_ns, picture)

    def _check_mount(self, sample: Sample, channel: str, ego_from_sensor: Pose, stamp_ns: int) -> None:
        """Keep a sensor's mount when it is first seen; a later one must agree."""
        assert self._poses is not None
        map_from_ego = self._poses[0]
        mount = map_from_ego(stamp_ns).inverse() @ map_from_ego(sample.stamp_ns) @ ego_from_sensor
        if channel in self._mounts:
            if (moved := _difference(self._mounts[channel], mount)) > _SAME_POSE:
                raise ValueError(
                    f"{channel} moved on the vehicle by {moved:.3g} m since its first reading: ego_from_sensor must "
                    "hold the motion between the sensor's and the sample's stamp that map_from_ego gives"
                )
            return
        self._mounts[channel] = mount

    def _is_new(self, topic: str, stamp_ns: int) -> bool:
        return stamp_ns not in self._stamps.get(topic, ())

    def _put(self, topic: str, message_type: str, stamp_ns: int, message: Any) -> None:
        """Let a message wait for older ones, unless its topic has one of that stamp."""
        if not self._is_new(topic, stamp_ns):
            return
        self._stamps.setdefault(topic, set()).add(stamp_ns)
        raw = typestore().serialize_cdr(message, message_type)
        after = message_type not in _MOTION
        heapq.heappush(self._waiting, _Waiting(stamp_ns, after, next(self._order), topic, message_type, raw))

    def _write_before(self, stamp_ns: int) -> None:
        """Write the waiting messages older than a stamp, and the transforms that belong among them."""
        while self._waiting and self._waiting[0].stamp_ns < stamp_ns:
            message = heapq.heappop(self._waiting)
            self._write_mounts(message.stamp_ns)
            while self._last_transform_ns is not None and self._last_transform_ns + self._period_ns < message.stamp_ns:
                self._write_transforms(self._last_transform_ns + self._period_ns)
            if message.type in _NEEDS_EXACT_POSE and message.stamp_ns != self._last_transform_ns:
                self._write_transforms(message.stamp_ns)
            self._write(message.topic, message.type, message.stamp_ns, message.raw)

    def _write_mounts(self, stamp_ns: int) -> None:
        """All mounts in one message when there are new ones: whoever joins late receives the last message alone."""
        if len(self._mounts) == self._mounts_written:
            return
        edges = [(BASE, frame, stamp_ns, pose) for frame, pose in self._mounts.items()]
        raw = typestore().serialize_cdr(messages.transforms(edges), TRANSFORMS)
        self._write(TF_STATIC_TOPIC, TRANSFORMS, stamp_ns, raw)
        self._mounts_written = len(self._mounts)

    def _write_transforms(self, stamp_ns: int) -> None:
        assert self._poses is not None
        map_from_ego, odom_from_ego = (pose_at(stamp_ns) for pose_at in self._poses)
        edges = [
            (MAP, ODOM, stamp_ns, map_from_ego @ odom_from_ego.inverse()),
            (ODOM, BASE, stamp_ns, odom_from_ego),
        ]
        raw = typestore().serialize_cdr(messages.transforms(edges), TRANSFORMS)
        self._write(TF_TOPIC, TRANSFORMS, stamp_ns, raw)
        self._last_transform_ns = max(stamp_ns, self._last_transform_ns or stamp_ns)

    def _write(self, topic: str, message_type: str, stamp_ns: int, raw: memoryview) -> None:
        if topic not in self._connections:
            offered = _OFFERED_BY_TOPIC.get(topic, _OFFERED_BY_TYPE.get(message_type, OfferedQos(10)))
            self._connections[topic] = self._bag.add_connection(
                topic, message_type, typestore=typestore(), offered_qos_profiles=[_qos(offered)]
            )
        self._bag.write(self._connections[topic], stamp_ns, raw)


def _difference(a: Pose, b: Pose) -> float:
    return float(np.abs(a.matrix - b.matrix).max())


def _open(path: Path, storage: Literal["mcap", "sqlite3"]) -> Any:
    """The library's writer, open; MCAP's chunks are compressed inside the file, which every reader understands."""
    typestore()
    from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

    bag = Writer(path, version=8, storage_plugin=StoragePlugin[storage.upper()])
    if storage == "mcap":
        bag.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
    bag.open()
    return bag


def _qos(offered: OfferedQos) -> Any:
    """An offered_qos_profile of rosbag2: keep last, no deadlines."""
    from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime

    never = QosTime(9223372036, 854775807)
    return Qos(
        QosHistory.KEEP_LAST,
        offered.depth,
        QosReliability.RELIABLE if offered.reliable else QosReliability.BEST_EFFORT,
        QosDurability.TRANSIENT_LOCAL if offered.latched else QosDurability.VOLATILE,
        never,
        never,
        QosLiveliness.AUTOMATIC,
        never,
        False,
    )
