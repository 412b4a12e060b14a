"""Intersection over union of upright rotated boxes for all pairs at once, on any device.

A convex polygon clipped to a slab keeps its area when the points outside are pushed onto the slab's edge, once the
points where its sides cross that edge are added: what the pushed points enclose has no area. So a rectangle, in the
frame of another one, is clipped to it with a fixed number of points and without any branch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """(..., Q, M) overlap of boxes (..., Q, 7) with (..., M, 7).

    A box is (x, y, z of the geometric centre, size along its own x, its own y, z, angle); its x axis points along
    (cos angle, -sin angle), as theta of `perception.networks.sparsefusion.boxes` turns.
    """
    shared_bev = bev_intersection(a[..., [0, 1, 3, 4, 6]], b[..., [0, 1, 3, 4, 6]])
    a, b = a[..., :, None, :], b[..., None, :, :]
    top = torch.minimum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    bottom = torch.maximum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    shared = shared_bev * (top - bottom).clamp(min=0)
    union = a[..., 3:6].prod(-1) + b[..., 3:6].prod(-1) - shared
    return shared / union.clamp(min=1e-8)


def bev_intersection(a: Tensor, b: Tensor) -> Tensor:
    """(..., Q, M) areas shared by rectangles (..., Q, 5) and (..., M, 5): x, y, size along own x and y, angle."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    sign = a.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    corner = sign * a[..., None, 2:4] / 2  # (..., Q, 1, 4, 2), each in its own frame
    corner = _turn(corner, a[..., None, 4]) + (a[..., :2] - b[..., :2])[..., None, :]
    corner = _turn(corner, -b[..., None, 4])  # (..., Q, M, 4, 2) in b's frame
    x, y = corner.unbind(-1)
    x, y = _clip(x, y, b[..., 2:3] / 2)
    y, x = _clip(y, x, b[..., 3:4] / 2)
    area = (x * y.roll(-1, -1) - x.roll(-1, -1) * y).sum(-1) / 2  # shoelace formula
    return area.abs()


def _turn(point: Tensor, angle: Tensor) -> Tensor:
    """Points (..., 2) from a frame whose x axis points along (cos, -sin) of the angle."""
    c, s = angle.cos(), angle.sin()
    x, y = point.unbind(-1)
    return torch.stack([c * x + s * y, c * y - s * x], -1)


def _clip(u: Tensor, v: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Clip polygons with points (u, v), each (..., P), to |u| <= half (..., 1); three times as many points."""
    du, dv = u.roll(-1, -1) - u, v.roll(-1, -1) - v
    divisor = torch.where(du == 0, torch.ones_like(du), du)
    at_low, at_high = (-half - u) / divisor, (half - u) / divisor
    first = torch.minimum(at_low, at_high).clamp(0, 1)  # share of the side; its ends where it does not cross
    second = torch.maximum(at_low, at_high).clamp(0, 1)
    u = torch.stack([u, u + first * du, u + second * du], -1).flatten(-2)
    v = torch.stack([v, v + first * dv, v + second * dv], -1).flatten(-2)
    return torch.minimum(torch.maximum(u, -half), half), v
