"""Ray casting without a loop over rays or parts; the same code on CPU and CUDA.

Every sensor is a grid of rays (rows x columns). A part can only be met by the rays of a rectangle of that grid, so the
rectangles of all parts are expanded into (part, ray) pairs, nearest parts first, and each pair is solved in closed
form; the nearest hit of a ray is an integer minimum over keys (distance, part), which is the same in any order.
Pairs go in chunks of bounded size, and a pair whose ray has already met something nearer is dropped unsolved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from perception.synthetic.primitives import (
    HEXAHEDRON,
    QUADRIC,
    SUN,
    Solids,
    Texture,
    enter_hexahedron,
    enter_quadric,
    length,
)

GROUND, SKY = -1, -2
"""Parts of `Hits` that are no solids."""

_FAR_KEY = (0x7F800000 << 32) | 0xFFFFFFFF  # infinitely far, no part
_CORNERS = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
_EDGES = [(0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (0, 4), (1, 5), (2, 6), (3, 7)]


class RayGrid(Protocol):
    """V grids of rows x columns rays; ray (v, r, c) is number (v * rows + r) * columns + c of the flat arrays."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def reach_m(self) -> float: ...

    @property
    def sees(self) -> int:
        """One of CAMERA, LIDAR, SUN."""

    @property
    def origin(self) -> Tensor:
        """(V, 3) m, map: where the rays start at the views' reference times."""

    def rectangle(self, corners: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Bounds of the hulls of corners (V, P, 8, 3): first, last row, first, last column, and seen at all."""

    def rays(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Origins (3, N), unit directions (3, N) in the map, times (N,) after the reference time (None: all zero)."""


@dataclass(frozen=True)
class Hits:
    """What each of N rays meets first: distance (inf for the sky) and part (GROUND, SKY or an index into Solids)."""

    distance: Tensor
    part: Tensor


@dataclass(frozen=True)
class Pinhole:
    """Cameras. rotation (V, 3, 3) map_from_camera, position (V, 3), intrinsic (V, 3, 3)."""

    rotation: Tensor
    position: Tensor
    intrinsic: Tensor
    rows: int
    columns: int
    reach_m: float = 180.0
    sees: int = 1

    @property
    def origin(self) -> Tensor:
        return self.position

    def rectangle(self, corners: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        near = 0.15
        local = torch.einsum("vij,vpki->vpkj", self.rotation, corners - self.position[:, None, None])
        a, b = local[:, :, [i for i, _ in _EDGES]], local[:, :, [j for _, j in _EDGES]]
        # Both ends of every edge, pulled along it to the near plane where they lie behind it.
        points = []
        for p, q in ((a, b), (b, a)):
            share = ((near - p[..., 2]) / (q[..., 2] - p[..., 2])).nan_to_num(0, 0, 0).clamp(0, 1)
            points.append(torch.where((p[..., 2] < near)[..., None], p + share[..., None] * (q - p), p))
        edge = torch.cat(points, 2)
        valid = edge[..., 2] > 0.99 * near
        z = edge[..., 2].clamp_min(1e-3)
        k = self.intrinsic[:, :, :, None, None]
        u = k[:, 0, 0] * edge[..., 0] / z + k[:, 0, 2]
        v = k[:, 1, 1] * edge[..., 1] / z + k[:, 1, 2]
        first_u, last_u = u.where(valid, torch.inf).amin(2).ceil(), u.where(valid, -torch.inf).amax(2).floor()
        first_v, last_v = v.where(valid, torch.inf).amin(2).ceil(), v.where(valid, -torch.inf).amax(2).floor()
        first_u, last_u = first_u.clamp(0, self.columns), last_u.clamp(-1, self.columns - 1)
        first_v, last_v = first_v.clamp(0, self.rows), last_v.clamp(-1, self.rows - 1)
        return first_v, last_v, first_u, last_u, (first_u <= last_u) & (first_v <= last_v)

    def rays(self) -> tuple[Tensor, Tensor, Tensor | None]:
        device = self.position.device
        v, u = torch.meshgrid(
            torch.arange(self.rows, device=device, dtype=torch.float32),
            torch.arange(self.columns, device=device, dtype=torch.float32),
            indexing="ij",
        )
        k = self.intrinsic[:, :, :, None, None]
        x, y = (u - k[:, 0, 2]) / k[:, 0, 0], (v - k[:, 1, 2]) / k[:, 1, 1]
        local = torch.stack([x, y, torch.ones_like(x)], 1)  # (V, 3, rows, columns)
        local = (local / (x * x + y * y + 1).sqrt()[:, None]).flatten(2)
        direction = (self.rotation @ local).transpose(0, 1)
        origin = self.position.T[..., None].expand_as(direction)
        return origin.reshape(3, -1), direction.reshape(3, -1), None

    def cosine(self) -> Tensor:
        """(V, rows, columns): of the angles between rays and the optical axis."""
        direction = self.rays()[1].view(3, len(self.position), -1)
        return torch.einsum("vi,ivn->vn", self.rotation[:, :, 2], direction).view(-1, self.rows, self.columns)


@dataclass(frozen=True)
class Spinning:
    """Spinning LiDARs, and radars as their fixed kind: a row per beam (rising), a column per firing.

    Attributes:
        rotation, position: (V, 3, 3), (V, 3) map_from_sensor at the reference time, x axis at azimuth 0.
        spin: (V, 3) rotation vector rad/s and drift: (V, 3) m/s, of the sensor in the map.
        elevation: (rows,) rad, rising. first_azimuth, azimuth_step: rad, of columns; negative step: clockwise.
        time: (columns,) s of each firing after the reference time.
    """

    rotation: Tensor
    position: Tensor
    spin: Tensor
    drift: Tensor
    elevation: Tensor
    first_azimuth: float
    azimuth_step: float
    time: Tensor
    reach_m: float = 105.0
    sees: int = 2

    @property
    def rows(self) -> int:
        return len(self.elevation)

    @property
    def columns(self) -> int:
        return len(self.time)

    @property
    def origin(self) -> Tensor:
        return self.position

    def rectangle(self, corners: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        local = torch.einsum("vij,vpki->vpkj", self.rotation, corners - self.position[:, None, None])
        middle = local.mean(2, keepdim=True)
        reach = (local - middle)[..., :2].norm(dim=-1).amax(-1)
        distance = middle[:, :, 0, :2].norm(dim=-1)
        least = (distance - reach).clamp_min(0.05)
        high, low = local[..., 2].amax(-1), local[..., 2].amin(-1)
        most = distance + reach
        slack = 0.012 + self.spin.norm(dim=-1)[:, None] * float(self.time.abs().max())
        top = torch.atan2(high, torch.where(high > 0, least, most)) + slack
        bottom = torch.atan2(low, torch.where(low < 0, least, most)) - slack
        first_row = torch.searchsorted(self.elevation, bottom.contiguous())
        last_row = torch.searchsorted(self.elevation, top.contiguous()) - 1
        direction = torch.atan2(middle[..., 1], middle[..., 0])
        turn = torch.atan2(local[..., 1], local[..., 0]) - direction
        turn = torch.remainder(turn + torch.pi, 2 * torch.pi) - torch.pi
        around = distance < 1.05 * reach  # the sensor may be inside the outline: any azimuth
        inside = around & ((turn.amax(-1) - turn.amin(-1)) > torch.pi)
        columns = [
            (direction[..., 0] + end - self.first_azimuth) / self.azimuth_step
            for end in (turn.amin(-1) - slack, turn.amax(-1) + slack)
        ]
        full = abs(self.azimuth_step) * self.columns > 6.2
        first, last = torch.minimum(*columns).ceil(), torch.maximum(*columns).floor()
        if full:
            first = torch.where(inside, 0, first)
            last = torch.where(inside, self.columns - 1, torch.minimum(last, first + self.columns - 1))
        else:  # a sector: bring the rectangle next to it, then clip
            turns = round(2 * torch.pi / abs(self.azimuth_step))
            shift = torch.floor(((first + last) / 2 - (self.columns - 1) / 2) / turns + 0.5) * turns
            first = torch.where(inside, 0, (first - shift).clamp(0, self.columns))
            last = torch.where(inside, self.columns - 1, (last - shift).clamp(-1, self.columns - 1))
        return first_row, last_row, first, last, (first <= last) & (first_row <= last_row)

    def rays(self) -> tuple[Tensor, Tensor, Tensor | None]:
        device = self.position.device
        azimuth = self.first_azimuth + self.azimuth_step * torch.arange(self.columns, device=device)
        flat, rise = self.elevation.cos()[:, None], self.elevation.sin()[:, None].expand(-1, self.columns)
        local = torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), rise])  # (3, rows, columns)
        direction = torch.einsum("vij,jrc->ivrc", self.rotation, local)
        # The sensor turns by a fraction of a degree within a scan: first order is exact.
        moved = (self.spin.T[..., None] * self.time)[:, :, None].expand_as(direction)
        direction = direction + torch.cross(moved, direction, dim=0)
        origin = (self.position.T[..., None] + self.drift.T[..., None] * self.time)[:, :, None].expand_as(direction)
        times = self.time.expand(len(self.position), self.rows, -1)
        return origin.reshape(3, -1), direction.reshape(3, -1), times.reshape(-1)


