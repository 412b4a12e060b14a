"""A vehicle's sensors by role, and the Sample that a set of their messages makes.

The live node and the bag reader are the two callers, so that what a bag shows is what the car sees. A sensor's channel
(`lidar_top`, `radar_front`, `cam_front`) names it in the Synchronizer, where roles of different kinds would collide.
Messages are taken by their attributes; no ROS is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from perception.config import Config
from perception.decode import CloudFields, decode_cloud, decode_compressed_image, decode_image, stamp_ns
from perception.errors import ConfigError, DataError
from perception.frames import FrameTree
from perception.rectify import CameraModel
from perception.sweeps import accumulate
from perception.sync import SensorTiming, SyncConfig
from perception.types import CameraImage, PointCloud, Pose, Sample

INTENSITY_RANGE = 255.0
"""Every LiDAR's intensity comes out as 0 to this, nuScenes' range."""


class CloudSensor(SensorTiming, CloudFields):
    """A LiDAR or radar that sends sensor_msgs/PointCloud2; the names and time of its fields as in CloudFields."""

    topic: str
    frame: str | None = None
    """In place of the header's frame_id, where that is wrong."""
    needed: tuple[str, ...] = ()
    """Fields without which a cloud is an error."""
    sweeps_s: float = Field(0.5, ge=0)
    """Earlier sweeps reach no farther back than this."""
    intensity_max: float = Field(INTENSITY_RANGE, gt=0)
    """The driver's full scale of intensity."""


class CameraSensor(SensorTiming):
    """A camera that sends sensor_msgs/Image or CompressedImage."""

    topic: str
    info_topic: str | None = None
    """Its CameraInfo; None: `camera_info` beside the image's topic."""
    frame: str | None = None
    """In place of the header's frame_id; an optical frame, z forward."""
    rectified: bool = False
    """The images are without distortion already; the intrinsic is CameraInfo's P."""
    balance: float = Field(0.0, ge=0, le=1)
    """How much of a fisheye's rim is kept, see `rectify`."""

    @property
    def camera_info(self) -> str:
        image = self.topic.removesuffix("/compressed")  # image_transport's suffix of the image's own topic
        return self.info_topic or f"{image.rpartition('/')[0]}/camera_info"


class Sensors(Config):
    """Role -> sensor."""

    lidars: dict[str, CloudSensor] = Field(default_factory=dict)
    radars: dict[str, CloudSensor] = Field(default_factory=dict)
    cameras: dict[str, CameraSensor] = Field(default_factory=dict)

    @property
    def channels(self) -> dict[str, CloudSensor | CameraSensor]:
        """Channel -> sensor: LiDARs, radars, cameras."""
        return {
            **{f"lidar_{role}": sensor for role, sensor in self.lidars.items()},
            **{f"radar_{role}": sensor for role, sensor in self.radars.items()},
            **{f"cam_{role}": sensor for role, sensor in self.cameras.items()},
        }


class VehicleConfig(Config):
    """What the vehicle sends and how it becomes Samples."""

    sensors: Sensors = Sensors()
    anchor: str | None = None
    """The channel whose messages make samples; None: the first LiDAR, else radar, else camera."""
    sweeps: int = Field(1, ge=1)
    """LiDAR and radar sweeps in a cloud, the key sweep included."""
    base_frame: str = "base_link"
    odom_frame: str = "odom"
    """Where the vehicle moves smoothly (REP 105); its motion between two stamps is taken from here."""
    map_frame: str = "map"
    odometry_topic: str | None = "/odom"
    """nav_msgs/Odometry; None, or a topic that is not there, gives samples without."""
    imu_topic: str | None = "/imu"
    gnss_topic: str | None = "/gps"
    wait_s: float = Field(0.0, ge=0)
    """Longest wait for the other sensors, see SyncConfig."""
    clock_jump_s: float = Field(1.0, gt=0)
    """A stamp that falls back by more begins a new epoch."""

    @property
    def sync(self) -> SyncConfig:
        """The synchroniser's configuration. Raises ConfigError for an anchor that is no sensor."""
        channels = self.sensors.channels
        anchor = self.anchor or next(iter(channels), None)
        if anchor is None or anchor not in channels:
            raise ConfigError(
                f"anchor: {anchor!r} is none of the vehicle's sensors", f"there are: {', '.join(channels) or 'none'}"
            )
        timings: dict[str, SensorTiming] = {
            channel: sensor if self.sweeps > 1 else sensor.model_copy(update={"sweeps_s": 0.0})
            for channel, sensor in channels.items()
        }
        return SyncConfig(anchor=anchor, sensors=timings, wait_s=self.wait_s, clock_jump_s=self.clock_jump_s)


