"""SemanticKITTI's scene completion volumes (semantic scene completion benchmark).

256 x 256 x 32 voxels of 0.2 m in the LiDAR's frame: x from 0 to 51.2 m, y from -25.6 to 25.6 m, z from -2 to 4.4 m.
The first release (v1.0) lies one voxel lower, from z = -2.2 m, though it says the same; the files do not tell which
they are. Four files a frame, every fifth scan, all in [x, y, z] C order:

* `.bin`: one bit a voxel, most significant first: the scan fell into it; the input of the task.
* `.label`: uint16 raw id a voxel, 0 free (train and val only).
* `.invalid`: one bit: seen from no pose of the aggregated scans, so not scored.
* `.occluded`: one bit: no ray of this scan passed through; what the scan fell into is marked too (`.bin` and `.invalid`
  are subsets of it), so that the LiDAR observed what is not occluded and what is in `.bin`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from perception.datasets.kitti_odometry import read_values
from perception.datasets.occupancy_files import check_layout
from perception.datasets.semantickitti_labels import SCORED_CLASSES, raw_labels, voxel_labels
from perception.types import IGNORE_LABEL, Array, OccupancyGrid3D, Pose, VoxelGrid

VoxelVersion = Literal["v1.0", "v1.1"]
"""Release of the voxel files, which sets the grid's lower end: -2.2 m or -2.0 m."""

CLASSES = ("free", *SCORED_CLASSES)
FREE_LABEL = 0
SHAPE = (256, 256, 32)

_MIN_Z_M = {"v1.0": -2.2, "v1.1": -2.0}
_COUNT = int(np.prod(SHAPE))
_SOURCE = "SemanticKITTI's voxel download (data_odometry_voxels)"


def grid(ego_from_lidar: Pose, version: VoxelVersion = "v1.1") -> VoxelGrid:
    """The benchmark's grid, in the LiDAR's frame."""
    return VoxelGrid((0.0, -25.6, _MIN_Z_M[version]), (0.2, 0.2, 0.2), SHAPE, ego_from_lidar)


def file_path(root: Path, sequence: str, frame: int) -> Path:
    """Where the truth of a frame lies; `root` is the folder that holds `sequences`."""
    return root / "sequences" / sequence / "voxels" / f"{frame:06d}.label"


def prediction_path(root: Path, sequence: str, frame: int) -> Path:
    """Where a submission has a frame's volume."""
    return root / "sequences" / sequence / "predictions" / f"{frame:06d}.label"


def read(path: Path, ego_from_lidar: Pose, stamp_ns: int, version: VoxelVersion = "v1.1") -> OccupancyGrid3D:
    """The truth of one frame, of its `.label` (the path), `.invalid` and, where there is one, `.occluded` with `.bin`.

    Invalid voxels and ids nobody scores are IGNORE_LABEL.

    Raises:
        DataError: a file is missing, of the wrong size, or holds ids of no class.
    """
    label = read_label_voxels(path)
    label[read_voxels(path.with_suffix(".invalid"))] = IGNORE_LABEL
    observed = {}
    if (occluded := path.with_suffix(".occluded")).exists():
        observed["lidar"] = ~read_voxels(occluded) | read_voxels(path.with_suffix(".bin"))
    return OccupancyGrid3D(grid(ego_from_lidar, version), label, CLASSES, FREE_LABEL, stamp_ns, observed=observed)


def write(path: Path, occupancy: OccupancyGrid3D, scanned: Array, version: VoxelVersion = "v1.1") -> None:
    """Write `.label` (the path), `.bin`, `.invalid` and, where the LiDAR's view is known, `.occluded`.

    Args:
        path: of the `.label` file.
        occupancy: the truth; ignored voxels become invalid.
        scanned: (256, 256, 32) bool, what the scan fell into; read back, all of it is observed.
        version: the release whose grid the occupancy has.

    Raises:
        ValueError: the occupancy is of another layout.
    """
    check_layout(occupancy, grid(occupancy.grid.ego_from_grid, version), CLASSES, f"SemanticKITTI {version}")
    ignored = occupancy.label == IGNORE_LABEL
    write_label_voxels(path, np.where(ignored, np.uint8(FREE_LABEL), occupancy.label))
    write_voxels(path.with_suffix(".invalid"), ignored)
    write_voxels(path.with_suffix(".bin"), scanned)
    if "lidar" in occupancy.observed:
        write_voxels(path.with_suffix(".occluded"), ~occupancy.observed["lidar"] | scanned)


def read_voxels(path: Path) -> Array:
    """(256, 256, 32) bool of a `.bin`, `.invalid` or `.occluded` file. Raises DataError if missing or of wrong size."""
    return np.unpackbits(read_values(path, "u1", _SOURCE, count=_COUNT // 8)).reshape(SHAPE).view(np.bool_)


def write_voxels(path: Path, voxels: Array) -> None:
    """Write (256, 256, 32) bool, one bit a voxel."""
    if voxels.shape != SHAPE or voxels.dtype != np.bool_:
        raise ValueError(f"SemanticKITTI voxels: expected {SHAPE} bool, got {voxels.shape} {voxels.dtype}")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.packbits(voxels).tofile(path)


def read_label_voxels(path: Path) -> Array:
    """(256, 256, 32) uint8 learning labels of a `.label` file of raw ids, truth or prediction; `.invalid` not applied.

    Raises:
        DataError: the file is missing, of another size, or holds ids of no class.
    """
    return voxel_labels(read_values(path, "<u2", _SOURCE, count=_COUNT), str(path)).reshape(SHAPE)


def write_label_voxels(path: Path, label: Array) -> None:
    """Write (256, 256, 32) uint8 learning labels as raw ids, the form of truth and of submissions.

    Raises ValueError for another shape, and for IGNORE_LABEL, which the format does not have.
    """
    if label.shape != SHAPE or label.dtype != np.uint8:
        raise ValueError(f"SemanticKITTI voxels: expected {SHAPE} uint8, got {label.shape} {label.dtype}")
    path.parent.mkdir(parents=True, exist_ok=True)
    raw_labels(label).astype("<u2").tofile(path)


def pool_labels(label: Array, factor: int) -> Array:
    """Labels (X, Y, Z) uint8 -> (X / factor, ...) by the majority of each block (as LMSCNet's training labels).

    A block that holds any scored class takes the one of most voxels, the smallest label of equals; one that holds only
    free and ignored voxels is free; one of ignored voxels alone is IGNORE_LABEL.
    """
    if any(n % factor for n in label.shape):
        raise ValueError(f"pool_labels: shape {label.shape} is no multiple of {factor}")
    x, y, z = (n // factor for n in label.shape)
    blocks = label.reshape(x, factor, y, factor, z, factor).transpose(0, 2, 4, 1, 3, 5).reshape(x * y * z, factor**3)
    scored = (blocks != FREE_LABEL) & (blocks != IGNORE_LABEL)
    block, _ = np.nonzero(scored)
    votes = np.bincount(block * len(CLASSES) + blocks[scored], minlength=len(blocks) * len(CLASSES))
    winner = votes.reshape(len(blocks), len(CLASSES)).argmax(1).astype(np.uint8)  # label 0 has no votes
    otherwise = np.where((blocks == FREE_LABEL).any(1), FREE_LABEL, IGNORE_LABEL)
    return np.where(scored.any(1), winner, otherwise).astype(np.uint8).reshape(x, y, z)
