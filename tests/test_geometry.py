from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from perception import geometry
from perception.types import Boxes3D, CameraImage, Pose, VoxelGrid


def boxes(*rows: tuple[float, ...], score=None, velocity=None) -> Boxes3D:
    """Rows of x, y, z, length, width, height, yaw."""
    a = np.array(rows, float).reshape(-1, 7)
    return Boxes3D(
        a[:, :3],
        a[:, 3:6],
        a[:, 6],
        np.zeros((len(a), 2)) if velocity is None else np.array(velocity, float),
        np.ones(len(a)) if score is None else np.array(score, float),
        np.zeros(len(a), np.int64),
        ("car",),
        0,
    )


def random_boxes(n: int, seed: int) -> Boxes3D:
    rng = np.random.default_rng(seed)
    center, size, yaw = rng.uniform(-4, 4, (n, 3)), rng.uniform(0.2, 5, (n, 3)), rng.uniform(-4, 4, (n, 1))
    return boxes(*np.concatenate([center, size, yaw], 1), score=rng.permutation(n) / max(n, 1))


def as_polygons(b: Boxes3D) -> list:
    shapely = pytest.importorskip("shapely")
    return [shapely.Polygon(corners) for corners in geometry.box_corners(b)[:, :4, :2]]


# --- Angles and poses -------------------------------------------------------------------------------------------------


@given(st.floats(-100, 100))
def test_a_wrapped_angle_is_the_same_angle(angle):
    wrapped = float(geometry.wrap_angle(angle))
    assert -np.pi < wrapped <= np.pi
    assert np.cos(wrapped) == pytest.approx(np.cos(angle), abs=1e-9)
    assert np.sin(wrapped) == pytest.approx(np.sin(angle), abs=1e-9)


def test_half_a_turn_wraps_to_plus_pi():
    np.testing.assert_allclose(geometry.wrap_angle(np.array([np.pi, -np.pi, 3 * np.pi, 0])), [np.pi, np.pi, np.pi, 0])


@given(st.integers(0, 1000), st.floats(0, 1))
def test_interpolation_turns_evenly_about_one_axis(seed, fraction):
    rng = np.random.default_rng(seed)
    a, axis = Rotation.random(random_state=seed), rng.normal(0, 0.5, 3)
    b = a * Rotation.from_rotvec(axis)
    start, end = Pose(a.as_matrix(), rng.normal(size=3)), Pose(b.as_matrix(), rng.normal(size=3))
    middle = geometry.interpolate_pose(start, end, fraction)
    np.testing.assert_allclose(middle.rotation, (a * Rotation.from_rotvec(axis * fraction)).as_matrix(), atol=1e-9)
    np.testing.assert_allclose(
        middle.translation, start.translation + fraction * (end.translation - start.translation), atol=1e-12
    )


@given(st.integers(0, 1000), st.sampled_from([0.0, 1e-12, 1e-9, 1e-6, 0.1, 2.0, np.pi - 1e-6]), st.booleans())
def test_slerp_agrees_with_scipy_at_any_angle_and_sign(seed, angle, flipped):
    rng = np.random.default_rng(seed)
    a, axis = Rotation.random(random_state=seed), rng.normal(size=3)
    b = a * Rotation.from_rotvec(axis / np.linalg.norm(axis) * angle)
    fractions = np.linspace(0, 1, 7)
    theirs = Slerp([0, 1], Rotation.concatenate([a, b]))(fractions).as_matrix()
    quaternion = -b.as_quat() if flipped else b.as_quat()
    ours = geometry.slerp(np.tile(a.as_quat(), (7, 1)), np.tile(quaternion, (7, 1)), fractions)
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_interpolation_ends_at_the_poses_and_does_not_go_beyond():
    a, b = Pose.from_yaw(0.1, (1, 2, 3)), Pose.from_yaw(2.0, (4, 5, 6))
    np.testing.assert_allclose(geometry.interpolate_pose(a, b, 0.0).matrix, a.matrix, atol=1e-15)
    np.testing.assert_allclose(geometry.interpolate_pose(a, b, 1.0).matrix, b.matrix, atol=1e-15)
    for fraction in (-0.01, 1.01, np.nan):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]; poses are never extrapolated"):
            geometry.interpolate_pose(a, b, fraction)


