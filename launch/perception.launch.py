"""Everything: the node (or one for each system), a bag if there is one, RViz if it is installed.

On a vehicle:       config:=my_vehicle.yaml
From a bag:         bag:=drive.mcap config:=my_vehicle.yaml
With nothing given: the synthetic city is made once, and played in a loop.
"""

from pathlib import Path
from shutil import which

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    IncludeLaunchDescription,
    LogInfo,
    OpaqueFunction,
    SetEnvironmentVariable,
    Shutdown,
)
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from perception.doctor import profile_variable, shared_memory
from perception.errors import PerceptionError

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs"


def generate_launch_description():
    return LaunchDescription(
        [
            DeclareLaunchArgument("bag", default_value="", description="rosbag2 folder, .mcap or .db3 to play"),
            DeclareLaunchArgument("config", default_value="", description="vehicle's YAML; configs/vehicle.yaml"),
            DeclareLaunchArgument(
                "demo",
                default_value="auto",
                description="play the synthetic city; auto: if neither bag nor config is given",
                choices=["auto", "true", "false"],
            ),
            DeclareLaunchArgument(
                "systems", default_value="", description="comma-separated names out of the configuration; empty: all"
            ),
            DeclareLaunchArgument(
                "separate",
                default_value="false",
                description="a process of its own for each of `systems`",
                choices=["true", "false"],
            ),
            DeclareLaunchArgument(
                "use_sim_time",
                default_value="auto",
                description="time from /clock; auto: if something is played",
                choices=["auto", "true", "false"],
            ),
            DeclareLaunchArgument(
                "rviz", default_value="auto", description="auto: if it is installed", choices=["auto", "true", "false"]
            ),
            DeclareLaunchArgument(
                "profile",
                default_value=str(CONFIGS / "fastdds_shm.xml"),
                description="Fast DDS profile; fastdds_shm_raw.xml for raw images",
            ),
            DeclareLaunchArgument("rate", default_value="1.0", description="playback speed"),
            DeclareLaunchArgument(
                "loop",
                default_value="auto",
                description="play again and again; auto: the demo only",
                choices=["auto", "true", "false"],
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

    def chosen(name, auto):
        return auto if value(name) == "auto" else value(name) == "true"

    demo = chosen("demo", auto=not value("bag") and not value("config"))
    played = demo or bool(value("bag"))
    config = value("config") or str(CONFIGS / "vehicle.yaml")
    use_sim_time = chosen("use_sim_time", auto=played)
    systems = [name.strip() for name in value("systems").split(",") if name.strip()]
    if value("separate") == "true" and not systems:
        raise PerceptionError(
            "separate:=true needs the systems' names", "give them, as in systems:=detection,occupancy"
        )

    profile = Path(value("profile"))
    memory = shared_memory(profile)
    actions = [
        SetEnvironmentVariable(profile_variable(), str(profile)),
    ]
    if memory.status != "ok":
        actions.append(LogInfo(msg=f"WARNING: shared memory: {memory.detail}\n  {memory.fix}"))
    groups = [[name] for name in systems] if value("separate") == "true" else [systems]
    actions += [node(config, group, use_sim_time) for group in groups]
    if played:
        arguments = {
            "bag": "" if demo else value("bag"),
            "rate": value("rate"),
            "loop": str(chosen("loop", auto=demo)).lower(),
            "stop_with_bag": value("stop_with_bag"),
        }
        actions.append(include("playback.launch.py", arguments))
    if chosen("rviz", auto=which("rviz2") is not None):
        actions.append(include("rviz.launch.py", {"use_sim_time": str(use_sim_time).lower()}))
    return actions


def node(config, systems, use_sim_time):
    parameters = {"config": config, "use_sim_time": use_sim_time}
    if systems:
        parameters["systems"] = systems
    return Node(
        package="perception_ros",
        executable="perception_node",
        name="_".join(["perception", *systems]) if len(systems) == 1 else "perception",
        parameters=[parameters],
        output="screen",
        on_exit=Shutdown(reason="the perception node has ended"),
    )


def include(name, arguments):
    source = PythonLaunchDescriptionSource(str(HERE / name))
    return IncludeLaunchDescription(source, launch_arguments=arguments.items())
