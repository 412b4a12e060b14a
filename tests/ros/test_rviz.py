"""The RViz view against what the node and the demo's bag publish: topic, type, QoS, frame."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

outputs = pytest.importorskip("perception_ros.outputs", exc_type=ImportError)

from rclpy.qos import DurabilityPolicy, ReliabilityPolicy  # noqa: E402 - only where there is rclpy

from perception.systems import load_stack  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
VIEW = yaml.safe_load((ROOT / "launch" / "perception.rviz").read_text())["Visualization Manager"]
SHOWS = {
    "PointCloud2": "sensor_msgs/msg/PointCloud2",
    "MarkerArray": "visualization_msgs/msg/MarkerArray",
    "Map": "nav_msgs/msg/OccupancyGrid",
    "Odometry": "nav_msgs/msg/Odometry",
    "Image": "sensor_msgs/msg/CompressedImage",
}
"""RViz display -> the type it subscribes to; an image's by image_transport, on topics that end in `compressed`."""


def displays(group: dict) -> list[dict]:
    return [d for one in group["Displays"] for d in (displays(one) if "Displays" in one else [one])]


WITH_TOPIC = [d for d in displays(VIEW) if "Topic" in d]
STACK = load_stack(ROOT / "configs" / "vehicle.yaml")


@pytest.fixture(scope="module")
def published():
    """Topic -> (type, publisher's reliability, durability) of the shipped configuration and of its sensors."""
    found = {}
    for name, system in STACK.systems.items():
        for output in outputs.OUTPUTS:
            if output.of == system.predictor.output:
                qos = output.qos
                found[f"/perception/{name}/{output.name}"] = (output.type, qos.reliability, qos.durability)
        if system.overlay:
            for role in STACK.sensors.cameras:
                topic = f"/perception/{name}/overlay/{role}/compressed"
                found[topic] = (outputs.OVERLAY_TYPE, outputs.QOS.reliability, outputs.QOS.durability)
    for sensor in STACK.sensors.lidars.values():
        found[sensor.topic] = (SHOWS["PointCloud2"], ReliabilityPolicy.BEST_EFFORT, DurabilityPolicy.VOLATILE)
    return found


@pytest.mark.parametrize("display", WITH_TOPIC, ids=lambda d: d["Name"])
def test_each_display_gets_messages_of_its_type_by_a_qos_that_is_offered(display, published):
    topic = display["Topic"]
    assert topic["Value"] in published
    message_type, reliability, durability = published[topic["Value"]]
    assert SHOWS[display["Class"].rpartition("/")[2]] == message_type
    # A subscriber may ask for no more than is offered.
    assert topic["Reliability Policy"] == "Best Effort" or reliability == ReliabilityPolicy.RELIABLE
    assert topic["Durability Policy"] == "Volatile" or durability == DurabilityPolicy.TRANSIENT_LOCAL


def test_boxes_voxels_pose_and_images_are_shown():
    assert {d["Class"].rpartition("/")[2] for d in displays(VIEW)} == {*SHOWS, "Grid", "TF"}
    assert all(re.fullmatch(r"rviz_default_plugins/\w+", d["Class"]) for d in displays(VIEW))


def test_voxels_are_boxes_in_their_own_colour_and_size():
    (voxels,) = [d for d in WITH_TOPIC if d["Topic"]["Value"].endswith("/voxels")]
    assert (voxels["Style"], voxels["Color Transformer"], voxels["Position Transformer"]) == ("Boxes", "RGB8", "XYZ")


def test_its_frames_are_the_vehicles():
    assert VIEW["Global Options"]["Fixed Frame"] == STACK.map_frame
    assert VIEW["Views"]["Current"]["Target Frame"] == STACK.base_frame
    assert {d["Reference Frame"] for d in displays(VIEW) if "Reference Frame" in d} == {STACK.base_frame}
