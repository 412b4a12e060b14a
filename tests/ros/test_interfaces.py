"""Message packages built without cmake: what comes out is what rclpy wants, and what goes wrong is said."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from perception.errors import PerceptionError

pytest.importorskip("rclpy")
builder = pytest.importorskip("perception_ros.interfaces")

MESSAGES = Path(__file__).resolve().parents[2] / "ros2_ws" / "src" / "perception_msgs"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache and a module path of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "perception" / "interfaces"


def test_colcon_builds_every_definition():
    listed = set(re.findall(r"msg/\w+\.msg", (MESSAGES / "CMakeLists.txt").read_text()))
    assert listed == {f"msg/{path.name}" for path in (MESSAGES / "msg").glob("*.msg")} != set()


def test_our_messages_survive_rclpys_serialisation(interfaces):
    import numpy as np
    from perception_msgs.msg import Detection3D, Detections3D, OccupancyGrid3D
    from rclpy.serialization import deserialize_message, serialize_message

    box = Detection3D(track_id="7", label=1, score=0.5, pose_covariance=np.arange(36, dtype=np.float32))
    box.pose.position.x = 3.25
    message = Detections3D(classes=["car", "bus"], detections=[box, Detection3D()])
    message.header.frame_id = "base_link"
    assert deserialize_message(serialize_message(message), Detections3D) == message
    grid = OccupancyGrid3D(shape=np.array([2, 3, 4], np.uint32), label=bytes(range(24)), free_label=17)
    again = deserialize_message(serialize_message(grid), OccupancyGrid3D)
    assert again.shape.tolist() == [2, 3, 4] and bytes(again.label) == bytes(range(24)) and again.UNKNOWN == 255


def test_the_hash_of_tf2_msgs_is_upstreams(interfaces, ros):
    # Another vendor's node takes no message of a type whose hash differs.
    import rclpy
    from tf2_msgs.msg import TFMessage

    node = rclpy.create_node("hashes")
    node.create_publisher(TFMessage, "tf", 1)
    (info,) = node.get_publishers_info_by_topic("tf")
    assert bytes(info.topic_type_hash.value).hex().startswith("e369d0f0")
    node.destroy_node()


def test_a_second_process_waits_for_the_first_and_builds_nothing(own_cache, tmp_path):
    code = "from perception_ros.interfaces import add_package; add_package('twice_msgs', {'Number': 'int32 value'})"
    code += "; from twice_msgs.msg import Number; from rclpy.serialization import serialize_message as s"
    code += "; print(s(Number(value=5)).hex())"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in said] == ["0001000005000000\n"] * 2
    assert sorted(err.count("building the ROS messages of twice_msgs") for _, err in said) == [0, 1]
    assert [path.suffix for path in sorted(own_cache.iterdir())] == ["", ".lock"]  # nothing half-built is left


def test_a_wrong_definition_is_named(own_cache):
    with pytest.raises(PerceptionError, match=r"wrong_msgs: its messages cannot be built: [\s\S]*int33"):
        builder.add_package("wrong_msgs", {"Number": "int33 value"})
    assert not [path for path in own_cache.iterdir() if path.is_dir()]


def test_without_a_compiler_it_says_what_to_install(own_cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PerceptionError, match=r"gcc and g\+\+ is not on the PATH\n  apt-get install gcc"):
        builder.add_package("any_msgs", {"Number": "int32 value"})


def test_without_the_wheels_it_says_to_source_a_workspace(own_cache, monkeypatch):
    monkeypatch.setattr(builder, "_version", lambda name: None)
    with pytest.raises(PerceptionError, match=r"any_msgs cannot be imported by [\s\S]*colcon build && \. install"):
        builder.add_package("any_msgs", {"Number": "int32 value"})


def test_a_folder_that_is_no_package_does_not_count(tmp_path, monkeypatch):
    (tmp_path / "shadow_msgs" / "msg").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not builder.available("shadow_msgs")
