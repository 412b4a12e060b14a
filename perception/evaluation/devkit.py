"""The official nuScenes devkit: imported when first needed, its tables, and whether results fit a split of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from perception.datasets.nuscenes_layout import own_splits
from perception.errors import DataError, PerceptionError

Devkit = Any
"""An object of the devkit, which has no types: NuScenes, EvalBoxes, DetectionConfig."""

_VERSION_ENDING = {
    "train": "trainval",
    "val": "trainval",
    "train_detect": "trainval",
    "train_track": "trainval",
    "mini_train": "mini",
    "mini_val": "mini",
    "test": "test",
}


def devkit(module: str) -> Devkit:
    """A module of `nuscenes`. Raises PerceptionError where the devkit cannot be imported."""
    try:
        return importlib.import_module(f"nuscenes.{module}")
    except ImportError as error:
        raise PerceptionError(
            f"nuScenes metrics need the official devkit: {error}", "pip install 'perception[nuscenes]'"
        ) from error


def load_tables(root: Path, version: str) -> Devkit:
    """The devkit's NuScenes object. Raises DataError where tables are missing, malformed or do not fit together."""
    nuscenes = devkit("nuscenes").NuScenes
    try:
        return nuscenes(version, dataroot=str(root), verbose=False)
    except (AssertionError, OSError, KeyError, TypeError, ValueError) as error:
        there = sorted(folder.name for folder in root.glob("v*") if folder.is_dir())
        raise DataError(
            f"{root / version}: the devkit cannot load the tables: {type(error).__name__}: {error}",
            f"{root} holds the versions: {', '.join(there) or 'none'}; maps/ and all tables are needed",
        ) from error


def split_tokens(tables: Devkit, split: str | Sequence[str]) -> list[str]:
    """The sample tokens of a split: an official one, one of the version's `splits.json`, `all`, or a list of scenes.

    Raises:
        DataError: the split is unknown, not one of this version, or none of its scenes are here.
    """
    if split == "all":
        return [str(sample["token"]) for sample in tables.sample]
    scenes = list(split) if not isinstance(split, str) else _scenes_of_split(tables, split)
    tokens = devkit("eval.common.loaders").get_samples_of_scenes(scenes, tables)
    if not tokens:
        raise DataError(
            f"{tables.dataroot}/{tables.version} holds none of the {len(scenes)} scenes of split {split!r}",
            f"the tables hold {len(tables.scene)} scenes: {examples(scene['name'] for scene in tables.scene)}",
        )
    return [str(token) for token in tokens]


def knows_split(tables: Devkit, split: str) -> bool:
    """Whether the devkit evaluates a split by its name: it refuses official names for versions that end otherwise."""
    return split not in _VERSION_ENDING or tables.version.endswith(_VERSION_ENDING[split])


def _scenes_of_split(tables: Devkit, split: str) -> list[str]:
    version, fitting = tables.version, ", ".join(_splits_of_version(tables)) or "none of the official ones"
    if not knows_split(tables, split):
        if own := own_splits(Path(tables.dataroot) / version).get(split):
            return list(own)
        raise DataError(
            f"split {split!r} is one of v1.0-{_VERSION_ENDING[split]}, not of {version}",
            f"splits of {version}: all, {fitting}, and those of its splits.json",
        )
    try:
        return list(devkit("utils.splits").get_scenes_of_split(split, tables))
    except (AssertionError, ValueError) as error:
        raise DataError(f"split {split!r}: {error}", f"splits of {version}: all, {fitting}") from error


def _splits_of_version(tables: Devkit) -> list[str]:
    return [split for split, ending in _VERSION_ENDING.items() if tables.version.endswith(ending)]


def check_samples(
    results: Path,
    tables: Devkit,
    split: str | Sequence[str],
    tokens: Sequence[str],
    predicted: Sequence[str],
    subset: bool,
) -> None:
    """Raise DataError unless the predicted samples are those of the split, or, for a subset, some of them.

    The message counts what is missing and what is too much, gives three examples of each with their scene and split,
    and the cure.
    """
    wanted, given = set(tokens), set(predicted)
    missing = [token for token in tokens if token not in given]
    extra = [token for token in predicted if token not in wanted]
    if not extra and (not missing or (subset and given)):
        return
    parts = [
        f"{len(some)} {kind} ({examples(_describe(tables, token) for token in some[:4])})"
        for kind, some in (("missing", missing), ("extra", extra))
        if some
    ]
    raise DataError(
        f"{results}: its {len(predicted)} samples are not the {len(tokens)} of split {split!r} of {tables.version}: "
        + ", ".join(parts),
        _cure(tables, extra),
    )


def _scene(tables: Devkit, token: str) -> str | None:
    """The name of a sample's scene; None where the tables do not have the sample."""
    try:
        return str(tables.get("scene", tables.get("sample", token)["scene_token"])["name"])
    except KeyError:
        return None


def _splits_with(tables: Devkit, scenes: Iterable[str]) -> list[str]:
    """The official splits of this version that hold all the scenes."""
    scenes_of_split, wanted = devkit("utils.splits").create_splits_scenes(), set(scenes)
    return [split for split in _splits_of_version(tables) if wanted <= set(scenes_of_split[split])]


def _describe(tables: Devkit, token: str) -> str:
    scene = _scene(tables, token)
    if scene is None:
        return f"{token}: not in {tables.version}"
    splits = _splits_with(tables, [scene])
    return f"{token}: {scene}" + (f" of {'/'.join(splits)}" if splits else "")


def _cure(tables: Devkit, extra: Sequence[str]) -> str:
    if not extra:
        return (
            "predict every sample of the split (one without a box is an empty list), "
            "or score what there is with --subset (subset=True)"
        )
    scenes = [_scene(tables, token) for token in extra]
    if None in scenes:
        return f"the file is not of {tables.version}: score it with the version and split that it was predicted on"
    if splits := _splits_with(tables, (scene for scene in scenes if scene)):
        return f"the extra samples are of split {' or '.join(splits)}: score with the split that was predicted"
    return "score with the split that was predicted, or leave the extra samples out of the file"


def examples(items: Iterable[str]) -> str:
    """Three of them at most."""
    first = list(islice(items, 4))
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "") if first else "none"
