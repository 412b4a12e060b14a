"""The two solids that everything in the city is made of, and where a ray enters them.

* **hexahedron**: a box whose sides may lean inwards: cabins, gable roofs, walls.
* **quadric**: an ellipsoid, or an elliptic cylinder or truncated cone about z: crowns, wheels, poles, limbs, cones.

The scene holds parts as a numpy structured array (`PART`), each in the frame of its agent (or of the map, agent 0);
`Solids` holds them as tensors, posed at one instant per view.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perception.types import Array

HEXAHEDRON, QUADRIC = 0, 1
SEEN_BY_ALL, SEEN_BY_LIDAR_AND_SUN = 7, 6
_TINY = 1e-20
CAMERA, LIDAR, SUN = 1, 2, 4
"""Bits of `views`: kinds of rays that meet a part. The ego vehicle's own roof is hidden from its cameras."""


class Texture(IntEnum):
    """How a surface is painted; see perception.synthetic.shading."""

    PLAIN = 0
    FACADE = 1
    FOLIAGE = 2
    BODY = 3
    CABIN = 4
    WHEEL = 5
    SIGN = 6
    SIGNAL = 7
    ROOF = 8
    STRIPES = 9
    COACH = 10
    GLASS = 11
    BARK = 12
    SHOP = 13
    LAMP = 14


PART = np.dtype(
    [
        ("kind", "u1"),
        ("center", "f4", 3),
        ("half", "f4", 3),
        ("rotation", "f4", (3, 3)),
        ("form", "f4", 3),
        ("label", "u1"),
        ("texture", "u1"),
        ("color", "f4", 3),
        ("seed", "f4"),
        ("agent", "i4"),
        ("views", "u1"),
    ]
)
"""One solid. `half` is half its extent along its own axes (m). `form` of a hexahedron: metres by which its front, back
and both sides together lean in from bottom to top; of a quadric: (e, a, b) of x^2 + y^2 + e z^2 = (a + b z)^2 in units
of `half`. `agent` 0 stands for the map, k for agent k - 1. Colours are linear reflectances."""