# --- Boxes ------------------------------------------------------------------------------------------------------------


def test_corners_are_in_the_order_of_the_picture():
    corners = geometry.box_corners(boxes((10, 20, 30, 4, 2, 6, 0)))[0]
    bottom = [[12, 21, 27], [8, 21, 27], [8, 19, 27], [12, 19, 27]]  # front left, rear left, rear right, front right
    np.testing.assert_allclose(corners[:4], bottom)
    np.testing.assert_allclose(corners[4:], np.array(bottom) + np.array([0, 0, 6]))
    turned = geometry.box_corners(boxes((0, 0, 0, 4, 2, 6, np.pi / 2)))[0]
    np.testing.assert_allclose(turned[0], [-1, 2, -3], atol=1e-12)  # its front looks along +y now


def test_edges_are_the_twelve_pairs_of_corners_that_differ_along_one_axis():
    corners = geometry.box_corners(boxes((0, 0, 0, 4, 2, 6, 0)))[0]
    assert len(set(geometry.BOX_EDGES)) == 12
    for a, b in geometry.BOX_EDGES:
        assert (corners[a] != corners[b]).sum() == 1
    assert (corners[[0, 3, 7, 4], 0] == 2).all()  # the front face


@given(st.integers(0, 1000), st.floats(-10, 10), st.floats(-50, 50))
def test_boxes_move_as_their_corners_do(seed, yaw, shift):
    b, pose = random_boxes(4, seed), Pose.from_yaw(yaw, (shift, -shift, 3))
    moved = geometry.transform_boxes(pose, b)
    np.testing.assert_allclose(geometry.box_corners(moved), pose.apply(geometry.box_corners(b)), atol=1e-9)
    back = geometry.transform_boxes(pose.inverse(), moved)
    np.testing.assert_allclose(back.center, b.center, atol=1e-9)
    np.testing.assert_allclose(geometry.wrap_angle(back.yaw - b.yaw), 0, atol=1e-9)


def test_velocity_turns_with_the_frame_and_stays_unknown_where_it_was():
    given = boxes((1, 0, 0, 1, 1, 1, 0), (2, 0, 0, 1, 1, 1, 0), velocity=[[3, 4], [np.nan, np.nan]])
    moved = geometry.transform_boxes(Pose.from_yaw(np.pi / 2, (100, 0, 0)), given)
    np.testing.assert_allclose(moved.velocity[0], [-4, 3], atol=1e-12)
    assert np.isnan(moved.velocity[1]).all()


def test_a_tilted_frame_leaves_boxes_upright():
    tilt = Pose(Rotation.from_euler("xyz", [0.1, -0.05, 1.0]).as_matrix(), np.zeros(3))
    moved = geometry.transform_boxes(tilt, boxes((5, 0, 0, 4, 2, 1.5, 0.0)))
    heading = tilt.rotation @ [1, 0, 0]
    assert moved.yaw[0] == pytest.approx(np.arctan2(heading[1], heading[0]))
    np.testing.assert_array_equal(moved.size, [[4, 2, 1.5]])


