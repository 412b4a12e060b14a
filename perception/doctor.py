"""What this machine can run: versions, GPU and spconv build, ROS Python, shared memory; each problem with its fix."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Status = Literal["ok", "off", "warn", "fail"]

ROS_PYTHON = {"humble": (3, 10), "iron": (3, 10), "jazzy": (3, 12), "kilted": (3, 12)}
"""The interpreter each distribution's apt packages are built for."""

SHM_NEEDED_BYTES = 256 * 2**20
"""Free shared memory for DataLoader workers and large messages; containers have 64 MiB unless told otherwise."""

PUBLISHING_PROCESSES = 3
"""Sensors' drivers or a bag player, the node, RViz: each allocates one segment of the Fast DDS profile's size."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `off`: an optional part is not installed; `fail`: the product cannot run."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Every check, in the order of the report. A check that itself breaks is reported as a failure, not hidden."""
    findings: list[Finding] = []
    for check in (_python, _libraries, _gpu, _spconv, _ros, _shared_memory, _nuscenes_devkit, _open3d, _cache):
        findings += _guarded(check)
    return findings


def _guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except Exception as error:
        name = check.__name__.strip("_").replace("_", " ")
        return [
            Finding(name, "fail", f"{type(error).__name__}: {error}", "reinstall the package that the message names")
        ]


def _python() -> list[Finding]:
    version = platform.python_version()
    good = (3, 10) <= sys.version_info[:2] <= (3, 12)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding(
            "Python",
            "ok" if good else "fail",
            f"{version}, {sys.executable}, {cores} cores",
            "" if good else "use Python 3.10, 3.11 or 3.12: ROS 2 Humble has 3.10, Jazzy 3.12",
        )
    ]


def _libraries() -> list[Finding]:
    names = ("numpy", "scipy", "torch", "opencv-python-headless", "pydantic", "safetensors")
    missing = [n for n in names if _version(n) is None]
    detail = ", ".join(f"{n} {_version(n)}" for n in names if n not in missing)
    if missing:
        return [
            Finding("libraries", "fail", f"missing: {', '.join(missing)}", "pip install -e . in the project's folder")
        ]
    return [Finding("libraries", "ok", detail)]


def _gpu() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        found = []
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            arch = f"sm_{properties.major}{properties.minor}"
            known = torch.cuda.get_arch_list()
            runs = arch in known or any(a.startswith("compute_") for a in known)
            detail = f"{properties.name}, {arch}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
            fix = "" if runs else f"this PyTorch is built for {', '.join(known)}: install a build that has {arch}"
            found.append(Finding(f"GPU {i}", "ok" if runs else "fail", detail, fix))
        return found
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        build = torch.version.cuda
        fix = (
            "install a CUDA build of PyTorch"
            if build is None
            else "update the NVIDIA driver, or choose an older CUDA build"
        )
        return [
            Finding(
                "GPU", "warn", f"there is an NVIDIA driver, but PyTorch ({build or 'CPU build'}) sees no device", fix
            )
        ]
    return [Finding("GPU", "off", "none: networks run on the CPU")]


def _spconv() -> list[Finding]:
    installed = [d for d in _distributions() if d == "spconv" or d.startswith("spconv-cu")]
    wheel = "cu120" if sys.version_info < (3, 12) else "cu126"
    if not installed:
        return [
            Finding(
                "spconv",
                "off",
                "not installed: the torch-native backend is used",
                f"on a GPU: pip install -e '.[{wheel}]'",
            )
        ]
    detail = ", ".join(f"{d} {_version(d)}" for d in installed)
    if len(installed) > 1:
        return [
            Finding("spconv", "fail", f"{detail}: they overwrite each other", f"pip uninstall all but spconv-{wheel}")
        ]
    try:
        importlib.import_module("spconv.pytorch")
    except Exception as error:
        return [
            Finding(
                "spconv", "fail", f"{detail} does not import: {error}", f"pip install --force-reinstall -e '.[{wheel}]'"
            )
        ]
    import torch

    if not torch.cuda.is_available():
        return [Finding("spconv", "ok", f"{detail}; on the CPU the torch-native backend is used")]
    major, minor = torch.cuda.get_device_capability()
    if installed[0] == "spconv":
        return [
            Finding(
                "spconv",
                "warn",
                f"{detail} is the CPU build",
                f"pip uninstall spconv cumm; pip install -e '.[{wheel}]'",
            )
        ]
    if major >= 10:
        return [
            Finding(
                "spconv",
                "warn",
                f"{detail} has no code for sm_{major}{minor}",
                "use backend: torch (needs nothing more)",
            )
        ]
    return [Finding("spconv", "ok", detail)]


