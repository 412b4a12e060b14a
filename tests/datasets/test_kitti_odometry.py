"""Files of a KITTI odometry sequence: exact text, whole binaries, the camera chain; checked on real calibrations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception.datasets import kitti_odometry as kitti
from perception.errors import DataError
from perception.types import Pose

OPTICAL_FROM_LIDAR = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
INTRINSIC = np.array([[700.0, 0.0, 600.0], [0.0, 710.0, 180.0], [0.0, 0.0, 1.0]])


def _calibration() -> kitti.Calibration:
    # The camera 0.06 m right of cam0: its coordinates are cam0's less 0.06 in x.
    projection = INTRINSIC @ np.concatenate([np.eye(3), [[-0.06], [0.0], [0.0]]], 1)
    return kitti.Calibration(Pose(OPTICAL_FROM_LIDAR, np.array([0.0, -0.08, -0.27])), projection)


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=20, unique=True))
def test_times_keep_every_nanosecond(tmp_path_factory, stamps):
    path = tmp_path_factory.mktemp("times") / "times.txt"
    kitti.write_times(path, sorted(stamps))
    assert kitti.read_times(path) == sorted(stamps)


def test_times_in_scientific_notation_are_exact(tmp_path):
    (tmp_path / "times.txt").write_text("0.000000e+00\n1.037359e-01\n4.705791e+02\n")
    assert kitti.read_times(tmp_path / "times.txt") == [0, 103_735_900, 470_579_100_000]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.0\nx\n", r"times\.txt:2: 'x' is no number of seconds"),
        ("0.0\nnan\n", r"times\.txt:2: 'nan' is no number of seconds"),
        ("0.0\n1.0\n1.0\n", r"times\.txt:3: 1\.0 s is not after the line before"),
        ("\n", r"times\.txt: empty"),
        ("\xff", r"times\.txt: not a text file"),
    ],
)
def test_damaged_times(tmp_path, text, message):
    (tmp_path / "times.txt").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        kitti.read_times(tmp_path / "times.txt")


def test_calibration_written_and_read_back(tmp_path):
    written = _calibration()
    kitti.write_calibration(tmp_path / "calib.txt", written)
    read = kitti.read_calibration(tmp_path / "calib.txt")
    np.testing.assert_allclose(read.projection, written.projection, atol=1e-9)
    np.testing.assert_allclose(read.cam0_from_lidar.matrix, written.cam0_from_lidar.matrix, atol=1e-12)
    np.testing.assert_allclose(read.intrinsic, INTRINSIC, atol=1e-9)


def test_the_chain_to_the_camera_is_p2_times_tr():
    calibration = _calibration()
    point_lidar = np.array([10.0, 1.0, 0.5, 1.0])
    u, v, w = calibration.projection @ calibration.cam0_from_lidar.matrix @ point_lidar
    x, y, z = calibration.lidar_from_camera.inverse().apply(point_lidar[:3])
    np.testing.assert_allclose((u / w, v / w), (700 * x / z + 600, 710 * y / z + 180))
    np.testing.assert_allclose((x, y, z), (-1.0 - 0.06, -0.5 - 0.08, 10 - 0.27))


def test_a_sequence_without_camera(tmp_path):
    kitti.write_calibration(tmp_path / "calib.txt", kitti.Calibration(_calibration().cam0_from_lidar, None))
    read = kitti.read_calibration(tmp_path / "calib.txt")
    assert read.intrinsic is None
    assert read.lidar_from_camera is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("P2: 1 0 0 0 0 1 0 0 0 0 1 0\n", r"no line 'Tr:'; it has P2\n.*data_odometry_calib"),
        ("Tr: 1 0 0 0 0 1 0 0 0 0 1\n", r"Tr: expected 12 numbers, got '1 0 0"),
        ("Tr: 1 0 0 0 0 1 0 0 0 0 x 0\n", r"Tr: expected 12 numbers"),
        ("Tr: 2 0 0 0 0 1 0 0 0 0 1 0\n", r"Tr: not a rigid transform"),
        ("Tr: -1 0 0 0 0 1 0 0 0 0 1 0\n", r"Tr: not a rigid transform"),
        ("Tr: 1 0 0 0 0 1 0 0 0 0 1 0\nP2: 0 0 0 0 0 1 0 0 0 0 1 0\n", r"P2 is no projection"),
    ],
)
def test_damaged_calibration(tmp_path, text, message):
    (tmp_path / "calib.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        kitti.read_calibration(tmp_path / "calib.txt")


def test_poses_turn_upright(tmp_path):
    """One metre ahead in the camera's map (z) is one metre ahead in the LiDAR's (x); a turn to the left stays one."""
    left_optical = np.array([[np.cos(0.3), 0, -np.sin(0.3)], [0, 1, 0], [np.sin(0.3), 0, np.cos(0.3)]])
    kitti.write_poses(tmp_path / "poses.txt", [Pose.identity(), Pose(left_optical, np.array([0.0, 0.0, 1.0]))])
    rows = kitti.read_poses(tmp_path / "poses.txt")
    calibration = kitti.Calibration(Pose(OPTICAL_FROM_LIDAR, np.zeros(3)), None)
    first, second = (kitti.map_from_lidar(row, calibration, "a test") for row in rows)
    np.testing.assert_allclose(first.matrix, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(second.translation, [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(second.yaw, 0.3, atol=1e-12)


def test_a_damaged_pose(tmp_path):
    (tmp_path / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n1 0 0 0\n")
    with pytest.raises(DataError, match=r"poses\.txt:2: expected 12 numbers"):
        kitti.read_poses(tmp_path / "poses.txt")
    with pytest.raises(DataError, match="somewhere: not a rigid transform"):
        kitti.map_from_lidar(np.full((3, 4), 0.5), _calibration(), "somewhere")


def test_scans_keep_order_and_bits(tmp_path):
    rng = np.random.default_rng(0)
    xyz, reflectance = rng.normal(0, 30, (1000, 3)).astype(np.float32), rng.random(1000).astype(np.float32)
    kitti.write_scan(tmp_path / "a.bin", xyz, reflectance)
    read = kitti.read_scan(tmp_path / "a.bin")
    np.testing.assert_array_equal(read[0], xyz)
    np.testing.assert_array_equal(read[1], reflectance)


@pytest.mark.parametrize(
    ("size", "message"), [(0, "0 bytes, which is no whole number of 16-byte"), (1000, "1,000 bytes, which is no whole")]
)
def test_truncated_scans(tmp_path, size, message):
    (tmp_path / "a.bin").write_bytes(b"\0" * size)
    with pytest.raises(DataError, match=message):
        kitti.read_scan(tmp_path / "a.bin")


def test_a_scan_with_nan_is_foreign(tmp_path):
    np.array([[1, 2, 3, 0], [np.nan, 0, 0, 0]], np.float32).tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin: 1 of 2 points are not finite"):
        kitti.read_scan(tmp_path / "a.bin")


def test_images_are_rgb_and_whole(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    kitti.write_image(tmp_path / "a.png", rgb)
    np.testing.assert_array_equal(kitti.read_image(tmp_path / "a.png"), rgb)
    whole = (tmp_path / "a.png").read_bytes()
    for damaged in (whole[:-20], b"\xff\xd8 a JPEG?"):
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(DataError, match="not a whole PNG"):
            kitti.read_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"b\.png: No such file"):
        kitti.read_image(tmp_path / "b.png")


@pytest.mark.parametrize("sequence", ["00", "03"])
def test_real_calibrations(shared_data, sequence):
    folder = shared_data / "semantickitti/sequences" / sequence
    calibration = kitti.read_calibration(folder / "calib.txt")
    x, y, z = calibration.lidar_from_camera.translation
    # KITTI's drawing: the cameras are 0.27 m ahead of the LiDAR and 0.08 m below it; the left colour one 0.06 m left.
    assert 0.2 < x < 0.4
    assert 0.0 < y < 0.12
    assert -0.15 < z < 0.0
    stamps = kitti.read_times(folder / "times.txt")
    assert len(stamps) == len(kitti.read_poses(folder / "poses.txt"))
    np.testing.assert_allclose(np.diff(stamps) / 1e9, 0.1037, atol=0.01)
