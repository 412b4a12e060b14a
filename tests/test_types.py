from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from perception.types import (
    IGNORE_LABEL,
    Boxes3D,
    CameraImage,
    Dataset,
    Gnss,
    Imu,
    Localization,
    Needs,
    OccupancyGrid3D,
    Odometry,
    PointCloud,
    Pose,
    Sample,
    Segmentation,
    Truth,
    VoxelGrid,
)

unit = st.floats(-1, 1, allow_nan=False)
metres = st.floats(-1e4, 1e4, allow_nan=False)
quaternions = st.tuples(unit, unit, unit, unit).filter(lambda q: np.linalg.norm(q) > 0.1)
poses = st.builds(Pose.from_quaternion, quaternions, st.tuples(metres, metres, metres))


# --- Pose -------------------------------------------------------------------------------------------------------------


@given(poses, poses, poses)
def test_poses_form_a_group(a, b, c):
    np.testing.assert_allclose(((a @ b) @ c).matrix, (a @ (b @ c)).matrix, atol=1e-7)
    np.testing.assert_allclose((a @ a.inverse()).matrix, np.eye(4), atol=1e-8)
    np.testing.assert_allclose((a @ b).matrix, a.matrix @ b.matrix, atol=1e-7)
    np.testing.assert_array_equal((a @ Pose.identity()).matrix, a.matrix)


@given(poses, poses)
def test_a_product_applies_right_to_left(a, b):
    points = np.array([[1.0, 2, 3], [-4, 5, -6]])
    np.testing.assert_allclose((a @ b).apply(points), a.apply(b.apply(points)), atol=1e-7)
    np.testing.assert_allclose(a.inverse().apply(a.apply(points)), points, atol=1e-7)


@given(quaternions)
def test_quaternions_agree_with_scipy_and_come_back(xyzw):
    pose, theirs = Pose.from_quaternion(xyzw), Rotation.from_quat(xyzw)
    np.testing.assert_allclose(pose.rotation, theirs.as_matrix(), atol=1e-12)
    assert abs(pose.quaternion @ theirs.as_quat()) == pytest.approx(1, abs=1e-12)  # q and -q are one rotation
    assert pose.quaternion[3] >= 0


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, -1, 1)])
def test_quaternions_of_half_turns_are_well_conditioned(axis):
    for angle in (np.pi, np.pi - 1e-8, np.pi - 1e-4):
        rotation = Rotation.from_rotvec(np.array(axis) / np.linalg.norm(axis) * angle)
        back = Pose.from_quaternion(Pose(rotation.as_matrix(), np.zeros(3)).quaternion)
        np.testing.assert_allclose(back.rotation, rotation.as_matrix(), atol=1e-12)


def test_a_quarter_turn_to_the_left():
    pose = Pose.from_yaw(np.pi / 2, (10, 20, 30))
    np.testing.assert_allclose(pose.apply(np.array([1.0, 2, 3])), [8, 21, 33], atol=1e-12)
    assert pose.yaw == pytest.approx(np.pi / 2)
    np.testing.assert_allclose(pose.quaternion, [0, 0, np.sqrt(0.5), np.sqrt(0.5)])
    assert Pose.from_yaw(np.pi).yaw == pytest.approx(np.pi)


def test_apply_keeps_dtype_and_shape_and_computes_in_double():
    far = Pose.from_yaw(0.0, (1e6, 0, 0))
    near = np.float32([[0.125, 0, 0]])
    moved = far.apply(near)
    assert moved.dtype == np.float32
    # The two translations cancel before anything is rounded to float32.
    np.testing.assert_array_equal((Pose.from_yaw(0.0, (-1e6, 0, 0)) @ far).apply(near), near)
    assert far.apply(np.zeros((2, 5, 3))).shape == (2, 5, 3)
    assert far.apply(np.zeros((0, 3), np.float32)).shape == (0, 3)
    np.testing.assert_array_equal(Pose.from_yaw(0.0, (0.5, 0, 0)).apply(np.array([1, 2, 3])), [1.5, 2, 3])


def test_matrices_of_three_or_four_rows():
    pose = Pose.from_yaw(0.3, (1, 2, 3))
    np.testing.assert_array_equal(Pose.from_matrix(pose.matrix).matrix, pose.matrix)
    np.testing.assert_array_equal(Pose.from_matrix(pose.matrix[:3].tolist()).matrix, pose.matrix)


