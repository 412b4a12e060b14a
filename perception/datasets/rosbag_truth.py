"""Truth beside a bag: one numpy file a sample, `truth/<stamp in ns>.npz` in the bag's folder. No ROS tool minds it.

A file holds what is known: boxes (center, size, yaw, velocity, score, label, classes, num_points) under `boxes.`, and
occupancy (label, classes, free_label, min_corner, voxel_size, ego_from_grid (4, 4)) under `occupancy.`; the pose is in
the bag's own /tf. numpy's own format, never pickled.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from perception.errors import DataError
from perception.types import Array, Boxes3D, OccupancyGrid3D, Pose, Truth, VoxelGrid

_FOLDER = "truth"
_BOX_ARRAYS = ("center", "size", "yaw", "velocity", "score", "label")


def truth_file(bag: Path, stamp_ns: int) -> Path:
    """Where the truth of a stamp lies, for a bag given by its folder or by one of its files."""
    folder = bag if bag.is_dir() or not bag.suffix else bag.parent
    return folder / _FOLDER / f"{stamp_ns}.npz"


def write_truth(bag: Path, stamp_ns: int, truth: Truth) -> None:
    """Write boxes and occupancy of a stamp into the bag's folder."""
    arrays: dict[str, Array] = {}
    if (boxes := truth.boxes) is not None:
        arrays |= {f"boxes.{name}": getattr(boxes, name) for name in _BOX_ARRAYS}
        arrays["boxes.classes"] = np.array(boxes.classes)
        if boxes.num_points is not None:
            arrays["boxes.num_points"] = boxes.num_points
    if (occupancy := truth.occupancy) is not None:
        grid = occupancy.grid
        arrays |= {
            "occupancy.label": occupancy.label,
            "occupancy.classes": np.array(occupancy.classes),
            "occupancy.free_label": np.array(occupancy.free_label),
            "occupancy.min_corner": np.array(grid.min_corner, np.float64),
            "occupancy.voxel_size": np.array(grid.voxel_size, np.float64),
            "occupancy.ego_from_grid": grid.ego_from_grid.matrix,
        }
    path = truth_file(bag, stamp_ns)
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)


def read_truth(bag: Path, stamp_ns: int) -> Truth:
    """Boxes and occupancy of a stamp; without either where none lie there.

    Raises:
        DataError: a damaged file.
    """
    path = truth_file(bag, stamp_ns)
    if not path.is_file():
        return Truth()
    try:
        with np.load(path, allow_pickle=False) as arrays:
            boxes = _boxes(arrays, stamp_ns) if "boxes.center" in arrays else None
            return Truth(boxes, _occupancy(arrays, stamp_ns) if "occupancy.label" in arrays else None)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a truth file: {error}", "write the bag again") from error


def _boxes(arrays: np.lib.npyio.NpzFile, stamp_ns: int) -> Boxes3D:
    columns = {name: arrays[f"boxes.{name}"] for name in _BOX_ARRAYS}
    classes = tuple(arrays["boxes.classes"].tolist())
    return Boxes3D(**columns, classes=classes, stamp_ns=stamp_ns, num_points=arrays.get("boxes.num_points"))


def _occupancy(arrays: np.lib.npyio.NpzFile, stamp_ns: int) -> OccupancyGrid3D:
    def three(name: str) -> tuple[float, float, float]:
        x, y, z = arrays[f"occupancy.{name}"].tolist()
        return x, y, z

    label = arrays["occupancy.label"]
    nx, ny, nz = label.shape
    grid = VoxelGrid(
        three("min_corner"), three("voxel_size"), (nx, ny, nz), Pose.from_matrix(arrays["occupancy.ego_from_grid"])
    )
    classes = tuple(arrays["occupancy.classes"].tolist())
    return OccupancyGrid3D(grid, label, classes, int(arrays["occupancy.free_label"]), stamp_ns)
