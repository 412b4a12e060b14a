"""Completion volumes: bit order, both releases' grids, pooling against a plain loop."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from perception.datasets import semantickitti_voxels as voxels
from perception.errors import DataError
from perception.types import IGNORE_LABEL, OccupancyGrid3D, Pose

EGO_FROM_LIDAR = Pose(np.eye(3), np.array([0.0, 0.0, 1.73]))


def test_bits_are_most_significant_first_in_x_y_z_order(tmp_path):
    data = np.zeros(256 * 256 * 32 // 8, np.uint8)
    x, y, z = 3, 7, 9
    byte, bit = divmod((x * 256 + y) * 32 + z, 8)
    data[byte] = 0x80 >> bit
    data.tofile(tmp_path / "000000.bin")
    assert np.argwhere(voxels.read_voxels(tmp_path / "000000.bin")).tolist() == [[x, y, z]]


def test_labels_are_in_x_y_z_order(tmp_path):
    data = np.zeros(256 * 256 * 32, "<u2")
    data[(3 * 256 + 7) * 32 + 9] = 252  # a moving car
    data.tofile(tmp_path / "000000.label")
    label = voxels.read_label_voxels(tmp_path / "000000.label")
    assert label[3, 7, 9] == 1
    assert label.sum() == 1


def test_the_releases_differ_by_one_voxel():
    new, old = voxels.grid(EGO_FROM_LIDAR), voxels.grid(EGO_FROM_LIDAR, "v1.0")
    np.testing.assert_allclose(new.max_corner, (51.2, 25.6, 4.4))
    point = np.array([[10.05, -3.05, -1.65]], np.float32)
    (index_new, _), (index_old, _) = new.index(point), old.index(point)
    np.testing.assert_array_equal(index_old - index_new, [[0, 0, 1]])
    np.testing.assert_array_equal(index_new, [[50, 112, 1]])


SCANNED = np.random.default_rng(1).random(voxels.SHAPE) < 0.01


def _occupancy(observed: bool, version: voxels.VoxelVersion = "v1.1") -> OccupancyGrid3D:
    rng = np.random.default_rng(0)
    label = rng.choice([0, *range(20), IGNORE_LABEL], voxels.SHAPE).astype(np.uint8)
    seen = {"lidar": (rng.random(voxels.SHAPE) < 0.3) | SCANNED} if observed else {}
    return OccupancyGrid3D(voxels.grid(EGO_FROM_LIDAR, version), label, voxels.CLASSES, 0, 4, observed=seen)


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
def test_written_and_read_back(tmp_path, observed, version):
    written = _occupancy(observed, version)
    path = voxels.file_path(tmp_path, "08", 5)
    assert path == tmp_path / "sequences/08/voxels/000005.label"
    voxels.write(path, written, SCANNED, version)
    read = voxels.read(path, EGO_FROM_LIDAR, 4, version)
    np.testing.assert_array_equal(read.label, written.label)
    assert read.grid.min_corner == written.grid.min_corner
    assert set(read.observed) == set(written.observed)
    if observed:
        np.testing.assert_array_equal(read.observed["lidar"], written.observed["lidar"])
    sizes = {p.suffix: p.stat().st_size for p in path.parent.iterdir()}
    bits = {".bin": 262_144, ".invalid": 262_144} | ({".occluded": 262_144} if observed else {})
    assert sizes == {".label": 4_194_304} | bits
    np.testing.assert_array_equal(voxels.read_voxels(path.with_suffix(".bin")), SCANNED)
    if observed:  # as in the official files
        assert voxels.read_voxels(path.with_suffix(".occluded"))[SCANNED].all()


def test_an_occupancy_of_the_other_release_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"SemanticKITTI v1\.1: expected .* from \(0.0, -25.6, -2.0\), got .* -2.2\)"):
        voxels.write(tmp_path / "000000.label", _occupancy(False, "v1.0"), SCANNED, "v1.1")


def test_predictions_hold_raw_ids_and_nothing_ignored(tmp_path):
    label = np.zeros(voxels.SHAPE, np.uint8)
    label[1, 2, 3] = 19
    voxels.write_label_voxels(tmp_path / "p.label", label)
    assert np.fromfile(tmp_path / "p.label", "<u2").reshape(voxels.SHAPE)[1, 2, 3] == 81
    label[0, 0, 0] = IGNORE_LABEL
    with pytest.raises(ValueError, match="label 255 has no raw id"):
        voxels.write_label_voxels(tmp_path / "p.label", label)
    with pytest.raises(ValueError, match=r"expected \(256, 256, 32\) uint8, got \(256, 256, 31\)"):
        voxels.write_label_voxels(tmp_path / "p.label", label[..., :31])


def test_missing_and_truncated(tmp_path):
    path = tmp_path / "000000.label"
    with pytest.raises(DataError, match=r"000000\.label: No such file or directory\n.*voxel download"):
        voxels.read(path, EGO_FROM_LIDAR, 0)
    voxels.write(path, _occupancy(False), SCANNED)
    path.with_suffix(".invalid").unlink()
    with pytest.raises(DataError, match=r"000000\.invalid: No such file"):
        voxels.read(path, EGO_FROM_LIDAR, 0)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"000000\.label: 4,194,302 bytes; expected 4,194,304"):
        voxels.read(path, EGO_FROM_LIDAR, 0)


def _pool_plainly(label, factor):
    pooled = np.zeros([n // factor for n in label.shape], np.uint8)
    for x, y, z in np.ndindex(pooled.shape):
        where = tuple(slice(i * factor, (i + 1) * factor) for i in (x, y, z))
        block = Counter(label[where].ravel().tolist())
        scored = {k: n for k, n in block.items() if k not in (0, IGNORE_LABEL)}
        if scored:
            pooled[x, y, z] = min(k for k, n in scored.items() if n == max(scored.values()))
        else:
            pooled[x, y, z] = 0 if 0 in block else IGNORE_LABEL
    return pooled


@given(
    hnp.arrays(np.uint8, (8, 8, 8), elements=st.sampled_from([0, 1, 2, 19, IGNORE_LABEL])), st.sampled_from([2, 4, 8])
)
def test_pooling_agrees_with_a_plain_loop(label, factor):
    np.testing.assert_array_equal(voxels.pool_labels(label, factor), _pool_plainly(label, factor))


def test_pooling_rules():
    block = np.zeros((2, 2, 2), np.uint8)
    assert voxels.pool_labels(block, 2).item() == 0
    block[0, 0] = IGNORE_LABEL
    assert voxels.pool_labels(block, 2).item() == 0
    block[:] = IGNORE_LABEL
    assert voxels.pool_labels(block, 2).item() == IGNORE_LABEL
    block[1, 1, 0] = 9  # one scored voxel outvotes seven others
    assert voxels.pool_labels(block, 2).item() == 9
    block[0, 0, 0] = 4  # a draw: the smaller label
    assert voxels.pool_labels(block, 2).item() == 4
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\) is no multiple of 4"):
        voxels.pool_labels(block, 4)