def test_what_is_no_rotation_is_refused():
    with pytest.raises(ValueError, match=r"not a rotation \(\|R R\^T - 1\| = 3, det = 8\)"):
        Pose(2 * np.eye(3), np.zeros(3))
    with pytest.raises(ValueError, match=r"not a rotation .*det = -1"):
        Pose(np.diag([1.0, 1, -1]), np.zeros(3))
    with pytest.raises(ValueError, match=r"Pose.translation: expected \(3\) float64, got \(4,\) float64"):
        Pose(np.eye(3), np.zeros(4))
    with pytest.raises(ValueError, match=r"Pose.translation: 1 of 3 values are not finite"):
        Pose(np.eye(3), np.array([0, np.nan, 0]))
    with pytest.raises(ValueError, match=r"Pose.rotation: expected \(3, 3\) float64, got \(3, 3\) float32"):
        Pose(np.eye(3, dtype=np.float32), np.zeros(3))
    for bad in ((0, 0, 0, 0), (0, 0, 1), (0, 0, np.nan, 1)):
        with pytest.raises(ValueError, match=r"expected four numbers \(x, y, z, w\) of non-zero norm"):
            Pose.from_quaternion(bad)


# --- PointCloud -------------------------------------------------------------------------------------------------------


def cloud(n: int = 3, **fields: np.ndarray) -> PointCloud:
    return PointCloud(np.arange(3 * n, dtype=np.float32).reshape(n, 3), fields, Pose.from_yaw(0, (1, 0, 0)), 5)


def test_a_cloud_selects_all_its_fields():
    picked = cloud(3, ring=np.array([4, 5, 6])).select(np.array([True, False, True]))
    np.testing.assert_array_equal(picked.field("ring"), [4, 6])
    np.testing.assert_array_equal(picked.xyz, [[0, 1, 2], [6, 7, 8]])
    np.testing.assert_array_equal(cloud(3, ring=np.array([4, 5, 6])).select(np.array([2, 0])).field("ring"), [6, 4])
    np.testing.assert_array_equal(picked.xyz_ego(), [[1, 1, 2], [7, 7, 8]])
    assert len(cloud(0)) == 0
    assert picked.stamp_ns == 5


def test_a_missing_field_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match=r"point cloud has fields \(x, y, z, ring\); 'intensity' is needed"):
        cloud(1, ring=np.array([1])).field("intensity")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ring": np.zeros(2)}, r"fields\['ring'\]: expected \(3\) .*, got \(2,\)"),
        ({"intensity": np.array([0, np.inf, 0])}, r"fields\['intensity'\]: 1 of 3 values are not finite"),
        ({"name": np.array(["a", "b", "c"])}, r"fields\['name'\]"),
        ({"time_lag": np.array([0, -0.1, 0])}, r"fields\['time_lag'\]: expected seconds >= 0, got -0.1"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        cloud(3, **fields)


def test_bad_points_and_stamps_are_refused():
    with pytest.raises(ValueError, match=r"PointCloud.xyz: expected \(N, 3\) float32, got \(2, 3\) float64"):
        PointCloud(np.zeros((2, 3)), {}, Pose.identity(), 0)
    with pytest.raises(ValueError, match=r"PointCloud.xyz: expected a numpy array, got list"):
        PointCloud([[0, 0, 0]], {}, Pose.identity(), 0)  # type: ignore[arg-type]
    for stamp in (1.5, True, np.int64(3), None):
        with pytest.raises(ValueError, match=r"PointCloud.stamp_ns: expected an int of nanoseconds"):
            PointCloud(np.zeros((0, 3), np.float32), {}, Pose.identity(), stamp)  # type: ignore[arg-type]


def test_types_are_frozen_and_have_no_stray_attributes():
    with pytest.raises(dataclasses.FrozenInstanceError):
        cloud().stamp_ns = 3  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        cloud().stamp = 3  # type: ignore[attr-defined]


def test_types_survive_a_worker_process():
    sample = Sample(7, lidars={"top": cloud(2, ring=np.array([1, 2]))}, odom_from_ego=Pose.from_yaw(0.1), token="a")
    back = pickle.loads(pickle.dumps(sample))
    np.testing.assert_array_equal(back.lidars["top"].xyz, sample.lidars["top"].xyz)
    assert (back.stamp_ns, back.token) == (7, "a")


# --- The other readings -----------------------------------------------------------------------------------------------


def test_an_image_is_bytes_with_a_pinhole():
    k, rgb = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]]), np.zeros((80, 100, 3), np.uint8)
    CameraImage(rgb, k, Pose.identity(), 0)
    with pytest.raises(ValueError, match=r"CameraImage.rgb: expected \(H, W, 3\) uint8, got \(80, 100, 3\) float64"):
        CameraImage(rgb / 255.0, k, Pose.identity(), 0)
    with pytest.raises(ValueError, match="positive focal lengths and last row"):
        CameraImage(rgb, np.zeros((3, 3)), Pose.identity(), 0)
    with pytest.raises(ValueError, match="positive focal lengths and last row"):
        CameraImage(rgb, k * 2, Pose.identity(), 0)


