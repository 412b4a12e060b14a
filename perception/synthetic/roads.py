"""Streets: a curved main road crossed by side streets, their paint, and the ground everything stands on.

The ground is a gentle analytic terrain plus kerbs. What lies where is a raster seen from above, four bytes a pixel:

* 0: signed distance to the carriageway's edge, 0.05 m a step, 64 is the edge, more is outside (kerb, sidewalk, land);
* 1: coverage by paint; 2: its colour (0 white, 255 yellow); 3: surface of the land (0 grass, 128 bare, 255 paved).

Lateral offsets are positive to the left of a road's direction. Traffic keeps to the right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor

from perception.types import Array

PIXEL_M = 0.1
KERB_M = 0.14
KERB_WIDTH_M = 0.18
_SDF_STEP_M, _SDF_ZERO = 0.05, 64


@dataclass(frozen=True)
class Style:
    """What makes one street unlike another; drawn from the scene's seed."""

    lanes: int
    lane_width_m: float
    bike_lane_m: float
    parking_m: float
    sidewalk_m: float
    curve: float
    block_m: float
    traffic: float
    parked: float
    people: float
    greenery: float
    storeys: tuple[int, int]
    setback_m: float
    houses: float
    yellow_centre: bool
    hill_m: float
    sun_azimuth: float
    sun_elevation: float
    overcast: float
    warmth: float

    @staticmethod
    def draw(rng: np.random.Generator) -> Style:
        u = rng.uniform
        low = int(rng.integers(2, 5))
        houses = float(rng.choice([0.0, 0.3, 0.9]))
        return Style(
            lanes=int(rng.choice([1, 2, 2])),
            lane_width_m=u(3.2, 3.7),
            bike_lane_m=u(1.4, 1.8),
            parking_m=u(2.8, 3.0),
            sidewalk_m=u(3.2, 5.0),
            curve=u(0.1, 0.45),
            block_m=u(75, 110),
            traffic=u(0.5, 1.0),
            parked=u(0.35, 0.8),
            people=u(0.5, 1.2),
            greenery=u(0.35, 1.0),
            storeys=(2, 3) if houses > 0.5 else (low, low + int(rng.integers(2, 6))),
            setback_m=u(2.5, 6.0) if houses > 0.5 else u(0.0, 2.0),
            houses=houses,
            yellow_centre=bool(rng.random() < 0.5),
            hill_m=u(0.3, 0.9),
            sun_azimuth=u(0, 2 * np.pi),
            sun_elevation=np.radians(u(28, 60)),
            overcast=float(rng.choice([0.0, 0.15, 0.35, 0.9])),
            warmth=u(0.0, 1.0),
        )


@dataclass(frozen=True, eq=False)
class Road:
    """A street along a centre line, with its cross-section.

    Attributes:
        line: (n, 2) m, a point a metre. crossed: (s, half length) of the junctions along it, m.
    """

    line: Array
    lanes: int
    lane_width_m: float
    bike_m: float
    parking_m: float
    crossed: list[tuple[float, float]] = field(default_factory=list)

    @property
    def length(self) -> float:
        return float(len(self.line) - 1)

    @property
    def lanes_m(self) -> float:
        """Width of the lanes of one direction."""
        return self.lanes * self.lane_width_m

    @property
    def half_width(self) -> float:
        return self.lanes_m + self.bike_m + self.parking_m

    def heading(self, s: Array | float) -> Array:
        s = np.clip(np.asarray(s, float), 0.5, self.length - 1.5)
        ahead, behind = self._center(s + 0.5), self._center(s - 0.5)
        return np.arctan2(ahead[..., 1] - behind[..., 1], ahead[..., 0] - behind[..., 0])

    def _center(self, s: Array | float) -> Array:
        s = np.asarray(s, float)
        knots = np.arange(len(self.line))
        return np.stack([np.interp(s, knots, self.line[:, k]) for k in (0, 1)], -1)

    def point(self, s: Array | float, lateral: Array | float = 0.0) -> Array:
        """(..., 2) m at arc length s, `lateral` to the left."""
        yaw = self.heading(s)
        return self._center(s) + np.asarray(lateral, float)[..., None] * np.stack([-np.sin(yaw), np.cos(yaw)], -1)

    def clear(self, s: float, margin_m: float = 0.0) -> bool:
        """Is s outside every junction, by a margin?"""
        return all(abs(s - at) > half + margin_m for at, half in self.crossed)


