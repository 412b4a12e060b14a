"""SurroundOcc: rows are x, y, z (OpenOccupancy's the other way round); 0 is ignored; absent is free."""

from __future__ import annotations

import numpy as np
import pytest

from perception.datasets import openoccupancy, surroundocc
from perception.errors import DataError
from perception.geometry import grid_points
from perception.types import IGNORE_LABEL, OccupancyGrid3D, Pose

EGO_FROM_LIDAR = Pose.from_yaw(-np.pi / 2, (0.94, 0.0, 1.84))


def test_rows_are_x_y_z_label_in_the_lidars_frame(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[104, 160, 6, 4], [0, 0, 0, 0]]))
    occupancy = surroundocc.read(tmp_path / "a.npy", EGO_FROM_LIDAR, 7)
    assert occupancy.classes[occupancy.label[104, 160, 6]] == "car"
    assert occupancy.label[0, 0, 0] == IGNORE_LABEL
    assert (occupancy.label == surroundocc.FREE_LABEL).sum() == 200 * 200 * 16 - 2
    center = grid_points(occupancy.grid, np.argwhere(occupancy.occupied))
    np.testing.assert_allclose(center, [[30.25 + 0.94, -2.25, -1.75 + 1.84]], atol=1e-9)
    np.testing.assert_allclose(occupancy.grid.max_corner, (50, 50, 3))


def test_of_rows_of_one_voxel_the_last_wins(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 1, 1, 4], [1, 1, 1, 4], [1, 1, 1, 9]]))
    assert surroundocc.read(tmp_path / "a.npy", EGO_FROM_LIDAR, 0).label[1, 1, 1] == 9


def test_classes_are_openoccupancys():
    assert surroundocc.CLASSES == openoccupancy.CLASSES
    assert len(surroundocc.CLASSES) == 17


def test_written_and_read_back(tmp_path):
    grid = surroundocc.grid(EGO_FROM_LIDAR)
    label = np.random.default_rng(0).choice([0, 0, 0, *range(1, 17), IGNORE_LABEL], grid.shape).astype(np.uint8)
    path = surroundocc.file_path(tmp_path, "samples/LIDAR_TOP/n015__LIDAR_TOP__153.pcd.bin")
    surroundocc.write(path, OccupancyGrid3D(grid, label, surroundocc.CLASSES, 0, 0))
    assert path == tmp_path / "samples/n015__LIDAR_TOP__153.pcd.bin.npy"
    np.testing.assert_array_equal(surroundocc.read(path, EGO_FROM_LIDAR, 0).label, label)


def test_a_file_of_openoccupancy_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[3, 400, 400, 4]]))
    with pytest.raises(DataError, match=r"outside the grid \(200, 200, 16\).*\n.*another layout"):
        surroundocc.read(tmp_path / "a.npy", EGO_FROM_LIDAR, 0)
    grid = openoccupancy.grid(EGO_FROM_LIDAR)
    other = OccupancyGrid3D(grid, np.zeros(grid.shape, np.uint8), openoccupancy.CLASSES, 0, 0)
    with pytest.raises(ValueError, match=r"SurroundOcc: expected \(200, 200, 16\) voxels"):
        surroundocc.write(tmp_path / "b.npy", other)


def test_foreign_and_missing_files(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[3, 3, 3, 99]]))
    with pytest.raises(DataError, match="label 99 in 1 voxels"):
        surroundocc.read(tmp_path / "a.npy", EGO_FROM_LIDAR, 0)
    with pytest.raises(DataError, match=r"No such file or directory\n.*SurroundOcc"):
        surroundocc.read(tmp_path / "b.npy", EGO_FROM_LIDAR, 0)
