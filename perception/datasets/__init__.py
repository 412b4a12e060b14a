"""The data sets by name. Each layout is read and written in one module, so that a format constant stands once."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from perception.config import Config, schema_of, validate
from perception.datasets.rosbag_file import is_bag
from perception.errors import DataError
from perception.types import Dataset

DATASETS = {
    "nuscenes": "perception.datasets.nuscenes:NuScenes",
    "semantickitti": "perception.datasets.semantickitti:SemanticKITTI",
    "omnihd": "perception.datasets.omnihd:OmniHD",
    "view_of_delft": "perception.datasets.view_of_delft:ViewOfDelft",
    "mmdet3d_infos": "perception.datasets.mmdet3d_infos:Mmdet3dInfos",
    "rosbag": "perception.datasets.rosbag:Rosbag",
}
"""Name in a configuration -> module:Class; the configuration of `Class` is `ClassConfig` beside it."""


def dataset_config(data: Mapping[str, Any], where: str) -> Config:
    """The configuration in the `dataset` keys of a file (`where`), of the class that its `name` asks for."""
    return validate(schema_of(DATASETS, "dataset", data, where), data, where, "dataset.")


def open_dataset(config: Config) -> Dataset:
    """The data set of a configuration; DataError where its files are not there."""
    module, _, cls = DATASETS[config.name].partition(":")  # type: ignore[attr-defined]
    return getattr(import_module(module), cls)(config)


def detect_layout(root: Path) -> dict[str, Any]:
    """What lies at `root`, told from the files that only one layout has, as the keys of a configuration.

    Raises DataError that lists what each layout looks like.
    """
    if root.exists() and is_bag(root):
        return {"name": "rosbag", "root": root}
    if not root.is_dir():
        raise DataError(f"{root}: no such folder", "give the data set's root, or a configuration file (.yaml)")
    versions = sorted(p.parent.name for p in root.glob("v1.0-*/scene.json"))
    if versions:
        version = next((v for v in ("v1.0-trainval", "v1.0-mini") if v in versions), versions[0])
        return {"name": "nuscenes", "root": root, "version": version, "split": "all"}
    # KITTI's calibration download makes a folder for every sequence, also for those without scans.
    if sequences := sorted(path.parent.name for path in root.glob("sequences/*/velodyne")):
        return {"name": "semantickitti", "root": root, "split": sequences}
    if next(root.glob("*/training/velodyne"), None):
        return {"name": "view_of_delft", "root": root}
    if next(root.glob("v1.0-*/sensor_calibration.json"), None):
        return {"name": "omnihd", "root": root}
    if (root / "infos.json").is_file():
        return {"name": "mmdet3d_infos", "root": root}
    holds = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
    raise DataError(
        f"{root}: not a layout that is known here; it holds {holds}",
        "nuScenes has v1.0-*/scene.json, SemanticKITTI sequences/*/velodyne, View-of-Delft radar/training/velodyne, "
        "OmniHD-Scenes v1.0-*/sensor_calibration.json, mmdetection3d infos.json, "
        "rosbag2 metadata.yaml and .mcap or .db3",
    )
