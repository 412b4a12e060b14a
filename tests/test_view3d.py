"""The 3D view: the geometries hold the sample's own coordinates; without a display it says so."""

from __future__ import annotations

import builders
import numpy as np
import pytest

from perception.errors import PerceptionError
from perception.types import OccupancyGrid3D, Pose, Sample, Truth, VoxelGrid
from perception.view3d import geometries, show

pytest.importorskip("open3d", reason="extra viz is not installed", exc_type=ImportError)


def test_points_boxes_and_voxels_are_where_they_are_in_ego():
    label = np.zeros((4, 4, 2), np.uint8)
    label[1, 2, 0] = 1
    grid = VoxelGrid((0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (4, 4, 2), Pose.from_yaw(0.0, (10.0, 0.0, 0.0)))
    truth = Truth(boxes=builders.boxes(), occupancy=OccupancyGrid3D(grid, label, ("free", "car"), 0, 0))
    sample = Sample(0, lidars={"top": builders.cloud()})
    _, cloud, lines, voxels = geometries(sample, truth)
    np.testing.assert_allclose(np.asarray(cloud.points), sample.lidars["top"].xyz_ego(), atol=1e-5)
    assert len(lines.lines) == 13 * len(truth.boxes)
    np.testing.assert_allclose(np.asarray(voxels.points), [[10.75, 1.25, 0.25]])


def test_without_a_display_it_says_so_at_once(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(PerceptionError, match=r"no display for a window .*\n.*PNG"):
        show(Sample(0), None)