def turn(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> Array:
    """(3, 3) rotation: roll about x, then pitch about y, then yaw about z; radians."""
    (cz, cy, cx), (sz, sy, sx) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    return z @ y @ x


def _part(kind: int, center: Any, half: Any, rotation: Array, form: Any, **look: Any) -> Array:
    part = np.zeros(1, PART)
    part["kind"], part["center"], part["half"], part["rotation"], part["form"] = kind, center, half, rotation, form
    part["views"] = SEEN_BY_ALL
    for name, value in look.items():
        part[name] = value
    return part


def box(center: Any, size: Any, yaw: Any = 0.0, lean: Any = (0, 0, 0), tilt: Any = (0, 0), **look: Any) -> Array:
    """A hexahedron of full `size` about `center`; `lean` is its form, `tilt` its pitch and roll, `look` PART fields."""
    return _part(HEXAHEDRON, center, np.asarray(size, float) / 2, turn(yaw, *tilt), lean, **look)


def ellipsoid(center: Any, size: Any, yaw: Any = 0.0, **look: Any) -> Array:
    return _part(QUADRIC, center, np.asarray(size, float) / 2, turn(yaw), (1, 1, 0), **look)


def cylinder(center: Any, radius: Any, height: Any, rotation: Any = None, top: Any = 1.0, **look: Any) -> Array:
    """A cylinder along its own z, or a truncated cone whose upper radius is `top` times the lower."""
    form = (0, (1 + top) / 2, (top - 1) / 2)
    rotation = turn() if rotation is None else rotation
    return _part(QUADRIC, center, (radius, radius, height / 2), rotation, form, **look)


def rod(a: Any, b: Any, radius: Any, **look: Any) -> Array:
    """A cylinder from point a to point b."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    along = (b - a) / np.linalg.norm(b - a)
    yaw, tilt = np.arctan2(along[1], along[0]), np.arccos(np.clip(along[2], -1, 1))
    return cylinder((a + b) / 2, radius, float(np.linalg.norm(b - a)), turn(yaw, tilt), **look)


@dataclass(frozen=True)
class Solids:
    """Parts as tensors. P parts; the poses have a leading axis V, one instant per view.

    Attributes:
        center: (V, P, 3) m, in the map. rotation: (V, P, 3, 3) map_from_part. velocity: (V, P, 3) m/s.
        kind, texture, label, views: (P,) uint8. agent: (P,) int64. half, form, color: (P, 3).
        seed: (V, P); a traffic light's is the lamp that is alight.
    """

    center: Tensor
    rotation: Tensor
    velocity: Tensor
    kind: Tensor
    half: Tensor
    form: Tensor
    label: Tensor
    texture: Tensor
    color: Tensor
    seed: Tensor
    agent: Tensor
    views: Tensor

    @staticmethod
    def pose(
        parts: dict[str, Tensor], rotation: Array, translation: Array, velocity: Array, seed: Tensor | None = None
    ) -> Solids:
        """Place parts, the tensors of `load`, by their agents' map_from_agent.

        Args:
            rotation, translation, velocity: (V, A, 3, 3), (V, A, 3), (V, A, 3); entry 0 of A is the map itself.
            seed: (V, P), or the parts' own.
        """
        agent = parts["agent"]
        turned, shift, speed = (
            torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(agent.device)
            for x in (rotation, translation, velocity)
        )
        local = turned[:, agent]  # (V, P, 3, 3)
        return Solids(
            center=(local * parts["center"][None, :, None]).sum(-1) + shift[:, agent],
            rotation=local @ parts["rotation"],
            velocity=speed[:, agent],
            seed=parts["seed"].expand(len(turned), -1) if seed is None else seed,
            **{n: x for n, x in parts.items() if n not in ("center", "rotation", "seed")},
        )

    def at(self, view: int) -> Solids:
        """One view alone."""
        one = slice(view, view + 1)
        center, rotation, velocity = self.center[one], self.rotation[one], self.velocity[one]
        return replace(self, center=center, rotation=rotation, velocity=velocity, seed=self.seed[one])


def load(parts: Array, device: torch.device | str) -> dict[str, Tensor]:
    """The fields of a PART array as tensors."""
    fields = {n: torch.from_numpy(np.ascontiguousarray(parts[n])).to(device) for n in PART.names or ()}
    return fields | {"agent": fields["agent"].long()}


def enter_hexahedron(origin: Tensor, direction: Tensor, half: Tensor, form: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays (N, 3), in the part's frame, enter and leave its hexahedron: (N,) each, entering > leaving: missed."""
    (ox, oy, oz), (dx, dy, dz), (hx, hy, hz) = origin.unbind(1), direction.unbind(1), half.unbind(1)
    front, back, side = (form / (2 * half[:, 2:])).unbind(1)
    middle_x, middle_back, middle_y = hx - form[:, 0] / 2, hx - form[:, 1] / 2, hy - form[:, 2] / 4
    side = side / 2
    near = torch.full_like(ox, -torch.inf)
    far = torch.full_like(ox, torch.inf)
    for limit, o, d in (
        (middle_x, ox + front * oz, dx + front * dz),
        (middle_back, back * oz - ox, back * dz - dx),
        (middle_y, oy + side * oz, dy + side * dz),
        (middle_y, side * oz - oy, side * dz - dy),
        (hz, oz, dz),
        (hz, -oz, -dz),
    ):  # a plane bounds one end only: its clamped direction puts the other one out of the way, or misses from outside
        inside = limit - o
        near = torch.maximum(near, inside / d.clamp_max(-_TINY))
        far = torch.minimum(far, inside.abs() / d.clamp_min(_TINY))
    return near, far


def enter_quadric(origin: Tensor, direction: Tensor, half: Tensor, form: Tensor) -> tuple[Tensor, Tensor]:
    """As enter_hexahedron, for quadrics capped at |z| = half[2]."""
    o, d = origin / half, direction / half
    (ox, oy, oz), (dx, dy, dz), (e, a, b) = o.unbind(1), d.unbind(1), form.unbind(1)
    rim_o, rim_d = a + b * oz, b * dz
    qa = (dx * dx + dy * dy + e * dz * dz - rim_d * rim_d).clamp_min(1e-9)  # a cone steeper than the ray is not solved
    qb = ox * dx + oy * dy + e * oz * dz - rim_o * rim_d
    qc = ox * ox + oy * oy + e * oz * oz - rim_o * rim_o
    root = (qb * qb - qa * qc).sqrt()  # NaN: missed, and every comparison with NaN is false
    inverse = 1 / torch.where(dz.abs() < 1e-9, 1e-9, dz)
    cap_a, cap_b = (-1 - oz) * inverse, (1 - oz) * inverse
    near = torch.maximum((-qb - root) / qa, torch.minimum(cap_a, cap_b))
    far = torch.minimum((-qb + root) / qa, torch.maximum(cap_a, cap_b))
    return near, far


def length(x: Tensor) -> Tensor:
    """(N,) of vectors (3, N); torch's own norm takes a hundred times as long along so short an axis."""
    return (x[0] * x[0] + x[1] * x[1] + x[2] * x[2]).sqrt()


def surface_normal(point: Tensor, quadric: Tensor, half: Tensor, form: Tensor) -> Tensor:
    """(3, N) outward unit normals, in the part's frame, at points (3, N) on its surface; half, form: (3, N)."""
    (x, y, z), (hx, hy, hz) = point, half
    front, back, side = form / (2 * hz)
    side = side / 2
    faces = torch.stack(  # how far within each face's plane the point is: it is on the greatest
        [x + front * z - hx + form[0] / 2, back * z - x - hx + form[1] / 2, y + side * z - hy + form[2] / 4,
         side * z - y - hy + form[2] / 4, z - hz, -z - hz]
    )  # fmt: skip
    face = faces == faces.amax(0)
    normal = torch.stack([face[0].float() - face[1].float(), face[2].float() - face[3].float(),
                          face[0] * front + face[1] * back + (face[2].float() + face[3].float()) * side
                          + face[4].float() - face[5].float()])  # fmt: skip
    u, v, w = point / half
    e, a, b = form
    capped = (e == 0) & (w.abs() > 0.999)
    flank = (~capped).float()
    curved = torch.stack([u * flank / hx, v * flank / hy, torch.where(capped, w, (e * w - b * (a + b * w)) / hz)])
    normal = torch.where(quadric, curved, normal)
    return normal / length(normal).clamp_min(1e-9)