@pytest.mark.parametrize("reading", [Imu, Odometry])
def test_readings_have_one_row_per_stamp(reading):
    reading(np.arange(4), np.zeros((4, 3)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"expected \(4, 3\) floating, got \(3, 3\)"):
        reading(np.arange(4), np.zeros((4, 3)), np.zeros((3, 3)))


def test_a_fix_is_on_the_globe():
    Gnss(48.1, 11.6, 500.0, np.eye(3), 0)
    with pytest.raises(ValueError, match=r"latitude 11\.6, longitude 481"):
        Gnss(11.6, 481.0, 500.0, np.eye(3), 0)


def test_a_localization_has_a_known_status_and_a_symmetric_covariance():
    Localization(Pose.identity(), np.diag([1e6, 1, 1, 1, 1, 1e-6]), 12, "degenerate", 0)
    with pytest.raises(ValueError, match="'fine' is none of ok, degenerate"):
        Localization(Pose.identity(), np.eye(6), 0, "fine", 0)  # type: ignore[arg-type]
    lopsided = np.eye(6)
    lopsided[0, 1] = 0.1
    with pytest.raises(ValueError, match="not symmetric"):
        Localization(Pose.identity(), lopsided, 0, "ok", 0)


# --- VoxelGrid --------------------------------------------------------------------------------------------------------

GRID = VoxelGrid((-2.0, 0.0, 1.0), (0.5, 1.0, 0.25), (8, 4, 4), Pose.identity())


def test_a_cell_holds_its_lower_faces_and_not_its_upper():
    index, inside = GRID.index(
        np.array([[-2, 0, 1], [-1.5, 1, 1.25], [2, 0, 1], [1.999, 3.999, 1.999], [-2.001, 0, 1]])
    )
    np.testing.assert_array_equal(index[:2], [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(index[3], [7, 3, 3])
    np.testing.assert_array_equal(inside, [True, True, False, True, False])
    assert GRID.max_corner == (2.0, 4.0, 2.0)


def test_integer_points_meet_a_corner_that_is_no_integer():
    grid = VoxelGrid((-0.5, -0.5, -0.5), (0.25, 0.25, 0.25), (4, 4, 4), Pose.identity())
    np.testing.assert_array_equal(grid.index(np.array([[0, 0, 0]]))[0], [[2, 2, 2]])


def test_the_index_of_a_centre_is_its_own():
    index = np.argwhere(np.ones(GRID.shape, bool))
    back, inside = GRID.index(GRID.center(index))
    np.testing.assert_array_equal(back, index)
    assert inside.all()
    np.testing.assert_allclose(GRID.center(np.array([[0, 0, 0]])), [[-1.75, 0.5, 1.125]])


def test_points_far_away_are_outside_however_far():
    far = np.array([[1e30, 0.5, 1.1], [-1e30, 0.5, 1.1], [0, 1e25, 1.1]], np.float32)
    with np.errstate(all="raise"):
        assert not GRID.index(far)[1].any()


def test_a_grid_has_extent():
    with pytest.raises(ValueError, match="must be positive"):
        VoxelGrid((0, 0, 0), (1, 0, 1), (1, 1, 1), Pose.identity())
    with pytest.raises(ValueError, match="must be positive"):
        VoxelGrid((0, 0, 0), (1, 1, 1), (1, 0, 1), Pose.identity())
    with pytest.raises(ValueError, match="expected three values each"):
        VoxelGrid((0, 0), (1, 1, 1), (1, 1, 1), Pose.identity())  # type: ignore[arg-type]


# --- Boxes and occupancy ----------------------------------------------------------------------------------------------


def boxes(m: int = 2, **changes) -> Boxes3D:
    fields = {
        "center": np.arange(3.0 * m).reshape(m, 3),
        "size": np.ones((m, 3)),
        "yaw": np.zeros(m),
        "velocity": np.zeros((m, 2)),
        "score": np.ones(m),
        "label": np.arange(m) % 2,
        "classes": ("car", "truck"),
        "stamp_ns": 0,
    }
    return Boxes3D(**{**fields, **changes})


def test_boxes_select_all_that_belongs_to_them():
    given = boxes(
        3,
        attribute=np.array(["a", "b", ""]),
        track_id=np.array(["1", "2", "3"]),
        num_points=np.array([5, 6, 7]),
        num_radar_points=np.array([1, 2, 3]),
        visibility=np.array([4, 3, 0]),
    )
    for picked in (
        given.select(np.array([2, 0])),
        given.select(np.array([True, False, True])).select(np.array([1, 0])),
    ):
        np.testing.assert_array_equal(picked.center[:, 0], [6, 0])
        assert picked.attribute.tolist() == ["", "a"]
        assert picked.track_id.tolist() == ["3", "1"]
        assert picked.num_points.tolist() == [7, 5]
        assert picked.num_radar_points.tolist() == [3, 1]
        assert picked.visibility.tolist() == [0, 4]
    assert boxes(2).select(np.array([0])).attribute is None


def test_unknown_velocities_are_nan_and_no_boxes_are_boxes():
    boxes(2, velocity=np.full((2, 2), np.nan))
    none = Boxes3D.empty(("car",), 3)
    assert (len(none), none.stamp_ns, none.center.shape) == (0, 3, (0, 3))
    assert len(none.select(np.zeros(0, bool))) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": np.array([[1, 1, 1], [1, 0, 1.0]])}, "size must be > 0"),
        ({"score": np.array([0.5, 1.5])}, r"score in \[0, 1\]"),
        ({"label": np.array([0, 2])}, "Boxes3D.label: 0 to 2 for 2 classes"),
        ({"yaw": np.array([0.0, np.nan])}, "Boxes3D.yaw: 1 of 2 values are not finite"),
        ({"velocity": np.full((2, 2), np.inf)}, "Boxes3D.velocity: 4 of 4"),
        ({"num_points": np.array([1.0, 2.0])}, r"Boxes3D.num_points: expected \(2\) int64"),
        ({"attribute": np.array(["a"])}, r"Boxes3D.attribute: expected \(2\) str_, got \(1,\)"),
    ],
)
def test_bad_boxes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        boxes(2, **changes)


def occupancy(label: np.ndarray, **changes) -> OccupancyGrid3D:
    fields = {"grid": GRID, "label": label, "classes": ("car", "road", "free"), "free_label": 2, "stamp_ns": 0}
    return OccupancyGrid3D(**{**fields, **changes})


def test_occupied_is_neither_free_nor_ignored():
    label = np.full(GRID.shape, 2, np.uint8)
    label[0, 0, :3] = 0, 1, IGNORE_LABEL
    assert np.argwhere(occupancy(label).occupied).tolist() == [[0, 0, 0], [0, 0, 1]]


def test_bad_occupancy_is_refused():
    label = np.zeros(GRID.shape, np.uint8)
    with pytest.raises(ValueError, match=r"OccupancyGrid3D.label: expected \(8, 4, 4\) uint8, got \(4, 4, 8\)"):
        occupancy(label.transpose(2, 1, 0))
    with pytest.raises(ValueError, match=r"OccupancyGrid3D.label: 7 for 3 classes"):
        occupancy(label + np.uint8(7))
    with pytest.raises(ValueError, match="free_label: 3 for 3 classes"):
        occupancy(label, free_label=3)
    with pytest.raises(ValueError, match=r"observed\['lidar'\]"):
        occupancy(label, observed={"lidar": label})
    with pytest.raises(ValueError, match=r"OccupancyGrid3D.score: expected \(8, 4, 4\) float32"):
        occupancy(label, score=np.zeros(GRID.shape))


def test_a_segmentation_labels_points_or_pixels():
    for shape in ((5,), (4, 6)):
        Segmentation(np.zeros(shape, np.uint8), ("road",), np.zeros(shape, np.uint16))
    Segmentation(np.full(3, IGNORE_LABEL, np.uint8), ("road",))
    with pytest.raises(ValueError, match=r"Segmentation.label: 1 for 1 classes"):
        Segmentation(np.ones(3, np.uint8), ("road",))
    with pytest.raises(ValueError, match=r"Segmentation.instance: expected \(3\) uint16"):
        Segmentation(np.zeros(3, np.uint8), ("road",), np.zeros(4, np.uint16))


def test_defaults_are_empty_and_a_dataset_is_known_by_its_methods():
    assert Truth().boxes is None
    assert Truth().point_label == {}
    assert (Needs().sweeps, Needs().anchor) == (1, "lidar")

    class Two:
        tokens = ("a", "b")

        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> Sample:
            return Sample(i)

        def truth(self, i: int) -> None:
            return None

        def scene_name(self, i: int) -> str:
            return "scene"

    assert isinstance(Two(), Dataset)
    assert not isinstance([], Dataset)


def test_the_seen_part_of_an_image_lies_in_it():
    rgb, k = np.zeros((4, 6, 3), np.uint8), np.array([[5.0, 0, 2], [0, 5.0, 1], [0, 0, 1]])
    assert CameraImage(rgb, k, Pose.identity(), 0, valid_size=(6, 3)).valid_size == (6, 3)
    for size in ((7, 4), (6, 5), (0, 4)):
        with pytest.raises(ValueError, match=r"valid_size: .* of an image of \(6, 4\)"):
            CameraImage(rgb, k, Pose.identity(), 0, valid_size=size)
