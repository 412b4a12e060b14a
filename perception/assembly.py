"""One synchronised set of messages -> the Sample: decoded, rectified, sweeps accumulated, all in ego at its stamp.

The live node and the bag reader are the two callers, so that what a bag shows is what the car sees. A message is first
decoded into a `Reading`, which knows nothing of the sample and may be kept for the next one (a sweep is in ten of
them), then placed by the transforms. Messages are taken by their attributes; no ROS is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from perception.decode import decode_cloud, decode_compressed_image, decode_image, stamp_ns
from perception.errors import DataError
from perception.frames import FrameError, FrameTree
from perception.rectify import CameraModel
from perception.sweeps import accumulate, deskew
from perception.types import Array, CameraImage, PointCloud, Pose, Sample
from perception.vehicle import INTENSITY_RANGE, CameraSensor, CloudSensor, VehicleConfig


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """One message, decoded.

    Attributes:
        data: with the identity in place of `ego_from_...`, which depends on the sample.
        frame: the sensor's.
        dropped_nonfinite: points that had a number which was not finite.
    """

    data: PointCloud | CameraImage
    frame: str
    dropped_nonfinite: int = 0

    @property
    def stamp_ns(self) -> int:
        return self.data.stamp_ns


class Placed(NamedTuple):
    """A reading and where it belongs: `ego_from_sensor`, ego motion up to the sample's stamp folded in."""

    reading: Reading
    ego_from_sensor: Pose


class Assembled(NamedTuple):
    """A Sample, and how many points of each channel were dropped because a number was not finite."""

    sample: Sample
    dropped_nonfinite: dict[str, int]


def decode_reading(message: Any, sensor: CloudSensor | CameraSensor, model: CameraModel | None = None) -> Reading:
    """A message of a sensor; `model` is the camera's.

    Raises:
        DataError: a message that contradicts its type, lacks a field, or comes before its camera's calibration.
    """
    frame = sensor.frame or message.header.frame_id.lstrip("/")
    if isinstance(sensor, CloudSensor):
        decoded = decode_cloud(message, Pose.identity(), sensor, sensor.needed, sensor.topic)
        return Reading(_scaled(decoded.cloud, sensor.intensity_max), frame, decoded.dropped_nonfinite)
    if model is None:
        raise DataError(f"{sensor.topic}: no calibration for it yet", f"publish its CameraInfo on {sensor.camera_info}")
    if hasattr(message, "format"):  # CompressedImage has one, Image has an encoding
        rgb = decode_compressed_image(message, sensor.topic, sensor.jpeg)
    else:
        rgb = decode_image(message, sensor.topic)
    try:
        rectified, intrinsic = model.rectify(rgb)
    except DataError as error:
        raise DataError(f"{sensor.topic}: {error.what}", error.do) from None
    return Reading(CameraImage(rectified, intrinsic, Pose.identity(), stamp_ns(message.header)), frame)


def assemble(
    config: VehicleConfig,
    sample_stamp_ns: int,
    messages: Mapping[str, Sequence[Any]],
    frames: FrameTree,
    cameras: Mapping[str, CameraModel],
) -> Assembled:
    """The Sample of one synchronised set of messages.

    Args:
        config: the vehicle.
        sample_stamp_ns: the anchor's stamp.
        messages: channel -> its matched message, then earlier ones, newest first; of a camera only the first is used.
        frames: transforms that cover all stamps.
        cameras: camera channel -> its model.

    Raises:
        DataError: as `decode_reading`.
        FrameError: a frame, or a stamp, that the tree does not know.
    """
    placed: dict[str, list[Placed]] = {}
    dropped: dict[str, int] = {}
    for channel, sensor in config.sensors.channels.items():
        for message in messages.get(channel, ())[: config.depth(sensor)]:
            reading = decode_reading(message, sensor, cameras.get(channel))
            pose = ego_from_sensor(config, frames, sample_stamp_ns, reading.frame, reading.stamp_ns)
            placed.setdefault(channel, []).append(Placed(reading, pose))
            if isinstance(sensor, CloudSensor):
                dropped[channel] = dropped.get(channel, 0) + reading.dropped_nonfinite
    return Assembled(merge(config, sample_stamp_ns, placed, frames), dropped)


