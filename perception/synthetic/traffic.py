"""Who moves where: queues of vehicles that follow each other and stop at red lights, people on sidewalks and crossings.

Vehicles follow the intelligent driver model (Treiber, Hennecke and Helbing 2000) along their lane. What overlaps
another agent at any time of the drive is removed afterwards, so that truth never holds two solids in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from perception.synthetic import agents as shapes
from perception.synthetic.agents import SHAPES, fit_box
from perception.synthetic.labels import Label
from perception.synthetic.roads import STOP_LINE_M, Junction, Road, Style
from perception.types import Array

STEP_S = 0.1
_PERIOD_S, _MAIN_GREEN_S, _SIDE_GREEN_S = 44.0, 24.0, (30.0, 38.0)
Rng = np.random.Generator


@dataclass
class Agent:
    """One road user: its solids, its box (m), and its track every STEP_S: xy (T, 2) m and yaw (T,), in the map."""

    label: Label
    parts: Array
    size: Array
    xy: Array
    yaw: Array
    ridden: bool = False
    needed: bool = False

    @staticmethod
    def of(label: Label, parts: Array, xy: Array, yaw: Array, ridden: bool = False, needed: bool = False) -> Agent:
        parts, size = fit_box(parts)
        return Agent(label, parts, size, xy, np.unwrap(yaw), ridden, needed)

    @property
    def speed(self) -> Array:
        """(T,) m/s."""
        return np.linalg.norm(np.gradient(self.xy, STEP_S, axis=0), axis=1)


@dataclass
class _Driver:
    """A vehicle in a lane: arc length s of its middle along its own direction, wanted speed, gap to keep."""

    lane: int
    s: float
    speed: float
    wanted: float
    length: float
    build: Callable[[], tuple[Array, Label, bool]] | None  # None: the ego vehicle
    needed: bool = False


@dataclass(frozen=True)
class _Lane:
    road: int
    way: int
    lateral: float
    stops: list[tuple[float, int]]  # (s of the stop line, junction)


def _is_green(t: Array | float, offset: Array | float, main: bool) -> Array:
    phase = (np.asarray(t) + offset) % _PERIOD_S
    return phase < _MAIN_GREEN_S if main else (phase >= _SIDE_GREEN_S[0]) & (phase < _SIDE_GREEN_S[1])


class Traffic:
    """Draws and moves all agents of a scene; `agents`, the first of which is the ego vehicle, is the result."""

    def __init__(
        self, roads: list[Road], junctions: list[Junction], style: Style, rng: Rng, start_s: float, duration_s: float
    ) -> None:
        self.roads, self.junctions, self.style, self.rng = roads, junctions, style, rng
        self.start_s, self.steps = start_s, int(duration_s / STEP_S) + 1
        self.offset = rng.uniform(0, 12, len(junctions) + 1)
        if rng.random() < 0.35:  # somewhere ahead the light turns red
            self.offset[:] = _MAIN_GREEN_S - rng.uniform(2, 5)
        self.agents: list[Agent] = []
        self._vehicles()
        self._parked()
        self._people()
        self._remove_overlaps()

    def signal(self, t_s: float, junction: Array, main: Array) -> Array:
        """What lights show: 0 red, 1 amber, 2 green; `main` (N,) 1 for the main road's."""
        main = main.astype(bool)
        offset = self.offset[junction]
        green = np.where(main, _is_green(t_s, offset, True), _is_green(t_s, offset, False))
        was = np.where(main, _is_green(t_s - 3, offset, True), _is_green(t_s - 3, offset, False))
        return np.where(green, 2, np.where(was, 1, 0))

    def _lanes(self) -> list[_Lane]:
        lanes = []
        for index, road in enumerate(self.roads):
            count = road.lanes + (road.bike_m > 0)
            for way in (1, -1):
                stops = []
                for at, half in road.crossed:
                    s = at if way == 1 else road.length - at
                    main = self.roads[0]
                    junction = (
                        min(range(len(self.junctions)), key=lambda j: abs(self.junctions[j].main_s - at))
                        if road is main
                        else index - 1
                    )
                    stops.append((s - half - STOP_LINE_M - 0.3, junction))
                for i in range(count):
                    middle = (i + 0.5) * road.lane_width_m if i < road.lanes else road.lanes_m + road.bike_m / 2
                    lanes.append(_Lane(index, way, -way * middle, sorted(stops)))
        return lanes

    def _vehicles(self) -> None:
        rng, lanes = self.rng, self._lanes()
        drivers: list[_Driver] = []
        ego_lane = int(rng.integers(self.style.lanes))
        for k, lane in enumerate(lanes):
            road = self.roads[lane.road]
            bike = abs(lane.lateral) > road.lanes_m
            s = rng.uniform(5, 25)
            if k == ego_lane:
                wanted = rng.uniform(8, 11.5)
                drivers.append(_Driver(k, self.start_s + 1.4, wanted * 0.8, wanted, 4.2, None, True))
            while s < road.length - 10:
                wanted, length, build = self._draw(bike)
                red = [(x, j) for x, j in lane.stops if x - 1 < s + length / 2 and s - length / 2 < x + 30]
                near_ego = k == ego_lane and -(length + 9) < s - self.start_s < length / 2 + 14
                if not near_ego and not red:
                    drivers.append(_Driver(k, s, wanted * 0.8, wanted, length, build))
                s += length + (rng.exponential(28 / self.style.traffic) + 9 if not bike else rng.exponential(40) + 15)
        # What a scene must show near the ego vehicle: riders beside it, a bus coming the other way.
        if self.roads[0].bike_m > 0:
            ahead = self.start_s + rng.uniform(10, 16)
            drivers = [d for d in drivers if not (d.lane == self.style.lanes and abs(d.s - ahead) < 8)]
            drivers.append(_Driver(self.style.lanes, ahead, 4.5, 4.5, 1.8, self._build(Label.BICYCLE), True))
        self._drive(lanes, drivers)

    def _draw(self, bike: bool) -> tuple[float, float, Callable[[], tuple[Array, Label, bool]]]:
        rng = self.rng
        if bike:
            return rng.uniform(3.5, 5.5), 1.8, self._build(Label.BICYCLE)
        label = Label(rng.choice([Label.CAR, Label.TRUCK, Label.BUS, Label.MOTORCYCLE], p=[0.76, 0.10, 0.05, 0.09]))
        length = {Label.CAR: 4.9, Label.TRUCK: 8.8, Label.BUS: 12.2, Label.MOTORCYCLE: 2.2}[label]
        return rng.uniform(7, 12), length, self._build(label)

    def _build(self, label: Label) -> Callable[[], tuple[Array, Label, bool]]:
        seed = int(self.rng.integers(1 << 31))

        def build() -> tuple[Array, Label, bool]:
            rng = np.random.default_rng(seed)
            if label == Label.BICYCLE:
                return shapes.bicycle(rng, True), label, True
            if label == Label.MOTORCYCLE:
                return shapes.motorcycle(rng, True), label, True
            return SHAPES[label](rng), label, False

        return build

    def _drive(self, lanes: list[_Lane], drivers: list[_Driver]) -> None:
        """Step all drivers through the scene (IDM), then turn arc lengths into tracks."""
        lane = np.array([d.lane for d in drivers])
        s, v = np.array([d.s for d in drivers]), np.array([d.speed for d in drivers])
        wanted, length = np.array([d.wanted for d in drivers]), np.array([d.length for d in drivers])
        track, gap0, headway, accel, brake = np.zeros((self.steps, len(drivers))), 2.2, 1.3, 1.6, 2.2
        for step in range(self.steps):
            track[step] = s
            gap, closing = np.full(len(s), 1e3), np.zeros(len(s))
            order = np.lexsort((s, lane))
            same = lane[order[1:]] == lane[order[:-1]]
            behind, ahead = order[:-1][same], order[1:][same]
            gap[behind] = s[ahead] - s[behind] - (length[ahead] + length[behind]) / 2
            closing[behind] = v[behind] - v[ahead]
            for k in range(len(s)):
                for stop, junction in lanes[lane[k]].stops:
                    left = stop - s[k] - length[k] / 2
                    green = _is_green(step * STEP_S, self.offset[junction], lanes[lane[k]].road == 0)
                    if not green and -0.5 < left < gap[k] and v[k] ** 2 < 2 * 4.0 * max(left, 0.05):
                        gap[k], closing[k] = max(left + 1.5, 0.1), v[k]
            want_gap = gap0 + np.maximum(0, v * headway + v * closing / (2 * np.sqrt(accel * brake)))
            a = accel * (1 - (v / wanted) ** 4 - (want_gap / np.maximum(gap, 0.3)) ** 2)
            v_next = np.maximum(0, v + np.clip(a, -6, accel) * STEP_S)
            s, v = s + (v + v_next) / 2 * STEP_S, v_next
        for k, driver in enumerate(drivers):
            path = lanes[driver.lane]
            road = self.roads[path.road]
            at = track[:, k] if path.way == 1 else road.length - track[:, k]
            xy = road.point(at, np.full(self.steps, path.lateral))
            yaw = road.heading(at) + (0 if path.way == 1 else np.pi)
            if driver.build is None:
                # The ego frame stands below the rear axle, the roof above its own frame: no refitting.
                parts = shapes.ego_vehicle()
                self.agents.insert(
                    0, Agent(Label.EGO, parts, np.array([4.2, 1.85, 1.6]), xy, np.unwrap(yaw), needed=True)
                )
                continue
            leaves = (track[:, k] > road.length - 8).any()
            if not leaves:
                parts, label, ridden = driver.build()
                self.agents.append(Agent.of(label, parts, xy, yaw, ridden, driver.needed))

    def _place(
        self, label: Label, parts: Array, xy: Array, yaw: float, needed: bool = False, ridden: bool = False
    ) -> None:
        still = np.repeat(np.asarray(xy, float)[None], self.steps, 0)
        self.agents.append(Agent.of(label, parts, still, np.full(self.steps, yaw), ridden, needed))

    def _parked(self) -> None:
        """Both kerbs of every road: beside the ego's start one of every kind that seldom passes, else parked cars."""
        taken = self._showcase()
        rng, main = self.rng, self.roads[0]
        for road in self.roads:
            for side in (-1, 1):
                s = rng.uniform(4, 10)
                lateral = side * (road.half_width - road.parking_m / 2 + 0.1)
                while s < road.length - 16:
                    truck = rng.random() < 0.06 and road is main
                    room = 10.0 if truck else 6.5
                    clash = road is main and any(k == side and s < b and a < s + room for k, a, b in taken)
                    if clash or not (road.clear(s, 12) and road.clear(s + room, 12)):
                        s += 2.0
                        continue
                    if rng.random() < self.style.parked:
                        label, yaw = Label.TRUCK if truck else Label.CAR, float(road.heading(s + room / 2))
                        yaw += (0 if side == -1 else np.pi) + rng.normal(0, 0.015)
                        self._place(label, SHAPES[label](rng), road.point(s + room / 2, lateral), yaw)
                    s += room + rng.uniform(0, 1.0)

    def _showcase(self) -> list[tuple[int, float, float]]:
        """Kerb places (side, from s, to s) of what every scene must show near the ego's start."""
        rng, road = self.rng, self.roads[0]
        taken: list[tuple[int, float, float]] = []
        ahead, behind = np.arange(4.0, 34.0, 1.0), -np.arange(2.0, 28.0, 1.0)
        for label, room, sides in (
            (Label.CONSTRUCTION_VEHICLE, 17.0, (-1, 1)),
            (Label.TRAILER, 11.5, (1, -1)),
            (Label.TRUCK, 10.0, (-1, 1)),
            (Label.BUS, 13.5, (1, -1)),
            (Label.MOTORCYCLE, 5.0, (-1, 1)),
        ):
            places = [(side, self.start_s + x) for offsets in (ahead, behind) for x in offsets for side in sides]
            for side, s in places:
                clear = all(road.clear(x, 7.0) for x in np.arange(s, s + room + 1, 2.0))
                if not clear or any(k == side and s < b and a < s + room for k, a, b in taken):
                    continue
                taken.append((side, s, s + room))
                lateral = side * (road.half_width - road.parking_m / 2 + 0.1)
                middle = s + room / 2
                yaw = float(road.heading(middle)) + (0 if side == -1 else np.pi)
                if label == Label.CONSTRUCTION_VEHICLE:
                    self._work_zone(road, s, room, lateral)
                elif label == Label.MOTORCYCLE:
                    for k in range(3):
                        parts = shapes.motorcycle(rng, False)
                        self._place(label, parts, road.point(s + 1.2 + 1.3 * k, lateral), yaw + 1.2, needed=k == 0)
                else:
                    self._place(label, SHAPES[label](rng), road.point(middle, lateral), yaw, needed=True)
                break
        return taken

    def _work_zone(self, road: Road, s: float, room: float, lateral: float) -> None:
        rng, side = self.rng, np.sign(lateral)
        edge = lateral - side * (road.parking_m / 2 - 0.1)
        yaw = float(road.heading(s + room / 2))
        xy = road.point(s + room * 0.58, lateral + side * 0.15)
        self._place(
            Label.CONSTRUCTION_VEHICLE,
            shapes.construction_vehicle(rng),
            xy,
            yaw + (0 if rng.random() < 0.6 else np.pi),
            True,
        )
        for k in range(2):  # across the parking lane, facing the traffic
            at = road.point(s + 1.2, lateral + (k - 0.5) * 0.1) if k == 0 else road.point(s + room - 0.6, lateral)
            self._place(Label.BARRIER, shapes.barrier(rng), at, yaw, needed=k == 0)
        for k in range(int(room / 2.4) - 1):
            place = road.point(s + 2.4 + 2.4 * k, edge)
            if k % 3 != 1:
                self._place(Label.TRAFFIC_CONE, shapes.traffic_cone(rng), place, yaw, needed=k < 4)
            else:
                self._place(Label.BARRIER, shapes.barrier(rng), place, yaw + np.pi / 2, needed=False)

    def _people(self) -> None:
        rng, main, t = self.rng, self.roads[0], np.arange(self.steps) * STEP_S
        first, last = self.start_s - 40, self.start_s + self.steps * STEP_S * 10 + 50
        near = [self.start_s + rng.uniform(6, 25), self.start_s + rng.uniform(10, 30)]
        count = int(self.style.people * (last - first) / 9)
        for k in range(count):
            s = near[k] if k < 2 else rng.uniform(first, last)
            side, walking = rng.choice([-1, 1]) if k >= 2 else -1, rng.random() < 0.8
            lateral = side * (main.half_width + rng.uniform(1.7, self.style.sidewalk_m - 0.6))
            velocity = rng.choice([-1, 1]) * rng.uniform(0.9, 1.6) * walking
            at = np.clip(s + velocity * t, 2, main.length - 2)
            sway = lateral + 0.1 * np.sin(t * 0.5 + k)
            yaw = main.heading(at) + (np.pi if velocity < 0 else 0) + (0 if walking else rng.uniform(-3, 3))
            parts = shapes.pedestrian(rng, walking)
            self.agents.append(Agent.of(Label.PEDESTRIAN, parts, main.point(at, sway), yaw, needed=k < 1))
        for j, junction in enumerate(self.junctions):  # crossing the main road while it is red
            half = next(h for at, h in main.crossed if at == junction.main_s)
            start = (_MAIN_GREEN_S + 2.5 - self.offset[j]) % _PERIOD_S
            for _ in range(int(rng.integers(1, 5))):
                at = junction.main_s + rng.choice([-1, 1]) * (half + rng.uniform(0.8, 3.0))
                way, speed = rng.choice([-1, 1]), rng.uniform(1.2, 1.6)
                reach = main.half_width + 1.5
                walked = np.clip((t - start - rng.uniform(0, 2)) * speed, 0, 2 * reach)
                yaw = main.heading(np.full(self.steps, at)) + way * np.pi / 2
                xy = main.point(np.full(self.steps, at), way * (walked - reach))
                self.agents.append(Agent.of(Label.PEDESTRIAN, shapes.pedestrian(rng, True), xy, yaw))
        for _ in range(3):  # bicycles left at the sidewalk's edge
            s, side = self.start_s + rng.uniform(-5, 35), rng.choice([-1, 1])
            for i in range(int(rng.integers(1, 4))):
                if main.clear(s + i, 4):
                    place = main.point(s + 0.7 * i, side * (main.half_width + self.style.sidewalk_m - 0.6))
                    across = float(main.heading(s)) + np.pi / 2 + 0.2
                    self._place(Label.BICYCLE, shapes.bicycle(rng, False), place, across)

    def _remove_overlaps(self) -> None:
        """Drop agents, the needed ones last, until no two ever touch."""
        order = sorted(range(len(self.agents)), key=lambda k: (k > 0, not self.agents[k].needed, k))
        kept: list[int] = []
        centers = [ego_box_track(a) if k == 0 else a.xy for k, a in enumerate(self.agents)]
        for k in order:
            if not any(self._touch(k, other, centers) for other in kept):
                kept.append(k)
        self.agents = [self.agents[k] for k in sorted(kept)]

    def _touch(self, i: int, j: int, centers: list[Array]) -> bool:
        a, b = self.agents[i], self.agents[j]
        offset = centers[j] - centers[i]
        reach = (np.hypot(*a.size[:2]) + np.hypot(*b.size[:2])) / 2
        near = (offset**2).sum(1) < reach**2
        if not near.any():
            return False
        # Truth boxes are drawn a little larger than the agents, and those must not overlap either.
        return bool(rectangles_touch(offset[near], a.yaw[near], a.size + 0.1, b.yaw[near], b.size + 0.1).any())


