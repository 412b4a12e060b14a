"""Where rays enter the solids, against triangles done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from perception.synthetic.primitives import (
    QUADRIC,
    Solids,
    box,
    cylinder,
    ellipsoid,
    enter_hexahedron,
    enter_quadric,
    load,
    rod,
    surface_normal,
)
from perception.synthetic.raycast import SKY, Pinhole, cast


def solids_of(*parts: np.ndarray) -> Solids:
    still = np.zeros((1, 1, 3))
    return Solids.pose(load(np.concatenate(parts), "cpu"), np.eye(3)[None, None], still, still)


def enter(part: np.ndarray, origin: list[float], toward: list[float]) -> float:
    """Distance from origin to the part along the line to `toward`."""
    s = solids_of(part)
    direction = torch.tensor([toward]) - torch.tensor([origin])
    direction = direction / direction.norm()
    rotation = s.rotation[0, 0]
    o, d = (torch.tensor([origin]) - s.center[0]) @ rotation, direction @ rotation
    near, far = (enter_hexahedron if part["kind"][0] == 0 else enter_quadric)(o, d, s.half, s.form)
    return float(near) if near <= far else float("inf")


@pytest.mark.parametrize(
    ("part", "origin", "toward", "distance"),
    [
        (box((0, 0, 0), (2, 2, 2)), [4.0, 4.0, 0.0], [1.0, 0.0, 0.0], 5.0),  # 3-4-5
        (box((0, 0, 0), (2, 2, 2), yaw=np.pi / 4), [5.0, 0.0, 0.0], [0.0, 0.0, 0.0], 5 - 2**0.5),
        (box((0, 0, 0), (6, 6, 4), lean=(3, 0, 0)), [6.0, 0.0, 0.0], [0.0, 0.0, 0.0], 4.5),  # half-way up: x = 1.5
        (box((0, 0, 0), (6, 6, 4), lean=(0, 0, 6)), [0.0, 6.0, 0.0], [0.0, 0.0, 0.0], 4.5),  # gable roof
        (ellipsoid((0, 0, 0), (4, 2, 2)), [7.0, 0.0, 0.0], [0.0, 0.0, 0.0], 5.0),
        (ellipsoid((3, 4, 0), (2, 2, 2)), [0.0, 0.0, 0.0], [3.0, 4.0, 0.0], 4.0),  # 3-4-5, less the radius
        (cylinder((0, 0, 0), 1.0, 4.0), [6.0, 0.0, 0.0], [0.0, 0.0, 0.0], 5.0),
        (cylinder((0, 0, 0), 1.0, 4.0), [0.0, 0.0, 7.0], [0.0, 0.0, 0.0], 5.0),  # through the cap
        (cylinder((0, 0, 0), 2.0, 4.0, top=0.5), [6.0, 0.0, 0.0], [0.0, 0.0, 0.0], 4.5),  # truncated cone: 1.5 half-way
        (rod((0, -3, 0), (0, 3, 0), 1.0), [4.0, 0.0, 0.0], [0.0, 0.0, 0.0], 3.0),
        (rod((0, -3, 0), (0, 3, 0), 1.0), [0.0, 8.0, 0.0], [0.0, 0.0, 0.0], 5.0),
        (box((0, 0, 0), (2, 2, 2)), [4.0, 1.5, 0.0], [0.0, 1.5, 0.0], float("inf")),
        (cylinder((0, 0, 0), 1.0, 4.0), [6.0, 0.0, 2.1], [0.0, 0.0, 2.1], float("inf")),
    ],
)
def test_distance_is_the_triangle_s(part, origin, toward, distance):
    assert enter(part, origin, toward) == pytest.approx(distance, abs=2e-5)


def test_normals_point_away_from_the_surface():
    s = solids_of(box((0, 0, 0), (2, 4, 6)), ellipsoid((0, 0, 0), (2, 4, 6)), cylinder((0, 0, 0), 1.0, 4.0))
    point = torch.tensor([[1.0, 0.3, 0.2], [0.0, 2.0, 0.0], [0.2, 0.1, 2.0]])
    normal = surface_normal(point.T, s.kind == QUADRIC, s.half.T, s.form.T).T
    torch.testing.assert_close(normal, torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), atol=1e-5, rtol=0)


def test_cast_agrees_with_every_part_tried_on_every_ray():
    rng = np.random.default_rng(0)
    parts = [box(rng.uniform(-8, 8, 3) + [0, 0, 14], rng.uniform(0.5, 4, 3), rng.uniform(0, 6)) for _ in range(20)]
    parts += [
        ellipsoid(rng.uniform(-8, 8, 3) + [0, 0, 14], rng.uniform(0.5, 4, 3), rng.uniform(0, 6)) for _ in range(20)
    ]
    parts += [box((0, -3, 0), (1, 1, 60))]  # beside the camera and behind it
    s = solids_of(*parts)
    intrinsic = torch.tensor([[[40.0, 0, 32], [0, 40.0, 24], [0, 0, 1]]])
    grid = Pinhole(torch.eye(3)[None], torch.zeros(1, 3), intrinsic, 48, 64)
    hits = cast(s, grid, chunk=997)
    origin, direction = (x.T for x in grid.rays()[:2])
    best = torch.full((len(origin),), torch.inf)
    part = torch.full((len(origin),), SKY)
    for k in range(len(parts)):
        one = [x[k : k + 1].expand(len(origin), -1) for x in (s.half, s.form)]
        o, d = (origin - s.center[0, k]) @ s.rotation[0, k], direction @ s.rotation[0, k]
        near, far = (enter_hexahedron if s.kind[k] == 0 else enter_quadric)(o, d, *one)
        closer = (near <= far) & (near > 0) & (near < best)
        best, part = torch.where(closer, near, best), torch.where(closer, k, part)
    assert (part >= 0).float().mean() > 0.3
    assert (hits.part == part).float().mean() > 0.999
    torch.testing.assert_close(hits.distance, best, atol=1e-4, rtol=1e-4)