def test_points_on_the_faces_are_inside():
    b = boxes((0, 0, 0, 4, 2, 2, 0), (10, 0, 0, 4, 2, 2, np.pi / 4))
    xyz = np.array([[2, 1, 1], [2.001, 0, 0], [-2, -1, -1], [0, 0, 1.001], [11.4, 1.4, 0], [11.4, -1.4, 0]])
    np.testing.assert_array_equal(
        geometry.points_in_boxes(xyz, b), [[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]
    )  # the second box lies along the diagonal
    assert geometry.points_in_boxes(np.zeros((0, 3)), b).shape == (2, 0)
    assert geometry.points_in_boxes(xyz, boxes()).shape == (0, 6)


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_points_in_boxes_agree_with_shapely(seed):
    shapely = pytest.importorskip("shapely")
    b, xyz = random_boxes(5, seed), np.random.default_rng(seed).uniform(-5, 5, (40, 3))
    inside = geometry.points_in_boxes(xyz, b)
    for m, polygon in enumerate(as_polygons(b)):
        seen_from_above = shapely.contains_xy(polygon, xyz[:, 0], xyz[:, 1])
        level = np.abs(xyz[:, 2] - b.center[m, 2]) <= b.size[m, 2] / 2
        np.testing.assert_array_equal(inside[m], seen_from_above & level)


# --- Projection -------------------------------------------------------------------------------------------------------

K = np.array([[100.0, 0, 50], [0, 200, 40], [0, 0, 1]])
EGO_FROM_CAMERA = Pose(np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]), np.array([1.0, 0, 1.5]))  # looking ahead


def test_projection_by_hand():
    pixel, depth = geometry.project(np.array([[1.0, -0.5, 5], [0, 0, 2], [0, 0, 0], [1, 1, -1]]), K)
    np.testing.assert_allclose(pixel[:2], [[70, 20], [50, 40]])
    assert np.isnan(pixel[2:]).all()
    np.testing.assert_array_equal(depth, [5, 2, 0, -1])


@given(st.floats(-0.4, 89.4), st.floats(-0.4, 69.4), st.floats(0.1, 200))
def test_a_pixels_ray_projects_back_to_it(u, v, depth):
    ray = np.linalg.inv(K) @ [u, v, 1]
    image = CameraImage(np.zeros((70, 90, 3), np.uint8), K, EGO_FROM_CAMERA, 0)
    pixel, d, visible = geometry.project_to_image(EGO_FROM_CAMERA.apply(ray * depth)[None], image)
    np.testing.assert_allclose(pixel[0], [u, v], atol=1e-6)
    assert d[0] == pytest.approx(depth)
    assert visible[0]


def test_ahead_left_and_up_is_left_and_up_in_the_image():
    image = CameraImage(np.zeros((70, 90, 3), np.uint8), K, EGO_FROM_CAMERA, 0)
    ego = np.array([[11.0, 1, 2.0], [-5, 0, 1.5], [11, 9, 1.5]], np.float32)
    pixel, depth, visible = geometry.project_to_image(ego, image)
    np.testing.assert_allclose(pixel[0], [50 - 10, 40 - 10])
    np.testing.assert_allclose(depth, [10, -6, 10])
    np.testing.assert_array_equal(visible, [True, False, False])  # ahead, behind, beside


# --- Overlaps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "area"),
    [
        ((0, 0, 0, 2, 2, 1, 0), (1, 1, 0, 2, 2, 1, 0), 1.0),
        ((0, 0, 0, 2, 2, 1, 0), (0, 0, 0, 2, 2, 1, np.pi / 4), 8 * (np.sqrt(2) - 1)),  # a regular octagon
        ((0, 0, 0, 4, 4, 1, 0), (0.5, 0, 0, 1, 1, 1, 0.7), 1.0),  # one within the other
        ((0, 0, 0, 10, 1, 1, 0), (0, 0, 0, 10, 1, 1, np.pi / 2), 1.0),  # a cross
        ((0, 0, 0, 2, 2, 1, 0), (2, 0, 0, 2, 2, 1, 0), 0.0),  # a shared face
        ((0, 0, 0, 2, 2, 1, 0), (9, 9, 0, 2, 2, 1, 0), 0.0),
        ((3, 4, 0, 5, 2, 1, 1.1), (3, 4, 0, 5, 2, 1, 1.1 + np.pi), 10.0),  # the same, facing back
    ],
)
def test_areas_that_can_be_computed_by_hand(a, b, area):
    np.testing.assert_allclose(geometry.bev_intersection(boxes(a), boxes(b)), [[area]], atol=1e-12)


