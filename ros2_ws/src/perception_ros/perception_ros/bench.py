"""`perception bench ros`: what the node adds to a network, with sensors in a process of their own.

The sensors send as a large rig does: a LiDAR's 680 KB at 20 Hz, six JPEGs of 1600x900 at 12 Hz, /tf at 50 Hz. The node
runs a predictor that takes no time, so that all that is left is the node: delivery, decoding, assembly, conversion.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import rclpy
import typer
import yaml
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from perception import systems
from perception.datasets import rosbag_messages
from perception.datasets.rosbag_file import CAMERA_INFO, COMPRESSED_IMAGE, POINT_CLOUD, TRANSFORMS, typestore
from perception.evaluation.result import WeightsProvenance
from perception.types import Boxes3D, CameraImage, Needs, PointCloud, Pose, Sample
from perception_ros.interfaces import ensure
from perception_ros.node import PerceptionNode
from perception_ros.outputs import message_class
from perception_ros.up import choose_profile

POINTS, FIELDS = 34_000, ("intensity", "ring")
CAMERAS = ("front", "front_left", "front_right", "back", "back_left", "back_right")
WIDTH, HEIGHT = 1600, 900
LIDAR_HZ, CAMERA_HZ, TF_HZ = 20, 12, 50
_BOXES = 50
_STAMP_AT = slice(4, 12)
"""A header's stamp in CDR bytes; /tf has its number of transforms before it."""
_TF_STAMP_AT = slice(8, 16)


class NoNetwork:
    """Needs what a fusion network needs and gives boxes at once."""

    output = "boxes"
    degraded = ""
    weights = WeightsProvenance.not_needed("it computes nothing")

    def __init__(self, sweeps: int) -> None:
        self.needs = Needs(lidar=("x", "y", "z", "intensity"), cameras=CAMERAS, sweeps=sweeps)

    def predict(self, sample: Sample) -> Boxes3D:
        center = np.linspace(-40, 40, 3 * _BOXES).reshape(-1, 3)
        zero = np.zeros(_BOXES)
        label = np.zeros(_BOXES, np.int64)
        return Boxes3D(
            center, np.ones((_BOXES, 3)), zero, np.ones((_BOXES, 2)), zero + 0.5, label, ("car",), sample.stamp_ns
        )

    def reset(self) -> None:
        """It remembers nothing."""


@dataclass(frozen=True)
class RosBench:
    """What was measured.

    Attributes:
        sent, received: topic -> messages.
        fates: reason -> sweeps of the LiDAR, `published` among them.
        stages_ms: stage -> (p50, p95).
        cores: CPU time over wall time, of the node's process.
    """

    sent: dict[str, int]
    received: dict[str, int]
    fates: dict[str, int]
    stages_ms: dict[str, tuple[float, float]]
    cores: float


