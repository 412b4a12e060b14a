from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.types import Pose, VoxelGrid
from perception.voxelize import hard_voxels, mean_voxels, padded_voxels

GRID = VoxelGrid((-2.0, -1.0, -0.5), (0.5, 0.25, 0.5), (8, 6, 3), Pose.identity())
NUSCENES = VoxelGrid((-54.0, -54.0, -5.0), (0.075, 0.075, 0.2), (1440, 1440, 40), Pose.identity())


def cell_of(point: np.ndarray, grid: VoxelGrid) -> tuple[int, ...] | None:
    """The plain definition, one axis at a time, in the points' float type."""
    cell = []
    for axis in range(3):
        with np.errstate(all="ignore"):
            c = np.floor(
                (point[axis] - point.dtype.type(grid.min_corner[axis])) / point.dtype.type(grid.voxel_size[axis])
            )
        if not 0 <= c < grid.shape[axis]:
            return None
        cell.append(int(c))
    return tuple(cell)


def hard_by_loop(points: np.ndarray, grid: VoxelGrid, max_points: int, max_voxels: int, stop_when_full: bool = False):
    """mmdet3d's sequential definition: visit the points in order."""
    voxels: dict[tuple[int, ...], list[np.ndarray]] = {}
    refused: set[tuple[int, ...]] = set()
    outside = dropped = 0
    for point in points:
        cell = cell_of(point, grid)
        if cell is None:
            outside += 1
        elif cell not in voxels and len(voxels) == max_voxels:
            refused.add(cell)
        elif len(voxels.setdefault(cell, [])) == max_points or (refused and stop_when_full):
            dropped += 1
        else:
            voxels[cell].append(point)
    out = np.zeros((len(voxels), max_points, points.shape[1]), points.dtype)
    for v, kept in enumerate(voxels.values()):
        out[v, : len(kept)] = kept
    index = np.array(list(voxels), np.int64).reshape(-1, 3)
    return out, index, np.array([len(k) for k in voxels.values()], np.int64), outside, dropped, len(refused)


def random_points(n: int, seed: int, channels: int = 5, grid: VoxelGrid = GRID) -> np.ndarray:
    """Some outside, many exactly on the borders between voxels."""
    rng = np.random.default_rng(seed)
    low, high = np.array(grid.min_corner), np.array(grid.max_corner)
    xyz = rng.uniform(low - 0.2, high + 0.2, (n, 3))
    snap = rng.random((n, 3)) < 0.3
    xyz = np.where(snap, low + np.round((xyz - low) / grid.voxel_size) * grid.voxel_size, xyz)
    return np.concatenate([xyz, rng.normal(size=(n, channels - 3))], 1).astype(np.float32)


def assert_hard_equal(got, expected) -> None:
    points, index, count, outside, dropped, refused = expected
    np.testing.assert_array_equal(np.asarray(got.points), points)
    np.testing.assert_array_equal(np.asarray(got.index), index)
    np.testing.assert_array_equal(np.asarray(got.count), count)
    assert (got.outside, got.points_dropped, got.voxels_dropped) == (outside, dropped, refused)


@settings(max_examples=150)
@given(st.integers(0, 300), st.integers(0, 1000), st.integers(1, 5), st.integers(1, 150), st.booleans())
def test_hard_voxels_are_those_of_the_sequential_loop(n, seed, max_points, max_voxels, stop):
    points = random_points(n, seed)
    expected = hard_by_loop(points, GRID, max_points, max_voxels, stop)
    assert_hard_equal(hard_voxels(points, GRID, max_points, max_voxels, stop_when_full=stop), expected)
    assert_hard_equal(
        hard_voxels(torch.from_numpy(points), GRID, max_points, max_voxels, stop_when_full=stop), expected
    )


@settings(max_examples=100)
@given(st.integers(0, 300), st.integers(0, 1000), st.integers(1, 5), st.integers(1, 150), st.booleans())
def test_padded_voxels_are_the_hard_ones_whatever_comes_as_padding(n, seed, max_points, max_voxels, stop):
    points = torch.from_numpy(random_points(n, seed))
    want = hard_voxels(points, GRID, max_points, max_voxels, stop_when_full=stop)
    padding = torch.full((17, points.shape[1]), torch.nan)
    got = padded_voxels(torch.cat([points, padding]), GRID, max_points, max_voxels, stop_when_full=stop)
    kept = len(want.count)
    for name in ("points", "index", "count"):
        rows = getattr(got, name)
        assert len(rows) == max_voxels
        assert torch.equal(rows[:kept], getattr(want, name)), name
        assert not rows[kept:].any(), name
    assert int(got.found) == kept + want.voxels_dropped


