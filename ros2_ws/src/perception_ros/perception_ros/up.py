"""Start a launch file, with ROS' own `launch` where it is installed, else with the stand-in for it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from perception.doctor import profile_variable
from perception.errors import PerceptionError
from perception_ros import launch_stand_in


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="perception up", description=__doc__)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[LAUNCH FILE] [NAME:=VALUE ...]",
        help="a path, or perception (without one), playback, rviz; then the launch file's arguments",
    )
    parser.add_argument("-s", "--show-args", action="store_true", help="list the launch file's arguments and end")
    options = parser.parse_args(words)
    # The folder `launch` of a checkout can be imported too; ROS' own comes with launch_ros.
    real = find_spec("launch_ros") is not None
    if not real:
        launch_stand_in.install()
    try:
        path, arguments = parse(options.words)
        if options.show_args:
            return show(path)
        return run_real(path, arguments) if real else launch_stand_in.run(path, arguments)
    except PerceptionError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def launch_folder() -> Path:
    """The top level's launch files in a checkout, those of the installed share otherwise."""
    checkout = Path(__file__).resolve().parents[4] / "launch"
    if checkout.is_dir():
        return checkout
    from ament_index_python import get_package_share_directory

    return Path(get_package_share_directory("perception_ros")) / "launch"


def choose_profile() -> None:
    """Take the shipped Fast DDS profile where none is chosen: its shared memory belongs to the publisher, and in the
    512 KiB of the default most clouds get lost."""
    if {"FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"} & os.environ.keys():
        return
    os.environ[profile_variable()] = str(launch_folder().parent / "configs" / "fastdds_shm.xml")


def parse(words: list[str]) -> tuple[Path, dict[str, str]]:
    """The launch file and its arguments.

    Raises:
        PerceptionError: no such launch file, or one that has no such argument.
    """
    arguments: dict[str, str] = {}
    names = []
    for word in words:
        name, assigned, value = word.partition(":=")
        if assigned:
            arguments[name] = value
        else:
            names.append(word)
    if len(names) > 1:
        raise PerceptionError(f"more than one launch file: {', '.join(names)}", "arguments are written NAME:=VALUE")
    name = names[0] if names else "perception"
    shipped = launch_folder() / f"{name}.launch.py"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.name.partition(".")[0] for file in launch_folder().glob("*.launch.py")))
        raise PerceptionError(f"there is no launch file {name!r}", f"give the path of one, or: {known}")
    declared = [argument.name for argument in load(path).get_launch_arguments()]
    if unknown := sorted(arguments.keys() - set(declared)):
        raise PerceptionError(f"{path.name} has no argument {', '.join(unknown)}", f"it has: {', '.join(declared)}")
    return path, arguments


def load(path: Path) -> Any:
    """A file's LaunchDescription, of ROS' own launch or the stand-in: whichever the file's imports find."""
    return launch_stand_in.load(path)


def show(path: Path) -> int:
    for argument in load(path).get_launch_arguments():
        default = argument.default_value
        # ROS' own keeps a list of substitutions.
        plain = default if isinstance(default, str) else "".join(getattr(part, "text", "") for part in default or ())
        sys.stdout.write(f"{argument.name}:={plain or repr('')}\n    {argument.description}\n")
    return 0


def run_real(path: Path, arguments: Mapping[str, str]) -> int:
    from launch import LaunchDescription, LaunchService  # type: ignore[attr-defined] # here a folder of that name
    from launch.actions import IncludeLaunchDescription
    from launch.launch_description_sources import PythonLaunchDescriptionSource

    source = PythonLaunchDescriptionSource(str(path))
    service = LaunchService(argv=[f"{name}:={value}" for name, value in arguments.items()])
    include = IncludeLaunchDescription(source, launch_arguments=list(arguments.items()))
    service.include_launch_description(LaunchDescription([include]))
    return service.run()


if __name__ == "__main__":
    sys.exit(main())