def merge(
    config: VehicleConfig, sample_stamp_ns: int, placed: Mapping[str, Sequence[Placed]], frames: FrameTree
) -> Sample:
    """The Sample of placed readings, newest first by channel.

    Raises:
        FrameError: the vehicle's own pose in odom, or a point's time that is to be undone, is not known.
    """

    def clouds(kind: str, sensors: Mapping[str, CloudSensor]) -> dict[str, PointCloud]:
        found = {}
        for role, sensor in sensors.items():
            sweeps = []
            for reading, pose in placed.get(f"{kind}_{role}", ()):
                cloud = reading.data
                assert isinstance(cloud, PointCloud)
                if sensor.deskew and "time_offset" in cloud.fields:
                    cloud = deskew(cloud, partial(frames.poses, config.odom_frame, reading.frame))
                sweeps.append(replace(cloud, ego_from_sensor=pose))
            if sweeps:
                found[role] = accumulate(sweeps)
        return found

    images = {}
    for role in config.sensors.cameras:
        for reading, pose in placed.get(f"cam_{role}", ())[:1]:
            assert isinstance(reading.data, CameraImage)
            images[role] = replace(reading.data, ego_from_camera=pose)
    odom, base = config.odom_frame, config.base_frame
    return Sample(
        sample_stamp_ns,
        clouds("lidar", config.sensors.lidars),
        clouds("radar", config.sensors.radars),
        images,
        odom_from_ego=frames.lookup(odom, base, sample_stamp_ns) if odom in frames.frames and odom != base else None,
    )


def ego_from_sensor(
    config: VehicleConfig, frames: FrameTree, sample_stamp_ns: int, sensor_frame: str, sensor_stamp_ns: int
) -> Pose:
    """Sensor frame at its stamp -> ego at the sample's stamp, the motion between the two taken from odom.

    Raises:
        FrameError: a frame, or a stamp, that the tree does not know.
    """
    if sensor_stamp_ns == sample_stamp_ns:
        return frames.lookup(config.base_frame, sensor_frame, sample_stamp_ns)
    return frames.lookup_across(config.base_frame, sample_stamp_ns, sensor_frame, sensor_stamp_ns, config.odom_frame)


def covered_readings(
    config: VehicleConfig,
    tree: FrameTree,
    frame: str,
    sample_stamp_ns: Array,
    stamp_ns: Array,
    used: Array,
    errors: list[FrameError],
) -> Array:
    """(S, k) bool: the readings that can be brought into ego at their sample's stamp.

    Args:
        config: the vehicle.
        tree: knowing at least the ends of what is covered.
        frame: the sensor's.
        sample_stamp_ns: (S,).
        stamp_ns: (S, k) of the readings.
        used: (S, k), false where there is no reading.
        errors: what the tree says of those that are not covered is added here.
    """
    odom, base = config.odom_frame, config.base_frame
    at_once = used & (stamp_ns == sample_stamp_ns[:, None])
    moved = used & ~at_once
    good = np.zeros_like(moved)
    good[at_once] = _known(tree, base, frame, stamp_ns[at_once], errors)
    if odom in tree.frames or moved.any():
        good[moved] = _known(tree, odom, frame, stamp_ns[moved], errors)
        good &= _known(tree, odom, base, sample_stamp_ns, errors)[:, None]
    return good


def _known(tree: FrameTree, dst: str, src: str, stamps: Array, errors: list[FrameError]) -> Array:
    """(T,) bool: the stamps at which the tree knows `dst_from_src`; what it says of others is added to `errors`."""
    if not len(stamps):
        return np.zeros(0, bool)
    try:
        tree.poses(dst, src, stamps)
    except FrameError as error:
        errors.append(error)
        if len(stamps) == 1 or error.reason not in ("before_buffer", "after_buffer"):
            return np.zeros(len(stamps), bool)
        middle = len(stamps) // 2
        return np.concatenate([_known(tree, dst, src, half, errors) for half in (stamps[:middle], stamps[middle:])])
    return np.ones(len(stamps), bool)


def _scaled(cloud: PointCloud, intensity_max: float) -> PointCloud:
    if intensity_max == INTENSITY_RANGE or "intensity" not in cloud.fields:
        return cloud
    scaled = (cloud.fields["intensity"].astype(np.float64) * (INTENSITY_RANGE / intensity_max)).astype(np.float32)
    return replace(cloud, fields={**cloud.fields, "intensity": scaled})
