"""Semantic occupancy as messages: the whole grid, its occupied voxels for RViz, and what a planner sees from above."""

from __future__ import annotations

import numpy as np

from perception.datasets.rosbag_file import Header
from perception.errors import DataError
from perception.types import IGNORE_LABEL, Array, OccupancyGrid3D, Pose
from perception.visualize import label_colors
from perception_ros.cdr import begin, put_pose, put_time
from perception_ros.detections import put_strings

GROUND = frozenset(
    (
        "driveable_surface",
        "road",
        "parking",
        "lane_marking",
        "other_flat",
        "other-ground",
        "sidewalk",
        "terrain",
    )
)
"""Classes that lie flat: in the bird's-eye view they are known ground, not obstacles."""

_VOXEL = np.dtype(
    {
        "names": ["x", "y", "z", "rgb", "label", "confidence"],
        "formats": ["<f4", "<f4", "<f4", "<u4", "u1", "<f4"],
        "offsets": [0, 4, 8, 12, 16, 20],
        "itemsize": 24,
    }
)
_FIELDS = (("x", 0, 7), ("y", 4, 7), ("z", 8, 7), ("rgb", 12, 7), ("label", 16, 2), ("confidence", 20, 7))
"""Name, offset and sensor_msgs/PointField's type (2 UINT8, 7 FLOAT32: PCL and RViz read `rgb` as the bits of one)."""


def occupancy_grid(occupancy: OccupancyGrid3D, header: Header) -> bytes:
    """perception_msgs/OccupancyGrid3D: every voxel, free and unknown ones included, in the header's frame."""
    grid = occupancy.grid
    out = begin(header)
    put_pose(out, grid.ego_from_grid @ _shift(grid.min_corner))
    out.numbers("d", *grid.voxel_size)
    out.numbers("I", *grid.shape)
    put_strings(out, occupancy.classes)
    out.numbers("B", occupancy.free_label)
    out.sequence(occupancy.label.reshape(-1))
    out.sequence(_bytes(occupancy.score) if occupancy.score is not None else np.zeros(0, np.uint8))
    return out.finish()


def voxel_cloud(occupancy: OccupancyGrid3D, header: Header) -> bytes:
    """sensor_msgs/PointCloud2 of the occupied voxels' centres in the header's frame.

    Fields x, y, z, rgb (packed, the colours of every picture), label and confidence (1 where the grid has no scores).
    In RViz: style Boxes, size that of a voxel, colour transformer RGB8.
    """
    where = np.unravel_index(np.flatnonzero(occupancy.occupied), occupancy.grid.shape)
    index = np.stack(where, 1)  # (V, 3)
    label = occupancy.label[where]
    voxels = np.zeros(len(index), _VOXEL)
    xyz = occupancy.grid.ego_from_grid.apply(occupancy.grid.center(index))
    voxels["x"], voxels["y"], voxels["z"] = xyz.T
    red, green, blue = label_colors(occupancy.classes, label).astype(np.uint32).T
    voxels["rgb"] = red << 16 | green << 8 | blue
    voxels["label"] = label
    voxels["confidence"] = 1.0 if occupancy.score is None else occupancy.score[where]
    out = begin(header)
    out.numbers("I", 1, len(voxels))  # height, width
    out.numbers("I", len(_FIELDS))
    for name, offset, kind in _FIELDS:
        out.string(name)
        out.numbers("I", offset)
        out.numbers("B", kind)
        out.numbers("I", 1)
    out.numbers("?", False)  # is_bigendian
    out.numbers("I", _VOXEL.itemsize, voxels.nbytes)  # point_step, row_step
    out.sequence(voxels.view(np.uint8))
    out.numbers("?", True)  # is_dense
    return out.finish()


def bev_grid(occupancy: OccupancyGrid3D, header: Header) -> bytes:
    """nav_msgs/OccupancyGrid seen from above, at height 0 of the header's frame.

    A column of voxels is -1 where none is known, 0 where nothing but free space and ground (`GROUND`) is known, else
    the percentage of its most certain obstacle.

    Raises:
        DataError: voxels that are not square from above, which the message cannot say.
    """
    grid = occupancy.grid
    if grid.voxel_size[0] != grid.voxel_size[1]:
        raise DataError(
            f"voxels of {grid.voxel_size[0]} by {grid.voxel_size[1]} m: nav_msgs/OccupancyGrid has square cells",
            "leave this output out",
        )
    origin = grid.ego_from_grid @ _shift(grid.min_corner)
    out = begin(header)
    put_time(out, header.stamp_ns)  # map_load_time
    out.numbers("f", grid.voxel_size[0])
    out.numbers("I", grid.shape[0], grid.shape[1])
    put_pose(out, Pose(origin.rotation, np.array([*origin.translation[:2], 0.0])))
    out.sequence(_columns(occupancy).T.reshape(-1))  # x runs fastest
    return out.finish()


def _columns(occupancy: OccupancyGrid3D) -> Array:
    """(X, Y) int8 values of the columns."""
    is_obstacle = np.zeros(256, bool)
    is_obstacle[: len(occupancy.classes)] = [name not in GROUND for name in occupancy.classes]
    where = np.flatnonzero(occupancy.occupied)  # first: most voxels are free, and to look their labels up is slow
    where = where[is_obstacle[occupancy.label.reshape(-1)[where]]]
    certain = np.zeros(occupancy.label.shape[:2], np.float32)
    score = np.float32(1) if occupancy.score is None else occupancy.score.reshape(-1)[where]
    np.maximum.at(certain.reshape(-1), where // occupancy.label.shape[2], score)
    percent = np.rint(100 * np.clip(certain, 0, 1)).astype(np.int8)
    known = (occupancy.label != IGNORE_LABEL).any(2)
    return np.where(known, percent, np.int8(-1))


def _bytes(score: Array) -> Array:
    """Confidences 0 to 1 in any shape -> (n,) uint8, 0 to 255."""
    scaled = score.reshape(-1) * np.float32(255)
    scaled += np.float32(0.5)  # in place, as the next: a benchmark's grid has ten million voxels
    return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)


def _shift(corner: tuple[float, float, float]) -> Pose:
    return Pose(np.eye(3), np.array(corner, np.float64))
