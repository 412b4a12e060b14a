"""One drive through one street: the town that stands, the traffic that moves, the ego vehicle's path."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation
from torch import Tensor

from perception.synthetic.furniture import Furniture
from perception.synthetic.labels import Label
from perception.synthetic.primitives import Solids, Texture, load
from perception.synthetic.roads import Ground, SemanticMap, Style, build_ground, build_roads
from perception.synthetic.traffic import STEP_S, Agent, Traffic
from perception.types import Array, Pose

Rng = np.random.Generator


class EgoMotion:
    """Smooth path of the ego frame: splines through its track, terrain's slope, suspension and weight transfer."""

    def __init__(self, ego: Agent, ground: Ground, rng: Rng) -> None:
        t = np.arange(len(ego.xy)) * STEP_S
        height, slope = (x.numpy() for x in ground.terrain(torch.from_numpy(ego.xy)))
        cos, sin = np.cos(ego.yaw), np.sin(ego.yaw)
        speed = ego.speed
        kernel = np.hanning(9) / np.hanning(9).sum()
        smooth = lambda x: np.convolve(np.pad(x, 4, mode="edge"), kernel, mode="valid")  # noqa: E731
        pitch = -np.arctan(slope[:, 0] * cos + slope[:, 1] * sin) - 0.004 * smooth(np.gradient(speed, STEP_S))
        roll = np.arctan(-slope[:, 0] * sin + slope[:, 1] * cos) + 0.004 * smooth(np.gradient(ego.yaw, STEP_S)) * speed
        sway, phase = rng.uniform(1.0, 2.2, 2), rng.uniform(0, 6, 2)
        shake = 0.0025 * np.clip(speed / 8, 0, 1)
        pitch = pitch + shake * np.sin(2 * np.pi * sway[0] * t + phase[0])
        roll = roll + shake * np.sin(2 * np.pi * sway[1] * t + phase[1])
        self.position = CubicSpline(t, np.column_stack([ego.xy, height]))
        self.angles = CubicSpline(t, np.column_stack([ego.yaw, pitch, roll]))
        self.end_s = float(t[-1])

    def rotation(self, t_s: Array | float) -> Rotation:
        return Rotation.from_euler("ZYX", self.angles(t_s))

    def pose(self, t_s: float) -> Pose:
        """map_from_ego."""
        return Pose(self.rotation(t_s).as_matrix(), self.position(t_s))

    def velocity(self, t_s: Array | float) -> tuple[Array, Array]:
        """Linear velocity m/s and angular velocity rad/s (..., 3), in the map's axes."""
        step = 1e-3
        twist = (self.rotation(t_s + step) * self.rotation(t_s - step).inv()).as_rotvec()
        return self.position(t_s, 1), twist / (2 * step)


@dataclass(frozen=True)
class Scene:
    """A street at any time t in seconds; the map's axes are east, north, up."""

    style: Style
    ground: Ground
    semantic_map: SemanticMap
    agents: list[Agent]
    parts: Array
    ego: EgoMotion
    traffic: Traffic
    tracks: Array  # (A, T, 3): x, y m and yaw rad of every agent each STEP_S
    _loaded: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # the parts on each device

    @staticmethod
    @lru_cache(maxsize=4)
    def build(seed: int, duration_s: float, periodic_furniture: bool = False) -> Scene:
        """A scene from its seed; `duration_s` of driving."""
        rng = np.random.default_rng([seed, 0xC17])
        style = Style.draw(rng)
        start_s, length = 110.0, 110.0 + duration_s * 10 + 130.0
        roads, junctions = build_roads(style, rng, length)
        traffic = Traffic(roads, junctions, style, rng, start_s, duration_s)
        ground, marks = build_ground(roads, style, rng, traffic.agents[0].xy, 115.0)
        furniture = Furniture(roads, style, ground, marks, rng, periodic_furniture)
        parts = [furniture.parts()]
        for k, agent in enumerate(traffic.agents):
            agent.parts["agent"] = k + 1
            parts.append(agent.parts)
        ego = EgoMotion(traffic.agents[0], ground, rng)
        tracks = np.stack([np.column_stack([a.xy, a.yaw]) for a in traffic.agents])
        return Scene(style, ground, marks, traffic.agents, np.concatenate(parts), ego, traffic, tracks)

    def agent_poses(self, times_s: list[float]) -> tuple[Array, Array, Array]:
        """map_from_agent at V times, of A + 1 frames, the first the map: (V, A + 1, 3, 3), (V, A + 1, 3) and m/s."""
        t = np.array(times_s)

        def at(t: Array) -> Array:
            t = np.clip(t / STEP_S, 0, self.tracks.shape[1] - 1.001)
            k = t.astype(int)
            before, after = self.tracks[:, k], self.tracks[:, k + 1]
            return (before + (t - k)[:, None] * (after - before)).swapaxes(0, 1)  # (V, A, 3)

        now, moved = at(t), at(t + 0.025) - at(t - 0.025)
        xy, yaw = now[..., :2], now[..., 2]
        sizes = np.array([a.size for a in self.agents])
        reach = 0.35 * sizes[:, 0]
        forward = reach[:, None] * np.stack([np.cos(yaw), np.sin(yaw)], -1)
        ends = torch.from_numpy(np.stack([xy + forward, xy - forward]).reshape(-1, 2))
        front, back = self.ground.terrain(ends)[0].numpy().reshape(2, *yaw.shape)
        people = np.array([a.label in (Label.PEDESTRIAN, Label.BICYCLE) for a in self.agents])
        kerb = self.ground.kerb(torch.from_numpy(xy.reshape(-1, 2))).numpy().reshape(yaw.shape) * people
        pitch = -np.arctan2(front - back, 2 * reach) * (sizes[:, 0] > 1.5)
        angles = np.stack([yaw, pitch, 0 * yaw], -1).reshape(-1, 3)
        rotation = np.zeros((len(t), len(self.agents) + 1, 3, 3))
        translation, velocity = np.zeros(rotation.shape[:3]), np.zeros(rotation.shape[:3])
        rotation[:, 0] = np.eye(3)
        rotation[:, 1:] = Rotation.from_euler("ZYX", angles).as_matrix().reshape(*yaw.shape, 3, 3)
        translation[:, 1:, :2], translation[:, 1:, 2] = xy, (front + back) / 2 + kerb
        velocity[:, 1:, :2] = moved[..., :2] / 0.05
        rotation[:, 1], translation[:, 1] = self.ego.rotation(t).as_matrix(), self.ego.position(t)
        velocity[:, 1] = self.ego.velocity(t)[0]
        return rotation, translation, velocity

    def solids(self, times_s: list[float], device: torch.device | str = "cpu") -> Solids:
        """All solids, posed at the instants of V views."""
        key = str(device)
        if key not in self._loaded:
            self._loaded[key] = load(self.parts, device)
        parts = self._loaded[key]
        seed = np.tile(self.parts["seed"], (len(times_s), 1))
        signals = np.flatnonzero(self.parts["texture"] == Texture.SIGNAL)
        junction, main = np.divmod(seed[0, signals].astype(int), 2)
        for row, t in zip(seed, times_s, strict=True):
            row[signals] = self.traffic.signal(t, junction, main)
        return Solids.pose(parts, *self.agent_poses(times_s), torch.from_numpy(seed).to(device))
