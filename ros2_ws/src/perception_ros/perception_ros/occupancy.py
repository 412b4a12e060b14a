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
    score = np.zeros(0) if occupancy.score is None else np.clip(occupancy.score, 0, 1).reshape(-1)
    out.sequence(np.rint(score * 255).astype(np.uint8))
    return out.finish()


def voxel_cloud(occupancy: OccupancyGrid3D, header: Header) -> bytes:
    """sensor_msgs/PointCloud2 of the occupied voxels' centres in the header's frame.

    Fields x, y, z, rgb (packed, the colours of every picture), label and confidence (1 where the grid has no scores).
    In RViz: style Boxes, size that of a voxel, colour transformer RGB8.
    """
    index = np.argwhere(occupancy.occupied)
    where = tuple(index.T)
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
    flat = [i for i, name in enumerate(occupancy.classes) if name in GROUND]
    obstacle = occupancy.occupied & ~np.isin(occupancy.label, flat)
    certainty = np.float32(1) if occupancy.score is None else occupancy.score
    percent = np.rint(100 * np.where(obstacle, np.clip(certainty, 0, 1), 0).max(2)).astype(np.int8)
    known = (occupancy.label != IGNORE_LABEL).any(2)
    return np.where(known, percent, np.int8(-1))


def _shift(corner: tuple[float, float, float]) -> Pose:
    return Pose(np.eye(3), np.array(corner, np.float64))