@dataclass(frozen=True)
class Junction:
    """Where side street `side` crosses the main road, at main_s and side_s along them."""

    side: int
    main_s: float
    side_s: float


@dataclass
class SemanticMap:
    """Landmarks in the map frame, for localization.

    Attributes:
        poles: (n, 2, 3) foot and head, m. signs, lights: (n, 4): centre and the yaw it faces.
        lane_lines, stop_lines, crossings: polylines (k, 3), m; a crossing is its closed outline.
    """

    poles: Array = field(default_factory=lambda: np.zeros((0, 2, 3)))
    signs: Array = field(default_factory=lambda: np.zeros((0, 4)))
    lights: Array = field(default_factory=lambda: np.zeros((0, 4)))
    lane_lines: list[Array] = field(default_factory=list)
    stop_lines: list[Array] = field(default_factory=list)
    crossings: list[Array] = field(default_factory=list)


def build_roads(style: Style, rng: np.random.Generator, length_m: float) -> tuple[list[Road], list[Junction]]:
    """The main road (first) of a given length, and the streets that cross it."""

    def curve(n: int, start: Array, yaw: float, bend: float) -> Array:
        s = np.arange(n + 1)
        phase, wave = rng.uniform(0, 2 * np.pi, 2), rng.uniform(140, 260, 2)
        turn = bend * (np.sin(2 * np.pi * s / wave[0] + phase[0]) + 0.5 * np.sin(2 * np.pi * s / wave[1] + phase[1]))
        heading = yaw + turn
        step = np.stack([np.cos(heading), np.sin(heading)], -1)
        return start + np.concatenate([np.zeros((1, 2)), np.cumsum(step[:-1], 0)])

    main = Road(
        curve(int(length_m), np.zeros(2), rng.uniform(-np.pi, np.pi), style.curve),
        style.lanes,
        style.lane_width_m,
        style.bike_lane_m,
        style.parking_m,
    )
    roads, junctions = [main], []
    s = rng.uniform(55, 75)
    while s < length_m - 40:
        half = 120
        side = Road(np.zeros((1, 2)), 1, float(np.clip(style.lane_width_m, 3.2, 3.5)), 0.0, 2.3)
        yaw = float(main.heading(s)) + np.pi / 2 + rng.uniform(-0.12, 0.12)
        forth = curve(half, main.point(s), yaw, 0.0)
        line = np.concatenate([2 * main.point(s) - forth[:0:-1], forth])
        bend = rng.uniform(-25, 25) * ((np.arange(len(line)) - half) / half) ** 2 * np.sign(np.arange(len(line)) - half)
        line = line + bend[:, None] * np.array([-np.sin(yaw), np.cos(yaw)])
        side = Road(line, side.lanes, side.lane_width_m, side.bike_m, side.parking_m)
        main.crossed.append((s, side.half_width + 1.0))
        side.crossed.append((float(half), main.half_width + 1.0))
        junctions.append(Junction(len(roads), s, float(half)))
        roads.append(side)
        s += style.block_m * rng.uniform(0.9, 1.3)
    return roads, junctions


CROSSING_M = (0.3, 3.5)
STOP_LINE_M = 4.7
"""Along a road, after the junction's edge: where a crossing begins and ends, and where vehicles stop."""


class Painter:
    """Draws onto the raster; polygons are given in the map, m."""

    def __init__(self, corner: Array, shape: tuple[int, int]) -> None:
        self.corner, self.shape = corner, shape
        self.paint, self.yellow = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)

    def pixels(self, xy: Array, shift: int = 4) -> Array:
        return np.round(((xy - self.corner) / PIXEL_M - 0.5) * (1 << shift)).astype(np.int32)

    def polygon(self, xy: Array, yellow: bool = False) -> None:
        cv2.fillPoly(self.paint, [self.pixels(xy)], (255,), cv2.LINE_AA, 4)
        if yellow:
            cv2.polylines(self.yellow, [self.pixels(xy, 0)], True, (255,), 3)

    def stripe(self, road: Road, lateral: float, s0: float, s1: float, width: float, yellow: bool = False) -> None:
        s = np.linspace(s0, s1, max(2, int((s1 - s0) / 1.5)))
        sides = [road.point(s, np.full(len(s), lateral + w)) for w in (width / 2, -width / 2)]
        self.polygon(np.concatenate([sides[0], sides[1][::-1]]), yellow)


