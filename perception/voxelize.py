"""Points to voxels: the mean of each voxel, or its first points in order. One implementation for numpy, CPU and CUDA.

Cells are found as mmdet3d and SparseFusion find them: floor((point - min) / size) in the points' own float type, kept
if within [0, shape). Sums run in point order within a voxel on every device, so results do not depend on it.

Voxel indices are [x, y, z] as everywhere here; mmdet3d's coordinates (z, y, x) are `index.flip(1)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from perception.types import Array, VoxelGrid

A = TypeVar("A", Array, Tensor)


@dataclass(frozen=True, slots=True, eq=False)
class MeanVoxels(Generic[A]):
    """Attributes:
    features: (V, C) mean over the points of each voxel, in the points' float type.
    index: (V, 3) int64 [x, y, z], in ascending order of x, then y, then z.
    count: (V,) int64 points per voxel.
    voxel_of_point: (N,) int64 row of each point's voxel, -1 outside the grid.
    """

    features: A
    index: A
    count: A
    voxel_of_point: A


@dataclass(frozen=True, slots=True, eq=False)
class HardVoxels(Generic[A]):
    """Attributes:
    points: (V, P, C), P = `max_points`; rows beyond `count` are 0.
    index: (V, 3) int64 [x, y, z], in order of each voxel's first point.
    count: (V,) int64 points kept, 1 to P.
    outside: points outside the grid.
    points_dropped: points of voxels that were kept, beyond the first P or after the stop.
    voxels_dropped: voxels beyond the cap, and their points with them.
    """

    points: A
    index: A
    count: A
    outside: int
    points_dropped: int
    voxels_dropped: int


def mean_voxels(points: A, grid: VoxelGrid) -> MeanVoxels[A]:
    """The mean of the points (N, C) of each voxel; columns 0 to 2 are x, y, z in the grid's frame.

    Raises:
        ValueError: `points` is not a float array (N, C >= 3).
    """
    tensor = _tensor(points)
    groups = _group(tensor, grid)
    count = groups.count
    # float64 sums: exact enough that the mean of equal points is that point, in any float type.
    total = torch.segment_reduce(tensor[groups.order].double(), "sum", lengths=count, axis=0, unsafe=True)
    features = (total / count[:, None]).to(tensor.dtype)
    voxel_of_point = torch.full((len(tensor),), -1, dtype=torch.int64, device=tensor.device)
    voxel_of_point[groups.order] = groups.voxel
    return MeanVoxels(*(_like(points, t) for t in (features, _unravel(groups.key, grid), count, voxel_of_point)))


def hard_voxels(
    points: A, grid: VoxelGrid, max_points: int, max_voxels: int, *, stop_when_full: bool = False
) -> HardVoxels[A]:
    """The first `max_points` points, in order, of each of the first `max_voxels` voxels in order of appearance.

    These are mmdet3d's deterministic hard voxels bit for bit: a point in a voxel beyond the cap is dropped, while a
    later point in a voxel kept still enters it. With CUDA points the host waits for the device once.

    Args:
        points: (N, C) float; columns 0 to 2 are x, y, z in the grid's frame.
        grid: where and how large the voxels are.
        max_points: at least 1.
        max_voxels: at least 1.
        stop_when_full: the first point that would open a voxel beyond the cap ends it all, as in the kernels of
            mmdet3d before 1.0: no later point enters a voxel kept either.

    Raises:
        ValueError: `points` is not a float array (N, C >= 3), or a limit is below 1.
    """
    if max_points < 1 or max_voxels < 1:
        raise ValueError(f"hard_voxels: max_points {max_points} and max_voxels {max_voxels} must be at least 1")
    tensor = _tensor(points)
    slots = _slots(tensor, grid, max_points, max_voxels, stop_when_full)
    num_inside, num_of_kept, num_kept, found = torch.stack(
        [slots.inside.sum(), slots.of_kept.sum(), slots.keep.sum(), slots.begins.sum()]
    ).tolist()
    num_voxels = min(found, max_voxels)
    filled, index, count = _fill(tensor, grid, max_points, slots, num_voxels)
    return HardVoxels(
        _like(points, filled),
        _like(points, index),
        _like(points, count),
        outside=len(tensor) - num_inside,
        points_dropped=num_of_kept - num_kept,
        voxels_dropped=found - num_voxels,
    )


@dataclass(frozen=True, slots=True, eq=False)
class PaddedVoxels:
    """Hard voxels in as many rows as there may be, so that no size depends on the points: for CUDA graphs.

    Attributes:
        points: (max_voxels, P, C), see `HardVoxels`; 0 in rows without a voxel.
        index: (max_voxels, 3).
        count: (max_voxels,) 0 in rows without a voxel, which are the last ones.
        found: () int64 voxels there are, kept or not.
    """

    points: Tensor
    index: Tensor
    count: Tensor
    found: Tensor


def padded_voxels(
    points: Tensor, grid: VoxelGrid, max_points: int, max_voxels: int, *, stop_when_full: bool = False
) -> PaddedVoxels:
    """`hard_voxels` without waiting for the device."""
    slots = _slots(points, grid, max_points, max_voxels, stop_when_full)
    return PaddedVoxels(*_fill(points, grid, max_points, slots, max_voxels), slots.begins.sum())


class _Slots(NamedTuple):
    """Where points go, (N,) each and sorted by voxel."""

    key: Tensor
    order: Tensor  # index into the points
    begins: Tensor  # the first point of its voxel
    inside: Tensor
    row: Tensor  # of the voxel in the output, by the order of first points
    of_kept: Tensor  # its voxel is kept
    place: Tensor  # among the points of its voxel
    keep: Tensor


def _slots(points: Tensor, grid: VoxelGrid, max_points: int, max_voxels: int, stop_when_full: bool) -> _Slots:
    key, order = torch.sort(_keys(points, grid), stable=True)
    inside = key < math.prod(grid.shape)
    begins = inside.clone()
    begins[1:] &= key[1:] != key[:-1]
    position = torch.arange(len(key), device=key.device)
    group = begins.cumsum(0)  # 1 for the points of the first voxel; with 0 and beyond the last, points outside
    start = torch.zeros(len(key) + 1, dtype=torch.int64, device=key.device)
    start = start.scatter_(0, torch.where(begins, group, 0), position)[group]
    opened = torch.empty_like(key).scatter_(0, order, begins.long()).cumsum(0)  # voxels up to each point, in its order
    row = opened[order[start]] - 1
    of_kept = inside & (row < max_voxels)
    place = position - start
    keep = of_kept & (place < max_points)
    if stop_when_full:
        keep &= opened[order] <= max_voxels
    return _Slots(key, order, begins, inside, row, of_kept, place, keep)


def _fill(points: Tensor, grid: VoxelGrid, max_points: int, slots: _Slots, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rows` voxels' points, index and count. One row more takes what is not kept."""
    voxel = torch.where(slots.keep, slots.row, rows)
    filled = points.new_zeros((rows + 1, max_points, points.shape[1]))
    filled[voxel, torch.where(slots.keep, slots.place, 0)] = points[slots.order]
    keys, count = slots.key.new_zeros((2, rows + 1))
    keys[torch.where(slots.begins & slots.of_kept, slots.row, rows)] = slots.key
    count.scatter_add_(0, voxel, slots.keep.long())
    return filled[:rows], _unravel(keys[:rows], grid), count[:rows]


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """The points inside the grid, sorted by voxel and, within a voxel, by their order."""

    order: Tensor  # (inside,) index into the points
    voxel: Tensor  # (inside,) which voxel, 0 to V - 1
    key: Tensor  # (V,) ascending linear index (x * Y + y) * Z + z
    count: Tensor  # (V,)


