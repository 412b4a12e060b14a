"""What the node listens to: each topic once, its bytes handed to the intake as they come.

Sensors are taken as best effort, which fits any driver. A callback only appends bytes, so that the few messages that
DDS keeps (`depth`) last while the executor is busy; what is kept longer is the intake's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message

from perception.datasets.rosbag_file import (
    CAMERA_INFO,
    COMPRESSED_IMAGE,
    GNSS,
    IMAGE,
    IMU,
    ODOMETRY,
    POINT_CLOUD,
    TF_STATIC_TOPIC,
    TF_TOPIC,
    TRANSFORMS,
)
from perception.errors import DataError
from perception.intake import Intake
from perception.systems import System
from perception.vehicle import CameraSensor, CloudSensor
from perception_ros.outputs import message_class

SENSOR_QOS = QoSProfile(depth=20, reliability=ReliabilityPolicy.BEST_EFFORT)
FAST_QOS = QoSProfile(depth=200, reliability=ReliabilityPolicy.BEST_EFFORT)
"""IMU, odometry and GNSS: a second at 200 Hz."""
TF_QOS = QoSProfile(depth=200, reliability=ReliabilityPolicy.RELIABLE)
TF_STATIC_QOS = QoSProfile(
    depth=100, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)


def deserialize(message_type: str, raw: bytes) -> Any:
    """The message in CDR bytes; DataError where they are not of that type."""
    kind = message_class(message_type)
    try:
        return deserialize_message(raw, kind)
    except Exception as error:  # rclpy gives whatever the middleware raises
        raise DataError(
            f"a message of {len(raw)} bytes is no {message_type}: {error}", "check its publisher's message version"
        ) from error


class Inputs:
    """The subscriptions of all systems together.

    Args:
        node: theirs.
        systems: what they read says which topics.
        intake: where messages go.
        taken: called with the topic after each message.

    Attributes:
        types: topic -> message type.
    """

    def __init__(self, node: Node, systems: Sequence[System], intake: Intake, taken: Callable[[str], None]) -> None:
        self._node, self._intake, self._taken = node, intake, taken
        self._subscriptions: list[Any] = []
        self.types: dict[str, str] = {}
        for system in systems:
            for channel, sensor in system.watched.sensors.channels.items():
                self._listen_to_sensor(channel, sensor)
        self._listen(TF_TOPIC, TRANSFORMS, TF_QOS, self._decoded(intake.take_transforms, TRANSFORMS, static=False))
        self._listen(
            TF_STATIC_TOPIC, TRANSFORMS, TF_STATIC_QOS, self._decoded(intake.take_transforms, TRANSFORMS, static=True)
        )
        for vehicle in (system.vehicle for system in systems):
            for topic, message_type, take in (
                (vehicle.imu_topic, IMU, intake.take_imu),
                (vehicle.gnss_topic, GNSS, intake.take_gnss),
                (vehicle.odometry_topic, ODOMETRY, intake.take_odometry),
            ):
                if topic is not None:
                    self._listen(topic, message_type, FAST_QOS, self._decoded(take, message_type))

    def close(self) -> None:
        """Listen no more."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)

    def _listen_to_sensor(self, channel: str, sensor: CloudSensor | CameraSensor) -> None:
        intake = self._intake
        if isinstance(sensor, CameraSensor):
            image = COMPRESSED_IMAGE if sensor.is_compressed else IMAGE
            self._listen(sensor.topic, image, SENSOR_QOS, lambda topic, raw: intake.take(channel, topic, raw))
            self._listen(
                sensor.camera_info,
                CAMERA_INFO,
                SENSOR_QOS,
                lambda _, raw: intake.take_camera_info(channel, sensor, raw),
            )
        else:
            self._listen(sensor.topic, POINT_CLOUD, SENSOR_QOS, lambda topic, raw: intake.take(channel, topic, raw))

    def _listen(self, topic: str, message_type: str, qos: QoSProfile, take: Callable[[str, bytes], None]) -> None:
        if topic in self.types:
            return
        self.types[topic] = message_type

        def received(raw: bytes) -> None:
            take(topic, raw)
            self._taken(topic)

        subscription = self._node.create_subscription(message_class(message_type), topic, received, qos, raw=True)
        self._subscriptions.append(subscription)

    def _decoded(self, take: Callable[..., None], message_type: str, **keys: Any) -> Callable[[str, bytes], None]:
        """`take` of messages instead of bytes."""

        def decode(topic: str, raw: bytes) -> None:
            try:
                message = deserialize(message_type, raw)
            except DataError as error:
                self._intake.refuse(topic, error)
                return
            take(message, topic, **keys)

        return decode
