"""What stands along the streets: buildings, trees, lamps, signs, signals, hedges; and the landmarks among it."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from perception.synthetic.labels import Label
from perception.synthetic.primitives import PART, Texture, box, cylinder, ellipsoid, rod, turn
from perception.synthetic.roads import Ground, Road, SemanticMap, Style
from perception.types import Array

Rng = np.random.Generator
_WALLS = [
    (0.42, 0.16, 0.10),
    (0.50, 0.26, 0.17),
    (0.62, 0.56, 0.46),
    (0.68, 0.66, 0.62),
    (0.45, 0.43, 0.40),
    (0.55, 0.45, 0.30),
    (0.30, 0.32, 0.35),
    (0.60, 0.40, 0.32),
    (0.72, 0.68, 0.55),
    (0.33, 0.20, 0.15),
]
_ROOFS = [(0.20, 0.08, 0.05), (0.12, 0.12, 0.13), (0.25, 0.14, 0.09), (0.16, 0.15, 0.14)]
_LEAVES = [
    (0.065, 0.105, 0.03),
    (0.045, 0.085, 0.025),
    (0.095, 0.125, 0.035),
    (0.045, 0.075, 0.035),
    (0.125, 0.125, 0.035),
]


class Furniture:
    """All that stands: buildings, trees, lamps, signs, signals, hedges, shelters."""

    def __init__(
        self, roads: list[Road], style: Style, ground: Ground, marks: SemanticMap, rng: Rng, periodic: bool
    ) -> None:
        self.roads, self.style, self.ground, self.marks, self.rng = roads, style, ground, marks, rng
        self._parts: list[Array] = []
        self._poles: list[Array] = []
        self._signs: list[Array] = []
        self._lights: list[Array] = []
        self._taken: list[tuple[Array, float]] = []
        height, width = ground.raster.shape[:2]
        self._built = np.zeros((height // 5 + 1, width // 5 + 1), np.uint8)  # 0.5 m a pixel
        for road in roads:
            for side in (-1, 1):
                self._signals(road, side)
                self._kerbside(road, side, periodic)
                self._frontage(road, side)
        self._wild()
        marks.poles, marks.signs, marks.lights = (
            np.array(x).reshape(-1, *shape)
            for x, shape in ((self._poles, (2, 3)), (self._signs, (4,)), (self._lights, (4,)))
        )

    def _add(self, part: Array) -> None:
        self._parts.append(part)

    def parts(self) -> Array:
        return np.concatenate([np.zeros(0, PART), *self._parts])

    def _z(self, xy: Array) -> float:
        return float(self.ground.height(torch.from_numpy(np.asarray(xy, float)[None]))[0])

    def _outside(self, xy: Array) -> float:
        return float(self.ground.sample(torch.from_numpy(np.asarray(xy, float)[None]))[0, 0])

    def _in_view(self, xy: Array) -> bool:
        height, width = self.ground.raster.shape[:2]
        u = (np.asarray(xy) - self.ground.corner) / 0.1
        return bool((u > 60).all() and u[0] < width - 60 and u[1] < height - 60)

    def _free(self, xy: Array, radius: float) -> bool:
        if any(np.hypot(*(xy - at)) < radius + r for at, r in self._taken):
            return False
        self._taken.append((np.asarray(xy), radius))
        return True

    def _pole(self, xy: Array, height: float, radius: float, color: tuple[float, float, float]) -> float:
        z = self._z(xy)
        foot, head = np.array([*xy, z]), np.array([*xy, z + height])
        self._poles.append(np.stack([foot, head]))
        self._add(rod(foot - [0, 0, 0.2], head, radius, label=Label.POLE, color=color))
        return z

    def _signals(self, road: Road, side: int) -> None:
        """Traffic lights for the traffic on this side, after the stop line: a mast with an arm over the lanes."""
        way = -side  # traffic that keeps right on side -1 drives along the road
        for at, half in road.crossed:
            main = road is self.roads[0]
            nearest = (
                int(np.argmin([abs(s - at) for s, _ in self.roads[0].crossed])) if main else self.roads.index(road) - 1
            )
            signal_seed = 2 * nearest + main
            s = at - way * (half + 0.3)
            xy = road.point(s, side * (road.half_width + 0.9))
            if not self._in_view(xy) or not self._free(xy, 0.6):
                continue
            z = self._pole(xy, 6.0, 0.09, (0.10, 0.11, 0.11))
            facing = float(road.heading(s)) + (np.pi if way == 1 else 0.0)
            arm = road.point(s, side * (road.half_width - road.parking_m - 1.5))
            self._add(rod([*xy, z + 5.8], [*arm, z + 5.9], 0.06, label=Label.POLE, color=(0.10, 0.11, 0.11)))
            out = 0.14 * np.array([np.cos(facing), np.sin(facing)])
            for place, height in ((arm, 5.55), (xy + out, 3.0)):
                self._add(
                    box(
                        [*place, z + height],
                        (0.24, 0.34, 0.95),
                        facing,
                        label=Label.SIGN,
                        texture=Texture.SIGNAL,
                        color=(0.02, 0.02, 0.02),
                        seed=float(signal_seed),
                    )
                )
                self._lights.append(np.array([*place, z + height, facing]))

    def _kerbside(self, road: Road, side: int, periodic: bool) -> None:
        """Between kerb and walkway: lamps, trees, signs, bins, shelters."""
        rng, style, main = self.rng, self.style, road is self.roads[0]
        spacing, s, k = rng.uniform(7, 10), rng.uniform(3, 9), 0
        if periodic:
            spacing, s = 16.0, 4.0
        lamp_every = round(30 / spacing)
        while s < road.length - 4:
            offset = 0.8 if periodic else rng.uniform(0.6, 1.0)
            xy = road.point(s, side * (road.half_width + offset))
            clear = road.clear(s, 3.5 if not periodic else 0.0) and self._in_view(xy) and self._outside(xy) > 0.4
            if clear and self._free(xy, 0.9):
                inward = float(road.heading(s)) - side * np.pi / 2
                choice = rng.random()
                if periodic or k % lamp_every == 0:
                    self._lamp(xy, inward, 7.0 if periodic else (8.5 if main else 6.0))
                elif choice < 0.55 * style.greenery + 0.15:
                    self._tree(xy, rng.uniform(6.0, 10.5), street=True)
                elif choice < 0.75:
                    self._sign(xy, inward + side * np.pi / 2 + (np.pi if side == -1 else 0.0))
                elif choice < 0.83 and main and s % 3 < 1.5:
                    self._shelter(road.point(s, side * (road.half_width + 1.6)), inward)
                else:
                    self._small(xy, inward)
            s += spacing if periodic else spacing * rng.uniform(0.85, 1.2)
            k += 1

    def _lamp(self, xy: Array, inward: float, height: float) -> None:
        grey = (0.16, 0.17, 0.17)
        z = self._pole(xy, height, 0.075, grey)
        reach = 1.7 * np.array([np.cos(inward), np.sin(inward)])
        tip = [*(xy + reach), z + height + 0.15]
        self._parts += [
            rod([*xy, z + height - 0.1], tip, 0.045, label=Label.POLE, color=grey),
            box(tip, (0.75, 0.28, 0.12), inward, label=Label.POLE, texture=Texture.LAMP, color=(0.3, 0.3, 0.3)),
        ]

    def _sign(self, xy: Array, facing: float) -> None:
        rng = self.rng
        height = rng.uniform(2.3, 2.9)
        z = self._pole(xy, height + 0.35, 0.035, (0.4, 0.4, 0.4))
        out = 0.06 * np.array([np.cos(facing), np.sin(facing)])
        at, seed, look = [*(xy + out), z + height], int(rng.integers(4)), {"label": Label.SIGN, "texture": Texture.SIGN}
        if seed < 2:
            self._add(cylinder(at, 0.34, 0.03, turn(facing, np.pi / 2), seed=seed, color=(0.8, 0.8, 0.8), **look))
        else:
            self._add(
                box(
                    at,
                    (0.03, 0.62, 0.62),
                    facing,
                    tilt=(0, np.pi / 4 * (seed == 3)),
                    seed=seed,
                    color=(0.03, 0.12, 0.45) if seed == 2 else (0.8, 0.5, 0.02),
                    **look,
                )
            )
        self._signs.append(np.array([*at, facing]))

    def _tree(self, xy: Array, height: float, street: bool = False) -> None:
        rng, z = self.rng, self._z(xy)
        clear = height * (rng.uniform(0.32, 0.4) if street else rng.uniform(0.15, 0.35))
        lean = rng.normal(0, 0.12, 2)
        top = np.array([*(xy + lean), z + height * 0.72])
        bark = (0.10, 0.075, 0.055)
        self._add(rod([*xy, z - 0.2], top, 0.05 + 0.014 * height, label=Label.TRUNK, texture=Texture.BARK, color=bark))
        leaf = np.array(_LEAVES[int(rng.integers(len(_LEAVES)))]) * rng.uniform(0.8, 1.2)
        wide = height * rng.uniform(0.30, 0.42) if street else height * rng.uniform(0.36, 0.52)
        middle = z + (clear + height) / 2
        count = int(rng.integers(11, 16))
        for k in range(count):
            around = 2 * np.pi * k / count * 2.4 + rng.uniform(-0.4, 0.4)
            level = (k + 0.5) / count * 2 - 1
            reach = wide * 0.74 * np.sqrt(max(0.0, 1 - level**2)) * rng.uniform(0.7, 1.1)
            center = [
                xy[0] + lean[0] + reach * np.cos(around),
                xy[1] + lean[1] + reach * np.sin(around),
                middle + level * (height - clear) * 0.36,
            ]
            size = wide * rng.uniform(0.6, 1.05) * np.array([1, 1, 0.82])
            shade = leaf * rng.uniform(0.85, 1.15)
            self._add(
                ellipsoid(
                    center,
                    size,
                    rng.uniform(0, 3),
                    label=Label.FOLIAGE,
                    texture=Texture.FOLIAGE,
                    color=shade,
                    seed=rng.random(),
                )
            )
            if k % 4 == 0:
                self._add(rod([*xy, z + clear], center, 0.05, label=Label.TRUNK, texture=Texture.BARK, color=bark))

    def _small(self, xy: Array, inward: float) -> None:
        rng, z, look = self.rng, self._z(xy), {"label": Label.FURNITURE}
        kind = rng.integers(4)
        if kind == 0:  # litter bin
            self._add(cylinder([*xy, z + 0.45], 0.24, 0.9, color=(0.05, 0.14, 0.07), **look))
        elif kind == 1:  # bench
            self._add(box([*xy, z + 0.43], (0.42, 1.6, 0.07), inward, color=(0.25, 0.14, 0.07), **look))
            back = xy - 0.22 * np.array([np.cos(inward), np.sin(inward)])
            self._add(box([*back, z + 0.7], (0.05, 1.6, 0.4), inward, color=(0.25, 0.14, 0.07), **look))
            self._add(box([*xy, z + 0.2], (0.3, 1.3, 0.4), inward, color=(0.05, 0.05, 0.05), **look))
        elif kind == 2:  # cabinet
            self._add(box([*xy, z + 0.6], (0.4, 0.9, 1.2), inward, color=(0.30, 0.33, 0.32), **look))
        else:  # bollards
            for k in range(-1, 2):
                at = xy + 1.2 * k * np.array([-np.sin(inward), np.cos(inward)])
                self._add(cylinder([*at, z + 0.45], 0.07, 0.9, label=Label.POLE, color=(0.08, 0.08, 0.08)))

    def _shelter(self, xy: Array, inward: float) -> None:
        z, look = self._z(xy), {"label": Label.FURNITURE}
        back = xy - 0.6 * np.array([np.cos(inward), np.sin(inward)])
        self._parts += [
            box([*xy, z + 2.45], (1.5, 3.6, 0.1), inward, color=(0.12, 0.13, 0.14), **look),
            box([*back, z + 1.25], (0.05, 3.4, 2.1), inward, texture=Texture.GLASS, color=(0.3, 0.36, 0.38), **look),
            box(
                [*(back + 0.3 * np.array([np.cos(inward), np.sin(inward)])), z + 0.45],
                (0.35, 2.4, 0.06),
                inward,
                color=(0.3, 0.17, 0.09),
                **look,
            ),
        ]
        along = np.array([-np.sin(inward), np.cos(inward)])
        for k in (-1.7, 1.7):
            at = xy + k * along + 0.55 * np.array([np.cos(inward), np.sin(inward)])
            self._add(rod([*at, z - 0.1], [*at, z + 2.45], 0.04, color=(0.12, 0.13, 0.14), **look))
        self._taken.append((np.asarray(xy), 2.2))

    def _frontage(self, road: Road, side: int) -> None:
        """Buildings along one side of a road, with hedges, fences or trees in the gaps."""
        rng, style = self.rng, self.style
        s = rng.uniform(2, 8)
        while s < road.length - 6:
            house = rng.random() < style.houses
            width = rng.uniform(8, 12) if house else rng.uniform(11, 26)
            depth = rng.uniform(8, 10) if house else rng.uniform(10, 14)
            yaw = float(road.heading(s + width / 2))
            edge = road.half_width + style.sidewalk_m + style.setback_m + rng.uniform(0, 1.0 + 1.5 * house)
            middle = road.point(s + width / 2, side * (edge + depth / 2))
            if self._claim(middle, width, depth, yaw):
                (self._house if house else self._block)(middle, width, depth, yaw + (np.pi if side == 1 else 0))
                gap = rng.uniform(2.0, 6.0) if house else (0.05 if rng.random() < 0.55 else rng.uniform(2.5, 8))
                if gap > 1:
                    self._gap(road, side, s + width, gap, edge)
                s += width + gap
            else:
                s += 3.0

    def _claim(self, middle: Array, width: float, depth: float, yaw: float) -> bool:
        if not self._in_view(middle):
            return False
        u, v = np.meshgrid(np.linspace(-width / 2, width / 2, 7), np.linspace(-depth / 2, depth / 2, 5))
        c, s = np.cos(yaw), np.sin(yaw)
        xy = np.stack([c * u - s * v, s * u + c * v], -1).reshape(-1, 2) + middle
        room = self.ground.sample(torch.from_numpy(xy))[:, 0].min() > self.style.sidewalk_m + 0.2
        corners = np.array([[-width, -depth], [width, -depth], [width, depth], [-width, depth]]) / 2 - 0.05 * np.sign(
            [[-1, -1], [1, -1], [1, 1], [-1, 1]]
        )
        outline = corners @ np.array([[c, s], [-s, c]]) + middle
        pixels = np.round((outline - self.ground.corner) / 0.5).astype(np.int32)
        mask = np.zeros_like(self._built)
        cv2.fillConvexPoly(mask, pixels, (1,))
        inner: Array = cv2.erode(mask, np.ones((3, 3), np.uint8))
        if not room or (inner & self._built).any():
            return False
        self._built |= mask
        return True

    def _block(self, xy: Array, width: float, depth: float, yaw: float) -> None:
        """A block of flats or offices; its front looks along +y of its frame."""
        rng = self.rng
        storey, floors = rng.uniform(2.9, 3.4), int(rng.integers(*self.style.storeys))
        ground_floor = rng.uniform(3.4, 4.2)
        height, z = ground_floor + storey * floors, self._z(xy) - 0.6
        wall, trim = np.array(_WALLS[int(rng.integers(len(_WALLS)))]) * rng.uniform(0.85, 1.1), (0.5, 0.49, 0.46)
        look = {"label": Label.BUILDING, "seed": rng.random()}
        ahead, along = np.array([-np.sin(yaw), np.cos(yaw)]), np.array([np.cos(yaw), np.sin(yaw)])
        shop = rng.random() < 0.6
        self._parts += [
            box(
                [*xy, z + (ground_floor + 0.6) / 2],
                (width, depth, ground_floor + 0.6),
                yaw,
                color=wall * 0.9,
                texture=Texture.SHOP if shop else Texture.FACADE,
                **look,
            ),
            box(
                [*xy, z + 0.6 + ground_floor + (height - ground_floor) / 2],
                (width, depth, height - ground_floor),
                yaw,
                color=wall,
                texture=Texture.FACADE,
                **look,
            ),
            box([*xy, z + 0.6 + height + 0.2], (width + 0.5, depth + 0.5, 0.4), yaw, color=trim, **look),
            box([*xy, z + 0.6 + ground_floor], (width + 0.3, depth + 0.3, 0.25), yaw, color=trim, **look),
        ]
        if rng.random() < 0.4:
            self._add(
                box(
                    [*xy, z + 0.6 + height + 1.2],
                    (width - 0.4, depth - 0.4, 2.0),
                    yaw,
                    lean=(2.2, 2.2, 4.4),
                    texture=Texture.ROOF,
                    color=_ROOFS[int(rng.integers(4))],
                    **look,
                )
            )
        else:
            at = xy + along * rng.uniform(-0.3, 0.3) * width
            self._add(box([*at, z + height + 1.6], (3.0, 3.0, 2.2), yaw, color=trim, **look))
        if rng.random() < 0.5:  # balconies
            columns = rng.choice([-0.33, 0.0, 0.33], size=int(rng.integers(1, 4)), replace=False)
            for floor in range(floors):
                for c in columns:
                    at = xy + ahead * (depth / 2 + 0.5) + along * c * width
                    base = z + 0.6 + ground_floor + floor * storey
                    self._add(box([*at, base + 0.1], (2.6, 1.1, 0.16), yaw, color=trim, **look))
                    self._add(
                        box(
                            [*(at + 0.5 * ahead), base + 0.6],
                            (2.6, 0.06, 0.95),
                            yaw,
                            texture=Texture.GLASS,
                            color=wall * 0.5,
                            **look,
                        )
                    )
        if shop and rng.random() < 0.6:
            at = xy + ahead * (depth / 2 + 0.6) + along * rng.uniform(-0.2, 0.2) * width
            self._add(
                box(
                    [*at, z + 3.5],
                    (width * 0.4, 1.2, 0.1),
                    yaw,
                    tilt=(0, -0.25),
                    texture=Texture.STRIPES,
                    color=rng.uniform(0.05, 0.5, 3),
                    **look,
                )
            )

    def _house(self, xy: Array, width: float, depth: float, yaw: float) -> None:
        rng = self.rng
        height, z = rng.uniform(2.7, 3.1) * int(rng.integers(1, 3)) + 0.8, self._z(xy) - 0.6
        wall, look = np.array(_WALLS[int(rng.integers(len(_WALLS)))]), {"label": Label.BUILDING, "seed": rng.random()}
        roof, rise = _ROOFS[int(rng.integers(4))], rng.uniform(2.2, 3.2)
        self._parts += [
            box([*xy, z + height / 2], (width, depth, height), yaw, color=wall, texture=Texture.FACADE, **look),
            box(
                [*xy, z + height + rise / 2],
                (width + 0.8, depth + 0.8, rise),
                yaw,
                lean=(0, 0, 2 * depth / 2 * 1.06),
                texture=Texture.ROOF,
                color=roof,
                **look,
            ),
            box(
                [*(xy + 0.3 * width * np.array([np.cos(yaw), np.sin(yaw)])), z + height + rise * 0.7],
                (0.7, 0.7, rise + 0.6),
                yaw,
                color=(0.25, 0.12, 0.09),
                **look,
            ),
        ]
        door = xy + np.array([-np.sin(yaw), np.cos(yaw)]) * (depth / 2 + 0.03)
        self._add(box([*door, z + 1.65], (1.0, 0.08, 2.1), yaw, color=rng.uniform(0.02, 0.3, 3), **look))

    def _gap(self, road: Road, side: int, s: float, gap: float, edge: float) -> None:
        rng = self.rng
        middle, yaw = road.point(s + gap / 2, side * (edge + 0.4)), float(road.heading(s + gap / 2))
        if not road.clear(s, gap + 2) or self._outside(middle) < self.style.sidewalk_m:
            return
        z, kind = self._z(middle), rng.random()
        if kind < 0.45:
            self._add(
                box(
                    [*middle, z + 0.6],
                    (gap, 0.7, 1.3),
                    yaw,
                    label=Label.FOLIAGE,
                    texture=Texture.FOLIAGE,
                    color=_LEAVES[int(rng.integers(5))],
                    seed=rng.random(),
                )
            )
        elif kind < 0.8:
            self._add(
                box(
                    [*middle, z + 0.7],
                    (gap, 0.08, 1.5),
                    yaw,
                    label=Label.FENCE,
                    texture=Texture.BARK,
                    color=(0.22, 0.15, 0.09),
                    seed=rng.random(),
                )
            )
        if rng.random() < 0.6:
            self._tree(road.point(s + gap / 2, side * (edge + 4)), rng.uniform(5, 9))

    def _wild(self) -> None:
        """Trees and bushes on the open land."""
        height, width = self.ground.raster.shape[:2]
        count = int(self.style.greenery * height * width * 1e-2 / 260)
        for _ in range(count):
            xy = self.rng.uniform(0, 1, 2) * [width * 0.1 - 14, height * 0.1 - 14] + self.ground.corner + 7.0
            cell = ((xy - self.ground.corner) / 0.5).astype(int)
            reach = self._built[max(cell[1] - 5, 0) : cell[1] + 6, max(cell[0] - 5, 0) : cell[0] + 6]
            if self._outside(xy) < self.style.sidewalk_m + 1.5 or reach.any() or not self._free(xy, 2.5):
                continue
            if self.rng.random() < 0.65:
                self._tree(xy, self.rng.uniform(5, 11))
            else:
                z, size = self._z(xy), self.rng.uniform(0.8, 2.0)
                self._add(
                    ellipsoid(
                        [*xy, z + size * 0.3],
                        (size, size * 1.2, size),
                        label=Label.FOLIAGE,
                        texture=Texture.FOLIAGE,
                        color=_LEAVES[int(self.rng.integers(5))],
                    )
                )
