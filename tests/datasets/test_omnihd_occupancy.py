"""OmniHD-Scenes occupancy: rows x, y, z, label in ego; what is absent is free."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perception.datasets import omnihd_occupancy
from perception.errors import DataError
from perception.types import OccupancyGrid3D, Pose


def save(path: Path, rows: np.ndarray, key: str = "occ_gt") -> Path:
    np.savez_compressed(path, **{key: rows})
    return path


def test_rows_are_x_y_z_label_half_metre_voxels_in_ego(tmp_path: Path) -> None:
    rows = np.array([[0, 0, 0, 8], [239, 159, 15, 11], [120, 80, 6, 1], [120, 80, 7, 4]])
    for dtype in (np.int64, np.int32, np.uint8, np.float64):
        occupancy = omnihd_occupancy.read(save(tmp_path / "a.npz", rows.astype(dtype)), 5)
        assert occupancy.label[120, 80, 6] == 1
        assert occupancy.label[239, 159, 15] == 11
        assert occupancy.occupied.sum() == 4
    assert (occupancy.grid.min_corner, occupancy.grid.max_corner) == ((-60, -40, -3), (60, 40, 5))
    np.testing.assert_allclose(occupancy.grid.center(np.array([[120, 80, 6]])), [[0.25, 0.25, 0.25]])
    np.testing.assert_array_equal(occupancy.grid.ego_from_grid.matrix, np.eye(4))
    assert len(omnihd_occupancy.CLASSES) == 12
    assert omnihd_occupancy.CLASSES[occupancy.free_label] == "free"
    assert omnihd_occupancy.grid(Pose.from_yaw(1.0)).shape == (240, 160, 16)


def test_round_trip_and_path(tmp_path: Path) -> None:
    path = omnihd_occupancy.file_path(tmp_path, "1693714828633418/lidar/lidar_top_compensation/1693714828733400.bin")
    assert path == tmp_path / "1693714828633418" / "occ_gt" / "1693714828733400.npz"
    label = np.random.default_rng(0).integers(0, 12, (240, 160, 16)).astype(np.uint8)
    occupancy = OccupancyGrid3D(omnihd_occupancy.grid(), label, omnihd_occupancy.CLASSES, 0, 7)
    omnihd_occupancy.write(path, occupancy)
    np.testing.assert_array_equal(omnihd_occupancy.read(path, 7).label, label)


@pytest.mark.parametrize(
    ("rows", "key", "message"),
    [
        (np.zeros((3, 4), np.int64), "semantics", "has no array occ_gt; it holds semantics"),
        (np.zeros((3, 3), np.int64), "occ_gt", r"expected rows of 4 numbers, got \(3, 3\)"),
        (np.full((3, 4), 0.5), "occ_gt", r"3 of 3 rows are no whole numbers"),
        (np.array([[240, 0, 0, 1]]), "occ_gt", r"1 of 1 rows lie outside the grid \(240, 160, 16\)"),
        (np.array([[0, 0, 0, 12]]), "occ_gt", "label 12 in 1 voxels; the layout knows 0 to 11"),
        (np.array([[0, 0, 0, 255]]), "occ_gt", "label 255; this layout ignores no voxel"),
        (np.zeros((700_000, 4), np.int64), "occ_gt", r"is 22,400,000 bytes, more than the 19,660,800"),
    ],
)
def test_foreign_files(tmp_path: Path, rows: np.ndarray, key: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        omnihd_occupancy.read(save(tmp_path / "a.npz", rows, key), 0)


def test_missing_and_truncated(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        omnihd_occupancy.read(tmp_path / "none.npz", 0)
    path = save(tmp_path / "a.npz", np.zeros((50, 4), np.int64))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"not a whole \.npz archive"):
        omnihd_occupancy.read(path, 0)


def test_the_writer_refuses_other_layouts(tmp_path: Path) -> None:
    label = np.full((240, 160, 16), 255, np.uint8)
    occupancy = OccupancyGrid3D(omnihd_occupancy.grid(), label, omnihd_occupancy.CLASSES, 0, 7)
    with pytest.raises(ValueError, match="has no ignored voxels"):
        omnihd_occupancy.write(tmp_path / "a.npz", occupancy)
    other = OccupancyGrid3D(omnihd_occupancy.grid(), label, ("free", "car"), 0, 7)
    with pytest.raises(ValueError, match="expected the classes"):
        omnihd_occupancy.write(tmp_path / "a.npz", other)
