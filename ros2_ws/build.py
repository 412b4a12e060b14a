#!/usr/bin/env python3
"""Build and test the workspace with colcon: on a sourced ROS as it is, on pip's ROS wheels with what they lack.

    python ros2_ws/build.py [arguments of colcon build]      then: . ros2_ws/install/local_setup.bash
    python ros2_ws/build.py test [arguments of colcon test]

The wheels (`pip install -e '.[ros,colcon]'`) set no environment, and their cmake files name the folders of the farm
that built them; both are mended here. With apt's ROS sourced, plain `colcon build` does the same.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

WORKSPACE = Path(__file__).resolve().parent
PREFIX = Path(sys.prefix)


def main(arguments: list[str]) -> int:
    env, options = dict(os.environ), []
    if "AMENT_PREFIX_PATH" not in env:
        if not _has_wheels():
            sys.exit(
                f"no ROS: AMENT_PREFIX_PATH is not set, and {sys.executable} has no ros-rclpy\n"
                "  source ROS (. /opt/ros/$ROS_DISTRO/setup.bash), or: pip install -e '.[ros,colcon]'"
            )
        _mend_cmake_files()
        env |= _environment()
        options = ["--cmake-args", f"-DPython3_EXECUTABLE={sys.executable}", "-DBUILD_TESTING=OFF"]
    colcon = [sys.executable, "-m", "colcon"]
    if arguments[:1] == ["test"]:
        tests = [*colcon, "test", "--event-handlers", "console_direct+", *arguments[1:]]
        code = subprocess.run(tests, cwd=WORKSPACE, env=env).returncode  # noqa: S603
        result = subprocess.run([*colcon, "test-result", "--verbose"], cwd=WORKSPACE, env=env)  # noqa: S603
        return code or result.returncode
    # One package after the other: the second needs the first, and a laptop's cores are few.
    build = [*colcon, "build", "--executor", "sequential", *arguments, *options]
    code = subprocess.run(build, cwd=WORKSPACE, env=env).returncode  # noqa: S603
    if code == 0:
        sys.stdout.write(f"built. Now: . {WORKSPACE / 'install' / 'local_setup.bash'}\n")
    return code


def _has_wheels() -> bool:
    try:
        metadata.version("ros-rclpy")
    except metadata.PackageNotFoundError:
        return False
    return True


def _environment() -> dict[str, str]:
    """What a set-up script of an apt ROS would export."""
    libraries = [PREFIX / "lib", *Path(sysconfig.get_path("purelib")).glob("ros_*.libs")]
    return {
        "AMENT_PREFIX_PATH": str(PREFIX),
        "CMAKE_PREFIX_PATH": str(PREFIX),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "PATH": f"{PREFIX / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "ROS_DISTRO": "kilted",
        "ROS_VERSION": "2",
        "ROS_PYTHON_VERSION": "3",
        # Interpreters re-execute themselves to get LD_LIBRARY_PATH, which cmake takes for a failure to start.
        "_ROS_WHEELS_BOOTSTRAP_COMPLETE": "1",
    }


def _mend_cmake_files() -> None:
    """Replace the build farm's Python and numpy header folders by this environment's; a second time finds nothing."""
    import numpy as np

    farm = re.compile(
        r"/opt/python/cp\d+-cp\d+/(include/python[\d.]+|lib/python[\d.]+/site-packages/numpy/_core/include)"
    )

    def here(match: re.Match[str]) -> str:
        return np.get_include() if "numpy" in match[1] else sysconfig.get_path("include")

    for path in (PREFIX / "share").glob("**/*.cmake"):
        text = path.read_text()
        mended = farm.sub(here, text)
        if mended != text:
            path.unlink()  # the installer may have hard-linked it to its cache
            path.write_text(mended)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
