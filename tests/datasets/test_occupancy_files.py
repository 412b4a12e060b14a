"""Arrays are believed only after they fit: what a damaged or foreign .npy and .npz says."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from perception.datasets.occupancy_files import check_labels, check_layout, read_npy, read_npz, voxels_of_rows
from perception.errors import DataError
from perception.types import OccupancyGrid3D, Pose, VoxelGrid

GRID = VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (4, 3, 2), Pose.identity())


def _npy_header(shape: str, descr: str = "'<i4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("array", [np.arange(12).reshape(3, 4), np.asfortranarray(np.arange(6.0).reshape(2, 3))])
def test_npy_and_npz_read_what_numpy_wrote(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", first=array, second=array + 1)
    np.testing.assert_array_equal(read_npy(tmp_path / "a.npy", 1000, "a test"), array)
    second, first = read_npz(tmp_path / "a.npz", ("second", "first"), 1000, "a test")
    np.testing.assert_array_equal(first, array)
    np.testing.assert_array_equal(second, array + 1)


def test_an_empty_array_is_read(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 4), np.int64))
    assert read_npy(tmp_path / "a.npy", 10, "a test").shape == (0, 4)


def test_a_huge_shape_is_refused_before_it_is_allocated(tmp_path):
    (tmp_path / "a.npy").write_bytes(_npy_header("(1099511627776, 4)") + b"\0" * 16)
    with pytest.raises(DataError, match=r"17,592,186,044,416 bytes, more than the 1,000 of this layout"):
        read_npy(tmp_path / "a.npy", 1000, "a test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_npy_header("(3, 4)") + b"\0" * 40, r"needs 48 bytes, there are 40"),
        (_npy_header("(3, 4)") + b"\0" * 56, r"needs 48 bytes, there are 56"),
        (_npy_header("(3,)", "'|O'") + b"\0" * 24, r"holds object, not numbers"),
        (_npy_header("(-3, 4)") + b"\0" * 48, r"needs -48 bytes"),
        (_npy_header("(3, 'x')"), r"not a \.npy array"),
        (b"", r"not a \.npy array"),
        (b"PK\x03\x04 something else", r"not a \.npy array \(the magic string"),
    ],
)
def test_damaged_npy(tmp_path, content, message):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_npy(tmp_path / "a.npy", 1000, "a test")
    assert str(tmp_path / "a.npy") in str(error.value)


def test_a_pickle_is_never_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="holds object, not numbers"):
        read_npy(tmp_path / "a.npy", 10_000, "a test")


def test_missing_files_say_where_they_come_from(tmp_path):
    for read in (lambda p: read_npy(p, 10, "the X download"), lambda p: read_npz(p, ("a",), 10, "the X download")):
        with pytest.raises(DataError, match=r"nowhere: No such file or directory\n.*part of the X download"):
            read(tmp_path / "nowhere")


def test_damaged_npz(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.arange(1000))
    with pytest.raises(DataError, match="has no array b; it holds a"):
        read_npz(path, ("a", "b"), 10_000, "a test")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"not a whole \.npz archive"):
        read_npz(path, ("a",), 10_000, "a test")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"not a whole \.npz archive"):
        read_npz(path, ("a",), 10_000, "a test")


def test_a_zip_bomb_is_refused(tmp_path):
    stream = io.BytesIO(_npy_header("(1000000, 4)") + b"\0" * 16_000_000)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", stream.getvalue())
    with pytest.raises(DataError, match=r"a\.npz\[a\].*more than the 1,000"):
        read_npz(tmp_path / "a.npz", ("a",), 1000, "a test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((2, 3), np.int64), r"expected rows of 4 numbers, got \(2, 3\) int64"),
        (np.array([[0, 0, 0, 1], [0, 0.5, 0, 1]]), r"1 of 2 rows are no whole numbers: \[0.0, 0.5, 0.0, 1.0\]"),
        (np.array([[0, 0, np.nan, 1]]), r"1 of 1 rows are no whole numbers"),
        (
            np.array([[0, 0, 0, 1], [1, 4, 0, 1]]),
            r"1 of 2 rows lie outside the grid \(4, 3, 2\): \(x, y, z\) = \(0, 4, 1\)",
        ),
        (np.array([[-1, 0, 0, 1]]), r"outside the grid"),
        (np.array([[0, 0, 0, 256]]), r"labels 256 to 256"),
        (np.array([[0, 0, 0, -1]]), r"labels -1 to -1"),
    ],
)
def test_rows_of_another_layout(rows, message):
    with pytest.raises(DataError, match=message):
        voxels_of_rows(rows, (2, 1, 0), GRID, "a file")


def test_rows_become_linear_indices():
    index, label = voxels_of_rows(np.array([[1, 2, 3, 9]], np.uint16), (2, 1, 0), GRID, "a file")
    assert np.unravel_index(index, GRID.shape) == (3, 2, 1)
    assert label.tolist() == [9]


def test_index_and_label_beside_velocities_are_floats():
    rows = np.array([[1, 2, 3, -0.25, 7.5, np.nan, 9]], np.float32)
    index, label = voxels_of_rows(rows, (2, 1, 0), GRID, "a file")
    assert np.unravel_index(index, GRID.shape) == (3, 2, 1)
    assert label.tolist() == [9]


def test_a_negative_label_is_no_class_and_not_the_ignored_one():
    check_labels(np.array([0, 1, 255]), ("free", "car"), "a file")
    with pytest.raises(DataError, match="label -1 in 2 voxels; the layout knows 0 to 1"):
        check_labels(np.array([-1, 0, -1]), ("free", "car"), "a file")


def test_an_occupancy_of_another_layout_is_not_written():
    occupancy = OccupancyGrid3D(GRID, np.zeros(GRID.shape, np.uint8), ("free", "car"), 0, 0)
    check_layout(occupancy, GRID, ("free", "car"), "X")
    with pytest.raises(ValueError, match="X: expected the classes"):
        check_layout(occupancy, GRID, ("car", "free"), "X")
    shifted = VoxelGrid((0.0, 0.0, 0.5), (1.0, 1.0, 1.0), (4, 3, 2), Pose.identity())
    with pytest.raises(ValueError, match=r"X: expected \(4, 3, 2\) voxels .* from \(0.0, 0.0, 0.5\), got"):
        check_layout(occupancy, shifted, ("free", "car"), "X")
