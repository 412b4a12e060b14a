"""The message packages that pip's ROS wheels lack: built once from their definitions, then found in the cache.

A sourced workspace brings perception_msgs, an apt ROS brings tf2_msgs, and nothing happens here. The wheels bring
neither, so each is built into `<cache>/interfaces/<hash>/<package>` (interface_builder.py) and put on sys.path; the
hash is over the definitions and all that the binary depends on.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from perception.cache import cache_dir
from perception.errors import PerceptionError

DEFINITIONS = Path(__file__).resolve().parents[2] / "perception_msgs" / "msg"
"""In the source tree, from which a pip installation of this package is editable."""


def ensure() -> None:
    """Make perception_msgs and tf2_msgs importable; call it before importing them.

    Raises:
        PerceptionError: a package is missing and cannot be built here.
    """
    if not available("perception_msgs"):
        add_package("perception_msgs", _own_definitions())
    if not available("tf2_msgs"):
        add_package("tf2_msgs", _tf2_definitions())


def available(package: str) -> bool:
    """Whether `package` can be imported; a folder of that name that is no package does not count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def add_package(package: str, definitions: Mapping[str, str]) -> Path:
    """Build `package` unless the cache has it, and put it on sys.path.

    Args:
        definitions: message name -> text of its .msg file. They may use each other and any installed package.

    Returns:
        The folder on sys.path that holds the package.

    Raises:
        PerceptionError: ROS is not from wheels, there is no compiler, or a definition is wrong.
    """
    _check_buildable(package)
    folder = cache_dir() / "interfaces" / _key(package, definitions)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes start at once; one builds, the others wait
        if not folder.is_dir():
            _build(package, definitions, folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    sys.modules.pop(package, None)  # a folder found as a namespace earlier
    importlib.invalidate_caches()
    return folder


def _build(package: str, definitions: Mapping[str, str], folder: Path) -> None:
    sys.stderr.write(f"building the ROS messages of {package} into {folder}, once (about 10 s) ...\n")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        root = Path(scratch) / folder.name
        (root / package / "msg").mkdir(parents=True)
        for name, text in definitions.items():
            (root / package / "msg" / f"{name}.msg").write_text(text)
        # The generators find their templates through the ament index, whose path the wheels do not set.
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "perception_ros.interface_builder", package, str(root)],
            env=os.environ | {"AMENT_PREFIX_PATH": sys.prefix},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = "\n  ".join(done.stderr.strip().splitlines()[-8:])
            raise PerceptionError(f"{package}: its messages cannot be built: {reason}", _DO)
        root.rename(folder)


def _check_buildable(package: str) -> None:
    if _version("ros-rclpy") is None:
        raise PerceptionError(
            f"{package} cannot be imported by {sys.executable}",
            "build the workspace and source it: cd ros2_ws && colcon build && . install/local_setup.bash; tf2_msgs: "
            "apt-get install ros-$ROS_DISTRO-tf2-msgs",
        )
    missing = [tool for tool in ("gcc", "g++") if shutil.which(tool) is None]
    if missing:
        raise PerceptionError(
            f"{package} has to be built for the ROS wheels, and {' and '.join(missing)} is not on the PATH",
            "apt-get install gcc g++",
        )


_DO = "pip install -e '.[ros]' -e ros2_ws/src/perception_ros, or use a workspace built by colcon"


def _key(package: str, definitions: Mapping[str, str]) -> str:
    import numpy as np

    parts = [package, platform.python_version(), platform.machine(), np.__version__, sys.prefix]
    parts += sorted(
        f"{d.metadata['Name']} {d.version}"
        for d in metadata.distributions()
        if (d.metadata["Name"] or "").startswith(("ros-rosidl", "ros-fast", "ros-rmw"))
    )
    parts += [f"{name}\n{text}" for name, text in sorted(definitions.items())]
    parts.append(Path(__file__).with_name("interface_builder.py").read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _own_definitions() -> dict[str, str]:
    found = {path.stem: path.read_text() for path in DEFINITIONS.glob("*.msg")}
    if not found:
        raise PerceptionError(
            f"perception_msgs is not installed, and there are no definitions in {DEFINITIONS}",
            "install from a checkout: pip install -e ros2_ws/src/perception_ros, or source a workspace built by colcon",
        )
    return found


def _tf2_definitions() -> dict[str, str]:
    """tf2_msgs/TFMessage as `rosbags` ships it; the type hash equals upstream's."""
    if find_spec("rosbags") is None:
        raise PerceptionError("tf2_msgs is not installed, and rosbags, which has its definition, neither", _DO)
    from rosbags.typesys import Stores, get_typestore

    text, _ = get_typestore(Stores.ROS2_KILTED).generate_msgdef("tf2_msgs/msg/TFMessage", ros_version=2)
    return {"TFMessage": text.split("=" * 80)[0]}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
