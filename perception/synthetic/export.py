"""The city written in the official layouts, by the writers of `perception.datasets`.

Training and validation scenes come of seeds far apart, so that no street is in both. On a CPU the key frames are
simulated in several processes and written in order by this one.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

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
from perception.types import Array, Boxes3D, OccupancyGrid3D, Pose, Sample, Truth, VoxelGrid

VALIDATION_SEED = 100_000
"""Validation scenes are made of seeds from here on."""

Layout = Literal["nuscenes", "semantickitti", "omnihd", "rosbag"]
Progress = Callable[[str, int, int], None]
"""Called with (what is done, how many key frames are, of how many)."""


class ExportConfig(Config):
    """What is written.

    Attributes:
        layout: `nuscenes` (tables, lidarseg, occupancy), `semantickitti`, `omnihd`, or `rosbag` (MCAP).
        train, val: scenes of each split.
        key_frames: of a scene, 2 Hz (10 Hz in SemanticKITTI).
        seed: of the first training scene.
        image_size: (width, height) of the cameras; SemanticKITTI's is its rig's own.
        sweeps: images between key frames as well; a bag always has them. LiDAR and radar always are whole.
        lidar_stride, camera_hz, radar_hz, shadow_texel_m: as in CityConfig.
        grid: of a bag's occupancy.
        occupancy: layouts of nuScenes occupancy written beside the tables.
        device: where the sensors are simulated.
        workers: processes that simulate, on a CPU; 0 is one a core. A GPU is used by this process alone.
    """

    layout: Layout = "nuscenes"
    train: int = Field(1, ge=0)
    val: int = Field(1, ge=0)
    key_frames: int = Field(10, ge=1, le=200)
    seed: int = Field(0, ge=0, lt=VALIDATION_SEED)
    image_size: tuple[int, int] = (800, 450)
    sweeps: bool = False
    lidar_stride: int = 1
    camera_hz: float = 12.0
    radar_hz: float = 13.0
    shadow_texel_m: float = 0.125
    grid: GridConfig = GridConfig()
    occupancy: tuple[OccupancyLayout, ...] = ("occ3d", "openoccupancy", "surroundocc")
    device: str = "cpu"
    workers: int = Field(0, ge=0)


def export(config: ExportConfig, root: Path, progress: Progress = lambda what, done, total: None) -> None:
    """Write a city under `root`.

    Raises:
        ConfigError: more scenes than the official splits have names for.
        DataError: something is there already.
    """
    counts = {"train": (config.seed, config.train), "val": (VALIDATION_SEED, config.val)}
    cities = {split: _city_config(config, seed, count) for split, (seed, count) in counts.items() if count}
    total = sum(city.scenes * city.key_frames for city in cities.values())
    done = 0

    def advance(what: str) -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    write = {"nuscenes": _nuscenes, "semantickitti": _semantickitti, "omnihd": _omnihd, "rosbag": _rosbag}
    write[config.layout](config, cities, root, advance)


Cities = Mapping[str, CityConfig]
Advance = Callable[[str], None]


def _grid_config(grid: VoxelGrid, frame: Literal["ego", "lidar"]) -> GridConfig:
    return GridConfig(min_corner=grid.min_corner, voxel_size=grid.voxel_size, shape=grid.shape, frame=frame)


_RIGS: dict[Layout, dict[str, Any]] = {
    "nuscenes": {"rig": "nuscenes", "occupancy": _grid_config(occ3d.grid(None), "ego")},
    "semantickitti": {
        "rig": "kitti",
        "taxonomy": "semantickitti",
        "key_period_s": 0.1,
        "image_size": None,
        "occupancy": _grid_config(semantickitti_voxels.grid(EGO_FROM_LIDAR), "lidar"),
    },
    "omnihd": {"rig": "omnihd", "taxonomy": "omnihd", "occupancy": _grid_config(omnihd_occupancy.grid(None), "ego")},
    "rosbag": {"rig": "nuscenes"},
}
"""What of a city's configuration each layout asks for. nuScenes' other occupancies are asked for one by one."""


def _city_config(config: ExportConfig, seed: int, scenes: int) -> CityConfig:
    """The scenes of a split, simulated with the rig and the names of the layout."""
    same = {name: getattr(config, name) for name in _PASSED_ON}
    keys = {**same, "seed": seed, "scenes": scenes, "occupancy": config.grid, **_RIGS[config.layout]}
    return CityConfig.model_validate(keys)


_PASSED_ON = ("key_frames", "device", "image_size", "lidar_stride", "camera_hz", "radar_hz", "shadow_texel_m")


@dataclass(frozen=True, slots=True)
class _Task:
    """A key frame to simulate, and what is asked for beside it.

    Attributes:
        sweeps: of which sensors to simulate all frames since the key frame before: no one's, LiDAR and radar, all.
        occupancy: in which layouts of nuScenes.
        built: the scene's Simulator, pickled; empty where it is still to be built.
    """

    city: CityConfig
    index: int
    sweeps: Literal["none", "clouds", "all"] = "none"
    occupancy: tuple[OccupancyLayout, ...] = ()
    built: bytes = b""


@dataclass(frozen=True, slots=True, eq=False)
class _KeyFrame:
    sample: Sample
    truth: Truth
    sweeps: list[Sample]
    occupancy: dict[OccupancyLayout, OccupancyGrid3D]


_open_city = lru_cache(maxsize=2)(City)  # a worker's own, whose scenes are built once


def _simulate(task: _Task) -> _KeyFrame:
    city = _open_city(task.city)
    sample, truth = city[task.index], city.truth(task.index)
    occupancy = {layout: _nuscenes_occupancy(city, task.index, layout, sample, truth) for layout in task.occupancy}
    return _KeyFrame(sample, truth, _simulate_sweeps(task, city), occupancy)


def _simulate_sweeps(task: _Task, city: City) -> list[Sample]:
    """The sensor frames later than the key frame before, the key frame's own included."""
    if task.sweeps == "none":
        return []
    scene, k = divmod(task.index, task.city.key_frames)
    stamps = city.key_stamps(scene)
    return list(city.frames(scene, task.sweeps == "all", stamps[k - 1] if k else 0, stamps[k]))


