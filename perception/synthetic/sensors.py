"""What the sensors of a rig measure in a scene, and the rigs.

A spinning LiDAR fires its columns one after another while the ego vehicle and all others move; its points are then
moved into its frame at the sweep's stamp (the end of the turn) by the true ego motion. A camera exposes at once.
Radars measure range, azimuth, elevation and the radial velocity relative to themselves, negative when closing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from perception.synthetic.labels import Label
from perception.synthetic.primitives import LIDAR, QUADRIC, Solids, Texture, surface_normal
from perception.synthetic.raycast import GROUND, Hits, Pinhole, Spinning, cast
from perception.synthetic.scene import Scene
from perception.synthetic.shading import Light, Picture, Shadows, develop, ground_label, render
from perception.types import Array, CameraImage, Gnss, Imu, Odometry, PointCloud, Pose


@dataclass(frozen=True)
class Weather:
    """Severities in [0, 1] of what changes all measurements of a scene."""

    rain: float = 0.0
    fog: float = 0.0
    night: float = 0.0


@dataclass(frozen=True)
class CameraSpec:
    """A pinhole camera: `intrinsic` (3, 3) belongs to `size` (width, height)."""

    role: str
    ego_from_camera: Pose
    intrinsic: Array
    size: tuple[int, int]

    def resized(self, width: int, height: int) -> CameraSpec:
        """Scaled to `width`; what is then too high loses its upper rows, as networks crop their input."""
        scale = width / self.size[0]
        intrinsic = self.intrinsic * np.array([[scale], [scale], [1.0]])
        intrinsic[:2, 2] += (scale - 1) / 2  # pixel centres are whole numbers
        intrinsic[1, 2] -= self.size[1] * scale - height
        return replace(self, intrinsic=intrinsic, size=(width, height))

    @property
    def azimuth(self) -> float:
        """Of the optical axis in ego, rad."""
        axis = self.ego_from_camera.rotation[:, 2]
        return float(np.arctan2(axis[1], axis[0]))


@dataclass(frozen=True)
class LidarSpec:
    """A spinning LiDAR, turning clockwise; azimuths in its own frame. `intensity_range`: of a full return."""

    role: str
    ego_from_lidar: Pose
    elevation_deg: tuple[float, ...]
    columns: int
    period_s: float = 0.05
    first_azimuth_deg: float = -174.0
    reach_m: float = 105.0
    intensity_range: float = 255.0

    def time_of(self, ego_azimuth: float) -> float:
        """Seconds before the end of a sweep at which the beam passes an azimuth of ego."""
        axis = self.ego_from_lidar.rotation.T @ np.array([np.cos(ego_azimuth), np.sin(ego_azimuth), 0.0])
        turned = (np.radians(self.first_azimuth_deg) - np.arctan2(axis[1], axis[0])) % (2 * np.pi)
        return self.period_s * (1 - turned / (2 * np.pi))


@dataclass(frozen=True)
class RadarSpec:
    """A radar: x ahead, y left, z up. Without `elevation` it measures in its own plane, as nuScenes' radars."""

    role: str
    ego_from_radar: Pose
    half_azimuth_deg: float = 60.0
    half_elevation_deg: float = 4.0
    step_deg: tuple[float, float] = (1.0, 2.0)
    reach_m: float = 100.0
    elevation: bool = False
    noise_m: float = 0.12
    noise_deg: tuple[float, float] = (0.4, 0.0)
    most: int = 125


@dataclass(frozen=True)
class Rig:
    """The sensors of a vehicle. `simultaneous`: cameras expose at the LiDAR's stamp, not when it looks their way."""

    name: str
    lidars: tuple[LidarSpec, ...] = ()
    cameras: tuple[CameraSpec, ...] = ()
    radars: tuple[RadarSpec, ...] = field(default=())
    simultaneous: bool = False


def _looking(yaw_deg: float, xyz: tuple[float, float, float], pitch_deg: float = 0.0) -> Pose:
    """Of a camera (optical frame) that looks along a yaw of ego."""
    optical = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    tilt = Pose.from_quaternion([0, np.sin(np.radians(pitch_deg) / 2), 0, np.cos(np.radians(pitch_deg) / 2)])
    return Pose.from_yaw(np.radians(yaw_deg), xyz) @ tilt @ Pose(optical, np.zeros(3))


