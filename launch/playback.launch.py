"""A bag, or the synthetic city, as if the vehicle drove: its topics, /tf, /tf_static and /clock."""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node


def generate_launch_description():
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "bag", default_value="", description="rosbag2 folder, .mcap or .db3; empty: the synthetic city"
            ),
            DeclareLaunchArgument("rate", default_value="1.0", description="playback speed"),
            DeclareLaunchArgument(
                "loop", default_value="false", description="play again and again", choices=["true", "false"]
            ),
            DeclareLaunchArgument(
                "stop_with_bag",
                default_value="false",
                description="shut everything down at the bag's end",
                choices=["true", "false"],
            ),
            OpaqueFunction(function=arrange),
        ]
    )


def arrange(context):
    def value(name):
        return LaunchConfiguration(name).perform(context)

    arguments = [value("bag")] if value("bag") else []
    arguments += ["--rate", value("rate")]
    if value("loop") == "true":
        arguments.append("--loop")
    return [
        Node(
            package="perception_ros",
            executable="perception_play",
            name="perception_play",
            arguments=arguments,
            output="screen",
            on_exit=Shutdown(reason="the bag has ended") if value("stop_with_bag") == "true" else None,
        )
    ]
