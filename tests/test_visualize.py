"""Pictures: what is drawn sits where it projects; hidden and distant things do not break them."""

from __future__ import annotations

from dataclasses import replace

import builders
import cv2
import numpy as np
import pytest

from perception.errors import DataError
from perception.types import OccupancyGrid3D, PointCloud, Pose, Sample, Truth, VoxelGrid
from perception.visualize import (
    PALETTE,
    Points,
    color_of,
    draw_boxes,
    draw_occupancy,
    draw_points,
    draw_velocities,
    render_bev,
    render_camera,
    render_cameras,
    render_occupancy,
    write_pictures,
    write_png,
)

RED = np.array([[255, 0, 0]], np.uint8)


def one_box(center, size=(4.0, 2.0, 1.5), yaw=0.0, velocity=(0.0, 0.0)):
    first = builders.boxes().select(np.array([0]))
    return replace(
        first,
        center=np.array([center], np.float64),
        size=np.array([size]),
        yaw=np.array([yaw]),
        velocity=np.array([velocity]),
    )


def test_a_colour_is_the_same_in_every_run_and_distinct_from_its_neighbours():
    assert color_of("car") == PALETTE["car"] == (255, 158, 0)
    assert color_of("zebra") == color_of("zebra") != color_of("yak")


def test_bev_has_ego_in_the_middle_x_up_and_y_left():
    image = render_bev([Points(np.array([[20.0, 10.0, 0.0]]), RED)], [], range_m=50.0, size_px=1000)
    v, u = np.argwhere((image == RED[0]).all(-1)).mean(0)
    assert u == pytest.approx(500 - 10 * 10, abs=1) and v == pytest.approx(500 - 20 * 10, abs=1)


def test_bev_draws_the_box_outline_at_its_metres():
    boxes = one_box((20.0, 0.0, 0.7), size=(10.0, 4.0, 1.5))
    image = render_bev([], [draw_boxes(boxes)], range_m=50.0, size_px=1000)
    v, u = np.argwhere((image == color_of("car")).all(-1)).T
    assert u.min() == pytest.approx(480, abs=2) and u.max() == pytest.approx(520, abs=2)  # width 4 m
    assert v.max() == pytest.approx(350, abs=2)  # rear face at x = 15 m; the heading line passes the front


def test_a_point_lands_on_its_pixel():
    # Ten metres ahead of the camera and one to the left: f/z = 8 px per metre.
    image = render_camera(builders.camera(), [Points(np.array([[11.7, 1.0, 1.5]], np.float32), RED)])
    v, u = np.argwhere((image != 90).any(-1)).mean(0)
    assert (u, v) == (pytest.approx(79.5 - 8, abs=1), pytest.approx(44.5, abs=1))


def test_a_box_behind_the_camera_draws_nothing_and_one_around_it_does_not_fail():
    plain = builders.camera()
    behind = render_camera(plain, segments=[draw_boxes(one_box((-20.0, 0.0, 1.0)))])
    assert (behind == plain.rgb).all()
    around = render_camera(plain, segments=[draw_boxes(one_box((2.0, 0.0, 1.0), size=(12.0, 3.0, 3.0)))])
    assert (around != plain.rgb).any()


def test_velocity_arrows_only_for_what_moves_and_is_known():
    still, moving, unknown = (
        one_box((5, 0, 0)),
        one_box((5, 0, 0), velocity=(3.0, 4.0)),
        one_box((5, 0, 0), velocity=(np.nan,) * 2),
    )
    assert len(draw_velocities(still).ends) == len(draw_velocities(unknown).ends) == 0
    assert np.linalg.norm(np.diff(draw_velocities(moving).ends[0], axis=0)) == pytest.approx(5.0)


def test_a_missing_camera_leaves_its_place_dark():
    sample = Sample(0, cameras={"front": builders.camera(), "back": builders.camera(), "back_left": builders.camera()})
    mosaic = render_cameras(sample, [], [], width_px=160)
    assert mosaic.shape == (180, 480, 3)
    assert (mosaic[:90, :160] == 18).all() and (mosaic[40:90, 160:320] == 90).all()  # front_left missing, front there


def test_no_camera_is_an_error_that_says_what_to_draw_instead():
    with pytest.raises(DataError, match=r"sample 'abc' has no camera image.*\n.*bird's-eye"):
        render_cameras(Sample(0, token="abc"), [], [])


def occupancy(label):
    grid = VoxelGrid((0.0, -8.0, -1.0), (1.0, 1.0, 1.0), label.shape, Pose.identity())
    return OccupancyGrid3D(grid, label, ("free", "car", "vegetation"), 0, 0)


def test_occupancy_picture_shows_the_colours_of_what_is_there_and_hides_inner_faces():
    label = np.zeros((16, 16, 4), np.uint8)
    empty = render_occupancy(draw_occupancy(occupancy(label)))
    assert len(np.unique(empty)) == 1
    label[8:12, 6:10] = 1
    picture = render_occupancy(draw_occupancy(occupancy(label)))
    top = np.array(color_of("car"))
    assert (picture == top).all(-1).sum() > 100  # the top faces have the full colour
    solid = draw_occupancy(occupancy(label))
    buried = label.copy()
    buried[9:11, 7:9, 0:2] = 0  # a hole no eye above can see
    assert (picture == render_occupancy(draw_occupancy(occupancy(buried)))).all() and len(solid.center) == 64


def test_pictures_are_written_and_read_back(tmp_path):
    label = np.zeros((16, 16, 4), np.uint8)
    label[5] = 2
    sample = Sample(0, lidars={"top": builders.cloud()}, cameras={"front": builders.camera()}, token="t")
    paths = write_pictures(tmp_path / "new", sample, Truth(boxes=builders.boxes(), occupancy=occupancy(label)))
    assert [p.name for p in paths] == ["bev.png", "cameras.png", "occupancy.png"]
    assert all(cv2.imread(str(p)) is not None for p in paths)
    assert [p.name for p in write_pictures(tmp_path, Sample(0, lidars={"top": builders.cloud()}), None)] == ["bev.png"]


def test_a_sample_with_nothing_in_it_still_draws(tmp_path):
    empty = PointCloud(np.zeros((0, 3), np.float32), {}, Pose.identity(), 0)
    assert len(draw_points(empty).xyz) == 0
    assert write_pictures(tmp_path, Sample(0, lidars={"top": empty}), Truth())[0].exists()


def test_a_picture_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"bev.png: the picture could not be written: .*\n.*another folder"):
        write_png(tmp_path / "file" / "bev.png", np.zeros((4, 4, 3), np.uint8))