def bench(seconds: float, sweeps: int = 1, jpeg: str = "opencv") -> RosBench:
    """Run sensors and node for some seconds."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "vehicle.yaml"
        config.write_text(yaml.safe_dump(_vehicle(jpeg)))
        return _run(config, seconds, sweeps)


def _vehicle(jpeg: str) -> dict[str, Any]:
    cameras = {
        role: {"topic": f"/cam_{role}/image_rect_compressed", "rectified": True, "jpeg": jpeg} for role in CAMERAS
    }
    return {
        "sensors": {"lidars": {"top": {"topic": "/lidar_top"}}, "cameras": cameras},
        "systems": {"bench": {"predictor": {"name": "truth_echo"}}},
    }


def _run(config: Path, seconds: float, sweeps: int) -> RosBench:
    load, systems.load_predictor = systems.load_predictor, lambda *_: NoNetwork(sweeps)  # type: ignore[assignment]
    rclpy.init(args=[])
    executor = SingleThreadedExecutor()
    node = PerceptionNode(parameter_overrides=[Parameter("config", value=str(config))])
    try:
        if not node.autostart():
            raise node.failure or RuntimeError("the node did not start")
        listener = rclpy.create_node("bench_listener")  # boxes and markers are made only for somebody
        for name, kind in (
            ("detections", "perception_msgs/msg/Detections3D"),
            ("markers", "visualization_msgs/msg/MarkerArray"),
        ):
            listener.create_subscription(message_class(kind), f"perception/bench/{name}", lambda _: None, 1, raw=True)
        for one in (node, listener):
            executor.add_node(one)
        return _measure(node, executor, seconds)
    finally:
        systems.load_predictor = load
        executor.shutdown()
        node.close()
        rclpy.try_shutdown()


def _measure(node: PerceptionNode, executor: SingleThreadedExecutor, seconds: float) -> RosBench:
    sensors = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "perception_ros.bench", "--sensors", "--seconds", str(seconds)], stdout=subprocess.PIPE
    )
    assert node._inputs is not None
    topics, intake, worker = list(node._inputs.types), node._diagnostics._intake, node.workers[0]  # type: ignore[union-attr]
    begun, cpu, stages = 0.0, 0.0, []
    while sensors.poll() is None or worker.in_hand:
        executor.spin_once(timeout_sec=0.1)
        if not begun and worker.published:
            begun, cpu = time.monotonic(), _cpu_s()
        while worker.latencies:
            stages.append(worker.latencies.popleft()[1])
    assert sensors.stdout is not None
    elapsed_s, cpu_s = time.monotonic() - begun, _cpu_s() - cpu
    names = stages[-1] if stages else {}
    return RosBench(
        json.loads(sensors.stdout.read()),
        {topic: intake.arrivals[topic].count for topic in topics if topic in intake.arrivals},
        {"published": worker.published} | dict(worker.dropped),
        {name: _percentiles([1e3 * one[name] for one in stages]) for name in names},
        cpu_s / elapsed_s,
    )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _percentiles(values: list[float]) -> tuple[float, float]:
    p50, p95 = np.percentile(values, [50, 95])
    return float(p50), float(p95)


class Sensors(Node):
    """Sends prepared bytes, with the stamp written into them."""

    def __init__(self) -> None:
        super().__init__("bench_sensors")
        best_effort = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.sent: Counter[str] = Counter()
        self._messages = _messages()
        self._publishers_of: dict[str, Any] = {}
        for topic, (kind, _) in self._messages.items():
            qos = latched if topic == "/tf_static" else QoSProfile(depth=100) if topic == "/tf" else best_effort
            self._publishers_of[topic] = self.create_publisher(message_class(kind), topic, qos)

    def matched(self) -> bool:
        return all(publisher.get_subscription_count() for publisher in self._publishers_of.values())

    def send(self, topic: str) -> None:
        raw = self._messages[topic][1]
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        at = _TF_STAMP_AT if topic.startswith("/tf") else _STAMP_AT
        raw[at] = np.array([seconds, nanoseconds], "<u4").tobytes()
        self._publishers_of[topic].publish(bytes(raw))
        self.sent[topic] += 1


def _messages() -> dict[str, tuple[str, bytearray]]:
    """Topic -> type and bytes."""
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-50, 50, (POINTS, 3)).astype(np.float32)
    fields = {name: rng.uniform(0, 255, POINTS).astype(np.float32) for name in FIELDS}
    cloud = rosbag_messages.point_cloud(PointCloud(xyz, fields, Pose.identity(), 0), "lidar_top")
    moved = rosbag_messages.transforms([("odom", "base_link", 0, Pose.identity())])
    mounts = [("base_link", frame, 0, Pose.identity()) for frame in ("lidar_top", *(f"cam_{r}" for r in CAMERAS))]
    found = {
        "/lidar_top": (POINT_CLOUD, cloud),
        "/tf": (TRANSFORMS, moved),
        "/tf_static": (TRANSFORMS, rosbag_messages.transforms(mounts)),
    }
    noise = cv2.resize(rng.integers(0, 255, (HEIGHT // 6, WIDTH // 6, 3), np.uint8), (WIDTH, HEIGHT))
    intrinsic = np.array([[1200.0, 0, WIDTH / 2], [0, 1200, HEIGHT / 2], [0, 0, 1]])
    for role in CAMERAS:
        image = CameraImage(noise, intrinsic, Pose.identity(), 0)
        topic = f"/cam_{role}/image_rect_compressed"
        found[topic] = (COMPRESSED_IMAGE, rosbag_messages.compressed_image(image, f"cam_{role}", 85))
        found[f"/cam_{role}/camera_info"] = (CAMERA_INFO, rosbag_messages.camera_info(image, f"cam_{role}"))
    return {t: (kind, bytearray(typestore().serialize_cdr(message, kind))) for t, (kind, message) in found.items()}


def send(seconds: float) -> dict[str, int]:
    """Be the sensors for some seconds, once all are listened to; topic -> messages sent."""
    ensure()
    rclpy.init(args=[])
    sensors = Sensors()
    deadline_s = time.monotonic() + 30
    while not sensors.matched() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    sensors.send("/tf_static")
    begun = time.monotonic()
    plan = [(k / TF_HZ, "/tf") for k in range(int((seconds + 0.5) * TF_HZ))]
    plan += [(0.2 + k / LIDAR_HZ, "/lidar_top") for k in range(int(seconds * LIDAR_HZ))]
    for i, role in enumerate(CAMERAS):
        for k in range(int(seconds * CAMERA_HZ)):
            due = 0.1 + (k + i / len(CAMERAS)) / CAMERA_HZ
            plan += [(due, f"/cam_{role}/camera_info"), (due, f"/cam_{role}/image_rect_compressed")]
    for due_s, topic in sorted(plan):
        time.sleep(max(begun + due_s - time.monotonic(), 0))
        sensors.send(topic)
    time.sleep(1.0)  # the last ones are still on their way: a publisher that goes takes them with it
    sensors.destroy_node()
    rclpy.try_shutdown()
    return dict(sensors.sent)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seconds: Annotated[float, typer.Option(min=1, help="How long the sensors send.")] = 20.0,
    sweeps: Annotated[int, typer.Option(min=1, help="LiDAR sweeps in a sample.")] = 1,
    jpeg: Annotated[str, typer.Option(help="opencv or simplejpeg")] = "opencv",
    sensors: Annotated[bool, typer.Option("--sensors", hidden=True)] = False,
) -> None:
    """The node's own cost: delivery, and milliseconds added to a frame."""
    choose_profile()
    if sensors:
        typer.echo(json.dumps(send(seconds)))
        return
    from rich.console import Console

    from perception_ros.bench_tables import ros_tables

    for table in ros_tables(bench(seconds, sweeps, jpeg)):
        Console().print(table)


if __name__ == "__main__":
    app()
