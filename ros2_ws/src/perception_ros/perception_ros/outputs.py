"""What the node publishes of a system: one table, and the publishers made of it.

Topics lie below `perception/<system>/`, relative to the node's namespace but not to its name, so that one process or
several give the same topics. Headers carry the anchor sensor's stamp; the frame is the vehicle's, of a pose the map.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from builtin_interfaces.msg import Time
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from perception.datasets.rosbag_file import Header
from perception.systems import System
from perception.types import Boxes3D, Localization
from perception.worker import Predicted
from perception_ros.detections import autoware_objects, detections, vision_detections
from perception_ros.localization import map_to_odom, odometry, pose
from perception_ros.markers import markers
from perception_ros.occupancy import bev_grid, occupancy_grid, voxel_cloud
from perception_ros.overlay import compressed_image, overlay

REPORT_TYPE = "perception_msgs/msg/PredictionReport"
OVERLAY_TYPE = "sensor_msgs/msg/CompressedImage"
LATENCY_TYPE = "std_msgs/msg/Float64"
"""Milliseconds."""
TF_TYPE = "tf2_msgs/msg/TFMessage"

QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
"""Of all outputs but those that are latched: RViz' default."""
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
"""RViz' Map display asks for it."""

STAGES = (
    "wait",
    "decode",
    "wait_transforms",
    "transforms",
    "assemble",
    "predict",
    "convert",
    "publish",
    "end_to_end",
)
"""Of a prediction, in the order they run; `end_to_end` is from the sensor's stamp to the end of `publish`."""

_FIXES = ("ok", "degenerate", "coasting")
"""Of a Localization's statuses those whose pose is published."""


class Output(NamedTuple):
    """A topic that a kind of prediction gives.

    Attributes:
        name: below the system's.
        type: of its messages; left out where its package is not installed.
        of: which kind of prediction gives it.
        frame: whose axes the header names.
        convert: (prediction, header) -> CDR bytes.
        qos: offered.
        motion: `convert` also takes the vehicle's frame and its own odometry.
    """

    name: str
    type: str
    of: Literal["boxes", "occupancy", "pose"]
    frame: Literal["base", "map"]
    convert: Callable[..., bytes]
    qos: QoSProfile = QOS
    motion: bool = False


OUTPUTS = (
    Output("detections", "perception_msgs/msg/Detections3D", "boxes", "base", detections),
    Output("detections_vision", "vision_msgs/msg/Detection3DArray", "boxes", "base", vision_detections),
    Output("objects", "autoware_perception_msgs/msg/DetectedObjects", "boxes", "base", autoware_objects),
    Output("markers", "visualization_msgs/msg/MarkerArray", "boxes", "base", markers),
    Output("occupancy", "perception_msgs/msg/OccupancyGrid3D", "occupancy", "base", occupancy_grid),
    Output("voxels", "sensor_msgs/msg/PointCloud2", "occupancy", "base", voxel_cloud),
    Output("bev", "nav_msgs/msg/OccupancyGrid", "occupancy", "base", bev_grid, LATCHED),
    Output("pose", "geometry_msgs/msg/PoseWithCovarianceStamped", "pose", "map", pose),
    Output("odometry", "nav_msgs/msg/Odometry", "pose", "map", odometry, motion=True),
)
"""Beside these every system has `report`, `latency/<stage>` for each of `STAGES` to be plotted, and with `overlay` an
`overlay/<camera>/compressed` for each camera; RViz opens compressed images on topics of such names only
(image_transport).
"""


def outputs_of(kind: str) -> list[Output]:
    """The table's rows for a kind of prediction whose message packages are installed."""
    return [output for output in OUTPUTS if output.of == kind and find_spec(output.type.partition("/")[0])]


def message_class(message_type: str) -> Any:
    """The class of a type such as `sensor_msgs/msg/PointCloud2`."""
    package, _, name = message_type.partition("/msg/")
    return getattr(import_module(f"{package}.msg"), name)


