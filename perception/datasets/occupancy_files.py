"""What the occupancy layouts share: arrays checked before they are read, rows of voxels, and the layout's own grid.

An array file states its own shape. It is believed only after it fits a bound and the bytes that are there, so that a
damaged or foreign file costs an error and not the memory. Pickled arrays are never opened.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from perception.errors import DataError
from perception.types import IGNORE_LABEL, Array, OccupancyGrid3D, VoxelGrid


def read_npy(path: Path, max_bytes: int, source: str) -> Array:
    """The array of a `.npy` file.

    Args:
        path: the file.
        max_bytes: more than any file of this layout holds.
        source: where such files come from, for the message.

    Raises:
        DataError: the file is missing, no `.npy`, pickled, larger than `max_bytes` or truncated.
    """
    try:
        with path.open("rb") as stream:
            return _read_array(stream, path.stat().st_size, str(path), max_bytes, source)
    except OSError as error:
        raise _unreadable(path, error, source) from error


def read_npz(path: Path, keys: Sequence[str], max_bytes: int, source: str) -> tuple[Array, ...]:
    """The named arrays of a `.npz` file, each of `max_bytes` at most. Raises DataError as `read_npy`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            absent = [key for key in keys if key not in members]
            if absent:
                raise DataError(
                    f"{path}: has no array {', '.join(absent)}; it holds {', '.join(members) or 'nothing'}",
                    f"expected a file of {source}",
                )
            arrays = []
            for key in keys:
                with archive.open(members[key]) as stream:
                    arrays.append(_read_array(stream, members[key].file_size, f"{path}[{key}]", max_bytes, source))
            return tuple(arrays)
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:  # RuntimeError: encrypted, unknown method
        raise DataError(f"{path}: not a whole .npz archive: {error}", f"copy it again from {source}") from error
    except OSError as error:
        raise _unreadable(path, error, source) from error


def _unreadable(path: Path, error: OSError, source: str) -> DataError:
    return DataError(f"{path}: {error.strerror or error}", f"it is part of {source}; the path is made from its root")


def _read_array(stream: IO[bytes], size: int, where: str, max_bytes: int, source: str) -> Array:
    """One `.npy` stream of `size` bytes: header, then exactly the values that it announces."""
    try:
        if (version := np.lib.format.read_magic(stream)) != (1, 0):
            raise ValueError(f"format version {version}; numbers are saved as (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, TypeError, SyntaxError) as error:
        raise DataError(f"{where}: not a .npy array ({error})", f"expected a file of {source}") from error
    if dtype.kind not in "biuf":
        raise DataError(f"{where}: holds {dtype}, not numbers", "pickled or structured arrays are never opened")
    body = math.prod(shape) * dtype.itemsize
    if body > max_bytes:
        raise DataError(
            f"{where}: {shape} {dtype} is {body:,} bytes, more than the {max_bytes:,} of this layout",
            f"expected a file of {source}",
        )
    if size - stream.tell() != body:
        raise DataError(
            f"{where}: {shape} {dtype} needs {body:,} bytes, there are {size - stream.tell():,}",
            f"the file is damaged; copy it again from {source}",
        )
    return np.frombuffer(stream.read(body), dtype).reshape(shape, order="F" if fortran else "C")


def voxels_of_rows(rows: Array, columns: Sequence[int], grid: VoxelGrid, where: str) -> tuple[Array, Array]:
    """Rows of one voxel each -> linear indices (N,) int64 in [x, y, z] C order, and the raw label of the last column.

    Args:
        rows: (N, 4 or more); index and label are whole numbers in any type (beside velocities they stand as floats).
        columns: which columns hold the x, y and z index.
        grid: the layout's grid.
        where: names the file, for the message.

    Raises:
        DataError: another shape or kind of number, an index outside the grid, or a label outside 0 to 255.
    """
    if rows.ndim != 2 or rows.shape[1] < 4:
        raise DataError(
            f"{where}: expected rows of 4 numbers, got {rows.shape} {rows.dtype}", "is it a file of another layout?"
        )
    read = rows[:, [*columns, -1]]  # (N, 4)
    with np.errstate(invalid="ignore"):
        whole = read.astype(np.int64)
    if (broken := (whole != read).any(1)).any():
        raise DataError(
            f"{where}: {int(broken.sum())} of {len(rows)} rows are no whole numbers: {read[broken][0].tolist()}",
            "is it a file of another layout?",
        )
    index, label = whole[:, :3], whole[:, 3]
    outside = ((index < 0) | (index >= grid.shape)).any(1)
    if outside.any():
        raise DataError(
            f"{where}: {int(outside.sum())} of {len(rows)} rows lie outside the grid {grid.shape}: "
            f"(x, y, z) = {tuple(index[outside][0].tolist())}",
            "is it a file of another layout or resolution?",
        )
    if len(label) and not 0 <= label.min() <= label.max() <= 255:
        raise DataError(f"{where}: labels {label.min()} to {label.max()}", "is it a file of another layout?")
    return np.ravel_multi_index(tuple(index.T), grid.shape), label


def check_labels(label: Array, classes: tuple[str, ...], where: str) -> None:
    """Raise DataError unless every label names a class or is IGNORE_LABEL."""
    unknown = label[((label < 0) | (label >= len(classes))) & (label != IGNORE_LABEL)]
    if len(unknown):
        raise DataError(
            f"{where}: label {int(unknown[0])} in {len(unknown)} voxels; the layout knows 0 to {len(classes) - 1}",
            "is it a file of another layout?",
        )


def check_layout(occupancy: OccupancyGrid3D, grid: VoxelGrid, classes: tuple[str, ...], layout: str) -> None:
    """Raise ValueError unless an occupancy has a layout's extent, resolution and classes; its frame is not compared."""
    given = occupancy.grid
    extent = np.array([given.min_corner, given.voxel_size]), np.array([grid.min_corner, grid.voxel_size])
    if given.shape != grid.shape or not np.allclose(*extent, atol=1e-6):
        raise ValueError(
            f"{layout}: expected {grid.shape} voxels of {grid.voxel_size} m from {grid.min_corner}, "
            f"got {given.shape} of {given.voxel_size} m from {given.min_corner}"
        )
    if occupancy.classes != classes:
        raise ValueError(f"{layout}: expected the classes {classes}, got {occupancy.classes}")