def _camera(role: str, focal: float, center: tuple[float, float], size: tuple[int, int], pose: Pose) -> CameraSpec:
    return CameraSpec(role, pose, np.array([[focal, 0, center[0]], [0, focal, center[1]], [0, 0, 1.0]]), size)


HDL32_DEG = tuple(np.linspace(-30.67, 10.67, 32).tolist())
HDL64_DEG = (*np.linspace(-24.33, -8.83, 32).tolist(), *np.linspace(-8.33, 2.0, 32).tolist())

_RADAR_MOUNTS = {
    "front": (0.0, (3.41, 0.0, 0.5)),
    "front_left": (90.0, (2.42, 0.8, 0.78)),
    "front_right": (-90.0, (2.42, -0.8, 0.77)),
    "back_left": (175.0, (-0.56, 0.63, 0.53)),
    "back_right": (-176.0, (-0.56, -0.62, 0.53)),
}

NUSCENES_RIG = Rig(
    "nuscenes",
    (LidarSpec("top", Pose.from_yaw(-np.pi / 2, (0.944, 0.0, 1.840)), HDL32_DEG, 1084),),
    tuple(
        _camera(role, focal, center, (1600, 900), _looking(yaw, xyz))
        for role, focal, center, yaw, xyz in (
            ("front", 1266.4, (816.3, 491.5), -0.3, (1.701, 0.016, 1.511)),
            ("front_right", 1260.8, (808.0, 495.3), -56.4, (1.551, -0.493, 1.496)),
            ("front_left", 1272.6, (826.6, 479.8), 55.2, (1.524, 0.495, 1.509)),
            ("back", 809.2, (829.2, 481.8), 179.9, (0.028, 0.003, 1.579)),
            ("back_left", 1256.7, (792.1, 492.8), 108.6, (1.036, 0.485, 1.591)),
            ("back_right", 1259.5, (807.3, 501.2), -110.8, (1.015, -0.481, 1.562)),
        )
    ),
    tuple(RadarSpec(role, Pose.from_yaw(np.radians(yaw), xyz)) for role, (yaw, xyz) in _RADAR_MOUNTS.items()),
)
"""nuScenes: HDL-32E, six cameras, five radars, at the mounts of its cars."""

KITTI_RIG = Rig(
    "kitti",
    (LidarSpec("top", Pose.from_yaw(0.0, (0.0, 0.0, 1.73)), HDL64_DEG, 2083, 0.1, 180.0, 110.0, 1.0),),
    (_camera("front", 718.9, (607.2, 185.2), (1242, 375), _looking(0.0, (0.27, 0.06, 1.65))),),
    simultaneous=True,
)
"""SemanticKITTI: HDL-64E and the left colour camera, ego on the ground below the LiDAR, one stamp a frame."""

OMNIHD_RIG = Rig(
    "omnihd",
    (
        LidarSpec(
            "top", Pose.from_yaw(0.0, (1.26, 0.0, 1.855)), tuple(np.linspace(-25, 15, 128).tolist()), 1800, 0.1, 180.0
        ),
    ),
    tuple(
        _camera(role, focal, (960.0, 540.0), (1920, 1080), _looking(yaw, xyz, 1.0))
        for role, focal, yaw, xyz in (
            ("front", 1500.0, 0.0, (1.7, 0.0, 1.6)),
            ("front_left", 1150.0, 56.0, (1.5, 0.5, 1.6)),
            ("front_right", 1150.0, -56.0, (1.5, -0.5, 1.6)),
            ("back", 1150.0, 180.0, (0.0, 0.0, 1.6)),
            ("back_left", 1150.0, 118.0, (0.9, 0.5, 1.6)),
            ("back_right", 1150.0, -118.0, (0.9, -0.5, 1.6)),
        )
    ),
    tuple(
        RadarSpec(
            role, Pose.from_yaw(np.radians(yaw), xyz), 60.0, 15.0, (0.8, 1.5), 120.0, True, 0.06, (0.25, 0.5), 1200
        )
        for role, (yaw, xyz) in (*_RADAR_MOUNTS.items(), ("back", (180.0, (-0.9, 0.0, 0.55))))
    ),
)
"""OmniHD-Scenes: 128 beams, six cameras, six 4D radars."""

