"""An interactive 3D view of a sample in open3d (extra `viz`, imported only here and only when asked for)."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from perception.errors import PerceptionError
from perception.types import Sample, Truth
from perception.visualize import draw_boxes, draw_occupancy, draw_points


def _open3d() -> Any:
    try:
        import open3d
    except (ImportError, OSError) as error:
        raise PerceptionError(
            f"open3d does not import: {error}",
            "pip install -e '.[viz]'; where libusb is missing: apt-get install libusb-1.0-0",
        ) from error
    return open3d


def geometries(sample: Sample, truth: Truth | None) -> list[Any]:
    """open3d geometries in ego: clouds coloured by height, box edges, occupied voxels, and ego's axes (x red, 2 m)."""
    o3d = _open3d()
    found: list[Any] = [o3d.geometry.TriangleMesh.create_coordinate_frame(size=2.0)]
    for cloud in (*sample.lidars.values(), *sample.radars.values()):
        points = draw_points(cloud)
        shape = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points.xyz.astype(np.float64)))
        shape.colors = o3d.utility.Vector3dVector(points.color / 255.0)
        found.append(shape)
    if truth and truth.boxes is not None and len(truth.boxes):
        segments = draw_boxes(truth.boxes)
        lines = o3d.geometry.LineSet(
            o3d.utility.Vector3dVector(segments.ends.reshape(-1, 3)),
            o3d.utility.Vector2iVector(np.arange(2 * len(segments.ends)).reshape(-1, 2).astype(np.int32)),
        )
        lines.colors = o3d.utility.Vector3dVector(segments.color / 255.0)
        found.append(lines)
    if truth and truth.occupancy is not None and truth.occupancy.occupied.any():
        voxels = draw_occupancy(truth.occupancy)
        cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(voxels.center))
        cloud.colors = o3d.utility.Vector3dVector(voxels.color / 255.0)
        grid = o3d.geometry.VoxelGrid.create_from_point_cloud(cloud, voxel_size=min(voxels.size))
        # open3d's voxel grids stay axis-aligned; one in the LiDAR's frame is drawn as points in ego instead.
        upright = np.allclose(voxels.ego_from_grid.matrix, np.eye(4))
        found.append(grid if upright else cloud.transform(voxels.ego_from_grid.matrix))
    return found


def show(sample: Sample, truth: Truth | None) -> None:
    """Open a window and return when it is closed; PerceptionError on a machine without a display."""
    o3d = _open3d()
    # Without a display open3d renders off screen and its loop never ends, so this is asked first.
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise PerceptionError(
            "open3d: no display for a window ($DISPLAY is not set)", "look at the PNG files, or log in with a screen"
        )
    window = o3d.visualization.Visualizer()
    if not window.create_window(window_name=f"sample {sample.token}"):
        raise PerceptionError(
            "open3d: the window could not be opened", "update the graphics driver, or look at the PNG files"
        )
    for geometry in geometries(sample, truth):
        window.add_geometry(geometry)
    window.get_render_option().background_color = np.full(3, 0.08)
    window.run()
    window.destroy_window()