def _group(points: Tensor, grid: VoxelGrid) -> _Groups:
    keys = _keys(points, grid)
    inside = torch.nonzero(keys < math.prod(grid.shape))[:, 0]
    keys, order = torch.sort(keys[inside], stable=True)
    key, voxel, count = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    return _Groups(inside[order], voxel, key, count)


def _keys(points: Tensor, grid: VoxelGrid) -> Tensor:
    """(N,) int64 linear index (x * Y + y) * Z + z of each point's voxel; X * Y * Z outside the grid."""
    corner, size, shape = _bounds(
        tuple(grid.min_corner), tuple(grid.voxel_size), tuple(grid.shape), points.dtype, points.device
    )
    cell = torch.floor((points[:, :3] - corner) / size)
    # Tested as floats: a far or non-finite value would wrap around when cast.
    inside = ((cell >= 0) & (cell < shape)).all(1)
    x, y, z = torch.where(inside[:, None], cell, 0).long().unbind(1)
    keys = (x * grid.shape[1] + y) * grid.shape[2] + z  # int64: grids of 2^31 voxels fit
    return torch.where(inside, keys, math.prod(grid.shape))


@cache
def _bounds(
    min_corner: tuple[float, ...],
    voxel_size: tuple[float, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """A grid's numbers as tensors: CUDA would multiply by the reciprocal of a scalar size and round differently.

    Kept for ever, since to copy them to a device each time would make the host wait for it, and graphs refer to them.
    """
    corner, size, cells = (torch.tensor(v, dtype=dtype, device=device) for v in (min_corner, voxel_size, shape))
    return corner, size, cells


def _unravel(key: Tensor, grid: VoxelGrid) -> Tensor:
    """Linear indices (V,) -> (V, 3) int64 [x, y, z]."""
    _, y, z = grid.shape
    return torch.stack([key // (y * z), key // z % y, key % z], -1)


def _tensor(points: Array | Tensor) -> Tensor:
    if isinstance(points, np.ndarray):  # torch takes neither read-only arrays nor those of the other byte order
        tensor = torch.from_numpy(np.require(points, points.dtype.newbyteorder("="), ["C", "W"]))
    else:
        tensor = points
    if tensor.ndim != 2 or tensor.shape[1] < 3 or not tensor.is_floating_point():
        raise ValueError(f"voxelize: expected points (N, C >= 3) float, got {tuple(tensor.shape)} {tensor.dtype}")
    return tensor


def _like(points: A, tensor: Tensor) -> A:
    """A result as the kind that came in."""
    return cast(Any, tensor.numpy() if isinstance(points, np.ndarray) else tensor)
