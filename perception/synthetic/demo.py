"""A small city in the cache, as nuScenes' tables and as a bag: what a newcomer looks at before any download."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import perception
from perception.cache import cache_dir
from perception.synthetic.export import ExportConfig, Progress, export

DEMO = ExportConfig(train=0, val=1, key_frames=4, occupancy=("occ3d",))
DRIVE = ExportConfig(layout="rosbag", train=0, val=1, key_frames=4, image_size=(480, 270))


def _silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


def demo_city(progress: Progress = _silent) -> dict[str, Any]:
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


def demo_bag(progress: Progress = _silent) -> Path:
    """A bag of two seconds of driving with its truth, made like the city where it is not there yet (a minute)."""
    return _made("demo-drive", DRIVE, progress) / "val_000"


def _made(name: str, config: ExportConfig, progress: Progress) -> Path:
    """The folder of an export in the cache.

    It appears under its name when it is whole, so that two processes, or an interrupted one, leave no half of it.
    """
    root = cache_dir() / f"{name}-{perception.__version__}"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{root.name}-", dir=root.parent))
        try:
            export(config, part, progress)
            try:
                part.rename(root)
            except OSError:
                if not root.exists():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return root
