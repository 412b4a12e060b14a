"""LiDAR, radar and point-label files of nuScenes: against bytes made by hand, the devkit, and damage."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.datasets.nuscenes_files import (
    RADAR_POINT,
    read_labels,
    read_lidar,
    read_radar,
    write_lidar,
    write_radar,
)
from perception.errors import DataError

HEADER = """# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS x y z dyn_prop id rcs vx vy vx_comp vy_comp is_quality_valid ambig_state x_rms y_rms invalid_state pdh0 \
vx_rms vy_rms
SIZE 4 4 4 1 2 4 4 4 4 4 1 1 1 1 1 1 1 1
TYPE F F F I I F F F F F I I I I I I I I
COUNT 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1
WIDTH 2
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS 2
DATA binary
"""
FIRST = (1.5, -2.0, 0.0, 6, 300, 12.5, -1.0, 0.5, 3.0, -0.25, 1, 3, 19, 20, 4, 2, 17, 3)
SECOND = (9.0, 4.0, 0.0, 1, 301, -5.0, 0.0, 0.0, 0.0, 0.0, 1, 4, 1, 2, 17, 7, 5, 6)
BODY = struct.pack("<fffbhfffffbbbbbbbb", *FIRST) + struct.pack("<fffbhfffffbbbbbbbb", *SECOND)


def radar_file(tmp_path: Path, header: str = HEADER, body: bytes = BODY) -> Path:
    path = tmp_path / "radar.pcd"
    path.write_bytes(header.encode() + body)
    return path


def test_radar_is_read_byte_for_byte(tmp_path: Path):
    xyz, fields = read_radar(radar_file(tmp_path))
    np.testing.assert_array_equal(xyz, np.array([FIRST[:3], SECOND[:3]], np.float32))
    assert list(fields) == HEADER.splitlines()[2].split()[4:]
    for k, values in enumerate(fields.values(), 3):
        assert values.tolist() == [FIRST[k], SECOND[k]]
    assert fields["id"].dtype == np.int16
    assert fields["invalid_state"].tolist() == [4, 17]  # every state is kept


def test_padding_after_the_last_point_is_not_read(tmp_path: Path):
    assert len(read_radar(radar_file(tmp_path, body=BODY + bytes(4000)))[0]) == 2


def test_a_row_of_nan_is_an_empty_cloud(tmp_path: Path):
    nothing = np.zeros(2, RADAR_POINT)
    nothing[["x", "y", "z"]] = np.nan
    xyz, fields = read_radar(radar_file(tmp_path, body=nothing.tobytes()))
    assert xyz.shape == (0, 3)
    assert {len(values) for values in fields.values()} == {0}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("DATA binary", "DATA ascii", "no PCD header that ends in 'DATA binary'"),
        ("WIDTH 2\n", "WIDTH 3\n", "WIDTH '3', POINTS '2'"),
        ("WIDTH 2\n", "WIDTH -2\n", "WIDTH '-2'"),
        ("HEIGHT 1\n", "HEIGHT 2\n", "HEIGHT 2; nuScenes radars have 1"),
        (" vy_rms", " power", "FIELDS .* power; nuScenes radars have x y z"),
        ("SIZE 4 4 4 1 2", "SIZE 4 4 4 1 4", "SIZE 4 4 4 1 4"),
    ],
)
def test_foreign_radar_headers_are_named(tmp_path: Path, old: str, new: str, message: str):
    with pytest.raises(DataError, match=rf"radar.pcd: .*{message}"):
        read_radar(radar_file(tmp_path, HEADER.replace(old, new)))


def test_a_truncated_radar_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="2 points need 86 bytes, there are 85"):
        read_radar(radar_file(tmp_path, body=BODY[:-1]))
    huge = HEADER.replace("WIDTH 2", "WIDTH 99999999999").replace("POINTS 2", "POINTS 99999999999")
    with pytest.raises(DataError, match="99999999999 points need 4,299,999,999,957 bytes"):
        read_radar(radar_file(tmp_path, huge))


@settings(max_examples=20)
@given(st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_radar_comes_back_and_the_devkit_agrees(tmp_path_factory: pytest.TempPathFactory, n: int, seed: int):
    from nuscenes.utils.data_classes import RadarPointCloud

    rng = np.random.default_rng(seed)
    points = np.zeros(n, RADAR_POINT)
    for name in RADAR_POINT.names or ():
        kind = RADAR_POINT[name]
        if kind.kind == "f":
            points[name] = rng.normal(0, 50, n)
        else:
            points[name] = rng.integers(np.iinfo(kind).min, np.iinfo(kind).max + 1, n)
    path = tmp_path_factory.mktemp("radar") / "x.pcd"
    write_radar(path, points)
    xyz, fields = read_radar(path)
    assert xyz.shape == (n, 3)
    for name, values in fields.items():
        np.testing.assert_array_equal(values, points[name])
    every = range(-128, 128)
    cloud = RadarPointCloud.from_file(str(path), invalid_states=every, dynprop_states=every, ambig_states=every)
    np.testing.assert_array_equal(cloud.points, np.array([points[name] for name in RADAR_POINT.names or ()]))


@pytest.mark.parametrize("n", [0, 1, 100])
def test_lidar_comes_back_and_the_devkit_agrees(tmp_path: Path, n: int):
    from nuscenes.utils.data_classes import LidarPointCloud

    rng = np.random.default_rng(n)
    xyz = rng.normal(0, 30, (n, 3)).astype(np.float32)
    intensity, ring = rng.uniform(0, 255, n).astype(np.float32), rng.integers(0, 32, n)
    path = tmp_path / "x.pcd.bin"
    write_lidar(path, xyz, intensity, ring)
    assert path.stat().st_size == 20 * n
    read, fields = read_lidar(path)
    np.testing.assert_array_equal(read, xyz)
    np.testing.assert_array_equal(fields["intensity"], intensity)
    np.testing.assert_array_equal(fields["ring"], ring)
    np.testing.assert_array_equal(LidarPointCloud.from_file(str(path)).points.T, np.c_[xyz, intensity])


def test_labels_must_fit_the_cloud(tmp_path: Path):
    path = tmp_path / "x_lidarseg.bin"
    path.write_bytes(bytes([1, 2, 31]))
    assert read_labels(path, 3).tolist() == [1, 2, 31]
    with pytest.raises(DataError, match="3 labels for a cloud of 4 points"):
        read_labels(path, 4)
