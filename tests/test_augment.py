from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from builders import EGO_FROM_LIDAR, boxes, camera, cloud
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.augment import AugmentConfig, Similarity, augment, move_boxes, move_cloud, move_image, zoom_image
from perception.geometry import box_corners, points_in_boxes, project
from perception.types import CameraImage, PointCloud, Pose, Sample, Truth

angles = st.floats(-3.2, 3.2)
worlds = st.builds(
    lambda yaw, x, y, scale, shift: Similarity.about(EGO_FROM_LIDAR, yaw, x, y, scale, np.array(shift)),
    angles, st.booleans(), st.booleans(), st.floats(0.5, 2.0), st.tuples(*[st.floats(-3, 3)] * 3),
)  # fmt: skip
TILTED = Pose.from_quaternion([0.3, -0.5, 0.4, 0.7], [1.0, -0.4, 1.5])


def pixels(xyz_ego: np.ndarray, image: CameraImage) -> tuple[np.ndarray, np.ndarray]:
    return project(image.ego_from_camera.inverse().apply(xyz_ego), image.intrinsic)


@settings(max_examples=50)
@given(worlds)
def test_points_keep_their_boxes_and_boxes_their_corners(world):
    truth = boxes()
    # Away from the faces, where float32 decides.
    near = np.repeat(truth.center, 40, 0) + np.random.default_rng(1).uniform(-0.33, 0.33, (400, 3))
    points = PointCloud(EGO_FROM_LIDAR.inverse().apply(near).astype(np.float32), {}, EGO_FROM_LIDAR, 0)
    before = points_in_boxes(points.xyz_ego().astype(np.float64), truth)
    moved_boxes, moved = move_boxes(truth, world), move_cloud(points, world)
    assert before.sum() == 400
    np.testing.assert_array_equal(points_in_boxes(moved.xyz_ego().astype(np.float64), moved_boxes), before)
    expected = np.sort(world.apply(box_corners(truth)), axis=1)
    np.testing.assert_allclose(np.sort(box_corners(moved_boxes), axis=1), expected, atol=1e-9)


@settings(max_examples=50)
@given(worlds, st.floats(0.6, 1.6), st.floats(0, 1), st.floats(0, 1))
def test_every_point_stays_on_its_pixel(world, zoom, crop_x, crop_y):
    image = replace(camera(), ego_from_camera=TILTED)
    points = TILTED.apply(np.random.default_rng(0).uniform([-4, -3, 1], [4, 3, 30], (200, 3)))
    before, depth = pixels(points, image)
    moved = move_image(image, world)
    after, moved_depth = pixels(world.apply(points), moved)
    expected = np.stack([image.rgb.shape[1] - 1 - before[:, 0], before[:, 1]], 1) if world.mirrors else before
    np.testing.assert_allclose(after, expected, atol=1e-6)
    np.testing.assert_allclose(moved_depth, world.scale * depth, rtol=1e-9)
    assert np.linalg.det(moved.ego_from_camera.rotation) == pytest.approx(1.0)  # Pose would refuse a mirrored frame

    zoomed = zoom_image(moved, zoom, (crop_x, crop_y))
    cut = max(zoom - 1, 0) * np.array([crop_x * 160, crop_y * 90])
    np.testing.assert_allclose(pixels(world.apply(points), zoomed)[0], zoom * (after + 0.5) - 0.5 - cut, atol=1e-6)


@settings(max_examples=30)
@given(worlds)
def test_velocities_turn_and_scale_with_the_world(world):
    truth = boxes(velocity=(3.0, -4.0))
    later = replace(truth, center=truth.center + np.concatenate([truth.velocity, np.zeros((len(truth), 1))], 1))
    displacement = move_boxes(later, world).center - move_boxes(truth, world).center
    np.testing.assert_allclose(move_boxes(truth, world).velocity, displacement[:, :2], atol=1e-9)
    unknown = replace(truth, velocity=np.full((len(truth), 2), np.nan))
    assert np.isnan(move_boxes(unknown, world).velocity).all()


def test_radar_velocities_move_with_their_points():
    mount = Pose.from_yaw(2.0, (3.0, 1.0, 0.5))
    fields = {name: np.array(v, np.float32) for name, v in
              {"vx_comp": [3.0], "vy_comp": [4.0], "radial_velocity": [-5.0], "rcs": [7.0]}.items()}  # fmt: skip
    radar = PointCloud(np.array([[10.0, 2.0, 0.0]], np.float32), fields, mount, 0)
    world = Similarity.about(Pose.identity(), 0.7, True, False, 1.1, np.zeros(3))
    moved = move_cloud(radar, world)
    tip = PointCloud(radar.xyz + np.array([[3.0, 4.0, 0.0]], np.float32), {}, mount, 0)
    displacement = move_cloud(tip, world).xyz - moved.xyz
    np.testing.assert_allclose(
        [[moved.fields["vx_comp"][0], moved.fields["vy_comp"][0]]], displacement[:, :2], atol=1e-5
    )
    assert moved.fields["radial_velocity"][0] == pytest.approx(-5.5)
    assert moved.fields["rcs"][0] == 7.0