def paint_road(painter: Painter, road: Road, style: Style, marks: SemanticMap, main: bool) -> None:
    """Lane lines, stop lines, crossings and arrows of one road, between its junctions."""
    edges = [0.0, *(x for at, half in sorted(road.crossed) for x in (at - half, at + half)), road.length]
    for k in range(0, len(edges), 2):
        first, last = edges[k] + STOP_LINE_M * (k > 0), edges[k + 1] - STOP_LINE_M * (k + 2 < len(edges))
        if last - first < 4:
            continue
        laterals = [i * road.lane_width_m for i in range(1, road.lanes + (road.bike_m > 0))]
        for lateral in (0.0, *laterals, *(-x for x in laterals)):
            solid = (lateral == 0 and main) or abs(lateral) == road.lanes_m
            marks.lane_lines.append(road.point(np.linspace(first, last, 20), np.full(20, lateral)))
            if lateral == 0 and main:
                for shift in (-0.22, 0.22):
                    painter.stripe(road, shift, first, last, 0.13, style.yellow_centre)
            elif solid:
                painter.stripe(road, lateral, first, last, 0.15)
            else:
                for s in np.arange(first, last - 3, 9.0):
                    painter.stripe(road, lateral, s, s + 3, 0.14)
        for side in (-1, 1):  # parking bays
            lateral = side * (road.half_width - road.parking_m)
            for s in np.arange(first + 2, last - 8, 6.5):
                painter.stripe(road, lateral, s, s + 1.2, 0.12)
                painter.stripe(road, lateral + side * 0.35, s + 0.54, s + 0.66, 0.7)
        for end, inward, arriving in ((first, 1, k > 0), (last, -1, k + 2 < len(edges))):
            if not arriving:
                continue
            across = inward * (road.lanes_m + road.bike_m)  # vehicles arriving at this end keep right
            low, high = min(0.0, across), max(0.0, across)
            outline = road.point(np.array([end, end, end + inward * 0.4, end + inward * 0.4]),
                                 np.array([low, high, high, low]))  # fmt: skip
            painter.polygon(outline)
            marks.stop_lines.append(outline[:2])
            _crossing(painter, road, marks, end - inward * STOP_LINE_M, inward)
            for i in range(road.lanes):
                _arrow(painter, road, end + inward * 9, inward * (i + 0.5) * road.lane_width_m, -inward)


def _crossing(painter: Painter, road: Road, marks: SemanticMap, edge: float, inward: int) -> None:
    near, far = edge + inward * CROSSING_M[0], edge + inward * CROSSING_M[1]
    reach = road.half_width - 0.5
    for lateral in np.arange(-reach, reach - 0.4, 1.05):
        corners = np.array([lateral, lateral, lateral + 0.5, lateral + 0.5])
        painter.polygon(road.point(np.array([near, far, far, near]), corners))
    marks.crossings.append(road.point(np.array([near, far, far, near, near]), reach * np.array([-1, -1, 1, 1, -1.0])))


def _arrow(painter: Painter, road: Road, s: float, lateral: float, way: int) -> None:
    """An arrow ahead in the lane, tip first in direction `way` of the road."""
    shape = np.array([[0, 0.07], [-2.2, 0.07], [-2.2, -0.07], [0, -0.07], [0, -0.3], [1.3, 0], [0, 0.3]])
    painter.polygon(road.point(s + way * shape[:, 0], lateral + way * shape[:, 1]))


