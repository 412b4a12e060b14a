"""Real rclpy: one ROS domain per test process, loopback only, shared memory large enough for a LiDAR's messages."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from perception.doctor import profile_variable

ROOT = Path(__file__).resolve().parents[2]

# Before rclpy is imported, for this process and the ones it starts.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
os.environ["ROS_DOMAIN_ID"] = str(1 + (os.getppid() * 8 + int(_worker)) % 100)  # above 101 ports may collide on Linux
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ[profile_variable()] = str(ROOT / "configs" / "fastdds_shm.xml")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in ("rclpy", "perception_ros") if find_spec(name) is None]
    for item in items:
        if missing and Path(__file__).parent in item.path.parents:
            reason = f"no {' and '.join(missing)}: pip install -e '.[ros]' -e ros2_ws/src/perception_ros"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Killed processes leave their shared memory behind; `fastdds` removes what no process has open."""
    fastdds = Path(sys.executable).with_name("fastdds")
    if fastdds.exists() and not hasattr(session.config, "workerinput"):  # not in the workers of xdist
        env = os.environ | {"PATH": f"{fastdds.parent}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run([str(fastdds), "shm", "clean"], env=env, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def interfaces() -> None:
    """perception_msgs and tf2_msgs can be imported."""
    from perception_ros.interfaces import ensure

    ensure()


@pytest.fixture
def ros(interfaces: None) -> Iterator[None]:
    """rclpy is initialised for this test and shut down after it, whatever happened."""
    import rclpy

    rclpy.init()
    yield
    rclpy.try_shutdown()


SpinUntil = Callable[..., None]


@pytest.fixture
def spin_until(ros: None) -> Iterator[SpinUntil]:
    """`spin_until(predicate, deadline_s=10, nodes=[node, probe])`: spins the nodes until it holds, else fails."""
    from rclpy.executors import SingleThreadedExecutor

    executor = SingleThreadedExecutor()

    def spin(predicate: Callable[[], bool], deadline_s: float = 10.0, *, nodes: list | tuple = ()) -> None:
        for node in nodes:
            executor.add_node(node)  # a second time it is ignored
        end = time.monotonic() + deadline_s
        while not predicate():
            if time.monotonic() > end:
                pytest.fail(f"not within {deadline_s} s: {inspect.getsource(predicate).strip()}")
            executor.spin_once(timeout_sec=0.05)

    yield spin
    executor.shutdown()