def ego_box_track(ego: Agent) -> Array:
    """(T, 2) middle of the ego vehicle, whose frame stands below its rear axle."""
    return ego.xy + 1.35 * np.stack([np.cos(ego.yaw), np.sin(ego.yaw)], -1)


def rectangles_touch(offset: Array, yaw_a: Array, size_a: Array, yaw_b: Array, size_b: Array) -> Array:
    """(T,) do two rectangles overlap; the second's centre is at `offset` (T, 2) of the first's (separating axes)."""
    axes = [
        np.stack([f(y), g(y) * sign], -1)
        for y in (yaw_a, yaw_b)
        for f, g, sign in ((np.cos, np.sin, 1), (np.sin, np.cos, -1))
    ]
    apart = np.zeros(len(offset), bool)
    for axis in axes:
        reach = np.zeros(len(offset))
        for yaw, size in ((yaw_a, size_a), (yaw_b, size_b)):
            along, across = np.stack([np.cos(yaw), np.sin(yaw)], -1), np.stack([-np.sin(yaw), np.cos(yaw)], -1)
            reach += size[0] / 2 * np.abs((along * axis).sum(-1)) + size[1] / 2 * np.abs((across * axis).sum(-1))
        apart |= np.abs((offset * axis).sum(-1)) > reach
    return ~apart
