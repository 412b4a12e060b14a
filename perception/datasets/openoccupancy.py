"""nuScenes-OpenOccupancy truth (Wang et al., ICCV 2023; annotation v0.1).

512 x 512 x 40 voxels of 0.2 m around the LiDAR, in the frame of LIDAR_TOP (x right, y forward, z up): x and y from
-51.2 to 51.2 m, z from -5 to 3 m. A file is an integer array of one row per occupied voxel, **[z, y, x, ..., label]**:
four columns, or seven where velocities stand between index and label. Label 0 in the file is noise, which nobody scores
(IGNORE_LABEL here); a voxel that is absent is free, which is label 0 in memory and in the metric.

Layout: `nuScenes-Occupancy/scene_{scene_token}/occupancy/{lidar_token}.npy`, lidar_token being the sample_data token of
the key frame's LIDAR_TOP.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perception.datasets.occupancy_files import check_labels, check_layout, read_npy, voxels_of_rows
from perception.errors import DataError
from perception.types import IGNORE_LABEL, Array, OccupancyGrid3D, Pose, VoxelGrid

CLASSES = (
    "free",
    "barrier",
    "bicycle",
    "bus",
    "car",
    "construction_vehicle",
    "motorcycle",
    "pedestrian",
    "traffic_cone",
    "trailer",
    "truck",
    "driveable_surface",
    "other_flat",
    "sidewalk",
    "terrain",
    "manmade",
    "vegetation",
)
FREE_LABEL = 0

_NOISE = 0
_COLUMNS_OF_XYZ = (2, 1, 0)
_SOURCE = "nuScenes-Occupancy v0.1 (OpenOccupancy)"


def grid(ego_from_lidar: Pose) -> VoxelGrid:
    """The benchmark's grid, in the LiDAR's frame at the key frame."""
    return VoxelGrid((-51.2, -51.2, -5.0), (0.2, 0.2, 0.2), (512, 512, 40), ego_from_lidar)


def file_path(root: Path, scene_token: str, lidar_token: str) -> Path:
    """Where the truth of a key frame lies; `root` is the folder that holds `nuScenes-Occupancy`."""
    return root / "nuScenes-Occupancy" / f"scene_{scene_token}" / "occupancy" / f"{lidar_token}.npy"


def read(path: Path, ego_from_lidar: Pose, stamp_ns: int) -> OccupancyGrid3D:
    """The truth of one key frame.

    Where several rows name one voxel, the label of most rows wins and the smallest of equals, noise taking part: the
    official loader's vote.

    Raises:
        DataError: the file is missing, damaged or of another layout.
    """
    voxels = grid(ego_from_lidar)
    rows = read_npy(path, max_bytes=int(np.prod(voxels.shape)) * 7 * 8, source=_SOURCE)
    if rows.ndim == 2 and rows.shape[1] not in (4, 7):
        raise DataError(f"{path}: {rows.shape[1]} columns; expected 4 or 7", "is it a file of another layout?")
    index, label = voxels_of_rows(rows, _COLUMNS_OF_XYZ, voxels, str(path))
    label = np.where(label == _NOISE, IGNORE_LABEL, label)
    check_labels(label, CLASSES, str(path))
    dense = np.full(voxels.shape, FREE_LABEL, np.uint8)
    index, label = _vote(index, label)
    dense.reshape(-1)[index] = label
    return OccupancyGrid3D(voxels, dense, CLASSES, FREE_LABEL, stamp_ns)


def _vote(index: Array, label: Array) -> tuple[Array, Array]:
    """One label per voxel, of rows (N,) in any order: the most frequent, the smallest of equals."""
    keys, votes = np.unique(index * 256 + label, return_counts=True)
    index, label = np.divmod(keys, 256)
    order = np.lexsort((label, -votes, index))  # voxel by voxel, the winner first
    _, first = np.unique(index[order], return_index=True)
    return index[order][first], label[order][first]


def write(path: Path, occupancy: OccupancyGrid3D) -> None:
    """Write rows [z, y, x, label] as int32. Raises ValueError for an occupancy of another layout."""
    check_layout(occupancy, grid(occupancy.grid.ego_from_grid), CLASSES, "OpenOccupancy")
    x, y, z = np.nonzero(occupancy.label != FREE_LABEL)
    label = occupancy.label[x, y, z]
    label = np.where(label == IGNORE_LABEL, _NOISE, label)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.stack([z, y, x, label], 1).astype(np.int32), allow_pickle=False)
