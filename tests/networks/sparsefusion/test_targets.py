"""Targets of boxes whose place in space and in the images is known by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from perception.errors import DataError
from perception.networks.sparsefusion.config import ImageConfig, LidarConfig, SparseFusionConfig
from perception.networks.sparsefusion.targets import encode_targets, level_shapes
from perception.networks.sparsefusion.tensors import Calibration
from perception.types import Boxes3D, Pose, Truth

CONFIG = SparseFusionConfig(
    classes=("car", "pedestrian"),
    cameras=("front", "right"),
    lidar=LidarConfig(range_m=(-24.0, -24.0, -5.0, 24.0, 24.0, 3.0), encoder_channels=(8, 16, 32)),  # cells of 0.3 m
    image=ImageConfig(canvas_px=(320, 192)),
)
EGO_FROM_LIDAR = Pose.from_yaw(-math.pi / 2, (1.0, 0.0, 1.8))  # x right, y forward, as nuScenes' LIDAR_TOP
# The LiDAR's x right, y forward, z up to the camera's x right, y down, z forward.
FRONT = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
RIGHT = torch.tensor([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])


def calibration(present: tuple[bool, bool] = (True, True), batch: int = 1) -> Calibration:
    """Both cameras at the LiDAR, focal length 100 px, the image 300 x 180 of a canvas of 320 x 192."""
    intrinsic = torch.tensor([[100.0, 0, 150], [0, 100, 90], [0, 0, 1]])
    valid = torch.tensor([300.0, 180.0])
    return Calibration(
        torch.stack([FRONT, RIGHT]).expand(batch, 2, 3, 3),
        torch.zeros(batch, 2, 3),
        intrinsic.expand(batch, 2, 3, 3),
        valid.expand(batch, 2, 2),
        valid.expand(batch, 2, 2),
        torch.tensor(present).expand(batch, 2),
    )


def ego_boxes(*rows: tuple, classes: tuple[str, ...] = ("car", "pedestrian", "tram")) -> Boxes3D:
    """Rows (x, y, z, length, width, height, yaw, vx, vy, label, points) in ego."""
    table = np.array(rows, np.float64).reshape(-1, 11)
    return Boxes3D(
        table[:, :3], table[:, 3:6], table[:, 6], table[:, 7:9], np.ones(len(table)), table[:, 9].astype(np.int64),
        classes, 0, num_points=table[:, 10].astype(np.int64),
    )  # fmt: skip


AHEAD = (11.0, 0.0, 0.8, 4.0, 2.0, 1.6, 0.0, 3.0, 0.0, 0, 5)
"""A car 10 m before the LiDAR, driving away: in the LiDAR's frame at (0, 10, -1), velocity (0, 3)."""


def targets_of(*rows: tuple, **changes):
    given = {"network_from_ego": [EGO_FROM_LIDAR.inverse()], "calibration": calibration(), "config": CONFIG}
    return encode_targets([Truth(boxes=ego_boxes(*rows))], **(given | changes))


