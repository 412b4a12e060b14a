"""The sensor files of nuScenes v1.0 beside its JPEGs: LiDAR `.pcd.bin`, radar `.pcd`, point labels `_lidarseg.bin`.

* LiDAR: rows of five little-endian float32: x, y, z, intensity (0 to 255), ring. No header.
* Radar: PCD v0.7, `DATA binary`, packed rows of `RADAR_POINT`. One row of NaN stands for an empty cloud; bytes after
  the last point are padding.
* Point labels: one uint8 per point of the key frame, an index of the category table.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perception.datasets.sensor_files import read_bytes, read_floats, write_floats
from perception.errors import DataError
from perception.types import Array

SOURCE = "nuScenes (the archives of samples/ and sweeps/)"

_AGAIN = f"copy it again from {SOURCE}"


def read_lidar(path: Path) -> tuple[Array, dict[str, Array]]:
    """A LiDAR file -> xyz (N, 3) float32 in metres, and the fields `intensity` (N,) float32, `ring` (N,) int32.

    Raises:
        DataError: the file is missing, truncated, or its numbers are not those of this layout.
    """
    points = read_floats(path, 5, SOURCE)
    ring = points[:, 4].astype(np.int32)
    if len(ring) and (ring.min() < 0 or (ring != points[:, 4]).any()):
        raise DataError(
            f"{path}: the fifth column ({points[:, 4].min():.4g} to {points[:, 4].max():.4g}) is no ring number",
            "rows are x, y, z, intensity, ring; a file of four columns is of another data set",
        )
    return points[:, :3].copy(), {"intensity": points[:, 3].copy(), "ring": ring}


def write_lidar(path: Path, xyz: Array, intensity: Array, ring: Array) -> None:
    """Write xyz (N, 3), intensity (N,) and ring (N,)."""
    write_floats(path, [xyz, intensity, ring])


def read_labels(path: Path, points: int) -> Array:
    """(points,) uint8 lidarseg values; DataError where the file is missing or has another number of them."""
    labels = np.frombuffer(read_bytes(path, SOURCE), np.uint8)
    if len(labels) != points:
        raise DataError(f"{path}: {len(labels)} labels for a cloud of {points} points", _AGAIN)
    return labels


RADAR_POINT = np.dtype(
    [
        ("x", "<f4"),
        ("y", "<f4"),
        ("z", "<f4"),
        ("dyn_prop", "<i1"),
        ("id", "<i2"),
        ("rcs", "<f4"),
        ("vx", "<f4"),
        ("vy", "<f4"),
        ("vx_comp", "<f4"),
        ("vy_comp", "<f4"),
        ("is_quality_valid", "<i1"),
        ("ambig_state", "<i1"),
        ("x_rms", "<i1"),
        ("y_rms", "<i1"),
        ("invalid_state", "<i1"),
        ("pdh0", "<i1"),
        ("vx_rms", "<i1"),
        ("vy_rms", "<i1"),
    ]
)
"""One radar return (Continental ARS 408 clusters; the devkit's `RadarPointCloud` lists the states).

Metres, m/s, dBsm. `vx, vy` are relative to the moving car, `vx_comp, vy_comp` have its motion removed. `dyn_prop` 0
moving to 7 stopped; `ambig_state` 3 is unambiguous; `invalid_state` 0 is valid; `pdh0` grows with the chance of an
artefact; `*_rms` are coded accuracies.
"""

RADAR_STATES = {
    "id": 0,
    "dyn_prop": 0,
    "is_quality_valid": 1,
    "ambig_state": 3,
    "x_rms": 0,
    "y_rms": 0,
    "invalid_state": 0,
    "pdh0": 1,
    "vx_rms": 0,
    "vy_rms": 0,
}
"""What is written for a radar without such states: a return that the devkit's default filters keep."""

_PCD_DATA = b"DATA binary\n"
_COLUMNS = [RADAR_POINT[name] for name in RADAR_POINT.names or ()]
_PCD_COLUMNS = {
    "FIELDS": " ".join(RADAR_POINT.names or ()),
    "SIZE": " ".join(str(column.itemsize) for column in _COLUMNS),
    "TYPE": " ".join("F" if column.kind == "f" else "I" for column in _COLUMNS),
    "COUNT": " ".join("1" for _ in _COLUMNS),
}


def read_radar(path: Path) -> tuple[Array, dict[str, Array]]:
    """A radar file -> xyz (N, 3) float32 in metres, and every other field of `RADAR_POINT` under its own name.

    Returns of every state are kept; rows that are not finite (how an empty cloud is written) are dropped.

    Raises:
        DataError: the file is missing, truncated, or its header is not that of this layout.
    """
    data = read_bytes(path, SOURCE)
    head, found, body = data.partition(_PCD_DATA)
    if not found or len(head) > 4096:
        raise DataError(f"{path}: no PCD header that ends in 'DATA binary'", _AGAIN)
    lines = (line.split(" ", 1) for line in head.decode("ascii", "replace").splitlines() if " " in line)
    header = {key: value.strip() for key, value in lines}
    for key, expected in (_PCD_COLUMNS | {"HEIGHT": "1"}).items():
        if header.get(key) != expected:
            raise DataError(
                f"{path}: PCD header has {key} {header.get(key, '(absent)')}; nuScenes radars have {expected}",
                "is it a cloud of another data set?",
            )
    width = header.get("WIDTH", "")
    if not width.isdigit() or header.get("POINTS") != width:
        raise DataError(f"{path}: PCD header has WIDTH {width!r}, POINTS {header.get('POINTS')!r}", _AGAIN)
    if (needed := int(width) * RADAR_POINT.itemsize) > len(body):
        raise DataError(f"{path}: {width} points need {needed:,} bytes, there are {len(body):,}", _AGAIN)
    points = np.frombuffer(body, RADAR_POINT, int(width))
    columns = {name: points[name] for name in RADAR_POINT.names or ()}
    finite = np.logical_and.reduce([np.isfinite(column) for column in columns.values()])
    xyz = np.stack([columns.pop(axis)[finite] for axis in "xyz"], 1)
    return xyz, {name: column[finite] for name, column in columns.items()}


def write_radar(path: Path, points: Array) -> None:
    """Write (N,) structured `RADAR_POINT`."""
    if not len(points):
        points = np.zeros(1, RADAR_POINT)
        points[["x", "y", "z"]] = np.nan
    header = {"VERSION": "0.7"} | _PCD_COLUMNS
    header |= {"WIDTH": str(len(points)), "HEIGHT": "1", "VIEWPOINT": "0 0 0 1 0 0 0", "POINTS": str(len(points))}
    head = "# .PCD v0.7 - Point Cloud Data file format\n" + "".join(f"{k} {v}\n" for k, v in header.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    # The devkit reads by line number and asserts that a byte follows the last point.
    path.write_bytes(head.encode() + _PCD_DATA + points.astype(RADAR_POINT).tobytes() + b"\n")