def test_hard_voxels_of_four_points():
    # Two voxels, in order of appearance; the third is beyond the cap. A later point of the first still enters it, the
    # one after that does not.
    points = np.float32(
        [
            [1.1, 0.1, 0.1, 1],
            [0.1, 0.1, 0.1, 2],
            [2.1, 0.1, 0.1, 3],
            [1.2, 0.1, 0.1, 4],
            [1.3, 0.1, 0.1, 5],
            [9, 0, 0, 6],
        ]
    )
    got = hard_voxels(points, VoxelGrid((0, 0, 0), (1, 1, 1), (4, 4, 4), Pose.identity()), max_points=2, max_voxels=2)
    np.testing.assert_array_equal(got.points[..., 3], [[1, 4], [2, 0]])
    np.testing.assert_array_equal(got.index, [[1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(got.count, [2, 1])
    assert (got.outside, got.points_dropped, got.voxels_dropped) == (1, 1, 1)


def test_cells_are_found_in_float32_as_the_official_code_finds_them():
    # In float64 1.0 / 0.2 floors to 5 and 0.6 / 0.2 to 2; rounded to float32 the latter quotient is 3.
    grid = VoxelGrid((0, 0, 0), (0.2, 0.2, 0.2), (10, 10, 10), Pose.identity())
    point = np.array([[0.6, 1.0, 0.2]])
    assert hard_voxels(point, grid, 1, 1).index.tolist() == [[2, 5, 1]]
    assert hard_voxels(point.astype(np.float32), grid, 1, 1).index.tolist() == [[3, 5, 1]]


def test_the_full_nuscenes_grid_against_the_loop():
    points = random_points(3000, 7, grid=NUSCENES)
    points[1500:] = points[:1500]  # so that voxels hold more than one point
    assert_hard_equal(hard_voxels(points, NUSCENES, 10, 1200), hard_by_loop(points, NUSCENES, 10, 1200))


@settings(max_examples=100)
@given(st.integers(0, 300), st.integers(0, 1000))
def test_mean_voxels_are_the_means_of_their_points(n, seed):
    points = random_points(n, seed)
    got = mean_voxels(points, GRID)
    cells = [cell_of(p, GRID) for p in points]
    order = sorted({c for c in cells if c is not None})
    assert got.index.tolist() == [list(c) for c in order]
    assert got.voxel_of_point.tolist() == [order.index(c) if c is not None else -1 for c in cells]
    for v, c in enumerate(order):
        mine = points[[i for i, other in enumerate(cells) if other == c]]
        assert got.count[v] == len(mine)
        np.testing.assert_array_equal(got.features[v], mine.astype(np.float64).mean(0).astype(np.float32))


def test_mean_voxels_agree_between_numpy_and_torch():
    points = random_points(500, 3)
    a, b = mean_voxels(points, GRID), mean_voxels(torch.from_numpy(points), GRID)
    assert isinstance(a.features, np.ndarray)
    assert isinstance(b.features, torch.Tensor)
    for name in ("features", "index", "count", "voxel_of_point"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name).numpy())


def test_no_points_and_none_inside():
    for points in (np.zeros((0, 4), np.float32), np.full((3, 4), 100, np.float32)):
        hard, mean = hard_voxels(points, GRID, 10, 100), mean_voxels(points, GRID)
        assert hard.points.shape == (0, 10, 4)
        assert hard.index.shape == mean.index.shape == (0, 3)
        assert mean.features.shape == (0, 4)
        assert hard.outside == len(points)
        assert mean.voxel_of_point.tolist() == [-1] * len(points)


@pytest.mark.filterwarnings("error")
def test_read_only_points_and_those_of_the_other_byte_order_serve_as_well():
    points = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
    frozen = np.frombuffer(points.tobytes(), np.float32).reshape(4, 3)  # as a memory-mapped file gives them
    for other in (frozen, points.astype(">f4"), np.asfortranarray(points)):
        np.testing.assert_array_equal(mean_voxels(other, GRID).features, mean_voxels(points, GRID).features)


def test_far_and_non_finite_points_are_outside():
    points = np.float32([[np.nan, 0, 0], [np.inf, 0, 0], [0, -np.inf, 0], [1e30, 0, 0], [0, 0, -1e30], [0, 0, 0]])
    assert hard_voxels(points, GRID, 1, 10).outside == 5


def test_indices_do_not_wrap_in_a_grid_of_more_than_2_to_the_31_voxels():
    grid = VoxelGrid((0, 0, 0), (1, 1, 1), (1440 * 64, 1440, 40), Pose.identity())  # a batch of 64 along x
    last = (1440 * 64 - 1, 1439, 39)
    points = np.float32([[*last, 1], [0, 0, 0, 2]]) + np.float32([0.5, 0.5, 0.5, 0])
    assert np.prod(grid.shape, dtype=np.int64) > 2**31
    assert hard_voxels(points, grid, 1, 2).index.tolist() == [list(last), [0, 0, 0]]
    assert mean_voxels(points, grid).index.tolist() == [[0, 0, 0], list(last)]


def test_the_cells_are_those_of_the_grid_type():
    points = random_points(1000, 11)
    index, inside = GRID.index(points[:, :3])
    got = mean_voxels(points, GRID)
    np.testing.assert_array_equal(got.voxel_of_point >= 0, inside)
    np.testing.assert_array_equal(got.index[got.voxel_of_point[inside]], index[inside])


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"expected points \(N, C >= 3\) float, got \(4, 2\) torch.float32"):
        mean_voxels(np.zeros((4, 2), np.float32), GRID)
    with pytest.raises(ValueError, match=r"got \(4, 3\) torch.int64"):
        hard_voxels(np.zeros((4, 3), np.int64), GRID, 1, 1)
    with pytest.raises(ValueError, match="max_points 0 and max_voxels 5 must be at least 1"):
        hard_voxels(np.zeros((4, 3)), GRID, 0, 5)


def test_open3d_counts_the_same_voxels():
    o3d = pytest.importorskip("open3d")
    grid = VoxelGrid((-2.0, -1.0, -0.5), (0.5, 0.5, 0.5), (8, 4, 4), Pose.identity())
    points = np.random.default_rng(0).uniform((-2, -1, -0.5), (2, 1, 1.5), (2000, 3))
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))
    voxels = o3d.geometry.VoxelGrid.create_from_point_cloud_within_bounds(
        cloud, 0.5, np.array(grid.min_corner), np.array(grid.max_corner)
    )
    theirs = sorted(tuple(int(i) for i in v.grid_index) for v in voxels.get_voxels())
    assert [tuple(i) for i in mean_voxels(points, grid).index.tolist()] == theirs


