"""Shapes of road users and of what stands in the road: a few solids each, x ahead, z = 0 the ground."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from perception.synthetic.labels import Label
from perception.synthetic.primitives import (
    SEEN_BY_LIDAR_AND_SUN,
    Texture,
    box,
    cylinder,
    ellipsoid,
    rod,
    turn,
)
from perception.types import Array

Rng = np.random.Generator

_PAINTS = [
    (0.78, 0.78, 0.76), (0.72, 0.73, 0.74), (0.42, 0.43, 0.45), (0.16, 0.165, 0.18), (0.025, 0.025, 0.03),
    (0.05, 0.05, 0.06), (0.40, 0.03, 0.03), (0.04, 0.09, 0.30), (0.25, 0.30, 0.36), (0.35, 0.28, 0.18),
    (0.04, 0.16, 0.10), (0.55, 0.25, 0.05),
]  # fmt: skip
_CLOTHES = [
    (0.03, 0.03, 0.04), (0.10, 0.13, 0.25), (0.45, 0.44, 0.42), (0.35, 0.05, 0.06), (0.08, 0.22, 0.12),
    (0.55, 0.42, 0.10), (0.20, 0.18, 0.16), (0.65, 0.64, 0.62), (0.10, 0.30, 0.40), (0.35, 0.16, 0.28),
]  # fmt: skip
_DARK, _RUBBER, _CHROME = (0.02, 0.02, 0.022), (0.018, 0.018, 0.018), (0.35, 0.35, 0.36)
_WHEEL = turn(roll=np.pi / 2)


def _pick(rng: Rng, table: list) -> tuple[float, float, float]:
    return table[int(rng.integers(len(table)))]


def _wheels(at: list[float], y: float, radius: float, width: float, **look: object) -> list[Array]:
    return [
        cylinder(
            (x, side * (y - width / 2), radius), radius, width, _WHEEL, texture=Texture.WHEEL, color=_RUBBER, **look
        )
        for x in at
        for side in (-1, 1)
    ]


def car(rng: Rng) -> Array:
    style = rng.choice(["sedan", "hatch", "suv", "van"], p=[0.35, 0.25, 0.28, 0.12])
    length, width, height, waist, cabin, back, front_lean, back_lean = {
        "sedan": (4.7, 1.84, 1.46, 0.60, 0.60, -0.035, 0.95, 0.70),
        "hatch": (4.1, 1.78, 1.50, 0.60, 0.66, -0.10, 0.85, 0.35),
        "suv": (4.75, 1.94, 1.74, 0.58, 0.68, -0.11, 0.75, 0.30),
        "van": (5.1, 2.0, 2.05, 0.50, 0.80, -0.08, 0.75, 0.10),
    }[str(style)]
    scale = rng.uniform(0.95, 1.05)
    length, height = length * scale, height * scale
    paint = _pick(rng, _PAINTS)
    look = {"label": Label.CAR, "seed": rng.random(), "color": paint}
    belt, tyre = waist * height, 0.33 if style != "suv" else 0.37
    parts = [
        box(
            (0, 0, (0.2 + belt) / 2), (length, width, belt - 0.2), lean=(0.22, 0.16, 0.14), texture=Texture.BODY, **look
        ),
        box(
            (back * length, 0, (belt + height) / 2),
            (cabin * length, width - 0.12, height - belt),
            lean=(front_lean, back_lean, 0.36),
            texture=Texture.CABIN,
            **look,
        ),
        *_wheels([0.3 * length, -0.3 * length], width / 2 + 0.01, tyre, 0.22, label=Label.CAR),
    ]
    mirror = (back + cabin / 2) * length - 0.75 * front_lean
    parts += [box((mirror, s * (width / 2 + 0.04), belt + 0.06), (0.12, 0.16, 0.13), **look) for s in (-1, 1)]
    return np.concatenate(parts)


def truck(rng: Rng) -> Array:
    paint, look = _pick(rng, _PAINTS), {"label": Label.TRUCK, "seed": rng.random()}
    if rng.random() < 0.3:  # pick-up
        return np.concatenate(
            [
                box((0, 0, 0.62), (5.4, 1.95, 0.72), lean=(0.15, 0.05, 0.1), texture=Texture.BODY, color=paint, **look),
                box(
                    (0.25, 0, 1.4), (2.3, 1.8, 0.84), lean=(0.8, 0.25, 0.3), texture=Texture.CABIN, color=paint, **look
                ),
                box((-1.8, 0, 1.0), (1.6, 1.5, 0.12), color=_DARK, **look),
                *_wheels([1.7, -1.6], 0.99, 0.4, 0.26, label=Label.TRUCK),
            ]
        )
    length, width, height = rng.uniform(6.2, 8.8), 2.45, rng.uniform(2.9, 3.6)
    cab = 1.9
    load = _pick(rng, [(0.75, 0.75, 0.73), (0.6, 0.6, 0.62), (0.10, 0.16, 0.35), (0.5, 0.30, 0.08), (0.12, 0.3, 0.18)])
    front = length / 2
    parts = [
        box((front - cab / 2, 0, 0.95), (cab, 2.3, 0.9), lean=(0.06, 0, 0), texture=Texture.BODY, color=paint, **look),
        box((front - cab / 2 - 0.05, 0, 2.0), (cab - 0.1, 2.3, 1.2), lean=(0.45, 0, 0.2), texture=Texture.CABIN,
            color=paint, **look),
        box((-cab / 2 - 0.1, 0, 0.85), (length - cab - 0.2, 0.9, 0.25), color=_DARK, **look),
        *_wheels([front - 1.1, -front + 1.4, -front + 2.5], width / 2 - 0.05, 0.48, 0.28, label=Label.TRUCK),
    ]  # fmt: skip
    if rng.random() < 0.7:
        parts.append(
            box(
                (-cab / 2 - 0.1, 0, (1.0 + height) / 2),
                (length - cab - 0.25, width, height - 1.0),
                color=load,
                texture=Texture.STRIPES if rng.random() < 0.3 else Texture.ROOF,
                **look,
            )
        )
    else:  # tipper
        parts.append(
            box((-cab / 2 - 0.1, 0, 1.65), (length - cab - 0.4, width, 1.2), lean=(-0.3, -0.4, 0), color=load, **look)
        )
    return np.concatenate(parts)


def bus(rng: Rng) -> Array:
    length, look = rng.uniform(10.5, 12.2), {"label": Label.BUS, "seed": rng.random()}
    paint = _pick(
        rng, [(0.45, 0.05, 0.05), (0.07, 0.20, 0.40), (0.70, 0.70, 0.66), (0.10, 0.30, 0.14), (0.7, 0.42, 0.04)]
    )
    return np.concatenate(
        [
            box((0, 0, 1.72), (length, 2.55, 2.85), lean=(0.2, 0.05, 0.1), texture=Texture.COACH, color=paint, **look),
            box((-0.1 * length, 0, 3.22), (0.35 * length, 1.7, 0.2), color=(0.6, 0.6, 0.6), **look),
            *_wheels([0.33 * length, -0.27 * length], 1.28, 0.5, 0.3, label=Label.BUS),
        ]
    )


def trailer(rng: Rng) -> Array:
    length, height = rng.uniform(7.5, 10.0), rng.uniform(3.1, 3.7)
    look = {"label": Label.TRAILER, "seed": rng.random()}
    load = _pick(rng, [(0.7, 0.7, 0.68), (0.15, 0.25, 0.45), (0.45, 0.12, 0.08), (0.25, 0.4, 0.25)])
    return np.concatenate(
        [
            box((0, 0, (1.15 + height) / 2), (length, 2.5, height - 1.15), texture=Texture.ROOF, color=load, **look),
            box((0, 0, 1.0), (length - 0.5, 1.0, 0.25), color=_DARK, **look),
            *_wheels(
                [-0.25 * length, -0.25 * length - 1.15, -0.25 * length + 1.15], 1.22, 0.48, 0.3, label=Label.TRAILER
            ),
            *(box((0.3 * length, s * 0.8, 0.5), (0.15, 0.15, 1.0), color=_CHROME, **look) for s in (-1, 1)),
            box(
                (-length / 2 - 0.03, 0, 0.75),
                (0.06, 2.3, 0.25),
                texture=Texture.STRIPES,
                color=(0.6, 0.05, 0.03),
                **look,
            ),
        ]
    )


def construction_vehicle(rng: Rng) -> Array:
    look = {"label": Label.CONSTRUCTION_VEHICLE, "seed": rng.random()}
    paint = _pick(rng, [(0.75, 0.42, 0.02), (0.72, 0.50, 0.03), (0.75, 0.25, 0.02)])
    cab = {"texture": Texture.CABIN, "color": paint, **look}
    if rng.random() < 0.6:  # excavator
        return np.concatenate(
            [
                *(
                    box((-0.6, s * 0.95, 0.45), (3.4, 0.5, 0.85), lean=(0.5, 0.5, 0), color=_DARK, **look)
                    for s in (-1, 1)
                ),
                box((-1.1, -0.1, 1.45), (2.6, 2.2, 1.0), lean=(0, 0.25, 0.1), color=paint, **look),
                box((0.35, 0.6, 1.95), (1.5, 1.0, 1.6), lean=(0.35, 0.1, 0.15), **cab),
                rod((0.4, -0.25, 1.5), (2.3, -0.25, 3.5), 0.2, color=paint, **look),
                rod((2.2, -0.25, 3.5), (3.4, -0.25, 1.5), 0.15, color=paint, **look),
                rod((0.9, -0.25, 1.5), (1.8, -0.25, 2.75), 0.07, color=_CHROME, **look),
                box((3.2, -0.25, 0.95), (0.7, 0.9, 0.8), lean=(0.0, 0.3, 0), color=(0.12, 0.11, 0.10), **look),
            ]
        )
    return np.concatenate(  # wheel loader
        [
            box((-1.5, 0, 1.35), (2.6, 1.9, 1.0), lean=(0, 0.2, 0.2), color=paint, **look),
            box((-0.3, 0, 2.2), (1.5, 1.5, 1.7), lean=(0.3, 0.2, 0.2), **cab),
            box((0.9, 0, 1.05), (1.8, 1.2, 0.7), color=paint, **look),
            *(rod((0.5, s * 0.6, 1.6), (2.5, s * 0.6, 0.7), 0.13, color=paint, **look) for s in (-1, 1)),
            box((3.0, 0, 0.55), (1.0, 2.6, 0.9), lean=(0.7, 0, 0), color=(0.15, 0.14, 0.13), **look),
            *_wheels([1.2, -1.7], 1.25, 0.72, 0.5, label=Label.CONSTRUCTION_VEHICLE),
        ]
    )


def _rider(rng: Rng, hip: tuple[float, float], hands: tuple[float, float], feet: float, label: Label) -> list[Array]:
    """A person on a two-wheeler: hip and hands are (x, z)."""
    look, cloth, legs = {"label": label}, _pick(rng, _CLOTHES), _pick(rng, _CLOTHES)
    (hx, hz), (gx, gz) = hip, hands
    shoulder = (hx + 0.25, hz + 0.5)
    parts = [
        rod((hx, 0, hz), (shoulder[0], 0, shoulder[1]), 0.16, color=cloth, **look),
        ellipsoid((shoulder[0], 0, shoulder[1]), (0.3, 0.44, 0.26), color=cloth, **look),
        ellipsoid((shoulder[0] + 0.1, 0, shoulder[1] + 0.27), (0.27, 0.23, 0.28), color=_pick(rng, _PAINTS), **look),
    ]
    for s in (-1, 1):
        knee = (hx + 0.38, s * 0.14, hz - 0.2)
        parts += [
            rod((hx, s * 0.1, hz), knee, 0.075, color=legs, **look),
            rod(knee, (hx + 0.2, s * 0.14, feet + 0.1 * (1 + s)), 0.06, color=legs, **look),
            rod((shoulder[0], s * 0.2, shoulder[1]), (gx, s * 0.22, gz), 0.05, color=cloth, **look),
        ]
    return parts


def bicycle(rng: Rng, ridden: bool) -> Array:
    paint, look = _pick(rng, _PAINTS), {"label": Label.BICYCLE}
    tubes = [((-0.5, 0, 0.34), (-0.15, 0, 0.3)), ((-0.15, 0, 0.3), (-0.3, 0, 0.85)), ((-0.15, 0, 0.3), (0.38, 0, 0.8)),
             ((-0.28, 0, 0.75), (0.38, 0, 0.82)), ((0.38, 0, 0.95), (0.53, 0, 0.34)),
             ((-0.5, 0, 0.34), (-0.28, 0, 0.75)), ((0.36, -0.27, 1.0), (0.36, 0.27, 1.0))]  # fmt: skip
    parts = [rod(a, b, 0.025, color=paint, **look) for a, b in tubes]
    parts += [cylinder((x, 0, 0.34), 0.34, 0.05, _WHEEL, texture=Texture.WHEEL, color=_RUBBER, seed=2.0, **look)
              for x in (-0.5, 0.53)]  # fmt: skip
    parts.append(box((-0.3, 0, 0.9), (0.26, 0.14, 0.07), color=_DARK, **look))
    return np.concatenate(parts + (_rider(rng, (-0.27, 0.92), (0.34, 1.02), 0.25, Label.BICYCLIST) if ridden else []))


def motorcycle(rng: Rng, ridden: bool) -> Array:
    paint, look = _pick(rng, _PAINTS), {"label": Label.MOTORCYCLE, "seed": rng.random()}
    parts = [
        cylinder((x, 0, 0.32), 0.32, 0.16, _WHEEL, texture=Texture.WHEEL, color=_RUBBER, **look) for x in (-0.68, 0.72)
    ] + [
        box((0.0, 0, 0.48), (0.75, 0.3, 0.42), lean=(0.1, 0.1, 0.05), color=(0.06, 0.06, 0.065), **look),
        ellipsoid((0.18, 0, 0.85), (0.6, 0.32, 0.32), color=paint, **look),
        box((-0.42, 0, 0.82), (0.75, 0.26, 0.12), lean=(0, 0.1, 0.05), color=_DARK, **look),
        box((-0.7, 0, 0.75), (0.4, 0.2, 0.18), lean=(0, 0.2, 0), color=paint, **look),
        rod((0.42, 0, 1.0), (0.72, 0, 0.32), 0.06, color=_CHROME, **look),
        rod((0.38, -0.36, 1.05), (0.38, 0.36, 1.05), 0.03, color=_DARK, **look),
        ellipsoid((0.52, 0, 0.92), (0.22, 0.26, 0.26), color=(0.6, 0.6, 0.6), **look),
        rod((-0.85, -0.17, 0.35), (-0.1, -0.17, 0.3), 0.05, color=_CHROME, **look),
    ]
    return np.concatenate(parts + (_rider(rng, (-0.35, 0.95), (0.36, 1.08), 0.3, Label.MOTORCYCLIST) if ridden else []))


def pedestrian(rng: Rng, walking: bool) -> Array:
    height = rng.uniform(1.55, 1.88) if rng.random() < 0.88 else rng.uniform(1.05, 1.4)
    k, look = height / 1.75, {"label": Label.PEDESTRIAN}
    cloth, legs, skin = (
        _pick(rng, _CLOTHES),
        _pick(rng, _CLOTHES),
        _pick(rng, [(0.55, 0.35, 0.25), (0.4, 0.24, 0.16), (0.16, 0.09, 0.06)]),
    )
    stride = rng.uniform(0.1, 0.32) * (1 if rng.random() < 0.5 else -1) if walking else 0.04
    bulk = rng.uniform(0.9, 1.15)
    parts = [
        box((0, 0, 1.17 * k), (0.24 * bulk, 0.42 * bulk, 0.5 * k), lean=(-0.04, 0, -0.08), color=cloth, **look),
        ellipsoid((0, 0, 1.40 * k), (0.22, 0.44 * bulk, 0.2 * k), color=cloth, **look),
        box((0, 0, 0.9 * k), (0.22, 0.34 * bulk, 0.2 * k), color=legs, **look),
        rod((0, 0, 1.42 * k), (0, 0, 1.55 * k), 0.055, color=skin, **look),
        ellipsoid((0.01, 0, 1.62 * k), (0.2, 0.16, 0.25), color=skin, **look),
        ellipsoid(
            (-0.02, 0, 1.66 * k),
            (0.21, 0.18, 0.2),
            color=_pick(rng, [(0.02, 0.015, 0.01), (0.12, 0.06, 0.03), (0.3, 0.2, 0.08)]),
            **look,
        ),
    ]
    for s in (-1, 1):
        knee = (s * stride * 0.6 + 0.04, s * 0.1, 0.48 * k)
        foot = (s * stride - 0.05, s * 0.1, 0.07)
        parts += [
            rod((0, s * 0.09, 0.9 * k), knee, 0.085 * bulk, color=legs, **look),
            rod(knee, foot, 0.062 * bulk, color=legs, **look),
            box((foot[0] + 0.06, foot[1], 0.045), (0.27, 0.1, 0.09), color=_DARK, **look),
            rod(
                (0, s * 0.22 * bulk, 1.38 * k),
                (-s * stride * 0.35, s * 0.26 * bulk, 1.1 * k),
                0.05,
                color=cloth,
                **look,
            ),
            rod(
                (-s * stride * 0.35, s * 0.26 * bulk, 1.1 * k),
                (-s * stride * 0.6 + 0.08, s * 0.25 * bulk, 0.88 * k),
                0.04,
                color=cloth,
                **look,
            ),
        ]
    if rng.random() < 0.25:
        parts.append(box((-0.2, 0, 1.22 * k), (0.18, 0.3, 0.42), color=_pick(rng, _CLOTHES), **look))
    return np.concatenate(parts)


def traffic_cone(rng: Rng) -> Array:
    k, look = rng.uniform(0.7, 1.0), {"label": Label.TRAFFIC_CONE}
    return np.concatenate(
        [
            box((0, 0, 0.025), (0.4 * k, 0.4 * k, 0.05), color=(0.03, 0.03, 0.03), **look),
            cylinder(
                (0, 0, 0.4 * k),
                0.15 * k,
                0.72 * k,
                top=0.2,
                texture=Texture.STRIPES,
                color=(0.75, 0.14, 0.01),
                seed=1.0,
                **look,
            ),
        ]
    )


def barrier(rng: Rng) -> Array:
    """Length across, width along: nuScenes' barriers face the traffic."""
    look, kind = {"label": Label.BARRIER, "seed": 1.0}, rng.random()
    if kind < 0.5:
        return np.concatenate(
            [
                box((0, 0, 0.9), (0.06, 2.0, 0.28), texture=Texture.STRIPES, color=(0.70, 0.05, 0.03), **look),
                box((0, 0, 0.5), (0.06, 2.0, 0.2), texture=Texture.STRIPES, color=(0.70, 0.05, 0.03), **look),
                *(box((0, s * 0.8, 0.5), (0.08, 0.08, 1.0), color=(0.5, 0.5, 0.5), **look) for s in (-1, 1)),
                *(box((0, s * 0.8, 0.05), (0.5, 0.2, 0.1), color=_DARK, **look) for s in (-1, 1)),
            ]
        )
    paint = _pick(rng, [(0.7, 0.18, 0.02), (0.72, 0.72, 0.7)])
    return np.concatenate(
        [
            box((0, 0, 0.2), (0.5, 2.0, 0.4), lean=(0.12, 0.12, 0), color=paint, **look),
            box((0, 0, 0.65), (0.26, 2.0, 0.5), lean=(0.06, 0.06, 0), color=paint, **look),
        ]
    )


