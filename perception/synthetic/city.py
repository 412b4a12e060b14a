"""The synthetic city as a data set: scenes by seed, samples at key frames, all sensor frames between, truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from perception.config import Config
from perception.synthetic.faults import Fault, degrade, weather_of
from perception.synthetic.roads import SemanticMap
from perception.synthetic.scene import Scene
from perception.synthetic.sensors import RIGS, CameraSpec, Clock, LidarScan, Rig, Simulator
from perception.synthetic.shading import Picture
from perception.synthetic.truth import (
    boxes,
    observed_by_cameras,
    observed_by_lidar,
    occupancy,
    occupancy_truth,
    segmentation,
    visible_share,
)
from perception.types import Array, CameraImage, OccupancyGrid3D, PointCloud, Pose, Sample, Truth, VoxelGrid

FIRST_KEY_S = 1.0
_VELOCITY_NS = 50_000_000


class GridConfig(Config):
    """Where occupancy truth is made; the defaults are Occ3D-nuScenes'. `frame`: whose axes the grid has."""

    min_corner: tuple[float, float, float] = (-40.0, -40.0, -1.0)
    voxel_size: tuple[float, float, float] = (0.4, 0.4, 0.4)
    shape: tuple[int, int, int] = (200, 200, 16)
    frame: Literal["ego", "lidar"] = "ego"


class CityConfig(Config):
    """A city. Scene k is made from `seed` + k alone; `scenes` of 20 s each hold 40 key frames, as nuScenes' do.
    Its street depends on its length in seconds too, not on the rate of its key frames.

    `image_size` (width, height): scaled by width from the rig's own, then cropped at the top; None keeps it.
    `lidar_stride`: of a LiDAR's turns, each n-th is a frame. `shadow_texel_m`: how finely shadows are drawn.
    """

    name: Literal["city"] = "city"
    seed: int = 0
    scenes: int = Field(2, ge=1)
    key_frames: int = Field(40, ge=1, le=1000)
    key_period_s: float = Field(0.5, gt=0)
    rig: Literal["nuscenes", "kitti", "omnihd", "nuscenes_4d"] = "nuscenes"
    image_size: tuple[int, int] | None = (800, 450)
    cameras: tuple[str, ...] | None = None
    radars: tuple[str, ...] | None = None
    sweeps: int = Field(1, ge=1, le=20)
    lidar_stride: int = Field(1, ge=1)
    camera_hz: float = Field(12.0, gt=0, le=20)
    radar_hz: float = Field(13.0, gt=0, le=20)
    shadow_texel_m: float = Field(0.125, gt=0)
    taxonomy: Literal["nuscenes", "semantickitti", "omnihd"] = "nuscenes"
    occupancy: GridConfig | None = GridConfig()
    periodic_furniture: bool = False
    faults: tuple[Fault, ...] = ()
    supersample: int = Field(1, ge=1, le=4)
    device: str = "cpu"


@dataclass(frozen=True)
class _Measured:
    """A key frame: its sample before faults of single sensors, its truth, and what both were made from, by role."""

    sample: Sample
    truth: Truth
    scans: dict[str, LidarScan]
    pictures: dict[str, tuple[CameraImage, Picture]]