NUSCENES_4D_RIG = replace(NUSCENES_RIG, name="nuscenes_4d", radars=OMNIHD_RIG.radars)
"""nuScenes' LiDAR and cameras with OmniHD-Scenes' 4D radars, for training where 128 beams would cost too much."""

RIGS = {rig.name: rig for rig in (NUSCENES_RIG, KITTI_RIG, OMNIHD_RIG, NUSCENES_4D_RIG)}


@dataclass(frozen=True)
class Clock:
    """Scene seconds <-> stamps: whole microseconds after `start_ns`."""

    start_ns: int

    def stamp(self, t_s: float) -> int:
        return self.start_ns + round(t_s * 1e6) * 1000

    def seconds(self, stamp_ns: int) -> float:
        return (stamp_ns - self.start_ns) * 1e-9


@dataclass(frozen=True)
class LidarScan:
    """A measured cloud with what is true of its points: Label (N,) uint8, agent (N,) (0: none), and the clean ranges.

    Attributes:
        range_image: (rows, columns) float32 true distances, on the device, inf where nothing was met.
    """

    cloud: PointCloud
    label: Array
    agent: Array
    range_image: Tensor


class Simulator:
    """Measures one scene with one rig on one device."""

    def __init__(
        self,
        scene: Scene,
        rig: Rig,
        clock: Clock,
        device: str,
        seed: int,
        weather: Weather,
        supersample: int,
        shadow_texel_m: float,
    ) -> None:
        self.scene, self.rig, self.clock, self.seed, self.weather = scene, rig, clock, seed, weather
        self.device, self.supersample, self.shadow_texel_m = torch.device(device), supersample, shadow_texel_m
        self.chunk = 1 << 17 if self.device.type == "cpu" else 1 << 22
        self.ground = scene.ground.to(self.device)
        self.light = Light.of(scene.style, self.device, max(weather.fog, 0.55 * weather.rain), weather.night)

    def pose(self, stamp_ns: int) -> Pose:
        """map_from_ego."""
        return self.scene.ego.pose(self.clock.seconds(stamp_ns))

    def _generator(self, stamp_ns: int, sensor: str) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, stamp_ns // 1000, *sensor.encode()]).generate_state(1)[0]
        return torch.Generator(self.device).manual_seed(int(state))

    def _tensor(self, *values: Array) -> Tensor:
        return torch.tensor(np.stack(values), dtype=torch.float32, device=self.device)

    def _meet(self, solids: Solids, grid: Spinning) -> tuple[Hits, Tensor, Tensor]:
        origin, direction, _ = grid.rays()
        hits = cast(solids, grid, self.chunk)
        t = self.ground.intersect(origin, direction, grid.reach_m)
        first = t < hits.distance
        part = torch.where(first, GROUND, hits.part)
        return Hits(torch.where(first, t, hits.distance), part), origin, direction

    def scan(
        self, spec: LidarSpec, stamps_ns: Sequence[Sequence[int]], sample_stamps_ns: Sequence[int]
    ) -> list[list[LidarScan]]:
        """Of each sample the sweeps that end at its stamps, all of one number and in one cast."""
        ends = [s for group in stamps_ns for s in group]
        reference = [self.clock.seconds(s) - spec.period_s / 2 for s in ends]
        egos, twists = [self.scene.ego.pose(t) for t in reference], [self.scene.ego.velocity(t) for t in reference]
        poses = [ego @ spec.ego_from_lidar for ego in egos]
        levers = [p.translation - ego.translation for p, ego in zip(poses, egos, strict=True)]
        time = ((torch.arange(spec.columns, device=self.device) + 0.5) / spec.columns - 0.5) * spec.period_s
        grid = Spinning(
            self._tensor(*(p.rotation for p in poses)),
            self._tensor(*(p.translation for p in poses)),
            self._tensor(*(w for _, w in twists)),
            self._tensor(*(v + np.cross(w, r) for (v, w), r in zip(twists, levers, strict=True))),
            torch.tensor(np.radians(spec.elevation_deg), dtype=torch.float32, device=self.device),
            float(np.radians(spec.first_azimuth_deg)),
            -2 * np.pi / spec.columns,
            time,
            spec.reach_m,
            LIDAR,
        )
        solids = self.scene.solids(reference, self.device)
        hits, origin, direction = self._meet(solids, grid)
        generators = [self._generator(group[0], spec.role) for group in stamps_ns]
        label, agent, intensity, kept, measured = self._returns(solids, grid, hits, origin, direction, spec, generators)
        at_stamps = [self.pose(stamp) @ spec.ego_from_lidar for stamp in ends]
        inverse = [p.inverse() for p in at_stamps]
        turn, shift = (
            torch.tensor(np.stack(x), device=self.device)
            for x in ([p.rotation for p in inverse], [p.translation for p in inverse])
        )
        shape = (len(ends), grid.rows, grid.columns)
        view, column, row = kept.view(shape).transpose(1, 2).nonzero(as_tuple=True)  # in firing order
        ray = (view * grid.rows + row) * grid.columns + column
        point = (origin.index_select(1, ray) + measured[ray] * direction.index_select(1, ray)).double()
        xyz = (turn[view] * point.T[:, None]).sum(-1) + shift[view]
        columns = [*xyz.T, intensity[ray], row, time[column] - spec.period_s / 2, label[ray], agent[ray]]
        table = torch.stack([c.float() for c in columns], 1).cpu().numpy()
        counts = np.bincount(view.cpu().numpy(), minlength=len(ends))
        sweeps, k = iter(np.split(table, np.cumsum(counts)[:-1])), 0
        ranges, samples = hits.distance.view(shape), []
        for group, sample_stamp in zip(stamps_ns, sample_stamps_ns, strict=True):
            back, scans = self.pose(sample_stamp).inverse(), []
            for stamp in group:
                rows = next(sweeps)
                fields = {
                    "intensity": rows[:, 3].copy(),
                    "ring": rows[:, 4].astype(np.uint8),
                    "time_offset": rows[:, 5].copy(),
                }
                cloud = PointCloud(np.ascontiguousarray(rows[:, :3]), fields, back @ at_stamps[k], stamp)
                scans.append(LidarScan(cloud, rows[:, 6].astype(np.uint8), rows[:, 7].astype(np.int64), ranges[k]))
                k += 1
            samples.append(scans)
        return samples

    def _returns(
        self, solids: Solids, grid: Spinning, hits: Hits, origin: Tensor, direction: Tensor, spec: LidarSpec,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Per ray: label, agent, intensity, is there a return, and the measured range."""
        device, n = self.device, origin.shape[1]
        distance = hits.distance.clamp_max(1e3)
        point = origin + distance * direction
        solid, part = hits.part >= 0, hits.part.clamp_min(0)
        view = torch.arange(len(grid.position), device=device).repeat_interleave(grid.rows * grid.columns)
        time = grid.time.repeat(len(grid.position) * grid.rows)
        rotation = solids.rotation[view, part].permute(1, 2, 0)
        offset = point - solids.center[view, part].T - solids.velocity[view, part].T * time
        local = (rotation * offset[:, None]).sum(0)
        half, form = solids.half[part].T, solids.form[part].T
        normal = (rotation * surface_normal(local, solids.kind[part] == QUADRIC, half, form)).sum(1)
        cosine = torch.where(solid, (normal * direction).sum(0).abs(), direction[2].abs()).clamp(0.01, 1)
        ground = self.ground.sample(point[:2].T)
        label = torch.where(solid, solids.label[part], ground_label(self.ground, ground))
        # Reflectance by material in 0-255: paint on the road and painted bodies shine, signs throw the light back.
        shine = torch.tensor(_REFLECTANCE, device=device)[label.long()]
        shine = torch.where(solid, shine, shine + 30 * ground[:, 1])
        tone = solids.color[part].mean(1)
        vehicle = solid & (label <= Label.TRAILER)
        shine = torch.where(vehicle, 5 + 55 * tone, shine)
        glass = solid & ((solids.texture[part] == Texture.CABIN) | (solids.texture[part] == Texture.GLASS))

        def uniform() -> Tensor:
            return torch.cat([torch.rand(n // len(generators), generator=g, device=device) for g in generators])

        def normal_noise() -> Tensor:
            return torch.cat([torch.randn(n // len(generators), generator=g, device=device) for g in generators])

        intensity = shine * cosine.sqrt() * torch.exp(0.35 * normal_noise())
        intensity = torch.where(label == Label.SIGN, 80 + 175 * cosine * uniform(), intensity)
        haze = 0.004 + 0.05 * self.weather.fog + 0.022 * self.weather.rain
        strength = (shine * cosine).clamp_min(0.2) * torch.exp(-2 * haze * distance) / (distance / 20).clamp_min(1) ** 2
        kept = uniform() < (strength / 0.35).clamp(0, 1) * torch.where(glass, 0.35, 0.985)
        kept = kept & (hits.distance < spec.reach_m)
        rough = torch.where(label == Label.FOLIAGE, 0.05, 0.018)
        measured = distance + rough * normal_noise()
        if self.weather.fog + self.weather.rain > 0:  # drops and droplets answer instead, close by
            early = (uniform() < 0.05 * self.weather.rain + 0.16 * self.weather.fog) & (hits.distance > 4)
            nearer = 1.5 + 9 * uniform() ** 2 * (1 + self.weather.rain)
            early = early & (nearer < distance)
            measured = torch.where(early, nearer, measured)
            label, kept = torch.where(early, Label.EGO.value, label.int()).to(torch.uint8), kept | early
            intensity = torch.where(early, 2 + 4 * uniform(), intensity)
            solid = solid & ~early
        agent = torch.where(solid, solids.agent[part], 0)
        scale = spec.intensity_range / 255
        intensity = (intensity.clamp(0, 255).round() if scale == 1 else (intensity * 2.2).clamp(0, 255)) * scale
        return label, agent, intensity.float(), kept, measured

    def expose(
        self, specs: Sequence[CameraSpec], stamps_ns: Sequence[Sequence[int]], sample_stamps_ns: Sequence[int]
    ) -> list[dict[str, tuple[CameraImage, Picture]]]:
        """Of each sample one image of each camera at its own stamp, with what is true of its pixels; all of one size.

        A GPU sees all at once, a CPU, whose cache holds one image, one after another.
        """
        middles = [self.clock.seconds(group[len(group) // 2]) for group in stamps_ns]
        centers = self._tensor(*(self.scene.ego.pose(t).translation for t in middles))
        solids = self.scene.solids(middles, self.device)
        shadows = Shadows.cast(solids, self.light, centers, self.shadow_texel_m, chunk=self.chunk)
        views = [(k, spec, s) for k, group in enumerate(stamps_ns) for spec, s in zip(specs, group, strict=True)]
        together, of_one = (1, 1) if self.device.type == "cpu" else (len(views), len(specs))
        images: list[dict[str, tuple[CameraImage, Picture]]] = [{} for _ in stamps_ns]
        for first in range(0, len(views), together):
            group = views[first : first + together]
            generators = [self._generator(s, spec.role) for _, spec, s in group[::of_one]]
            rgb, picture = self._pictures(group, shadows, generators)
            for i, (k, spec, stamp) in enumerate(group):
                ego_from_camera = self.pose(sample_stamps_ns[k]).inverse() @ self.pose(stamp) @ spec.ego_from_camera
                images[k][spec.role] = (CameraImage(rgb[i], spec.intrinsic, ego_from_camera, stamp), picture.at(i))
        return images

    def _pictures(
        self, views: Sequence[tuple[int, CameraSpec, int]], shadows: Shadows, generators: Sequence[torch.Generator]
    ) -> tuple[Array, Picture]:
        """Images (V, H, W, 3) of views (index of the sample's shadows, camera, stamp), and the truth of their pixels.

        The picture's distances are depths, along the optical axis.
        """
        times, k = [self.clock.seconds(s) for _, _, s in views], self.supersample
        poses = [self.scene.ego.pose(t) @ spec.ego_from_camera for t, (_, spec, _) in zip(times, views, strict=True)]
        width, height = views[0][1].size
        magnify, centers = np.array([[k], [k], [1]]), np.array([[0, 0, (k - 1) / 2]] * 2 + [[0, 0, 0]])
        grid = Pinhole(
            self._tensor(*(p.rotation for p in poses)),
            self._tensor(*(p.translation for p in poses)),
            self._tensor(*(spec.intrinsic * magnify + centers for _, spec, _ in views)),
            height * k,
            width * k,
        )
        place = torch.tensor([place for place, _, _ in views], device=self.device)
        solids = self.scene.solids(times, self.device)
        picture = render(solids, self.ground, grid, self.light, shadows, place, self.chunk)
        radiance, middle = picture.radiance, slice(k // 2, None, k)
        if k > 1:
            radiance = radiance.view(len(views), height, k, width, k, 3).clamp_max(3).mean((2, 4))
        rgb = develop(radiance, generators, 0.010 + 0.035 * self.weather.night).cpu().numpy()
        distance, label, agent = (x[:, middle, middle] for x in (picture.distance, picture.label, picture.agent))
        return rgb, Picture(radiance, distance * grid.cosine()[:, middle, middle], label, agent)

    def detect(
        self, specs: Sequence[RadarSpec], stamps_ns: Sequence[Sequence[int]], sample_stamps_ns: Sequence[int]
    ) -> list[dict[str, PointCloud]]:
        """Of each sample one cloud of each radar at its own stamp, all in one cast; radars differ in role and mount."""
        spec = specs[0]
        views = [(k, one, s) for k, group in enumerate(stamps_ns) for one, s in zip(specs, group, strict=True)]
        times = [self.clock.seconds(s) for _, _, s in views]
        egos, twists = [self.scene.ego.pose(t) for t in times], [self.scene.ego.velocity(t) for t in times]
        poses = [ego @ one.ego_from_radar for ego, (_, one, _) in zip(egos, views, strict=True)]
        moving = [
            v + np.cross(w, pose.translation - ego.translation)
            for (v, w), pose, ego in zip(twists, poses, egos, strict=True)
        ]
        half, (step_a, step_e) = np.radians(spec.half_azimuth_deg), np.radians(spec.step_deg)
        columns = int(2 * half / step_a) + 1
        rise = np.arange(-np.radians(spec.half_elevation_deg), np.radians(spec.half_elevation_deg) + 1e-6, step_e)
        still = torch.zeros(len(views), 3, device=self.device)
        grid = Spinning(
            self._tensor(*(p.rotation for p in poses)), self._tensor(*(p.translation for p in poses)), still, still,
            torch.tensor(rise, dtype=torch.float32, device=self.device), -float(half), float(step_a),
            torch.zeros(columns, device=self.device), spec.reach_m, LIDAR,
        )  # fmt: skip
        solids = self.scene.solids(times, self.device)
        hits, _, direction = self._meet(solids, grid)
        view = torch.arange(len(views), device=self.device).repeat_interleave(grid.rows * grid.columns)
        solid, part = hits.part >= 0, hits.part.clamp_min(0)
        label = torch.where(solid, solids.label[part].long(), int(Label.ROAD))
        target = torch.where(solid, solids.velocity[view, part].T, 0.0)
        met = (hits.distance < spec.reach_m) & (hits.distance > 1.0) & (label != Label.EGO)
        table = torch.cat([direction, target, torch.stack([hits.distance, label, met])]).T.cpu().numpy()
        samples: list[dict[str, PointCloud]] = [{} for _ in stamps_ns]
        back = [self.pose(stamp).inverse() for stamp in sample_stamps_ns]
        for rows, (k, one, stamp), pose, own in zip(
            np.split(table.astype(np.float64), len(views)), views, poses, moving, strict=True
        ):
            rows = rows[rows[:, 8] > 0]
            rng = np.random.default_rng([self.seed, stamp // 1000, *one.role.encode()])
            samples[k][one.role] = _detections(
                one, rng, rows[:, 6], rows[:, :3] @ pose.rotation, ((rows[:, 3:6] - own) * rows[:, :3]).sum(1),
                own @ pose.rotation, np.array(_RCS_DBSM)[rows[:, 7].astype(int)], back[k] @ pose, stamp,
            )  # fmt: skip
        return samples

    def inertial(self, first_ns: int, last_ns: int, rate_hz: float = 100.0) -> Imu:
        """IMU readings after first_ns up to last_ns."""
        stamps, rng = self._readings(first_ns, last_ns, rate_hz, 1)
        bias = np.random.default_rng([self.seed, 11]).normal(0, 1, 6) * ([1e-3] * 3 + [0.02] * 3)
        t, ego = (stamps - self.clock.start_ns) * 1e-9, self.scene.ego
        to_ego = ego.rotation(t).inv()
        spin = to_ego.apply(ego.velocity(t)[1]) + bias[:3] + rng.normal(0, 2e-3, (len(t), 3))
        force = to_ego.apply(ego.position(t, 2) + np.array([0, 0, 9.81])) + bias[3:] + rng.normal(0, 0.03, (len(t), 3))
        return Imu(stamps, spin, force)

    def odometry(self, first_ns: int, last_ns: int, rate_hz: float = 50.0) -> Odometry:
        """Wheel odometry readings after first_ns up to last_ns: 0.3 % of scale, noise."""
        stamps, rng = self._readings(first_ns, last_ns, rate_hz, 2)
        scale = 1 + 0.003 * np.random.default_rng([self.seed, 12]).normal()
        t, ego = (stamps - self.clock.start_ns) * 1e-9, self.scene.ego
        to_ego, (velocity, twist) = ego.rotation(t).inv(), ego.velocity(t)
        linear = to_ego.apply(velocity) * scale + rng.normal(0, 0.02, (len(t), 3))
        angular = to_ego.apply(twist) + rng.normal(0, 3e-3, (len(t), 3))
        return Odometry(stamps, linear, angular)

    def _readings(self, first_ns: int, last_ns: int, rate_hz: float, kind: int) -> tuple[Array, np.random.Generator]:
        period = int(1e9 / rate_hz)
        first = self.clock.start_ns + ((first_ns - self.clock.start_ns) // period + 1) * period
        return np.arange(first, last_ns + 1, period, dtype=np.int64), np.random.default_rng(
            [self.seed, last_ns // 1000, kind]
        )

    def odom_from_ego(self, stamp_ns: int) -> Pose:
        """Odometry's own frame: starts at the drive's start and drifts by 0.3 % in distance and 0.02 deg/s in yaw."""
        scale, drift = np.random.default_rng([self.seed, 13]).normal(0, 1, 2) * [0.003, np.radians(0.02)]
        t = self.clock.seconds(stamp_ns)
        since = self.scene.ego.pose(0.0).inverse() @ self.scene.ego.pose(t)
        return Pose.from_yaw(drift * t) @ Pose(since.rotation, since.translation * (1 + scale))

    def fix(self, stamp_ns: int) -> Gnss:
        """A satellite fix of ego: 1.2 m (1 sigma) across, 2.5 m up, about a false origin."""
        rng = np.random.default_rng([self.seed, stamp_ns // 1000, 3])
        sigma = np.array([1.2, 1.2, 2.5])
        east, north, up = self.pose(stamp_ns).translation + rng.normal(0, 1, 3) * sigma
        latitude = 1.29 + north / 110_574.0
        return Gnss(
            latitude, 103.85 + east / (111_320.0 * np.cos(np.radians(latitude))), up, np.diag(sigma**2), stamp_ns
        )


# By Label, 0-255: median answers at right angles.
_REFLECTANCE = (30.0, 30, 45, 30, 35, 60, 20, 20, 18, 70, 25, 14, 14, 24, 26, 20, 34, 30, 30, 160, 30, 22, 26, 18, 18)
_RCS_DBSM = (9.0, 16, 14, 18, 16, 2, 4, 0, -4, -8, -90, -26, -26, -24, -22, -24, 8, 2, 3, 6, 2, -9, -2, 0, -2)


def _detections(
    spec: RadarSpec, rng: np.random.Generator, distance: Array, direction: Array, radial: Array, moving: Array,
    rcs: Array, ego_from_radar: Pose, stamp_ns: int,
) -> PointCloud:  # fmt: skip
    """Detections from the rays that met something: noise, threshold, one per cell of resolution, ghosts, clutter.

    Args:
        direction: (N, 3) in the radar's frame. radial: (N,) relative radial velocity. moving: (3,) the radar's own
            velocity in its frame. rcs: (N,) dBsm.
    """
    rcs = rcs + rng.normal(0, 4, len(rcs))
    snr = rcs + 62 - 40 * np.log10(np.maximum(distance, 2)) + 12
    heard = (snr > 10) & (rng.random(len(rcs)) < 0.75)
    distance, direction, radial, rcs, snr = (x[heard] for x in (distance, direction, radial, rcs, snr))
    azimuth, elevation = np.arctan2(direction[:, 1], direction[:, 0]), np.arcsin(np.clip(direction[:, 2], -1, 1))
    # One detection, the strongest, in a cell of range, azimuth (and elevation).
    cell = np.stack(
        [distance // 0.6, azimuth // np.radians(1.6), elevation // np.radians(3) if spec.elevation else 0 * azimuth], 1
    )
    order = np.argsort(-snr, kind="stable")
    _, first = np.unique(cell[order], axis=0, return_index=True)
    chosen = order[np.sort(first)][: spec.most]
    distance, azimuth, elevation, radial, rcs, snr = (
        x[chosen] for x in (distance, azimuth, elevation, radial, rcs, snr)
    )
    ghosts = np.flatnonzero((rng.random(len(snr)) < 0.02) & (snr > 25))  # once more by way of the own bumper
    clutter = rng.poisson(3 + 12 * spec.elevation)
    distance = np.concatenate([distance, 2 * distance[ghosts], rng.uniform(2, spec.reach_m, clutter)])
    spread = np.radians([spec.half_azimuth_deg, spec.half_elevation_deg])
    azimuth = np.concatenate([azimuth, azimuth[ghosts], rng.uniform(-spread[0], spread[0], clutter)])
    elevation = np.concatenate([elevation, elevation[ghosts], rng.uniform(-spread[1], spread[1], clutter)])
    radial = np.concatenate([radial, 2 * radial[ghosts], rng.uniform(-15, 5, clutter)])
    rcs = np.concatenate([rcs, rcs[ghosts] - 12, rng.normal(-10, 4, clutter)])
    snr = np.concatenate([snr, snr[ghosts] - 12, rng.uniform(10, 14, clutter)])
    real = np.arange(len(snr)) < len(snr) - clutter - len(ghosts)
    n = len(distance)
    distance = distance + rng.normal(0, spec.noise_m, n)
    azimuth = azimuth + rng.normal(0, np.radians(spec.noise_deg[0]), n)
    elevation = elevation + rng.normal(0, np.radians(spec.noise_deg[1]), n) if spec.elevation else np.zeros(n)
    radial = radial + rng.normal(0, 0.08, n)
    u = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], 1)
    compensated = radial + u @ moving
    fields = {
        "rcs": rcs, "snr": snr, "power": rcs - 40 * np.log10(np.maximum(distance, 1)) + 80,
        "radial_velocity": radial, "radial_velocity_comp": compensated,
        "vx": radial * u[:, 0], "vy": radial * u[:, 1],
        "vx_comp": compensated * u[:, 0], "vy_comp": compensated * u[:, 1],
        "motion_state": (np.abs(compensated) > 0.5).astype(float), "valid": real.astype(float),
    }  # fmt: skip
    return PointCloud(
        (u * distance[:, None]).astype(np.float32),
        {k: v.astype(np.float32) for k, v in fields.items()},
        ego_from_radar,
        stamp_ns,
    )
