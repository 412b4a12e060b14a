"""Occ3D-nuScenes truth (Tian et al., NeurIPS 2023).

200 x 200 x 16 voxels of 0.4 m in **ego** (not the LiDAR's frame): x and y from -40 to 40 m, z from -1 to 5.4 m. A file
is an npz of three dense uint8 arrays indexed [x, y, z]: `semantics` (17 is free, 0 is `others`, a class of its own),
`mask_lidar` and `mask_camera` (1 where that kind of sensor saw the voxel; the benchmark scores inside `mask_camera`).

Layout: `gts/{scene_name}/{sample_token}/labels.npz`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perception.datasets import openoccupancy
from perception.datasets.occupancy_files import check_labels, check_layout, read_npz
from perception.errors import DataError
from perception.types import IGNORE_LABEL, OccupancyGrid3D, Pose, VoxelGrid

CLASSES = ("others", *openoccupancy.CLASSES[1:], "free")
FREE_LABEL = 17

_KEYS = ("semantics", "mask_lidar", "mask_camera")
_SOURCE = "Occ3D-nuScenes (gts)"


def grid(ego_from_lidar: Pose | None = None) -> VoxelGrid:
    """The benchmark's grid, in ego: `ego_from_lidar` is taken so that all layouts are called alike, and not used."""
    del ego_from_lidar
    return VoxelGrid((-40.0, -40.0, -1.0), (0.4, 0.4, 0.4), (200, 200, 16), Pose.identity())


def file_path(root: Path, scene_name: str, sample_token: str) -> Path:
    """Where the truth of a key frame lies; `root` is the folder that holds `gts`."""
    return root / "gts" / scene_name / sample_token / "labels.npz"


def read(path: Path, stamp_ns: int) -> OccupancyGrid3D:
    """The truth of one key frame, `observed` by `lidar` and by `camera`.

    Raises:
        DataError: the file is missing, damaged or of another layout.
    """
    voxels = grid()
    arrays = read_npz(path, _KEYS, max_bytes=int(np.prod(voxels.shape)) * 8, source=_SOURCE)
    for key, array in zip(_KEYS, arrays, strict=True):
        if array.shape != voxels.shape or array.dtype.kind not in "bui":
            raise DataError(
                f"{path}[{key}]: expected {voxels.shape} uint8, got {array.shape} {array.dtype}",
                "is it a file of another layout?",
            )
    semantics, mask_lidar, mask_camera = arrays
    check_labels(semantics, CLASSES, str(path))
    observed = {"lidar": mask_lidar.astype(bool), "camera": mask_camera.astype(bool)}
    return OccupancyGrid3D(voxels, semantics.astype(np.uint8), CLASSES, FREE_LABEL, stamp_ns, observed=observed)


def write(path: Path, occupancy: OccupancyGrid3D) -> None:
    """Write the npz. Raises ValueError for another layout, ignored voxels (it has none) or a missing `observed`."""
    check_layout(occupancy, grid(), CLASSES, "Occ3D")
    if not {"lidar", "camera"} <= set(occupancy.observed):
        raise ValueError(f"Occ3D: needs what lidar and camera observed, got {sorted(occupancy.observed)}")
    if (occupancy.label == IGNORE_LABEL).any():
        raise ValueError("Occ3D: has no ignored voxels; what is not scored is outside the masks")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        semantics=occupancy.label,
        mask_lidar=occupancy.observed["lidar"].astype(np.uint8),
        mask_camera=occupancy.observed["camera"].astype(np.uint8),
    )
