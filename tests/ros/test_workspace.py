"""colcon on the pip wheels, for real: builds, tests, and what it built is what a sourced shell finds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("colcon_core") is None, reason="no colcon: pip install -e '.[ros,colcon]'"),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the build reads, so that nothing is left in the tree; built."""
    top = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("build", "install", "log", "__pycache__", "*.egg-info")
    for name in ("ros2_ws", "launch", "configs"):
        shutil.copytree(ROOT / name, top / name, ignore=ignored)
    done = run(top, "build")
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith(f"built. Now: . {top}/ros2_ws/install/local_setup.bash")
    return top


def run(top: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "AMENT_PREFIX_PATH"}
    command = [sys.executable, str(top / "ros2_ws" / "build.py"), *(a for a in arguments if a != "build")]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_colcon_test_runs_the_packages_tests(checkout):
    done = run(checkout, "test")
    assert done.returncode == 0, done.stdout
    assert "7 tests, 0 errors, 0 failures, 0 skipped" in done.stdout, done.stdout


def test_a_sourced_shell_finds_the_built_packages(checkout):
    code = "import perception_msgs.msg, perception_ros; print(perception_msgs.__file__); print(perception_ros.__file__)"
    script = f'. ros2_ws/install/local_setup.bash && "{sys.executable}" -c "{code}"'
    done = subprocess.run(["bash", "-c", script], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(f"{checkout}/ros2_ws/install/") for line in done.stdout.split())


def test_the_definitions_of_both_ways_of_building_hash_alike(checkout, interfaces, tmp_path):
    # A node of a colcon workspace has to understand one that runs on the wheels.
    code = (
        "import rclpy; from perception_ros.interfaces import ensure; ensure();"
        "from perception_msgs.msg import Detections3D, OccupancyGrid3D, PredictionReport; rclpy.init();"
        "n = rclpy.create_node('h'); [n.create_publisher(t, t.__name__, 1) for t in (Detections3D, OccupancyGrid3D,"
        " PredictionReport)]; [print(bytes(n.get_publishers_info_by_topic(t)[0].topic_type_hash.value).hex())"
        " for t in ('Detections3D', 'OccupancyGrid3D', 'PredictionReport')]; rclpy.shutdown()"
    )
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    script = f'. ros2_ws/install/local_setup.bash && "{sys.executable}" -c "{code}"'
    sourced = subprocess.run(["bash", "-c", script], cwd=checkout, capture_output=True, text=True)
    assert plain.stdout == sourced.stdout and len(plain.stdout.split()) == 3, plain.stderr + sourced.stderr