def _simulate_drive(task: _Task) -> list[tuple[Sample, Truth]]:
    """The same with IMU and wheel readings since the LiDAR's last sweep; a fix and the truth with each sweep."""
    scene = task.index // task.city.key_frames
    city = City(task.city, {scene: pickle.loads(task.built)})  # noqa: S301 - of this very export
    simulator, drive = city.simulator(scene), []
    frames = _simulate_sweeps(task, city)
    every_ns = round(task.city.lidar_stride * city.rig.lidars[0].period_s * 1e9)
    last_ns = next(frame.stamp_ns for frame in frames if frame.lidars) - every_ns
    for frame in frames:
        if not frame.lidars:
            drive.append((frame, Truth()))
            continue
        since, last_ns = last_ns, frame.stamp_ns
        full = replace(
            frame,
            odom_from_ego=simulator.odom_from_ego(last_ns),
            imu=simulator.inertial(since, last_ns),
            odometry=simulator.odometry(since, last_ns),
            gnss=simulator.fix(last_ns),
        )
        drive.append((full, city.truth_of_sweep(scene, full)))
    return drive


T = TypeVar("T")


def _in_order(config: ExportConfig, simulate: Callable[[_Task], T], tasks: Iterable[_Task]) -> Iterator[T]:
    """What `simulate` gives for each task, in order; made ahead by other processes where that helps."""
    workers = 1 if torch.device(config.device).type == "cuda" else config.workers or os.cpu_count() or 1
    if workers == 1:
        yield from map(simulate, tasks)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads can hang
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        try:
            for _ in range(workers):
                pool.submit(os.getpid)  # they start while the first task is prepared
            left = iter(tasks)
            waiting = deque(pool.submit(simulate, task) for task in islice(left, 2 * workers))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(simulate, task) for task in islice(left, 1))  # key frames wait in memory
        except BaseException:  # interrupted, or not wanted any more: what they are at is not waited for
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C its parent decides