@settings(max_examples=60)
@given(st.integers(0, 10_000))
def test_areas_agree_with_shapely(seed):
    a, b = random_boxes(6, seed), random_boxes(5, seed + 1)
    ours = geometry.bev_intersection(a, b)
    theirs = [[p.intersection(q).area for q in as_polygons(b)] for p in as_polygons(a)]
    np.testing.assert_allclose(ours, theirs, atol=1e-9)
    union = a.size[:, :2].prod(1)[:, None] + b.size[:, :2].prod(1) - np.array(theirs)
    np.testing.assert_allclose(geometry.bev_iou(a, b), np.array(theirs) / union, atol=1e-9)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e-9, 1e-7, np.pi / 2, np.pi]), st.booleans())
def test_boxes_that_share_edges_lines_or_corners(seed, turn, grid):
    """Where clipping is degenerate: the same box turned by nearly a multiple of a quarter, on whole metres."""
    rng = np.random.default_rng(seed)
    a = np.round(random_boxes(6, seed).center) if grid else random_boxes(6, seed).center
    size = rng.integers(1, 4, (6, 3)).astype(float)
    yaw = rng.choice([0, np.pi / 4, 1.0], 6)
    first = boxes(*np.concatenate([a, size, yaw[:, None]], 1))
    second = boxes(*np.concatenate([a, size, yaw[:, None] + turn], 1))
    theirs = [[p.intersection(q).area for q in as_polygons(second)] for p in as_polygons(first)]
    np.testing.assert_allclose(geometry.bev_intersection(first, second), theirs, atol=1e-6)


def test_iou_of_a_box_with_itself_is_one_and_is_symmetric():
    b = random_boxes(8, 3)
    for iou in (geometry.bev_iou, geometry.iou_3d):
        matrix = iou(b, b)
        np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-9)
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-9)
        assert matrix.min() >= 0
        assert matrix.max() <= 1 + 1e-9
    assert geometry.bev_iou(b, boxes()).shape == (8, 0)
    assert geometry.iou_3d(boxes(), b).shape == (0, 8)


def test_volumes_share_height_too():
    a, b = boxes((0, 0, 0, 2, 2, 2, 0)), boxes((1, 0, 1, 2, 2, 2, 0), (0, 0, 2, 2, 2, 2, 0), (0, 0, 5, 2, 2, 2, 0))
    np.testing.assert_allclose(geometry.iou_3d(a, b), [[2 / 14, 0, 0]])


# --- Suppression ------------------------------------------------------------------------------------------------------


def nms_by_loop(b: Boxes3D, threshold: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(b)), key=lambda i: (-b.score[i], i)):
        if all(geometry.bev_iou(b.select(np.array([i])), b.select(np.array([k])))[0, 0] <= threshold for k in kept):
            kept.append(i)
    return kept


def test_a_suppressed_box_suppresses_nothing():
    row = boxes((0, 0, 0, 2, 1, 1, 0), (1, 0, 0, 2, 1, 1, 0), (2, 0, 0, 2, 1, 1, 0), score=[0.9, 0.8, 0.7])
    np.testing.assert_array_equal(geometry.rotated_nms(row, 0.3), [0, 2])  # neighbours overlap by a third
    np.testing.assert_array_equal(geometry.rotated_nms(row, 0.34), [0, 1, 2])
    tied = boxes((0, 0, 0, 2, 1, 1, 0), (0, 0, 0, 2, 1, 1, 0), score=[0.5, 0.5])
    np.testing.assert_array_equal(geometry.rotated_nms(tied, 0.5), [0])
    assert geometry.rotated_nms(boxes(), 0.5).shape == (0,)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.5]))
def test_suppression_is_the_greedy_loop(seed, threshold):
    b = random_boxes(8, seed)
    assert geometry.rotated_nms(b, threshold).tolist() == nms_by_loop(b, threshold)


# --- Grids ------------------------------------------------------------------------------------------------------------


def test_voxel_centres_in_ego():
    grid = VoxelGrid((0, 0, 0), (1, 1, 1), (4, 4, 4), Pose.from_yaw(np.pi / 2, (10, 0, 2)))
    np.testing.assert_allclose(geometry.grid_points(grid, np.array([[1, 0, 0]])), [[9.5, 1.5, 2.5]])
