"""One drive through one street: the town that stands, the traffic that moves, the ego vehicle's path."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation

from perception.synthetic.furniture import Furniture
from perception.synthetic.labels import Label
from perception.synthetic.primitives import Solids, Texture, turn
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

    def agent_poses(self, t_s: float) -> tuple[Array, Array, Array]:
        """map_from_agent at t: rotations, translations, velocities of A + 1 frames; 0 is the map."""

        def at(t: float) -> Array:
            t = min(max(t / STEP_S, 0.0), self.tracks.shape[1] - 1.001)
            k = int(t)
            return self.tracks[:, k] + (t - k) * (self.tracks[:, k + 1] - self.tracks[:, k])

        now, moved = at(t_s), at(t_s + 0.025) - at(t_s - 0.025)
        xy, yaw, later = now[:, :2], now[:, 2], moved[:, :2]
        sizes = np.array([a.size for a in self.agents])
        forward = np.stack([np.cos(yaw), np.sin(yaw)], -1)
        reach = sizes[:, :1] * 0.35
        ends = torch.from_numpy(np.concatenate([xy + reach * forward, xy - reach * forward, xy]))
        terrain = self.ground.terrain(ends)[0].numpy().reshape(3, -1)
        people = np.array([a.label in (Label.PEDESTRIAN, Label.BICYCLE) for a in self.agents])
        kerb = self.ground.kerb(torch.from_numpy(xy)).numpy() * people
        pitch = -np.arctan2(terrain[0] - terrain[1], 2 * reach[:, 0]) * (sizes[:, 0] > 1.5)
        rotation = np.concatenate([np.eye(3)[None], np.stack([turn(y, p) for y, p in zip(yaw, pitch, strict=True)])])
        translation = np.concatenate([np.zeros((1, 3)), np.column_stack([xy, terrain[:2].mean(0) + kerb])])
        velocity = np.concatenate([np.zeros((1, 3)), np.column_stack([later / 0.05, np.zeros(len(xy))])])
        ego = self.ego.pose(t_s)
        rotation[1], translation[1], velocity[1] = ego.rotation, ego.translation, self.ego.velocity(t_s)[0]
        return rotation, translation, velocity

    def solids(self, times_s: list[float], device: torch.device | str = "cpu") -> Solids:
        """All solids, posed at the instants of V views."""
        poses = [self.agent_poses(t) for t in times_s]
        parts = self.parts.copy()
        signals = np.flatnonzero(parts["texture"] == Texture.SIGNAL)
        junction, main = np.divmod(parts["seed"][signals].astype(int), 2)
        parts["seed"][signals] = self.traffic.signal(times_s[0], junction, main)
        rotation, translation, velocity = (np.stack(x) for x in zip(*poses, strict=True))
        return Solids.pose(parts, rotation, translation, velocity, device)
