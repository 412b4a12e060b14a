"""The city written in the official layouts, by the writers of `perception.datasets`.

Training and validation scenes come of seeds far apart, so that no street is in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from perception.config import Config
from perception.datasets import occ3d, omnihd_occupancy, openoccupancy, semantickitti_voxels, surroundocc
from perception.datasets.nuscenes_layout import OccupancyLayout, official_splits
from perception.datasets.nuscenes_writer import NuScenesWriter
from perception.datasets.omnihd_writer import OmniHDWriter
from perception.datasets.semantickitti import EGO_FROM_LIDAR, SemanticKITTIWriter
from perception.errors import ConfigError
from perception.synthetic.city import City, CityConfig, GridConfig
from perception.synthetic.roads import PIXEL_M, Ground
from perception.types import Array, OccupancyGrid3D, Pose, Sample, Truth, VoxelGrid

VALIDATION_SEED = 100_000
"""Validation scenes are made of seeds from here on."""

Progress = Callable[[str, int, int], None]
"""Called with (what, done, of how many)."""


class ExportConfig(Config):
    """What is written.

    Attributes:
        layout: `nuscenes` (tables, lidarseg, occupancy), `semantickitti`, `omnihd`, or `rosbag` (MCAP).
        train, val: scenes of each split.
        key_frames: of a scene, 2 Hz (10 Hz in SemanticKITTI).
        seed: of the first training scene.
        image_size: (width, height) of the cameras; SemanticKITTI's is its rig's own.
        sweeps: images between key frames as well (12 Hz); a bag always has them. LiDAR and radar always are whole.
        occupancy: layouts of nuScenes occupancy written beside the tables.
        device: where the sensors are simulated.
    """

    layout: Literal["nuscenes", "semantickitti", "omnihd", "rosbag"] = "nuscenes"
    train: int = Field(1, ge=0)
    val: int = Field(1, ge=0)
    key_frames: int = Field(10, ge=1, le=200)
    seed: int = Field(0, ge=0, lt=VALIDATION_SEED)
    image_size: tuple[int, int] = (800, 450)
    sweeps: bool = False
    occupancy: tuple[OccupancyLayout, ...] = ("occ3d",)
    device: str = "cpu"


def export(config: ExportConfig, root: Path, progress: Progress = lambda what, done, total: None) -> None:
    """Write a city under `root`.

    Raises:
        ConfigError: more scenes than the official splits have names for.
        DataError: something is there already.
    """
    scenes = {"train": (config.seed, config.train), "val": (VALIDATION_SEED, config.val)}
    cities = {split: _city(config, seed, count) for split, (seed, count) in scenes.items() if count}
    total = sum(len(city) for city in cities.values())
    done = 0

    def advance(what: str) -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    writers = {"nuscenes": _nuscenes, "semantickitti": _semantickitti, "omnihd": _omnihd, "rosbag": _rosbag}
    writers[config.layout](config, cities, root, advance)


Cities = Mapping[str, City]
Advance = Callable[[str], None]


def _city(config: ExportConfig, seed: int, scenes: int) -> City:
    """The scenes of a split, simulated with the rig and the names of the layout."""
    keys = {"seed": seed, "scenes": scenes, "key_frames": config.key_frames, "device": config.device}
    return City(CityConfig.model_validate({**keys, "image_size": config.image_size, **_RIGS[config.layout]}))


def _grid_config(grid: VoxelGrid, frame: Literal["ego", "lidar"]) -> GridConfig:
    return GridConfig(min_corner=grid.min_corner, voxel_size=grid.voxel_size, shape=grid.shape, frame=frame)


_RIGS: dict[str, dict[str, Any]] = {
    "nuscenes": {"rig": "nuscenes", "occupancy": _grid_config(occ3d.grid(None), "ego")},
    "semantickitti": {
        "rig": "kitti",
        "taxonomy": "semantickitti",
        "key_period_s": 0.1,
        "image_size": None,
        "occupancy": _grid_config(semantickitti_voxels.grid(EGO_FROM_LIDAR), "lidar"),
    },
    "omnihd": {"rig": "omnihd", "taxonomy": "omnihd", "occupancy": _grid_config(omnihd_occupancy.grid(None), "ego")},
    "rosbag": {"rig": "nuscenes", "occupancy": None},
}
"""What of a city's configuration each layout asks for. nuScenes' other occupancies are asked for one by one."""


def _named(occupancy: OccupancyGrid3D, classes: tuple[str, ...], free_label: int) -> OccupancyGrid3D:
    """The same occupancy under a benchmark's names: its classes have the city's numbers, but for the free one."""
    label = np.where(occupancy.label == occupancy.free_label, np.uint8(free_label), occupancy.label)
    return replace(occupancy, label=label, classes=classes, free_label=free_label)


def _nuscenes(config: ExportConfig, cities: Cities, root: Path, advance: Advance) -> None:
    """One version, `v1.0-mini` where the scenes fit its splits, else `v1.0-trainval`, under official scene names."""
    splits = official_splits()
    small = config.train <= len(splits["mini_train"]) and config.val <= len(splits["mini_val"])
    version, prefix = ("v1.0-mini", "mini_") if small else ("v1.0-trainval", "")
    for split, city in cities.items():
        if city.config.scenes > len(splits[prefix + split]):
            held = len(splits[prefix + split])
            raise ConfigError(f"{split}: {city.config.scenes} scenes, the official split has {held}", "ask for fewer")
    with NuScenesWriter(root, version) as writer:
        for split, city in cities.items():
            for scene, name in zip(range(city.config.scenes), splits[prefix + split], strict=False):
                _nuscenes_scene(config, city, scene, name, writer, advance)


def _nuscenes_scene(
    config: ExportConfig, city: City, scene: int, name: str, writer: NuScenesWriter, advance: Advance
) -> None:
    """Every sensor frame in the order of stamps, in a map whose origin is the lower left corner of its mask."""
    ground = city.simulator(scene).scene.ground
    map_from_city = Pose(np.eye(3), np.array([-ground.corner[0], -ground.corner[1], 0.0]))
    city_from_ego = city.map_from_ego(scene)
    writer.start_scene(
        name,
        lambda stamp_ns: map_from_city @ city_from_ego(stamp_ns),
        location="synthetic-city",
        description=f"seed {city.config.seed + scene}",
        map_mask=_drivable(ground),
    )
    key_of_stamp = {stamp: scene * config.key_frames + k for k, stamp in enumerate(city.key_stamps(scene))}
    waiting: list[Sample] = []
    taken: set[tuple[str, int]] = set()  # readings of key frames, which come again among all frames
    for frame in city.frames(scene, cameras=config.sweeps):
        if not (frame.lidars and frame.stamp_ns in key_of_stamp):
            waiting.append(frame)
            continue
        i = key_of_stamp[frame.stamp_ns]
        sample, truth = city[i], city.truth(i)
        taken |= {(role, r.stamp_ns) for kind in (sample.cameras, sample.radars) for role, r in kind.items()}
        for sweep in waiting:
            if not any((role, sweep.stamp_ns) in taken for role in (*sweep.cameras, *sweep.radars)):
                writer.add_sweep(sweep)
        waiting = []
        writer.add_sample(sample, truth)
        for layout in config.occupancy:
            writer.add_occupancy(layout, _nuscenes_occupancy(city, i, layout, sample, truth))
        advance(f"{name}, key frame {i % config.key_frames + 1}")


def _nuscenes_occupancy(
    city: City, index: int, layout: OccupancyLayout, sample: Sample, truth: Truth
) -> OccupancyGrid3D:
    if layout == "occ3d":
        assert truth.occupancy is not None
        return _named(truth.occupancy, occ3d.CLASSES, occ3d.FREE_LABEL)
    benchmark = openoccupancy if layout == "openoccupancy" else surroundocc
    found = city.occupancy_at(index, benchmark.grid(sample.lidars["top"].ego_from_sensor))
    return _named(found, benchmark.CLASSES, benchmark.FREE_LABEL)


def _drivable(ground: Ground) -> Array:
    """(H, W) uint8: 255 on the carriageway, north up, 0.1 m a pixel."""
    rows, columns = ground.raster.shape[:2]
    v, u = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    xy = (torch.stack([u, v], -1).reshape(-1, 2) + 0.5) * PIXEL_M + torch.tensor(ground.corner)
    inside = ground.to("cpu").sample(xy.float())[:, 0] <= 0
    return np.flipud(inside.reshape(rows, columns).numpy()).astype(np.uint8) * 255


def _semantickitti(config: ExportConfig, cities: Cities, root: Path, advance: Advance) -> None:
    """10 Hz sequences, 00 on for training, 08 for validation: SemanticKITTI has no other validation sequence."""
    names = {"train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"), "val": ("08",)}
    for split, city in cities.items():
        if city.config.scenes > len(names[split]):
            held = len(names[split])
            raise ConfigError(f"{split}: {city.config.scenes} scenes, SemanticKITTI has {held}", "ask for fewer")
    with SemanticKITTIWriter(root) as writer:
        for split, city in cities.items():
            for scene, name in zip(range(city.config.scenes), names[split], strict=False):
                writer.start_sequence(name, city.map_from_ego(scene))
                for k in range(config.key_frames):
                    i = scene * config.key_frames + k
                    truth = city.truth(i)
                    assert truth.occupancy is not None
                    volume = _named(truth.occupancy, semantickitti_voxels.CLASSES, semantickitti_voxels.FREE_LABEL)
                    writer.add_sample(city[i], replace(truth, occupancy=volume if k % 5 == 0 else None))
                    advance(f"sequence {name}, scan {k + 1}")


def _omnihd(config: ExportConfig, cities: Cities, root: Path, advance: Advance) -> None:
    """Key frames at 2 Hz, and between them LiDAR and radars at 10 Hz."""
    with OmniHDWriter(root) as writer:
        for split, city in cities.items():
            between = City(city.config.model_copy(update=_BETWEEN | {"key_frames": 5 * (config.key_frames - 1) + 1}))
            for scene in range(city.config.scenes):
                writer.start_clip(city.name_of(scene), city.map_from_ego(scene), split)
                for k in range(between.config.key_frames):
                    i = scene * config.key_frames + k // 5
                    if k % 5:
                        writer.add_sweep(between[scene * between.config.key_frames + k])
                        continue
                    writer.add_sample(city[i], city.truth(i))
                    advance(f"clip {scene}, key frame {k // 5 + 1}")


_BETWEEN = {"key_period_s": 0.1, "cameras": (), "occupancy": None}


def _rosbag(config: ExportConfig, cities: Cities, root: Path, advance: Advance) -> None:
    """One MCAP bag a scene, every sensor at its own rate."""
    from perception.datasets.rosbag import RosbagWriter  # extra `bag`

    for split, city in cities.items():
        for scene in range(city.config.scenes):
            keys = set(city.key_stamps(scene))
            with RosbagWriter(root / f"{split}_{scene:03d}") as writer:
                writer.start(city.map_from_ego(scene))
                for frame in city.frames(scene):
                    writer.add(frame)
                    if frame.lidars and frame.stamp_ns in keys:
                        advance(f"{split} {scene}, {frame.stamp_ns}")
