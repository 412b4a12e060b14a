"""A small city in the cache, in nuScenes' layout: what a newcomer looks at before any download."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import perception
from perception.cache import cache_dir
from perception.synthetic.export import ExportConfig, Progress, export

DEMO = ExportConfig(train=0, val=1, key_frames=4, occupancy=("occ3d",))


def demo_city(progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """The `dataset` keys of the demo city, which is made first where it is not there yet (half a minute on two cores).

    It appears under its name when it is whole, so that two processes, or an interrupted one, leave no half of it.
    """
    root = cache_dir() / f"demo-city-{perception.__version__}"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{root.name}-", dir=root.parent))
        try:
            export(DEMO, part, progress)
            try:
                part.rename(root)
            except OSError:
                if not root.exists():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return {
        "name": "nuscenes",
        "root": root,
        "version": "v1.0-mini",
        "split": "mini_val",
        "occupancy": "occ3d",
        "occupancy_root": root,
    }
