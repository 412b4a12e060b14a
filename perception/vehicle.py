"""A vehicle's configuration: its sensors by role, their topics, frames and timing.

A sensor's channel (`lidar_top`, `radar_front`, `cam_front`) names it in the Synchronizer, where roles of different
kinds would collide.
"""

from __future__ import annotations

from pydantic import Field

from perception.config import Config
from perception.decode import CloudFields, JpegDecoder
from perception.errors import ConfigError
from perception.sync import SensorTiming, SyncConfig

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
    deskew: bool = False
    """Move each point to where it would be seen at the stamp, by its own time; a network trained on raw sweeps, as
    nuScenes' are, wants them raw.
    """


class CameraSensor(SensorTiming):
    """A camera that sends sensor_msgs/Image or CompressedImage."""

    topic: str
    compressed: bool | None = None
    """CompressedImage, not Image; None: told by `compressed` in the topic's last name."""
    jpeg: JpegDecoder = "opencv"
    """`simplejpeg` (extra `jpeg`) is a sixth faster and gives the same pixels."""
    info_topic: str | None = None
    """Its CameraInfo; None: `camera_info` beside the image's topic."""
    frame: str | None = None
    """In place of the header's frame_id; an optical frame, z forward."""
    rectified: bool = False
    """The images are without distortion already; the intrinsic is CameraInfo's P."""
    balance: float = Field(0.0, ge=0, le=1)
    """How much of a fisheye's rim is kept, see `rectify`."""

    @property
    def is_compressed(self) -> bool:
        last = self.topic.rpartition("/")[2]
        return "compressed" in last if self.compressed is None else self.compressed

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

    def depth(self, sensor: CloudSensor | CameraSensor) -> int:
        """How many of a sensor's messages a sample holds at most."""
        return self.sweeps if isinstance(sensor, CloudSensor) else 1

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