@pytest.mark.gpu
@pytest.mark.parametrize("n", [0, 1, 20_000])
def test_cuda_gives_the_same_bits(n):
    points = random_points(n, 5, grid=NUSCENES)
    points[n // 2 :] = points[: n - n // 2]
    on_gpu = torch.from_numpy(points).cuda()
    cpu, gpu = hard_voxels(points, NUSCENES, 10, 6000), hard_voxels(on_gpu, NUSCENES, 10, 6000)
    for name in ("points", "index", "count"):
        assert getattr(gpu, name).device.type == "cuda"
        np.testing.assert_array_equal(getattr(gpu, name).cpu().numpy(), getattr(cpu, name))
    assert (cpu.outside, cpu.points_dropped, cpu.voxels_dropped) == (
        gpu.outside,
        gpu.points_dropped,
        gpu.voxels_dropped,
    )
    cpu_mean, gpu_mean = mean_voxels(points, GRID), mean_voxels(on_gpu, GRID)  # coarse: hundreds of points per voxel
    for name in ("features", "index", "count", "voxel_of_point"):
        np.testing.assert_array_equal(getattr(gpu_mean, name).cpu().numpy(), getattr(cpu_mean, name))


@pytest.mark.gpu
def test_cuda_divides_as_the_cpu_does():
    """A division by a scalar would become a product with its reciprocal there, and move points on voxel borders."""
    points = np.zeros((1_000_000, 3), np.float32)
    points[:, 0] = np.random.default_rng(0).uniform(-54, 54, len(points))
    points[::2, 0] = np.float32(-54) + np.arange(500_000, dtype=np.float32) % 1440 * np.float32(0.075)
    a, b = mean_voxels(points, NUSCENES), mean_voxels(torch.from_numpy(points).cuda(), NUSCENES)
    np.testing.assert_array_equal(a.voxel_of_point, b.voxel_of_point.cpu().numpy())