@dataclass(frozen=True)
class Ground:
    """Terrain, kerbs and the raster, as tensors.

    Attributes:
        waves: (4, 3): wave numbers x and y (rad/m), phases, amplitudes (m) of the terrain.
        raster: (H, W, 4) uint8, row along y, stored channel by channel. corner: (x, y) m of its lower corner.
    """

    waves: Tensor
    raster: Tensor
    corner: tuple[float, float]
    sidewalk_m: float

    def to(self, device: torch.device | str) -> Ground:
        return Ground(self.waves.to(device), self.raster.to(device), self.corner, self.sidewalk_m)

    def terrain(self, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Height (N,) without kerbs and its gradient (N, 2), at (N, 2)."""
        kx, ky, phase, amplitude = self.waves.to(xy.dtype)[..., None]  # (3, 1)
        angle = xy[:, 0] * kx + xy[:, 1] * ky + phase  # (3, N)
        slope = amplitude * angle.cos()
        return (amplitude * angle.sin()).sum(0), torch.stack([(slope * kx).sum(0), (slope * ky).sum(0)]).T

    def sample(self, xy: Tensor) -> Tensor:
        """(N, 4): distance outside the carriageway (m), paint, yellow and land surface in [0, 1], interpolated."""
        outside, *marks = self._interpolated(4, xy)
        return torch.stack([(outside - _SDF_ZERO) * _SDF_STEP_M, *(x / 255 for x in marks)]).T

    def _interpolated(self, channels: int, xy: Tensor) -> list[Tensor]:
        """Bilinear values (N,) of the raster's first channels at (N, 2)."""
        height, width = self.raster.shape[:2]
        u = ((xy[:, 0] - self.corner[0]) / PIXEL_M - 0.5).clamp(0, width - 1.001)
        v = ((xy[:, 1] - self.corner[1]) / PIXEL_M - 0.5).clamp(0, height - 1.001)
        u0, v0 = u.floor(), v.floor()
        fu, fv = u - u0, v - v0
        first, values = v0.long() * width + u0.long(), []
        corners = [first + step for step in (0, 1, width, width + 1)]
        for plane in self.raster.unbind(2)[:channels]:
            flat = plane.reshape(-1)
            a, b, c, d = (flat.index_select(0, index).float() for index in corners)
            values.append((a * (1 - fu) + b * fu) * (1 - fv) + (c * (1 - fu) + d * fu) * fv)
        return values

    def kerb(self, xy: Tensor) -> Tensor:
        """(N,) height above the terrain at (N, 2): 0 on the carriageway, KERB_M beside it."""
        outside_m = (self._interpolated(1, xy)[0] - _SDF_ZERO) * _SDF_STEP_M
        return (outside_m / 0.05).clamp(0, 1) * KERB_M

    def height(self, xy: Tensor) -> Tensor:
        return self.terrain(xy)[0] + self.kerb(xy)

    def intersect(self, origin: Tensor, direction: Tensor, reach_m: float) -> Tensor:
        """Distances (N,) at which rays (3, N) from above meet the ground, inf beyond reach.

        Newton's method on the smooth terrain, raised by a kerb and not; where the two answers lie on different sides
        of a kerb, its face is found between them by bisection.
        """
        found = torch.full_like(direction[0], torch.inf)
        down = (direction[2] < 0.05).nonzero()[:, 0]
        o, d = origin.index_select(1, down), direction.index_select(1, down)
        low = self._newton(o, d, reach_m, KERB_M)
        high = self._newton(o, d, reach_m, 0.0)
        flat = low.isfinite() & high.isfinite()
        start = low.where(flat, 0)
        raised = self.kerb((o[:2] + start * d[:2]).T) > 0.5 * KERB_M
        t = torch.where(raised | ~high.isfinite(), low, high)
        unsure = (flat & ~raised & (high - low < 40)).nonzero()[:, 0]
        a, b, o, d = low[unsure], high[unsure], o[:2].index_select(1, unsure), d[:2].index_select(1, unsure)
        edge = (self.kerb((o + (b - 0.02) * d).T) > 0).nonzero()[:, 0]
        unsure, a, b, o, d = unsure[edge], a[edge], b[edge], o[:, edge], d[:, edge]
        whole = b - a
        full = b
        for _ in range(8):
            middle = (a + b) / 2
            above = KERB_M * (full - middle) / whole.clamp_min(1e-6)  # height of the ray over the carriageway
            inside = self.kerb((o + middle * d).T) >= above
            a, b = torch.where(inside, a, middle), torch.where(inside, middle, b)
        t[unsure] = b
        found[down] = t.where(t < reach_m, torch.inf)
        return found

    def _newton(self, o: Tensor, d: Tensor, reach_m: float, raised_m: float) -> Tensor:
        base = self.terrain(o[:2].T)[0] + raised_m
        t = torch.where(d[2] < -0.01, (base - o[2]) / d[2].clamp_max(-0.01), 60.0).clamp(0, reach_m)
        miss = t
        for _ in range(4):
            height, slope = self.terrain((o[:2] + t * d[:2]).T)
            miss = o[2] + t * d[2] - height - raised_m
            rate = (d[2] - slope[:, 0] * d[0] - slope[:, 1] * d[1]).clamp_max(-2e-3)
            t = (t - miss / rate).clamp(0, reach_m)
        settled = (miss.abs() < 0.05) & (t > 0.01) & (t < reach_m)
        return t.where(settled, torch.inf)


def build_ground(
    roads: list[Road], style: Style, rng: np.random.Generator, center: Array, margin_m: float
) -> tuple[Ground, SemanticMap]:
    """The raster within `margin_m` of the points `center` (n, 2), and the paint on it as landmarks (heights added)."""
    low, high = center.min(0) - margin_m, center.max(0) + margin_m
    shape = (int((high[1] - low[1]) / PIXEL_M), int((high[0] - low[0]) / PIXEL_M))
    painter, marks = Painter(low, shape), SemanticMap()
    road_mask = np.full(shape, 255, np.uint8)
    for road in roads:
        s = np.arange(0, road.length, 1.0)
        outline = np.concatenate([road.point(s, np.full(len(s), w * road.half_width))[:: int(w)] for w in (1, -1)])
        cv2.fillPoly(road_mask, [painter.pixels(outline)], (0,), cv2.LINE_8, 4)
    for road in roads:
        paint_road(painter, road, style, marks, road is roads[0])
    corner_m = 5.0  # corners of junctions are rounded by closing the mask with a disc
    wide = cv2.distanceTransform(road_mask, cv2.DIST_L2, 5) > corner_m / PIXEL_M
    closed = (cv2.distanceTransform(1 - wide.astype(np.uint8), cv2.DIST_L2, 5) < corner_m / PIXEL_M).astype(np.uint8)
    outside = cv2.distanceTransform(closed, cv2.DIST_L2, 5) - cv2.distanceTransform(1 - closed, cv2.DIST_L2, 5)
    sdf = cv2.GaussianBlur(outside, (0, 0), 1.5) * PIXEL_M
    land = cv2.resize(rng.random((shape[0] // 150 + 2, shape[1] // 150 + 2)).astype(np.float32), shape[::-1])
    paved = np.where(land > 0.62 + 0.3 * style.greenery * (style.houses < 0.5), 255, np.where(land < 0.22, 128, 0))
    if style.houses < 0.5 and style.greenery < 0.6:
        paved = np.where(paved == 0, 255, paved)
    raster = np.stack(
        [np.clip(np.round(sdf / _SDF_STEP_M + _SDF_ZERO), 0, 255).astype(np.uint8), painter.paint,
         cv2.blur(painter.yellow, (3, 3)), paved.astype(np.uint8)])  # fmt: skip
    planes = torch.from_numpy(raster).permute(1, 2, 0)
    angle, wavelength = rng.uniform(0, 2 * np.pi, 3), rng.uniform(150, 320, 3)
    number = 2 * np.pi / wavelength
    waves = np.stack([number * np.cos(angle), number * np.sin(angle), rng.uniform(0, 2 * np.pi, 3),
                      style.hill_m * rng.uniform(0.5, 1, 3)])  # fmt: skip
    ground = Ground(torch.tensor(waves), planes, (float(low[0]), float(low[1])), style.sidewalk_m)
    for lines in (marks.lane_lines, marks.stop_lines, marks.crossings):
        lines[:] = [np.column_stack([xy, ground.terrain(torch.from_numpy(xy))[0].numpy()]) for xy in lines]
    return ground, marks