def _ros() -> list[Finding]:
    distro = os.environ.get("ROS_DISTRO", "")
    if find_spec("rclpy") is not None:
        try:
            importlib.import_module("rclpy")
        except Exception as error:
            fix = (
                "source the ROS set-up script in this shell; with pip wheels install the extra: pip install -e '.[ros]'"
            )
            return [Finding("ROS 2", "fail", f"rclpy does not import: {error}", fix)]
        return [
            Finding("ROS 2", "ok", f"rclpy {_version('ros-rclpy') or 'of ' + (distro or 'an unknown distribution')}")
        ]
    here = sys.version_info[:2]
    if distro in ROS_PYTHON and ROS_PYTHON[distro] != here:
        want = ".".join(map(str, ROS_PYTHON[distro]))
        fix = f"make the environment with python{want} -m venv --system-site-packages"
        return [
            Finding(
                "ROS 2",
                "warn",
                f"{distro} is sourced, built for Python {want}; this is {platform.python_version()}",
                fix,
            )
        ]
    if distro:
        fix = "make the environment with --system-site-packages, and source the set-up script first"
        return [Finding("ROS 2", "warn", f"{distro} is sourced, but this interpreter does not see rclpy", fix)]
    return [Finding("ROS 2", "off", "no rclpy: only offline work", "source ROS, or: pip install -e '.[ros]'")]


def _shared_memory() -> list[Finding]:
    profile = os.environ.get("FASTDDS_DEFAULT_PROFILES_FILE") or os.environ.get("FASTRTPS_DEFAULT_PROFILES_FILE")
    return [shared_memory(Path(profile) if profile else None)]


def profile_variable() -> str:
    """The environment variable that names Fast DDS' profile: distributions up to Jazzy have Fast DDS 2."""
    fast_dds_2 = os.environ.get("ROS_DISTRO") in ("humble", "iron", "jazzy")
    return "FASTRTPS_DEFAULT_PROFILES_FILE" if fast_dds_2 else "FASTDDS_DEFAULT_PROFILES_FILE"


def shared_memory(profile: Path | None = None, shm: Path = Path("/dev/shm")) -> Finding:  # noqa: S108 - the mount itself
    """Whether /dev/shm has room for the segments of a Fast DDS profile; the node and the launch files ask too.

    Where it has not, Fast DDS falls back to UDP without a word to the application, and large messages get lost.

    Args:
        profile: an XML profile, as in configs/; None: room for DataLoader workers and large messages in general.
        shm: the mount of POSIX shared memory.
    """
    name = "shared memory"
    if not shm.is_dir():
        absent = f"{shm} is absent: DataLoader workers and DDS fall back to slow paths"
        return Finding(name, "warn", absent, "mount a tmpfs")
    needed, user = SHM_NEEDED_BYTES, "large messages"
    if profile is not None:
        try:
            sizes = re.findall(r"<segment_size>\s*(\d+)", profile.read_text(encoding="utf-8"))
        except OSError as error:
            fix = "set FASTDDS_DEFAULT_PROFILES_FILE to configs/fastdds_shm.xml, or unset it"
            return Finding(name, "warn", f"the Fast DDS profile cannot be read: {error}", fix)
        segment = max(map(int, sizes), default=0)
        needed = PUBLISHING_PROCESSES * segment
        user = f"{PUBLISHING_PROCESSES} segments of {segment / 2**20:.0f} MiB ({profile.name})"
    usage = shutil.disk_usage(shm)
    detail = f"{usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB free in {shm}"
    if usage.free >= needed:
        return Finding(name, "ok", detail)
    left = sum(path.stat().st_size for path in shm.glob("fastdds_*")) / 2**20
    fix = f"in Docker: --shm-size=1g or --ipc=host; else remove leftovers ({left:.0f} MiB now) with: fastdds shm clean"
    return Finding(name, "warn", f"{detail}, {user} need {needed / 2**20:.0f}: large messages will be lost", fix)


def _nuscenes_devkit() -> list[Finding]:
    if find_spec("nuscenes") is None:
        return [
            Finding(
                "nuscenes-devkit", "off", "not installed: no official detection scores", "pip install -e '.[nuscenes]'"
            )
        ]
    importlib.import_module("nuscenes.eval.detection.evaluate")
    return [Finding("nuscenes-devkit", "ok", f"{_version('nuscenes-devkit')}")]


def _open3d() -> list[Finding]:
    if find_spec("open3d") is None:
        return [Finding("open3d", "off", "not installed: no interactive view", "pip install -e '.[viz]'")]
    try:
        importlib.import_module("open3d")
    except (ImportError, OSError) as error:
        fix = "apt-get install libusb-1.0-0" if "libusb" in str(error) else "pip install --force-reinstall -e '.[viz]'"
        return [Finding("open3d", "warn", f"does not import: {error}", fix)]
    return [Finding("open3d", "ok", f"{_version('open3d') or _version('open3d-cpu')}")]


def _cache() -> list[Finding]:
    from perception.cache import cache_dir

    folder = cache_dir()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if not os.access(existing, os.W_OK):
        return [Finding("cache", "fail", f"{folder} is not writable", "set XDG_CACHE_HOME to a folder that is")]
    return [
        Finding(
            "cache",
            "ok" if free > 1 else "warn",
            f"{folder}, {free:.0f} GiB free",
            "" if free > 1 else "free some space",
        )
    ]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _distributions() -> list[str]:
    return sorted({d.metadata["Name"].lower() for d in metadata.distributions() if d.metadata["Name"]})
