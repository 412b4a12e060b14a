"""Occ3D: dense, in ego, 17 is free, two masks; checked on a real label."""

from __future__ import annotations

import numpy as np
import pytest

from perception.datasets import occ3d
from perception.errors import DataError
from perception.geometry import grid_points
from perception.types import IGNORE_LABEL, OccupancyGrid3D, Pose


def _occupancy(seed: int = 0) -> OccupancyGrid3D:
    rng = np.random.default_rng(seed)
    grid = occ3d.grid()
    observed = {"lidar": rng.random(grid.shape) < 0.1, "camera": rng.random(grid.shape) < 0.2}
    label = rng.integers(0, 18, grid.shape).astype(np.uint8)
    return OccupancyGrid3D(grid, label, occ3d.CLASSES, occ3d.FREE_LABEL, 5, observed=observed)


def test_written_and_read_back(tmp_path):
    path = occ3d.file_path(tmp_path, "scene-0061", "token")
    assert path == tmp_path / "gts/scene-0061/token/labels.npz"
    written = _occupancy()
    occ3d.write(path, written)
    occupancy = occ3d.read(path, 5)
    np.testing.assert_array_equal(occupancy.label, written.label)
    for kind in ("lidar", "camera"):
        np.testing.assert_array_equal(occupancy.observed[kind], written.observed[kind])


def test_the_grid_is_in_ego_whatever_the_lidars_place():
    grid = occ3d.grid(Pose.from_yaw(1.0, (1.0, 2.0, 3.0)))
    np.testing.assert_allclose(grid_points(grid, np.array([[0, 0, 0]])), [[-39.8, -39.8, -0.8]])
    np.testing.assert_allclose(grid.max_corner, (40, 40, 5.4))


def test_a_real_label(shared_data):
    occupancy = occ3d.read(shared_data / "occ3d_nuscenes/labels.npz", 0)
    assert (occupancy.label == occ3d.FREE_LABEL).sum() == 600_908
    assert occupancy.observed["lidar"].sum() == 56_601
    assert occupancy.observed["camera"].sum() == 43_355


def _save(path, **changes):
    grid = occ3d.grid()
    arrays = {k: np.zeros(grid.shape, np.uint8) for k in ("semantics", "mask_lidar", "mask_camera")} | changes
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_camera": None}, "has no array mask_camera; it holds semantics, mask_lidar"),
        (
            {"semantics": np.zeros((200, 200), np.uint8)},
            r"\[semantics\]: expected \(200, 200, 16\) uint8, got \(200, 200\)",
        ),
        ({"semantics": np.zeros((200, 200, 16), np.float32)}, r"got \(200, 200, 16\) float32"),
        ({"semantics": np.full((200, 200, 16), 18, np.uint8)}, "label 18 in 640000 voxels; the layout knows 0 to 17"),
        ({"semantics": np.zeros((512, 512, 40), np.uint8)}, "more than the 5,120,000 of this layout"),
    ],
)
def test_files_of_another_layout(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        occ3d.read(_save(tmp_path / "labels.npz", **changes), 0)


def test_missing_and_truncated(tmp_path):
    with pytest.raises(DataError, match=r"No such file or directory\n.*Occ3D-nuScenes"):
        occ3d.read(tmp_path / "labels.npz", 0)
    path = _save(tmp_path / "labels.npz")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"labels\.npz: not a whole \.npz archive"):
        occ3d.read(path, 0)


def test_what_the_layout_cannot_hold_is_not_written(tmp_path):
    whole = _occupancy()
    blind = OccupancyGrid3D(whole.grid, whole.label, occ3d.CLASSES, 17, 0)
    with pytest.raises(ValueError, match=r"needs what lidar and camera observed, got \[\]"):
        occ3d.write(tmp_path / "labels.npz", blind)
    label = whole.label.copy()
    label[0, 0, 0] = IGNORE_LABEL
    with pytest.raises(ValueError, match="has no ignored voxels"):
        occ3d.write(
            tmp_path / "labels.npz", OccupancyGrid3D(whole.grid, label, occ3d.CLASSES, 17, 0, observed=whole.observed)
        )
