"""OpenOccupancy: rows are z, y, x; 0 is noise; absent is free; the grid hangs on the LiDAR."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perception.datasets import openoccupancy
from perception.errors import DataError
from perception.geometry import grid_points
from perception.types import IGNORE_LABEL, OccupancyGrid3D, Pose

# nuScenes' LIDAR_TOP: x right, y forward, 1.84 m above ego.
EGO_FROM_LIDAR = Pose.from_yaw(-np.pi / 2, (0.94, 0.0, 1.84))


def _save(path: Path, rows: list[list[int]], dtype: type = np.int64) -> Path:
    np.save(path, np.array(rows, dtype).reshape(len(rows), -1))
    return path


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_rows_are_z_y_x_label(tmp_path, dtype):
    path = _save(tmp_path / "a.npy", [[5, 10, 20, 4], [39, 511, 0, 16], [0, 0, 0, 0]], dtype)
    occupancy = openoccupancy.read(path, EGO_FROM_LIDAR, 7)
    assert openoccupancy.CLASSES[occupancy.label[20, 10, 5]] == "car"
    assert openoccupancy.CLASSES[occupancy.label[0, 511, 39]] == "vegetation"
    assert occupancy.label[0, 0, 0] == IGNORE_LABEL
    assert (occupancy.label == openoccupancy.FREE_LABEL).sum() == 512 * 512 * 40 - 3
    assert occupancy.occupied.sum() == 2
    assert occupancy.stamp_ns == 7


def test_a_voxel_ahead_of_the_lidar_is_ahead_of_ego(tmp_path):
    # 30.1 m along the LiDAR's y (forward), 2.1 m along its x (right), 1.9 m below it.
    path = _save(tmp_path / "a.npy", [[15, 406, 266, 11]])
    occupancy = openoccupancy.read(path, EGO_FROM_LIDAR, 0)
    center = grid_points(occupancy.grid, np.argwhere(occupancy.occupied))
    np.testing.assert_allclose(center, [[30.1 + 0.94, -2.1, -1.9 + 1.84]], atol=1e-9)
    np.testing.assert_allclose(occupancy.grid.max_corner, (51.2, 51.2, 3.0))


def test_the_label_is_the_last_of_seven_columns(tmp_path):
    occupancy = openoccupancy.read(_save(tmp_path / "a.npy", [[1, 2, 3, 9, 9, 9, 7]]), EGO_FROM_LIDAR, 0)
    assert occupancy.label[3, 2, 1] == 7


def test_rows_of_one_voxel_vote(tmp_path):
    rows = [[0, 0, 0, 11]] * 2 + [[0, 0, 0, 4]] * 3 + [[0, 0, 1, 16], [0, 0, 1, 4]] + [[0, 0, 2, 0], [0, 0, 2, 9]]
    rng = np.random.default_rng(0)
    occupancy = openoccupancy.read(_save(tmp_path / "a.npy", rng.permutation(rows).tolist()), EGO_FROM_LIDAR, 0)
    assert occupancy.label[0, 0, 0] == 4  # three against two
    assert occupancy.label[1, 0, 0] == 4  # a draw: the smaller label
    assert occupancy.label[2, 0, 0] == 9  # a draw with noise, which counts as 255


def test_written_and_read_back(tmp_path):
    rng = np.random.default_rng(1)
    grid = openoccupancy.grid(EGO_FROM_LIDAR)
    label = np.zeros(grid.shape, np.uint8)
    label[rng.integers(0, 512, 5000), rng.integers(0, 512, 5000), rng.integers(0, 40, 5000)] = rng.choice(
        [*range(1, 17), IGNORE_LABEL], 5000
    )
    path = openoccupancy.file_path(tmp_path, "scene", "lidar")
    openoccupancy.write(path, OccupancyGrid3D(grid, label, openoccupancy.CLASSES, 0, 3))
    assert path == tmp_path / "nuScenes-Occupancy/scene_scene/occupancy/lidar.npy"
    occupancy = openoccupancy.read(path, EGO_FROM_LIDAR, 3)
    np.testing.assert_array_equal(occupancy.label, label)
    assert len(np.load(path)) == (label != 0).sum()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 0, 512, 1]], r"1 of 1 rows lie outside the grid \(512, 512, 40\): \(x, y, z\) = \(512, 0, 0\)"),
        ([[40, 0, 0, 1]], r"\(x, y, z\) = \(0, 0, 40\)"),
        ([[0, 0, 0, 17]], r"label 17 in 1 voxels; the layout knows 0 to 16"),
        ([[0, 0, 0, 1, 1]], r"5 columns; expected 4 or 7"),
    ],
)
def test_files_of_another_layout(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        openoccupancy.read(_save(tmp_path / "a.npy", rows), EGO_FROM_LIDAR, 0)


def test_missing_and_truncated(tmp_path):
    with pytest.raises(DataError, match=r"No such file or directory\n.*nuScenes-Occupancy v0\.1"):
        openoccupancy.read(tmp_path / "a.npy", EGO_FROM_LIDAR, 0)
    path = _save(tmp_path / "a.npy", [[0, 0, 0, 1]] * 10)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="needs 320 bytes, there are 311"):
        openoccupancy.read(path, EGO_FROM_LIDAR, 0)