def test_one_flip_mirrors_the_image_and_two_leave_it():
    image = camera()
    image.rgb[:, :10] = 255
    flipped = move_image(image, Similarity.about(Pose.identity(), 0.0, False, True, 1.0, np.zeros(3)))
    np.testing.assert_array_equal(flipped.rgb, image.rgb[:, ::-1])
    turned = move_image(image, Similarity.about(Pose.identity(), 0.0, True, True, 1.0, np.zeros(3)))
    np.testing.assert_array_equal(turned.rgb, image.rgb)
    np.testing.assert_allclose(turned.ego_from_camera.rotation, np.diag([-1, -1, 1]) @ image.ego_from_camera.rotation)


@pytest.mark.parametrize(("scale", "crop"), [(0.8, (0.0, 0.0)), (1.5, (1.0, 0.5))])
def test_a_zoomed_image_shows_things_where_the_intrinsic_says(scale, crop):
    image = camera()
    y, x = np.mgrid[:90, :160]
    blob = np.exp(-((x - 120.0) ** 2 + (y - 60.0) ** 2) / 50)
    image.rgb[:] = (255 * blob[..., None]).astype(np.uint8)
    zoomed = zoom_image(image, scale, crop, fill=(1, 2, 3))
    weight = zoomed.rgb[..., 0].astype(np.float64) * (zoomed.rgb[..., 0] > 8)
    mean = [(weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()]
    move = zoomed.intrinsic @ np.linalg.inv(image.intrinsic)
    np.testing.assert_allclose(mean, (move @ [120, 60, 1])[:2], atol=0.1)
    if scale < 1:
        assert zoomed.valid_size == (128, 72)
        assert (zoomed.rgb[72:] == (1, 2, 3)).all() and (zoomed.rgb[:, 128:] == (1, 2, 3)).all()
        assert not (zoomed.rgb[:72, :128] == (1, 2, 3)).all(-1).any()
    else:
        assert zoomed.valid_size is None


def test_a_zoomed_image_is_neither_zoomed_nor_mirrored_again():
    zoomed = zoom_image(camera(), 0.5)
    with pytest.raises(ValueError, match="has a valid part already"):
        zoom_image(zoomed, 0.5)
    with pytest.raises(ValueError, match="cannot be mirrored"):
        move_image(zoomed, Similarity.about(Pose.identity(), 0.0, True, False, 1.0, np.zeros(3)))


def test_augment_is_the_same_for_the_same_seed_and_keeps_sample_and_truth_together():
    sample = Sample(7, {"top": cloud()}, {}, {"front": camera()}, odom_from_ego=Pose.identity(), token="a")
    truth = Truth(boxes(), map_from_ego=Pose.identity())
    first, again, other = (augment(sample, truth, AugmentConfig(), np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first[0].lidars["top"].xyz, again[0].lidars["top"].xyz)
    np.testing.assert_array_equal(first[0].cameras["front"].rgb, again[0].cameras["front"].rgb)
    assert np.abs(first[0].lidars["top"].xyz - other[0].lidars["top"].xyz).max() > 0.1
    assert first[0].token == "a" and first[0].odom_from_ego is None and first[1].map_from_ego is None
    np.testing.assert_array_equal(first[0].lidars["top"].fields["intensity"], sample.lidars["top"].fields["intensity"])
    # The LiDAR stays where it is: the network's frame does not move with the world.
    np.testing.assert_array_equal(first[0].lidars["top"].ego_from_sensor.matrix, EGO_FROM_LIDAR.matrix)


def test_nothing_is_changed_where_every_range_is_empty():
    still = AugmentConfig(rotation_rad=(0, 0), scale=(1, 1), shift_m=0, flip_x=0, flip_y=0, zoom=(1, 1))
    sample, truth = Sample(7, {"top": cloud()}, {}, {"front": camera()}), Truth(boxes())
    cv2.circle(sample.cameras["front"].rgb, (40, 30), 9, (250, 10, 10), -1)
    moved, moved_truth = augment(sample, truth, still, np.random.default_rng(0))
    np.testing.assert_allclose(moved.lidars["top"].xyz, sample.lidars["top"].xyz, atol=1e-5)
    np.testing.assert_array_equal(moved.cameras["front"].rgb, sample.cameras["front"].rgb)
    np.testing.assert_allclose(moved_truth.boxes.yaw, truth.boxes.yaw)
    assert moved.cameras["front"].valid_size is None
