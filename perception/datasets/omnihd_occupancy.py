"""OmniHD-Scenes occupancy truth (Zheng et al., arXiv 2412.10734).

240 x 160 x 16 voxels of 0.5 m in **ego**: x from -60 to 60 m, y from -40 to 40 m, z from -3 to 5 m. A file is an npz
with one array `occ_gt` of a row per occupied voxel, [x, y, z, label]; a voxel that is absent is free, label 0. There is
no ignored label. The benchmark scores labels 1 to 11, without a mask.

Layout: `{clip}/occ_gt/{name of the key frame's LiDAR file}.npz`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perception.datasets.occupancy_files import check_labels, check_layout, read_npz, voxels_of_rows
from perception.errors import DataError
from perception.types import IGNORE_LABEL, OccupancyGrid3D, Pose, VoxelGrid

CLASSES = (
    "free",
    "car",
    "pedestrian",
    "rider",
    "large_vehicle",
    "cycle",
    "road_obstacle",
    "traffic_fence",
    "driveable_surface",
    "sidewalk",
    "vegetation",
    "manmade",
)
FREE_LABEL = 0

_KEY = "occ_gt"
_COLUMNS_OF_XYZ = (0, 1, 2)
_SOURCE = "the occupancy labels of OmniHD-Scenes"


def grid(ego_from_lidar: Pose | None = None) -> VoxelGrid:
    """The benchmark's grid, in ego: `ego_from_lidar` is taken so that all layouts are called alike, and not used."""
    del ego_from_lidar
    return VoxelGrid((-60.0, -40.0, -3.0), (0.5, 0.5, 0.5), (240, 160, 16), Pose.identity())


def file_path(root: Path, lidar_filename: str) -> Path:
    """Where the truth of a key frame lies; `lidar_filename` is `{clip}/lidar/lidar_top_compensation/{stamp}.bin`."""
    lidar = Path(lidar_filename)
    return root / lidar.parents[2] / "occ_gt" / f"{lidar.stem}.npz"


def read(path: Path, stamp_ns: int) -> OccupancyGrid3D:
    """The truth of one key frame. Where several rows name one voxel the last wins, as in the official loader.

    Raises:
        DataError: the file is missing, damaged or of another layout.
    """
    voxels = grid()
    (rows,) = read_npz(path, (_KEY,), max_bytes=int(np.prod(voxels.shape)) * 4 * 8, source=_SOURCE)
    index, label = voxels_of_rows(rows, _COLUMNS_OF_XYZ, voxels, str(path))
    check_labels(label, CLASSES, str(path))
    if (label == IGNORE_LABEL).any():
        raise DataError(f"{path}: label {IGNORE_LABEL}; this layout ignores no voxel", f"expected a file of {_SOURCE}")
    dense = np.full(voxels.shape, FREE_LABEL, np.uint8)
    dense.reshape(-1)[index] = label
    return OccupancyGrid3D(voxels, dense, CLASSES, FREE_LABEL, stamp_ns)


def write(path: Path, occupancy: OccupancyGrid3D) -> None:
    """Write the npz. Raises ValueError for another layout or ignored voxels (it has none)."""
    check_layout(occupancy, grid(), CLASSES, "OmniHD-Scenes")
    if (occupancy.label == IGNORE_LABEL).any():
        raise ValueError("OmniHD-Scenes: has no ignored voxels")
    index = np.argwhere(occupancy.label != FREE_LABEL)
    label = occupancy.label[tuple(index.T)].astype(np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{_KEY: np.concatenate([index, label[:, None]], 1)})