class SystemOutputs:
    """The publishers of one system. `wanted` and `publish` are called in its worker's thread."""

    def __init__(self, node: LifecycleNode, system: System, pool: Executor) -> None:
        self._node, self._system, self._pool = node, system, pool
        self._outputs = [
            (output, self._publisher(output.name, output.type, output.qos))
            for output in outputs_of(system.predictor.output)
        ]
        self._report = self._publisher("report", REPORT_TYPE)
        self._latencies = {stage: self._publisher(f"latency/{stage}", LATENCY_TYPE) for stage in STAGES}
        roles = system.watched.sensors.cameras if system.config.overlay else ()
        self._overlays = {role: self._publisher(f"overlay/{role}/compressed", OVERLAY_TYPE) for role in roles}
        self._tf = None
        if system.config.broadcast_tf and system.predictor.output == "pose":
            self._tf = node.create_lifecycle_publisher(message_class(TF_TYPE), "/tf", QoSProfile(depth=100))

    def close(self) -> None:
        """Take the topics away."""
        for publisher in self._publishers():
            self._node.destroy_lifecycle_publisher(publisher)

    def wanted(self) -> bool:
        """Whether anybody listens; /tf always counts as listened to."""
        return self._tf is not None or any(publisher.get_subscription_count() for publisher in self._publishers())

    def _publishers(self) -> list[Any]:
        found = [*(p for _, p in self._outputs), self._report, *self._latencies.values(), *self._overlays.values()]
        return found if self._tf is None else [*found, self._tf]

    def publish(self, predicted: Predicted) -> None:
        """Everything that somebody listens to; adds the stages `convert`, `publish` and `end_to_end`."""
        vehicle, prediction = self._system.vehicle, predicted.prediction
        stamp, spent_s = predicted.sample.stamp_ns, {"convert": 0.0, "publish": 0.0}

        def put(publisher: Any, convert: Callable[[], bytes]) -> None:
            start_s = time.monotonic()
            message = convert()
            middle_s = time.monotonic()
            publisher.publish(message)
            spent_s["convert"] += middle_s - start_s
            spent_s["publish"] += time.monotonic() - middle_s

        known = not isinstance(prediction, Localization) or prediction.status in _FIXES
        for output, publisher in self._outputs if known else ():
            if publisher.get_subscription_count():
                frame = vehicle.base_frame if output.frame == "base" else vehicle.map_frame
                moved = (vehicle.base_frame, predicted.sample.odometry) if output.motion else ()
                put(publisher, lambda o=output, f=frame, m=moved: o.convert(prediction, Header(stamp, f), *m))  # type: ignore[misc]
        if self._tf is not None and known:
            assert isinstance(prediction, Localization)
            odom_from_ego = predicted.sample.odom_from_ego
            if odom_from_ego is not None:
                header = Header(stamp, vehicle.map_frame)
                put(self._tf, lambda: map_to_odom(prediction, header, odom_from_ego, vehicle.odom_frame))
        self._publish_overlays(predicted, put)
        predicted.stages.update(spent_s)
        now_ns = self._node.get_clock().now().nanoseconds
        predicted.stages["end_to_end"] = (now_ns - stamp) / 1e9
        self._report.publish(_report(self._system.name, vehicle.base_frame, predicted))
        for stage, publisher in self._latencies.items():
            if publisher.get_subscription_count():
                publisher.publish(message_class(LATENCY_TYPE)(data=1e3 * predicted.stages[stage]))

    def _publish_overlays(self, predicted: Predicted, put: Callable[[Any, Callable[[], bytes]], None]) -> None:
        asked = [role for role, publisher in self._overlays.items() if publisher.get_subscription_count()]
        if not asked:
            return
        watched = self._system.watched
        sensors = watched.sensors.model_copy(
            update={"cameras": {role: watched.sensors.cameras[role] for role in asked}, "radars": {}}
        )
        seen = predicted.draft.prepare(
            watched.model_copy(update={"sensors": sensors, "sweeps": 1}), self._pool, 0.0
        ).sample
        boxes = predicted.prediction if isinstance(predicted.prediction, Boxes3D) else None
        for role in asked:
            if (image := seen.cameras.get(role)) is not None:
                header = Header(image.stamp_ns, predicted.draft.frame_of(f"cam_{role}"))
                put(self._overlays[role], lambda r=role, h=header: compressed_image(overlay(seen, r, boxes), h))  # type: ignore[misc]

    def _publisher(self, name: str, message_type: str, qos: QoSProfile = QOS) -> Any:
        topic = f"perception/{self._system.name}/{name}"
        return self._node.create_lifecycle_publisher(message_class(message_type), topic, qos)


def _report(system: str, frame: str, predicted: Predicted) -> Any:
    report = message_class(REPORT_TYPE)()
    report.header.stamp, report.header.frame_id = _time(predicted.sample.stamp_ns), frame
    report.system = system
    sensor, stage = (
        message_class("perception_msgs/msg/StampedSensor"),
        message_class("perception_msgs/msg/StageLatency"),
    )
    report.sensors = [
        sensor(channel=channel, stamp=_time(stamp)) for channel, stamps in predicted.used.items() for stamp in stamps
    ]
    stages = dict(predicted.stages)
    report.end_to_end_s = stages.pop("end_to_end")
    report.stages = [stage(stage=name, duration_s=duration_s) for name, duration_s in stages.items()]
    return report


def _time(stamp_ns: int) -> Time:
    seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
    return Time(sec=seconds, nanosec=nanoseconds)