def _named(occupancy: OccupancyGrid3D, classes: tuple[str, ...], free_label: int) -> OccupancyGrid3D:
    """The same occupancy under a benchmark's names: its classes have the city's numbers, but for the free one."""
    label = np.where(occupancy.label == occupancy.free_label, np.uint8(free_label), occupancy.label)
    return replace(occupancy, label=label, classes=classes, free_label=free_label)


def _scene_names(cities: Cities, names: Mapping[str, tuple[str, ...]]) -> list[tuple[str, CityConfig, int, str]]:
    """(split, city, scene, its name in the layout); ConfigError where the layout has no more names."""
    found = []
    for split, city in cities.items():
        if city.scenes > len(names[split]):
            raise ConfigError(
                f"{split}: {city.scenes} scenes, the official split has names for {len(names[split])}", "ask for fewer"
            )
        found += [(split, city, scene, names[split][scene]) for scene in range(city.scenes)]
    return found


def _nuscenes(config: ExportConfig, cities: Cities, root: Path, advance: Advance) -> None:
    """One version, `v1.0-mini` where the scenes fit its splits, else `v1.0-trainval`, under official scene names."""
    splits = official_splits()
    small = config.train <= len(splits["mini_train"]) and config.val <= len(splits["mini_val"])
    version, prefix = ("v1.0-mini", "mini_") if small else ("v1.0-trainval", "")
    scenes = _scene_names(cities, {split: splits[prefix + split] for split in cities})
    sweeps: Literal["clouds", "all"] = "all" if config.sweeps else "clouds"
    tasks = [
        _Task(city, scene * config.key_frames + k, sweeps, config.occupancy)
        for _, city, scene, _ in scenes
        for k in range(config.key_frames)
    ]
    with NuScenesWriter(root, version) as writer:
        key_frames = _in_order(config, _simulate, tasks)
        for split, city, scene, name in scenes:
            _start_nuscenes_scene(writer, _open_city(city), scene, name, prefix + split)
            taken: set[tuple[str, str, int]] = set()
            for k in range(config.key_frames):
                key = next(key_frames)
                # The readings of a key frame come again among all frames, the latest of them before the next one.
                taken |= {(kind, role, r.stamp_ns) for kind, role, r in _readings(key.sample)}
                for sweep in key.sweeps:
                    if not any((kind, role, r.stamp_ns) in taken for kind, role, r in _readings(sweep)):
                        writer.add_sweep(sweep)
                writer.add_sample(key.sample, key.truth)
                for layout, occupancy in key.occupancy.items():
                    writer.add_occupancy(layout, occupancy)
                advance(f"{name}, key frame {k + 1}")


def _readings(sample: Sample) -> Iterator[tuple[str, str, Any]]:
    for kind in ("lidars", "radars", "cameras"):
        for role, reading in getattr(sample, kind).items():
            yield kind, role, reading


def _start_nuscenes_scene(writer: NuScenesWriter, city: City, scene: int, name: str, split: str) -> None:
    """Begin a scene in a map whose origin is the lower left corner of its mask.

    `splits.json` says which scenes of the official split there are, so that a part of one is a whole split here.
    """
    ground = city.simulator(scene).scene.ground
    map_from_city = Pose(np.eye(3), np.array([-ground.corner[0], -ground.corner[1], 0.0]))
    city_from_ego = city.map_from_ego(scene)
    writer.start_scene(
        name,
        lambda stamp_ns: map_from_city @ city_from_ego(stamp_ns),
        split=split,
        location="synthetic-city",
        description=f"seed {city.config.seed + scene}",
        map_mask=_drivable(ground),
    )


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
    """10 Hz sequences; a completion volume for every fifth scan. 08 is the one validation sequence there is."""
    names = {"train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"), "val": ("08",)}
    scenes = _scene_names(cities, names)
    count = config.key_frames
    tasks = [_Task(city, scene * count + k) for _, city, scene, _ in scenes for k in range(count)]
    key_frames = _in_order(config, _simulate, tasks)
    with SemanticKITTIWriter(root) as writer:
        for _, city, scene, name in scenes:
            writer.start_sequence(name, _open_city(city).map_from_ego(scene))
            for k in range(count):
                key = next(key_frames)
                assert key.truth.occupancy is not None
                volume = _named(key.truth.occupancy, semantickitti_voxels.CLASSES, semantickitti_voxels.FREE_LABEL)
                writer.add_sample(key.sample, replace(key.truth, occupancy=volume if k % 5 == 0 else None))
                advance(f"sequence {name}, scan {k + 1}")


