"""A small city in the cache, as nuScenes' tables and as a bag: what a newcomer looks at before any download."""

from __future__ import annotations

import fcntl
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import perception
from perception.cache import cache_dir
from perception.synthetic.city import GridConfig
from perception.synthetic.export import ExportConfig, Progress, export

DEMO = ExportConfig(train=0, val=1, key_frames=4, occupancy=("occ3d",))
DRIVE = ExportConfig(
    layout="rosbag",
    train=0,
    val=1,
    key_frames=4,
    image_size=(320, 180),
    lidar_stride=2,
    camera_hz=4.0,
    radar_hz=5.0,
    shadow_texel_m=0.25,
    grid=GridConfig(voxel_size=(0.5, 0.5, 0.5), shape=(160, 160, 13)),
)
"""Two seconds with as few frames as still look like a drive: whoever starts the stack for the first time waits."""


def _say(what: str, done: int, total: int) -> None:
    """Progress where no other is asked for: a newcomer's first minute is not to be silent."""
    sys.stderr.write(f"making a small city, once: {done} of {total}, {what}\n")


def demo_city(progress: Progress = _say) -> dict[str, Any]:
    """The `dataset` keys of the demo city, made first where it is not there yet (half a minute on two cores)."""
    root = _made("demo-city", DEMO, progress)
    return {
        "name": "nuscenes",
        "root": root,
        "version": "v1.0-mini",
        "split": "mini_val",
        "occupancy": "occ3d",
        "occupancy_root": root,
    }


def demo_bag(progress: Progress = _say) -> Path:
    """A bag of two seconds of driving with its truth, made like the city where it is not there yet (seconds)."""
    return _made("demo-drive", DRIVE, progress) / "val_000"


def _made(name: str, config: ExportConfig, progress: Progress) -> Path:
    """The folder of an export in the cache.

    It appears under its name when it is whole, so that an interrupted process leaves no half of it. Of several that
    want it (a node and its player start together) one makes it, the others wait.
    """
    made_as = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:8]
    root = cache_dir() / f"{name}-{perception.__version__}-{made_as}"
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_name(f"{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            with tempfile.TemporaryDirectory(prefix=f"{root.name}-", dir=root.parent) as scratch:
                part = Path(scratch) / name
                export(config, part, progress)
                part.rename(root)
    return root
