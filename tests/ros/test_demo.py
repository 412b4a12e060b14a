"""`perception up` as a user starts it: the synthetic drive, through DDS and the node, to what RViz shows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

rclpy = pytest.importorskip("rclpy")
pytest.importorskip("perception_ros.up")

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 150  # the drive is made first, on a loaded machine
QUICK_S = 30


class Up:
    """A running `perception up`; what it says goes to a file, for a pipe that nobody reads fills up and blocks it."""

    def __init__(self, log: Path, words: tuple[str, ...]) -> None:
        self.log = log
        command = [sys.executable, "-m", "perception_ros.up", "rviz:=false", *words]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def check_running(self) -> None:
        assert self.process.poll() is None, self.log.read_text()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=QUICK_S)


@pytest.fixture
def up(tmp_path):
    """Starts `perception up` with arguments; it has ended after the test."""
    started = []

    def start(*words: str) -> Up:
        started.append(Up(tmp_path / f"up{len(started)}.log", words))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def view_topics() -> dict[str, dict]:
    """Topic -> its subscription's settings, of every display in the RViz view."""

    def walk(group: dict):
        for display in group["Displays"]:
            if "Displays" in display:
                yield from walk(display)
            elif "Topic" in display:
                yield display["Topic"]["Value"], display["Topic"]

    return dict(walk(yaml.safe_load((ROOT / "launch" / "perception.rviz").read_text())["Visualization Manager"]))


def test_the_demo_reaches_every_display_and_ends_cleanly(up, spin_until):
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    running = up()
    probe = rclpy.create_node("rviz_probe")
    topics = view_topics()

    def offered() -> dict[str, str]:
        found = {topic: probe.get_publishers_info_by_topic(topic) for topic in topics}
        return {topic: infos[0].topic_type for topic, infos in found.items() if infos}

    def all_are_offered() -> bool:
        running.check_running()
        return offered().keys() == topics.keys()

    spin_until(all_are_offered, DEADLINE_S, nodes=[probe])
    received: dict[str, list] = {topic: [] for topic in topics}
    for topic, message_type in offered().items():
        package, _, name = message_type.partition("/msg/")
        best_effort = topics[topic]["Reliability Policy"] == "Best Effort"
        qos = QoSProfile(
            depth=1, reliability=ReliabilityPolicy.BEST_EFFORT if best_effort else ReliabilityPolicy.RELIABLE
        )
        probe.create_subscription(getattr(import_module(f"{package}.msg"), name), topic, received[topic].append, qos)

    spin_until(lambda: all(received.values()), DEADLINE_S, nodes=[probe])
    newest = {topic.rpartition("/")[2]: messages[-1] for topic, messages in received.items()}
    assert newest["voxels"].header.frame_id == "base_link" and newest["voxels"].width > 1000
    assert any(
        marker.ns == "boxes" for message in received["/perception/detection/markers"] for marker in message.markers
    )
    assert newest["odometry"].header.frame_id == "map" and newest["odometry"].child_frame_id == "base_link"
    assert newest["compressed"].format == "jpeg"
    probe.destroy_node()
    code, out = running.stop(), running.log.read_text()
    assert code == 0 and "Traceback" not in out, out


@pytest.mark.slow
def test_systems_in_processes_of_their_own_give_the_same_topics(up, spin_until):
    running = up("systems:=detection,localization", "separate:=true")
    probe = rclpy.create_node("probe")

    def both() -> bool:
        running.check_running()
        names = {info.node_name for info in probe.get_publishers_info_by_topic("/perception/detection/markers")}
        others = {info.node_name for info in probe.get_publishers_info_by_topic("/perception/localization/pose")}
        return names == {"perception_detection"} and others == {"perception_localization"}

    spin_until(both, DEADLINE_S, nodes=[probe])
    assert not probe.get_publishers_info_by_topic("/perception/occupancy/voxels")
    probe.destroy_node()


def test_a_wrong_configuration_ends_it_with_the_reason(tmp_path):
    (tmp_path / "car.yaml").write_text("sensors: {lidar: {}}\n")
    command = [sys.executable, "-m", "perception_ros.up", "rviz:=false", f"config:={tmp_path / 'car.yaml'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=dict(os.environ))
    assert done.returncode == 1
    assert "car.yaml" in done.stdout and "lidars" in done.stdout and "Traceback" not in done.stdout
