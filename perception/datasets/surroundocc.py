"""SurroundOcc-nuScenes truth (Wei et al., ICCV 2023).

200 x 200 x 16 voxels of 0.5 m around the LiDAR, in the frame of LIDAR_TOP (x right, y forward, z up): x and y from -50
to 50 m, z from -5 to 3 m. A file is an integer array of one row per occupied voxel, **[x, y, z, label]** (OpenOccupancy
has z first). Label 0 in the file is `ignore` (IGNORE_LABEL here); a voxel that is absent is free, which is label 0 in
memory and in the metric. The classes are those of OpenOccupancy, in its order.

Layout: `samples/{file name of the key frame's LIDAR_TOP}.npy`, as in `samples/n015-...__LIDAR_TOP__...pcd.bin.npy`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perception.datasets.occupancy_files import check_labels, check_layout, read_npy, voxels_of_rows
from perception.datasets.openoccupancy import CLASSES as CLASSES
from perception.types import IGNORE_LABEL, OccupancyGrid3D, Pose, VoxelGrid

FREE_LABEL = 0

_IGNORED = 0
_COLUMNS_OF_XYZ = (0, 1, 2)
_SOURCE = "SurroundOcc's 200x200x16 occupancy labels"


def grid(ego_from_lidar: Pose) -> VoxelGrid:
    """The benchmark's grid, in the LiDAR's frame at the key frame."""
    return VoxelGrid((-50.0, -50.0, -5.0), (0.5, 0.5, 0.5), (200, 200, 16), ego_from_lidar)


def file_path(root: Path, lidar_filename: str) -> Path:
    """Where the truth of a key frame lies; `lidar_filename` is nuScenes' `filename` of its LIDAR_TOP."""
    return root / "samples" / f"{Path(lidar_filename).name}.npy"


def read(path: Path, ego_from_lidar: Pose, stamp_ns: int) -> OccupancyGrid3D:
    """The truth of one key frame. Where several rows name one voxel the last wins, as in the official loader.

    Raises:
        DataError: the file is missing, damaged or of another layout.
    """
    voxels = grid(ego_from_lidar)
    rows = read_npy(path, max_bytes=int(np.prod(voxels.shape)) * 4 * 8, source=_SOURCE)
    index, label = voxels_of_rows(rows, _COLUMNS_OF_XYZ, voxels, str(path))
    label = np.where(label == _IGNORED, IGNORE_LABEL, label)
    check_labels(label, CLASSES, str(path))
    dense = np.full(voxels.shape, FREE_LABEL, np.uint8)
    dense.reshape(-1)[index] = label
    return OccupancyGrid3D(voxels, dense, CLASSES, FREE_LABEL, stamp_ns)


def write(path: Path, occupancy: OccupancyGrid3D) -> None:
    """Write rows [x, y, z, label] as int64. Raises ValueError for an occupancy of another layout."""
    check_layout(occupancy, grid(occupancy.grid.ego_from_grid), CLASSES, "SurroundOcc")
    index = np.argwhere(occupancy.label != FREE_LABEL)
    label = occupancy.label[tuple(index.T)].astype(np.int64)
    label[label == IGNORE_LABEL] = _IGNORED
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.concatenate([index, label[:, None]], 1), allow_pickle=False)
