"""What a built and sourced workspace has, run by `colcon test`. All other tests are in the top level's tests/ros."""

from importlib import import_module
from pathlib import Path

import pytest
from ament_index_python.packages import get_package_prefix, get_package_share_directory

SHARE = Path(get_package_share_directory("perception_ros"))


def test_it_is_the_workspaces_package_that_is_tested():
    assert "install" in SHARE.parts
    assert Path(import_module("perception_msgs").__file__).is_relative_to(get_package_prefix("perception_msgs"))


@pytest.mark.parametrize("name", ["Detections3D", "OccupancyGrid3D", "PredictionReport"])
def test_the_messages_travel(name):
    import rclpy

    message_type = getattr(import_module("perception_msgs.msg"), name)
    sent = message_type()
    sent.header.frame_id = "base_link"
    received = []
    rclpy.init()
    try:
        node = rclpy.create_node("travel")
        node.create_subscription(message_type, "there", received.append, 1)
        publisher = node.create_publisher(message_type, "there", 1)
        for _ in range(200):
            if publisher.get_subscription_count():
                break
            rclpy.spin_once(node, timeout_sec=0.05)
        publisher.publish(sent)
        for _ in range(200):
            if received:
                break
            rclpy.spin_once(node, timeout_sec=0.05)
        node.destroy_node()
    finally:
        rclpy.shutdown()
    assert received == [sent]


@pytest.mark.parametrize("executable", ["perception_node", "perception_play"])
def test_the_programs_are_where_ros_looks(executable):
    assert Path(get_package_prefix("perception_ros"), "lib", "perception_ros", executable).is_file()


def test_launch_files_view_and_configurations_are_installed():
    installed = {path.name for path in SHARE.glob("*/*")}
    assert {"perception.launch.py", "playback.launch.py", "rviz.launch.py", "fastdds_shm.xml"} <= installed