def _omnihd(config: ExportConfig, cities: Cities, root: Path, advance: Advance) -> None:
    """Key frames at 2 Hz, and between them LiDAR and radars at 10 Hz."""
    count, every = config.key_frames, 5
    update = {"key_period_s": 0.1, "cameras": (), "occupancy": None, "key_frames": every * (count - 1) + 1}
    between = {split: city.model_copy(update=update) for split, city in cities.items()}
    frames = [
        (split, scene, k)
        for split, city in cities.items()
        for scene in range(city.scenes)
        for k in range(every * (count - 1) + 1)
    ]
    tasks = [
        _Task(between[split], scene * between[split].key_frames + k)
        if k % every
        else _Task(cities[split], scene * count + k // every)
        for split, scene, k in frames
    ]
    with OmniHDWriter(root) as writer:
        for (split, scene, k), key in zip(frames, _in_order(config, _simulate, tasks), strict=True):
            if k == 0:
                city = _open_city(cities[split])
                writer.start_clip(city.name_of(scene), city.map_from_ego(scene), split)
            if k % every:
                writer.add_sweep(key.sample)
            else:
                assert key.truth.boxes is not None
                writer.add_sample(key.sample, replace(key.truth, boxes=_omnihd_boxes(key.truth.boxes)))
                advance(f"{split} clip {scene}, key frame {k // every + 1}")


_OMNIHD_CLASSES = ("car", "large_vehicle", "pedestrian", "rider")
_OMNIHD_LABEL = {"car": 0, "truck": 1, "construction_vehicle": 1, "bus": 1, "trailer": 1, "pedestrian": 2}


def _omnihd_boxes(boxes: Boxes3D) -> Boxes3D:
    """What OmniHD-Scenes annotates: vehicles, pedestrians and ridden cycles; a rider is boxed with the cycle."""
    assert boxes.attribute is not None
    label = np.array([_OMNIHD_LABEL.get(boxes.classes[k], -1) for k in boxes.label], np.int64)
    label[boxes.attribute == "cycle.with_rider"] = _OMNIHD_CLASSES.index("rider")
    kept = label >= 0
    return replace(boxes.select(kept), label=label[kept], classes=_OMNIHD_CLASSES, attribute=None)


def _rosbag(config: ExportConfig, cities: Cities, root: Path, advance: Advance) -> None:
    """One MCAP bag a scene, every sensor at its own rate; beside it the boxes and voxels of every sweep."""
    from perception.datasets.rosbag import RosbagWriter  # extra `bag`

    count = config.key_frames
    scenes = [(split, city, scene) for split, city in cities.items() for scene in range(city.scenes)]

    def tasks() -> Iterator[_Task]:
        for _, city, scene in scenes:
            built = pickle.dumps(_open_city(city).simulator(scene))  # once, not in every process
            yield from (_Task(city, scene * count + k, "all", built=built) for k in range(count))

    intervals = _in_order(config, _simulate_drive, tasks())
    for split, city, scene in scenes:
        simulator = _open_city(city).simulator(scene)
        with RosbagWriter(root / f"{split}_{scene:03d}") as writer:
            writer.start(simulator.pose, simulator.odom_from_ego)
            for k in range(count):
                for frame, truth in next(intervals):
                    writer.add(frame, truth)
                advance(f"{split} {scene}, second {k / 2:.1f}")