@dataclass(frozen=True)
class Orthographic:
    """Parallel rays, for the sun's shadows and the open sky: rotation (V, 3, 3) map_from_view, z along the rays."""

    rotation: Tensor
    corner: Tensor
    step_m: float
    rows: int
    columns: int
    reach_m: float = 400.0
    sees: int = SUN

    @property
    def origin(self) -> Tensor:
        local = torch.tensor([self.columns, self.rows, 0.0], device=self.corner.device) * self.step_m / 2
        return self.corner + (self.rotation * local).sum(-1)

    def rectangle(self, corners: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        local = torch.einsum("vij,vpki->vpkj", self.rotation, corners - self.corner[:, None, None]) / self.step_m
        first_u = local[..., 0].amin(-1).ceil().clamp(0, self.columns)
        last_u = local[..., 0].amax(-1).floor().clamp(-1, self.columns - 1)
        first_v = local[..., 1].amin(-1).ceil().clamp(0, self.rows)
        last_v = local[..., 1].amax(-1).floor().clamp(-1, self.rows - 1)
        return first_v, last_v, first_u, last_u, (first_u <= last_u) & (first_v <= last_v)

    def rays(self) -> tuple[Tensor, Tensor, Tensor | None]:
        device = self.corner.device
        v, u = torch.meshgrid(
            torch.arange(self.rows, device=device) * self.step_m,
            torch.arange(self.columns, device=device) * self.step_m,
            indexing="ij",
        )
        local = torch.stack([u, v, torch.zeros_like(u)]).flatten(1)
        origin = (self.corner[..., None] + self.rotation @ local).transpose(0, 1)  # (3, V, rows * columns)
        direction = self.rotation[:, :, 2].T[..., None].expand_as(origin)
        return origin.reshape(3, -1), direction.reshape(3, -1), None


def cast(solids: Solids, grid: RayGrid, chunk: int = 1 << 17) -> Hits:
    """The first solid that every ray of the grid meets; ground is added by `Ground.intersect`.

    Args:
        chunk: (part, ray) pairs solved at a time; on a GPU make it millions, on a CPU let a chunk fit the cache.
    """
    origin, direction, time = grid.rays()
    best = torch.full(origin.shape[1:], _FAR_KEY, dtype=torch.int64, device=origin.device)
    view, part, near, rectangle = _candidates(solids, grid)
    special = (solids.texture[part] == Texture.FOLIAGE).float()
    special += 2 * ((solids.texture[part] == Texture.WHEEL) & (solids.seed[view, part] == 2)).float()
    table = torch.cat(
        [
            solids.rotation[view, part].flatten(1),
            solids.center[view, part],
            solids.velocity[view, part],
            solids.half[part],
            solids.form[part],
            special[:, None],
        ],
        1,
    ).T.contiguous()  # (22, items): the arithmetic runs along long rows
    for kind in (HEXAHEDRON, QUADRIC):
        for item, ray in _pairs((solids.kind[part] == kind).nonzero()[:, 0], view, rectangle, grid, chunk):
            reached = (best.index_select(0, ray) >> 32).int().view(torch.float32)
            keep = (reached > near.index_select(0, item)).nonzero()[:, 0]
            item, ray = item.index_select(0, keep), ray.index_select(0, keep)
            row, o, d = (x.index_select(1, i) for x, i in ((table, item), (origin, ray), (direction, ray)))
            t, met = _solve(kind, row, o, d, None if time is None else time[ray])
            keep = (met & (t < grid.reach_m)).nonzero()[:, 0]
            key = (t[keep].view(torch.int32).long() << 32) | part[item[keep]]
            best.scatter_reduce_(0, ray.index_select(0, keep), key, "amin")
    missed = best == _FAR_KEY
    distance = (best >> 32).int().view(torch.float32)
    return Hits(torch.where(missed, torch.inf, distance), torch.where(missed, SKY, best & 0xFFFFFFFF))


def _pairs(
    chosen: Tensor, view: Tensor, rectangle: Tensor, grid: RayGrid, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Items and rays of all pairs of the chosen rectangles, row by row of each, about `chunk` at a time."""
    for index, row in runs(rectangle[chosen, 2], 1 << 62):
        item = chosen[index]
        first_row, first_column, _, width = rectangle[item].unbind(1)
        first_ray = (view[item] * grid.rows + first_row + row) * grid.columns + first_column
        for segment, place in runs(width, chunk):
            yield item.index_select(0, segment), first_ray.index_select(0, segment) + place


def runs(count: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs of `count` (S,) members laid out one after another: run and place in it of each member (N,) int64.

    Whole runs, about `chunk` members at a time.
    """
    device, end = count.device, count.cumsum(0)
    start = end - count
    total = int(end[-1]) if len(end) else 0
    marks = torch.arange(chunk, total + chunk, chunk, device=device) if total > chunk else end[-1:]
    stop = torch.searchsorted(end, marks).clamp_max(len(end) - 1) + 1
    a = first = 0
    for b, last in torch.stack([stop, end[stop - 1]], 1).tolist() if total else []:
        run = torch.arange(a, b, device=device).repeat_interleave(count[a:b], output_size=last - first)
        yield run, torch.arange(first, last, device=device) - start.index_select(0, run)
        a, first = b, last


def _candidates(solids: Solids, grid: RayGrid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views, parts, least distances, and rectangles (first row, first column, height, width), nearest first."""
    corners = solids.half[None, :, None] * _CORNERS.to(solids.half.device)[None, None]
    corners = (solids.rotation[:, :, None] * corners[..., None, :]).sum(-1) + solids.center[:, :, None]
    if isinstance(grid, Spinning):  # what moves within the scan
        sweep_s = float(grid.time.abs().max())
        outward = torch.sign(corners - solids.center[:, :, None])
        corners = corners + outward * (solids.velocity - grid.drift[:, None]).abs()[:, :, None] * sweep_s
    radius = solids.half.norm(dim=1)
    near = ((solids.center - grid.origin[:, None]).norm(dim=-1) - radius - 1.5).clamp_min(0)
    first_row, last_row, first_column, last_column, seen = grid.rectangle(corners)
    seen = seen & (near < grid.reach_m) & ((solids.views & grid.sees) > 0)
    if isinstance(grid, Orthographic):  # along the common direction
        depth = ((solids.center - grid.corner[:, None]) * grid.rotation[:, None, :, 2]).sum(-1)
        near = (depth - radius).clamp_min(0)
    view, part = seen.nonzero(as_tuple=True)
    rectangle = torch.stack([first_row, first_column, last_row - first_row + 1, last_column - first_column + 1], -1)
    rectangle = rectangle[view, part].long()
    rectangle[:, 1].remainder_(grid.columns)
    beyond = rectangle[:, 1] + rectangle[:, 3] - grid.columns
    crossing = (beyond > 0).nonzero()[:, 0]  # the seam of a full turn: two rectangles
    rest = rectangle[crossing]
    rest[:, 1], rest[:, 3] = 0, beyond[crossing]
    rectangle[crossing, 3] -= beyond[crossing]
    view, part, rectangle = (
        torch.cat([x, y]) for x, y in ((view, view[crossing]), (part, part[crossing]), (rectangle, rest))
    )
    near = near[view, part]
    order = near.argsort(stable=True)
    return view[order], part[order], near[order], rectangle[order]


def _solve(kind: int, row: Tensor, origin: Tensor, direction: Tensor, time: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distances (N,) along rays (3, N) to the parts of columns (22, N), and whether they are met from outside."""
    offset = origin - row[9:12]
    if time is not None:
        offset = offset - row[12:15] * time
    o = offset[0] * row[0:3] + offset[1] * row[3:6] + offset[2] * row[6:9]
    d = direction[0] * row[0:3] + direction[1] * row[3:6] + direction[2] * row[6:9]
    half, form = row[15:18], row[18:21]
    if kind == HEXAHEDRON:
        near, far = enter_hexahedron(o.T, d.T, half.T, form.T)
        return near, (near <= far) & (near > 0)
    near, far = enter_quadric(o.T, d.T, half.T, form.T)
    met = (near <= far) & (near > 0)
    # Foliage is ragged: towards the outline of a crown, gaps between the leaves let it pass. Bicycle wheels are rims.
    x, y, z = point = o + near * d
    unit = point / half
    slope = d / half
    facing = -(unit * slope).sum(0) / length(slope)
    ripple = (7 * x + row[9]).sin() * (9 * y + row[10]).sin() + (17 * z + 13 * x).sin() * (21 * y - 9 * z).sin()
    gap = (row[21] == 1) & (ripple * 0.42 + 0.40 > facing)
    hub = unit[0] ** 2 + unit[1] ** 2
    return near, met & ~gap & ~((row[21] == 2) & (hub < 0.78) & (hub > 0.02))