class Assembled(NamedTuple):
    """A Sample, and how many points of each channel were dropped because a number was not finite."""

    sample: Sample
    dropped_nonfinite: dict[str, int]


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


def assemble(
    config: VehicleConfig,
    sample_stamp_ns: int,
    messages: Mapping[str, Sequence[Any]],
    frames: FrameTree,
    cameras: Mapping[str, CameraModel],
) -> Assembled:
    """The Sample of one synchronised set: decoded, rectified, sweeps accumulated, everything in ego at its stamp.

    Args:
        config: the vehicle.
        sample_stamp_ns: the anchor's stamp.
        messages: channel -> its matched message, then earlier ones, newest first; of a camera only the first is used.
        frames: transforms that cover all stamps.
        cameras: camera channel -> its model.

    Raises:
        DataError: a message that contradicts its type, or lacks a field.
        FrameError: as `ego_from_sensor`.
    """
    dropped: dict[str, int] = {}

    def pose_of(sensor: CloudSensor | CameraSensor, message: Any) -> Pose:
        frame = sensor.frame or message.header.frame_id.lstrip("/")
        return ego_from_sensor(config, frames, sample_stamp_ns, frame, stamp_ns(message.header))

    def clouds(kind: str, sensors: Mapping[str, CloudSensor]) -> dict[str, PointCloud]:
        found = {}
        for role, sensor in sensors.items():
            channel, sweeps = f"{kind}_{role}", []
            for message in messages.get(channel, ())[: config.sweeps]:
                decoded = decode_cloud(message, pose_of(sensor, message), sensor, sensor.needed, sensor.topic)
                dropped[channel] = dropped.get(channel, 0) + decoded.dropped_nonfinite
                sweeps.append(_scaled(decoded.cloud, sensor.intensity_max))
            if sweeps:
                found[role] = accumulate(sweeps)
        return found

    images = {}
    for role, camera in config.sensors.cameras.items():
        for message in messages.get(f"cam_{role}", ())[:1]:
            images[role] = _image(message, camera, cameras[f"cam_{role}"], pose_of(camera, message))
    odom, base = config.odom_frame, config.base_frame
    sample = Sample(
        sample_stamp_ns,
        clouds("lidar", config.sensors.lidars),
        clouds("radar", config.sensors.radars),
        images,
        odom_from_ego=frames.lookup(odom, base, sample_stamp_ns) if odom in frames.frames and odom != base else None,
    )
    return Assembled(sample, dropped)


def _scaled(cloud: PointCloud, intensity_max: float) -> PointCloud:
    if intensity_max == INTENSITY_RANGE or "intensity" not in cloud.fields:
        return cloud
    scaled = (cloud.fields["intensity"].astype(np.float64) * (INTENSITY_RANGE / intensity_max)).astype(np.float32)
    return PointCloud(cloud.xyz, {**cloud.fields, "intensity": scaled}, cloud.ego_from_sensor, cloud.stamp_ns)


def _image(message: Any, sensor: CameraSensor, model: CameraModel, ego_from_camera: Pose) -> CameraImage:
    compressed = hasattr(message, "format")  # CompressedImage has one, Image has an encoding
    rgb = (decode_compressed_image if compressed else decode_image)(message, sensor.topic)
    try:
        rectified, intrinsic = model.rectify(rgb)
    except DataError as error:
        raise DataError(f"{sensor.topic}: {error.what}", error.do) from None
    return CameraImage(rectified, intrinsic, ego_from_camera, stamp_ns(message.header))