def test_a_car_ahead_in_space():
    boxes = targets_of(AHEAD).boxes
    # theta = -yaw - pi/2, and its yaw in the LiDAR's frame is pi/2: sin(-pi) = 0, cos(-pi) = -1
    expected = [80, 80 + 10 / 0.3, -1.0, math.log(2), math.log(4), math.log(1.6), 0, -1, 0, 3]
    torch.testing.assert_close(boxes.code[0, 0], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert boxes.label.tolist() == [[0]] and boxes.exists.all() and boxes.visible.all()


def test_a_car_ahead_in_the_image():
    """Seen from behind by the front camera: centre 1 m below it, 10 m away; the near end at 8 m gives the extent."""
    image = targets_of(AHEAD).image
    assert image.view.tolist() == [[0]]
    # The car's x axis is the camera's z: rotation_y = -atan2(1, 0)
    expected = [150 / 320, 100 / 192, 10, math.log(4), math.log(1.6), math.log(2), -1, 0, 0, 3]
    torch.testing.assert_close(image.code[0, 0], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image.center_camera[0, 0], torch.tensor([0.0, 1, 10]), rtol=1e-5, atol=1e-5)
    top, bottom = 90 + 100 * 0.2 / 12, 90 + 100 * 1.8 / 8  # the far end's upper edge, the near end's lower one
    torch.testing.assert_close(image.size_px[0, 0], torch.tensor([2 * 100 / 8, bottom - top]))


def test_heatmaps_peak_where_the_box_is():
    targets = targets_of(AHEAD)
    assert targets.lidar_heatmap.shape == (1, 2, 160, 160)
    assert (targets.lidar_heatmap == 1).nonzero().tolist() == [[0, 0, 113, 80]]
    assert (targets.lidar_heatmap[0, 1] == 0).all()
    shapes = level_shapes(CONFIG.image.canvas_px)
    assert shapes == ((48, 80), (24, 40), (12, 20), (6, 10))
    assert targets.image_heatmap.shape == (1, 2, 2, sum(h * w for h, w in shapes))
    assert (targets.image_heatmap == 1).nonzero().tolist() == [[0, 0, 0, (100 // 4) * 80 + 150 // 4]]


def test_a_near_box_peaks_on_a_coarse_level():
    """3 m away and 2 m wide, its near end spans 200 px of the image: the last level."""
    near = (4.0, 0.0, 1.8, 4.0, 2.0, 1.6, 0.0, 0.0, 0.0, 0, 5)
    targets = targets_of(near)
    assert targets.image.size_px[0, 0].tolist() == pytest.approx([200, 160], rel=1e-4)
    shapes = level_shapes(CONFIG.image.canvas_px)
    before = sum(h * w for h, w in shapes[:3])
    assert (targets.image_heatmap == 1).nonzero().tolist() == [[0, 0, 0, before + (90 // 32) * 10 + 150 // 32]]


def test_a_box_in_two_images_is_there_twice_and_one_behind_in_none():
    corner = (11.0, -10.0, 0.8, 1.0, 1.0, 1.6, 0.0, 0.0, 0.0, 1, 1)  # 45 degrees to the right: at the edge of both
    behind = (-9.0, 0.0, 0.8, 4.0, 2.0, 1.6, 0.0, 0.0, 0.0, 0, 1)
    targets = targets_of(corner, behind)
    assert targets.image.view[targets.image.exists].tolist() == [0, 1]
    assert targets.image.code[0, :, 0].tolist() == pytest.approx([250 / 320, 50 / 320], rel=1e-5)
    assert targets.boxes.visible.tolist() == [[True, False]]


def test_a_missing_camera_sees_nothing():
    targets = targets_of(AHEAD, calibration=calibration(present=(False, True)))
    assert not targets.image.exists.any() and not targets.boxes.visible.any()
    assert targets.boxes.exists.all() and not targets.image_heatmap.any()


def test_beyond_the_image_is_not_seen_though_on_the_canvas():
    """u = 305 of 300 px of image and 320 px of canvas."""
    right = (11.0, -15.5, 1.8, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0, 1)
    assert not (targets_of(right).image.view[0] == 0).any()
    assert (targets_of((11.0, -14.5, *right[2:])).image.view[0] == 0).any()


def test_what_does_not_count_is_left_out():
    unknown_speed = (*AHEAD[:7], math.nan, math.nan, 0, 5)
    without_points, outside, tram = (*AHEAD[:10], 0), (40.0, *AHEAD[1:]), (*AHEAD[:9], 2, 5)
    targets = targets_of(without_points, outside, tram, unknown_speed)
    assert targets.boxes.exists.tolist() == [[True]]
    assert targets.boxes.code[0, 0, 8:].tolist() == [0, 0]
    uncounted = replace(ego_boxes(without_points), num_points=None)
    pose = [EGO_FROM_LIDAR.inverse()]
    assert encode_targets([Truth(boxes=uncounted)], pose, None, CONFIG).boxes.exists.all()


def test_labels_are_matched_by_name():
    boxes = ego_boxes(AHEAD, classes=("pedestrian", "car"))
    targets = encode_targets([Truth(boxes=boxes)], [EGO_FROM_LIDAR.inverse()], calibration(), CONFIG)
    assert targets.boxes.label.tolist() == [[1]] and targets.image.label.tolist() == [[1]]


def test_a_batch_is_padded_and_may_be_empty():
    pose = EGO_FROM_LIDAR.inverse()
    truths = [Truth(boxes=ego_boxes()), Truth(boxes=ego_boxes(AHEAD, (*AHEAD[:9], 1, 1)))]
    targets = encode_targets(truths, [pose, pose], calibration(batch=2), CONFIG)
    assert targets.boxes.exists.tolist() == [[False, False], [True, True]]
    assert targets.lidar_heatmap.amax((1, 2, 3)).tolist() == [0, 1]
    assert targets.image_heatmap.amax((1, 2, 3)).tolist() == [0, 1]
    nothing = encode_targets(truths[:1], [pose], calibration(), CONFIG)
    assert nothing.boxes.code.shape == (1, 0, 10) and nothing.image.code.shape == (1, 0, 10)
    assert not nothing.lidar_heatmap.any()


def test_the_ablations_have_their_own_targets():
    lidar = targets_of(AHEAD, calibration=None, config=CONFIG.model_copy(update={"modality": "lidar"}))
    assert lidar.image is None and lidar.image_heatmap is None and lidar.lidar_heatmap is not None
    camera = targets_of(AHEAD, config=CONFIG.model_copy(update={"modality": "camera"}))
    assert camera.lidar_heatmap is None and camera.image_heatmap is not None and camera.boxes.visible.all()


def test_a_truth_without_boxes_is_refused():
    with pytest.raises(DataError, match="a sample's truth has no boxes\n  train on a data set"):
        encode_targets([Truth()], [EGO_FROM_LIDAR], None, CONFIG)
