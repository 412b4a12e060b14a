"""Points to voxels: the mean of each voxel, or its first points in order. One implementation for numpy, CPU and CUDA.

Cells are found as mmdet3d and SparseFusion find them: floor((point - min) / size) in the points' own float type, kept
if within [0, shape). Sums run in point order within a voxel on every device, so results do not depend on it.

Voxel indices are [x, y, z] as everywhere here; mmdet3d's coordinates (z, y, x) are `index.flip(1)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

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
    points_dropped: points beyond the first P of a voxel that was kept.
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


def hard_voxels(points: A, grid: VoxelGrid, max_points: int, max_voxels: int) -> HardVoxels[A]:
    """The first `max_points` points, in order, of each of the first `max_voxels` voxels in order of appearance.

    These are mmdet3d's deterministic hard voxels bit for bit: a point in a voxel beyond the cap is dropped, while a
    later point in a voxel kept still enters it.

    Args:
        points: (N, C) float; columns 0 to 2 are x, y, z in the grid's frame.
        grid: where and how large the voxels are.
        max_points: at least 1.
        max_voxels: at least 1.

    Raises:
        ValueError: `points` is not a float array (N, C >= 3), or a limit is below 1.
    """
    if max_points < 1 or max_voxels < 1:
        raise ValueError(f"hard_voxels: max_points {max_points} and max_voxels {max_voxels} must be at least 1")
    tensor = _tensor(points)
    groups = _group(tensor, grid)
    appearance = torch.argsort(groups.order[groups.start])
    row_of_voxel = torch.empty_like(appearance)
    row_of_voxel[appearance] = torch.arange(len(appearance), device=tensor.device)
    row = row_of_voxel[groups.voxel]  # (inside,) output row of each point, in sorted order
    slot = torch.arange(len(groups.order), device=tensor.device) - groups.start[groups.voxel]
    kept_voxels = appearance[:max_voxels]
    keep = (slot < max_points) & (row < max_voxels)
    voxels = tensor.new_zeros((len(kept_voxels), max_points, tensor.shape[1]))
    voxels[row[keep], slot[keep]] = tensor[groups.order[keep]]
    full = groups.count[kept_voxels]
    return HardVoxels(
        _like(points, voxels),
        _like(points, _unravel(groups.key[kept_voxels], grid)),
        _like(points, full.clamp(max=max_points)),
        outside=len(tensor) - len(groups.order),
        points_dropped=int((full - max_points).clamp(min=0).sum()),
        voxels_dropped=len(appearance) - len(kept_voxels),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """The points inside the grid, sorted by voxel and, within a voxel, by their order."""

    order: Tensor  # (inside,) index into the points
    voxel: Tensor  # (inside,) which voxel, 0 to V - 1
    key: Tensor  # (V,) ascending linear index (x * Y + y) * Z + z
    start: Tensor  # (V,) where in `order` each voxel begins
    count: Tensor  # (V,)


def _group(points: Tensor, grid: VoxelGrid) -> _Groups:
    # min and size are tensors on the device: CUDA would multiply by the reciprocal of a scalar and round differently.
    corner = torch.tensor(grid.min_corner, dtype=points.dtype, device=points.device)
    size = torch.tensor(grid.voxel_size, dtype=points.dtype, device=points.device)
    shape = torch.tensor(grid.shape, device=points.device)
    cell = torch.floor((points[:, :3] - corner) / size)
    # Tested as floats: a far or non-finite value would wrap around when cast.
    inside = torch.nonzero(((cell >= 0) & (cell < shape)).all(1))[:, 0]
    cell = cell[inside].long()
    keys = (cell[:, 0] * grid.shape[1] + cell[:, 1]) * grid.shape[2] + cell[:, 2]  # int64: grids of 2^31 voxels fit
    keys, order = torch.sort(keys, stable=True)
    key, voxel, count = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    return _Groups(inside[order], voxel, key, count.cumsum(0) - count, count)


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