class City:
    """Implements perception.types.Dataset; samples are made when asked for, the same ones every time on one device.

    Args:
        built: scenes that another process has built, by number.
    """

    def __init__(self, config: CityConfig, built: Mapping[int, Simulator] | None = None) -> None:
        self.config = config
        self._built = built or {}
        self.rig = _rig(config)
        self.tokens = [f"{self.name_of(s)}-{k:03d}" for s in range(config.scenes) for k in range(config.key_frames)]
        self._simulator = lru_cache(maxsize=2)(self._build)
        self._measured = lru_cache(maxsize=2)(self._measure)

    def __reduce__(self) -> tuple:
        return City, (self.config,)  # caches stay behind

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample:
        """The sample of a key frame, its faults included."""
        return self._with_faults(index, self._measured(index).sample)

    def truth(self, index: int) -> Truth:
        return self._measured(index).truth

    def key_frames(self, indices: Sequence[int]) -> list[tuple[Sample, Truth]]:
        """Samples and truths of key frames of one scene, which a GPU measures at once: the same as one by one."""
        if len({i // self.config.key_frames for i in indices}) != 1:
            raise ValueError(f"City.key_frames: {list(indices)} are not of one scene")
        return [
            (self._with_faults(i, measured.sample), measured.truth)
            for i, measured in zip(indices, self._measure_all(indices), strict=True)
        ]

    def occupancy_at(self, index: int, grid: VoxelGrid) -> OccupancyGrid3D:
        """Occupancy truth of a key frame at any grid, in the configured taxonomy; without masks of what was seen."""
        scene, k = divmod(index, self.config.key_frames)
        stamp = self.key_stamps(scene)[k]
        label = self._labels_at(self._simulator(scene), stamp, grid)
        return occupancy_truth(label, grid, self.config.taxonomy, stamp, {})

    def scene_name(self, i: int) -> str:
        """The scene that sample i belongs to."""
        return self.name_of(i // self.config.key_frames)

    def name_of(self, scene: int) -> str:
        """A scene's name, which tells its seed."""
        return f"city-{self.config.seed + scene:04d}"

    def key_stamps(self, scene: int) -> list[int]:
        """Stamps of a scene's key frames, ns."""
        clock = self._clock(scene)
        return [clock.stamp(FIRST_KEY_S + k * self.config.key_period_s) for k in range(self.config.key_frames)]

    def map_from_ego(self, scene: int) -> Callable[[int], Pose]:
        """The true ego pose of a scene at any stamp between its first and last sensor frame."""
        return self._simulator(scene).pose

    def semantic_map(self, scene: int) -> SemanticMap:
        return self._simulator(scene).scene.semantic_map

    def simulator(self, scene: int) -> Simulator:
        """The scene itself, for those who want more than samples."""
        return self._simulator(scene)

    def frames(
        self, scene: int, cameras: bool = True, after_ns: int = 0, until_ns: int = 2**63 - 1
    ) -> Iterator[Sample]:
        """Every sensor frame of a scene, key frames included, in stamp order: samples of one sensor each.

        Each sample's stamp is its sensor's own, later than `after_ns` and not later than `until_ns`. `cameras` False
        leaves the images out (they take most of the time).
        """
        sim = self._simulator(scene)
        images = lru_cache(maxsize=2)(partial(self._images, scene))
        radars = lru_cache(maxsize=2)(partial(self._radars, scene))
        for stamp, kind, i, tick in sorted(p for p in self._plan(scene, cameras) if after_ns < p[0] <= until_ns):
            if kind == "lidar":
                lidar = self.rig.lidars[i]
                yield Sample(stamp, lidars={lidar.role: sim.scan(lidar, [[stamp]], [stamp])[0][0].cloud})
            elif kind == "camera":
                role = self.rig.cameras[i].role
                yield Sample(stamp, cameras={role: images(tick)[role]})
            else:
                role = self.rig.radars[i].role
                yield Sample(stamp, radars={role: radars(tick)[role]})

    def truth_of_sweep(self, scene: int, sweep: Sample) -> Truth:
        """Boxes and occupancy at the stamp of a LiDAR sweep that `frames` gave, no key frame; seen by that sweep alone.

        Occupancy is in ego's axes, without masks of what was seen.
        """
        sim, stamp, shape = self._simulator(scene), sweep.stamp_ns, self.config.occupancy
        around = [stamp - _VELOCITY_NS, stamp, stamp + _VELOCITY_NS]
        found = None
        if shape is not None:
            grid = VoxelGrid(shape.min_corner, shape.voxel_size, shape.shape, Pose.identity())
            found = occupancy_truth(self._labels_at(sim, stamp, grid), grid, self.config.taxonomy, stamp, {})
        return Truth(boxes(sim, stamp, around, list(sweep.lidars.values()), [], None), found)

    def _plan(self, scene: int, cameras: bool) -> Iterator[tuple[int, str, int, int]]:
        """(stamp, kind, which sensor of it, tick) of every sensor frame."""
        end, first_s = self._last_key_s, FIRST_KEY_S / 2
        for i, lidar in enumerate(self.rig.lidars):
            key = round(FIRST_KEY_S / lidar.period_s)
            for turn in range(int(first_s / lidar.period_s), int(end / lidar.period_s + 1e-6) + 1):
                if (turn - key) % self.config.lidar_stride == 0:
                    yield self._clock(scene).stamp(turn * lidar.period_s), "lidar", i, turn
        for tick in range(int((end - FIRST_KEY_S) * self.config.camera_hz + 1e-6) + 1) if cameras else ():
            for i, stamp in enumerate(self._camera_stamps(scene, tick)):
                yield stamp, "camera", i, tick
        for tick in range(int(first_s * self.config.radar_hz), int(end * self.config.radar_hz) + 1):
            for i, stamp in enumerate(self._radar_stamps(scene, tick)):
                if stamp <= self._clock(scene).stamp(end):
                    yield stamp, "radar", i, tick

    def _camera_stamps(self, scene: int, tick: int) -> list[int]:
        """When the cameras expose for the n-th time; the first time belongs to the first key frame."""
        t_s = FIRST_KEY_S + tick / self.config.camera_hz
        return [self._clock(scene).stamp(t_s - self._camera_lag(camera)) for camera in self.rig.cameras]

    def _radar_stamps(self, scene: int, tick: int) -> list[int]:
        t_s = tick / self.config.radar_hz
        return [self._clock(scene).stamp(t_s + _radar_phase(i)) for i in range(len(self.rig.radars))]

    def _images(self, scene: int, tick: int) -> dict[str, CameraImage]:
        """Of all cameras at their own stamps. They share their shadows, as those of a key frame do."""
        stamps = self._camera_stamps(scene, tick)
        found = self._simulator(scene).expose(self.rig.cameras, [stamps], [stamps[0]])[0]
        return {c.role: replace(found[c.role][0], ego_from_camera=c.ego_from_camera) for c in self.rig.cameras}

    def _radars(self, scene: int, tick: int) -> dict[str, PointCloud]:
        stamps = self._radar_stamps(scene, tick)
        found = self._simulator(scene).detect(self.rig.radars, [stamps], [stamps[0]])[0]
        return {r.role: replace(found[r.role], ego_from_sensor=r.ego_from_radar) for r in self.rig.radars}

    def _clock(self, scene: int) -> Clock:
        return Clock((1_600_000_000 + 1000 * (self.config.seed + scene)) * 1_000_000_000)

    def _camera_lag(self, camera: CameraSpec) -> float:
        """Seconds before a key frame's stamp at which its image is taken: when the LiDAR looks its way."""
        return self.rig.lidars[0].time_of(camera.azimuth) if self.rig.lidars and not self.rig.simultaneous else 0.0

    @property
    def _last_key_s(self) -> float:
        return round(FIRST_KEY_S + (self.config.key_frames - 1) * self.config.key_period_s, 6)

    def _build(self, scene: int) -> Simulator:
        config = self.config
        if scene in self._built:
            return self._built[scene]
        town = Scene.build(config.seed + scene, self._last_key_s + 1.0, config.periodic_furniture)
        return Simulator(
            town,
            self.rig,
            self._clock(scene),
            config.device,
            config.seed + scene,
            weather_of(config.faults),
            config.supersample,
            config.shadow_texel_m,
        )

    def _with_faults(self, index: int, sample: Sample) -> Sample:
        scene, k = divmod(index, self.config.key_frames)
        for fault in self.config.faults:
            sample = degrade(sample, fault, lambda camera, lag: self._late_image(scene, k, camera, lag))
        return sample

    def _late_image(self, scene: int, k: int, role: str, lag_s: float) -> CameraImage:
        """The image that a camera took `lag_s` before the one that belongs to key frame k."""
        sim, stamp = self._simulator(scene), self.key_stamps(scene)[k]
        camera = next(c for c in self.rig.cameras if c.role == role)
        taken = stamp - round((self._camera_lag(camera) + lag_s) * 1e6) * 1000
        return sim.expose([camera], [[taken]], [stamp])[0][role][0]

    def _measure(self, index: int) -> _Measured:
        return self._measure_all([index])[0]

    def _measure_all(self, indices: Sequence[int]) -> list[_Measured]:
        """Samples of key frames of one scene, without faults of single sensors, and their truths."""
        scene, config = indices[0] // self.config.key_frames, self.config
        sim, stamps = self._simulator(scene), self.key_stamps(scene)
        keys = [index - scene * config.key_frames for index in indices]
        now = [stamps[k] for k in keys]
        scans: list[dict[str, list[LidarScan]]] = [{} for _ in keys]
        for lidar in self.rig.lidars:
            period = round(lidar.period_s * 1e9)
            sweeps = sim.scan(lidar, [[stamp - i * period for i in range(config.sweeps)] for stamp in now], now)
            for found, group in zip(scans, sweeps, strict=True):
                found[lidar.role] = group
        lags = [round(self._camera_lag(c) * 1e6) * 1000 for c in self.rig.cameras]
        taken = [[stamp - lag for lag in lags] for stamp in now]
        pictures = sim.expose(self.rig.cameras, taken, now) if lags else [{} for _ in keys]
        heard = [[self._radar_stamp(scene, stamp, i) for i in range(len(self.rig.radars))] for stamp in now]
        radars = sim.detect(self.rig.radars, heard, now) if self.rig.radars else [{} for _ in keys]
        measured = []
        for i, (index, k, stamp) in enumerate(zip(indices, keys, now, strict=True)):
            previous = stamps[k - 1] if k else stamp - round(config.key_period_s * 1e9)
            sample = Sample(
                stamp,
                {role: _accumulated(group) for role, group in scans[i].items()},
                radars[i],
                {role: image for role, (image, _) in pictures[i].items()},
                odom_from_ego=sim.odom_from_ego(stamp),
                imu=sim.inertial(previous, stamp),
                odometry=sim.odometry(previous, stamp),
                gnss=sim.fix(stamp),
                token=self.tokens[index],
            )
            first = {role: group[0] for role, group in scans[i].items()}
            one = _Measured(sample, Truth(), first, pictures[i])
            measured.append(replace(one, truth=self._truth(sim, stamps, one)))
        return measured

    def _truth(self, sim: Simulator, stamps: list[int], measured: _Measured) -> Truth:
        config, sample, pictures, scans = self.config, measured.sample, measured.pictures, measured.scans
        ego = sim.pose(sample.stamp_ns)
        share, found = None, None
        if len(pictures) > 1:
            solids = sim.scene.solids([sim.clock.seconds(sample.stamp_ns)], sim.device)
            share = visible_share(solids, list(pictures.values()), ego, len(sim.scene.agents) + 1)
        if config.occupancy is not None:
            shape = config.occupancy
            frame = self.rig.lidars[0].ego_from_lidar if shape.frame == "lidar" else Pose.identity()
            found = self._occupancy(sim, measured, VoxelGrid(shape.min_corner, shape.voxel_size, shape.shape, frame))
        depth, label, agent = _pixels([p for _, p in pictures.values()])
        clouds, radars = [s.cloud for s in scans.values()], list(sample.radars.values())
        return Truth(
            boxes(sim, sample.stamp_ns, stamps, clouds, radars, share),
            found,
            ego,
            {role: segmentation(s.label, s.agent, config.taxonomy) for role, s in scans.items()},
            dict(zip(pictures, depth, strict=True)),
            {r: segmentation(x, a, config.taxonomy) for r, x, a in zip(pictures, label, agent, strict=True)},
        )

    def _occupancy(self, sim: Simulator, measured: _Measured, grid: VoxelGrid) -> OccupancyGrid3D:
        stamp, pictures = measured.sample.stamp_ns, list(measured.pictures.values())
        label, observed = self._labels_at(sim, stamp, grid), {}
        for lidar in self.rig.lidars[:1]:
            observed["lidar"] = observed_by_lidar(grid, lidar, measured.scans[lidar.role], sim.device)
        if pictures:
            observed["camera"] = observed_by_cameras(grid, pictures, sim.device)
        return occupancy_truth(label, grid, self.config.taxonomy, stamp, observed)

    def _labels_at(self, sim: Simulator, stamp: int, grid: VoxelGrid) -> Tensor:
        solids = sim.scene.solids([sim.clock.seconds(stamp)], sim.device)
        return occupancy(sim.ground, solids, sim.pose(stamp), grid, sim.chunk)

    def _radar_stamp(self, scene: int, stamp: int, i: int) -> int:
        """The last frame of radar i before a stamp."""
        clock = self._clock(scene)
        tick = int((clock.seconds(stamp) - _radar_phase(i)) * self.config.radar_hz)
        return self._radar_stamps(scene, tick)[i]


def _radar_phase(i: int) -> float:
    return 0.011 * i


def _rig(config: CityConfig) -> Rig:
    rig = RIGS[config.rig]
    cameras = [c for c in rig.cameras if config.cameras is None or c.role in config.cameras]
    if config.image_size is not None:
        cameras = [c.resized(*config.image_size) for c in cameras]
    radars = tuple(r for r in rig.radars if config.radars is None or r.role in config.radars)
    return replace(rig, cameras=tuple(cameras), radars=radars)


def _accumulated(scans: list[LidarScan]) -> PointCloud:
    if len(scans) == 1:
        return scans[0].cloud
    from perception.sweeps import accumulate

    return accumulate([s.cloud for s in scans])


def _pixels(pictures: list[Picture]) -> tuple[Array, Array, Array]:
    """Of all pictures, from the device: depths, 0 where there is none (the sky), labels and agents."""
    if not pictures:
        return (np.zeros(0),) * 3
    depth = torch.stack([p.distance for p in pictures])
    label, agent = torch.stack([p.label for p in pictures]), torch.stack([p.agent for p in pictures])
    known = torch.where(depth.isfinite(), depth, 0.0)
    return known.cpu().numpy(), label.cpu().numpy(), agent.to(torch.int16).cpu().numpy()