def ego_vehicle() -> Array:
    """The roof and bonnet that the ego vehicle's own LiDAR meets, and that cast its shadow."""
    look = {"label": Label.EGO, "views": SEEN_BY_LIDAR_AND_SUN, "color": (0.7, 0.7, 0.7), "texture": Texture.BODY}
    return np.concatenate(
        [
            box((1.35, 0, 0.55), (4.1, 1.75, 0.75), lean=(0.2, 0.15, 0.14), **look),
            box((0.75, 0, 1.2), (2.5, 1.6, 0.55), lean=(0.8, 0.5, 0.3), **look),
            box((0.85, 0, 1.5), (1.35, 1.3, 0.06), **look),
        ]
    )


SHAPES: dict[Label, Callable[[Rng], Array]] = {
    Label.CAR: car,
    Label.TRUCK: truck,
    Label.BUS: bus,
    Label.TRAILER: trailer,
    Label.CONSTRUCTION_VEHICLE: construction_vehicle,
    Label.BARRIER: barrier,
    Label.TRAFFIC_CONE: traffic_cone,
}


def fit_box(parts: Array) -> tuple[Array, Array]:
    """Parts shifted so that their upright bounding box stands over the origin, and its (3,) size, m."""
    sign = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    half, form = parts["half"].astype(float), parts["form"].astype(float)
    grown = half.copy()  # a negative lean widens the top
    leaning = parts["kind"] == 0
    grown[leaning, 0] += np.maximum(-form[leaning, :2].min(1), 0)
    grown[leaning, 1] += np.maximum(-form[leaning, 2], 0) / 2
    corner = np.einsum("pij,pcj->pci", parts["rotation"], sign[None] * grown[:, None]) + parts["center"][:, None]
    low, high = corner.min((0, 1)), corner.max((0, 1))
    shifted = parts.copy()
    shifted["center"][:, :2] -= (low + high)[:2] / 2
    return shifted, np.array([high[0] - low[0] + 0.08, high[1] - low[1] + 0.08, high[2] + 0.04])
