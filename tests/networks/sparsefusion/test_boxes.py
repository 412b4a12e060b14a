"""Overlaps against the float64 oracle, box codes and suppression by hand, and the way back to ego."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from perception import geometry
from perception.errors import PerceptionError
from perception.networks.sparsefusion.boxes import (
    Detections,
    class_scores,
    detect,
    encode_boxes,
    network_rows,
    suppressed,
    to_boxes3d,
)
from perception.networks.sparsefusion.config import LidarConfig, SparseFusionConfig
from perception.networks.sparsefusion.iou import bev_intersection, iou_3d
from perception.networks.sparsefusion.tensors import BoxPrediction, Candidates, ImagePrediction, Outputs
from perception.types import Boxes3D, Pose

CONFIG = SparseFusionConfig()


def random_boxes(seed: int, count: int) -> Boxes3D:
    rng = np.random.default_rng(seed)
    return Boxes3D(
        rng.uniform(-3, 3, (count, 3)), rng.uniform(0.3, 5, (count, 3)), rng.uniform(-4, 4, count),
        rng.normal(0, 3, (count, 2)), rng.uniform(0, 1, count), rng.integers(0, 10, count), CONFIG.classes, 0,
    )  # fmt: skip


def overlap_rows(boxes: Boxes3D) -> torch.Tensor:
    rows = torch.from_numpy(network_rows(boxes))
    return torch.cat([torch.from_numpy(boxes.center), rows[:, 3:7]], 1)


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_overlaps_equal_those_of_polygon_clipping(seed):
    a, b = random_boxes(seed, 6), random_boxes(seed + 1, 5)
    np.testing.assert_allclose(iou_3d(overlap_rows(a), overlap_rows(b)), geometry.iou_3d(a, b), atol=1e-9)
    in_float32 = iou_3d(overlap_rows(a).float(), overlap_rows(b).float())
    np.testing.assert_allclose(in_float32, geometry.iou_3d(a, b), atol=2e-5)


def test_overlaps_where_edges_coincide():
    """The same box, one shifted along an edge, one turned by a quarter, one that only touches, one inside."""
    square = [0.0, 0.0, 2.0, 2.0, 0.0]
    others = [square, [1, 0, 2, 2, 0], [0, 0, 2, 2, math.pi / 2], [2, 0, 2, 2, 0], [0.2, -0.1, 1, 0.5, 0.3]]
    shared = bev_intersection(torch.tensor([square]).double(), torch.tensor(others).double())
    np.testing.assert_allclose(shared[0], [4, 2, 4, 0, 0.5], atol=1e-12)


def test_overlaps_of_batches_pair_within_a_sample():
    a, b = overlap_rows(random_boxes(0, 8)).view(2, 4, 7), overlap_rows(random_boxes(1, 6)).view(2, 3, 7)
    assert torch.equal(iou_3d(a, b)[1], iou_3d(a[1], b[1]))
    assert iou_3d(a, b[:, :0]).shape == (2, 4, 0)


def prediction_of(boxes: Boxes3D, dtype: torch.dtype = torch.float64) -> BoxPrediction:
    code = encode_boxes(torch.from_numpy(network_rows(boxes)), CONFIG.lidar).T[None].to(dtype)
    logit = (8 * F.one_hot(torch.from_numpy(boxes.label), 10).T[None] - 4).to(dtype)
    return BoxPrediction(code[:, :2], code[:, 2:3], code[:, 3:6], code[:, 6:8], code[:, 8:], logit)


def candidates_of(label: np.ndarray, view: bool = False) -> Candidates:
    label = torch.from_numpy(label)[None]
    index = torch.zeros_like(label)
    return Candidates(label, index, index if view else None, torch.full((1, 10, label.shape[1]), 0.5).double())


def test_boxes_come_back_to_ego():
    """Through the code, the network's frame (x right, y forward, 1.8 m up) and suppression with none near."""
    boxes = random_boxes(3, 12)
    boxes = Boxes3D(
        boxes.center + np.arange(12)[:, None] * [4.0, -3.0, 0], boxes.size, geometry.wrap_angle(boxes.yaw),
        boxes.velocity, boxes.score, boxes.label, boxes.classes, 7,
    )  # fmt: skip
    ego_from_network = Pose.from_yaw(-math.pi / 2, (1.0, 0.1, 1.8))
    prediction = prediction_of(geometry.transform_boxes(ego_from_network.inverse(), boxes))
    outputs = Outputs(None, None, candidates_of(boxes.label), None, prediction, None, None, None)
    (back,) = to_boxes3d(detect(outputs, CONFIG), CONFIG, [ego_from_network], [7])
    for name in ("center", "size", "velocity"):
        np.testing.assert_allclose(getattr(back, name), getattr(boxes, name), atol=1e-9, err_msg=name)
    np.testing.assert_allclose(np.cos(back.yaw - boxes.yaw), 1, atol=1e-12)
    np.testing.assert_array_equal(back.label, boxes.label)
    np.testing.assert_allclose(back.score, 0.5 / (1 + math.exp(-4)))
    assert back.stamp_ns == 7 and back.classes == CONFIG.classes


def test_camera_candidates_score_half_and_only_where_both_agree():
    boxes = random_boxes(0, 4)
    label = boxes.label.copy()
    image_logit = F.one_hot(torch.from_numpy(label), 10).T[None].double()
    image_logit[0, :, 3] = image_logit[0, :, 3].roll(1)  # the decoder thinks otherwise of the last
    nothing = torch.zeros(1, 2, 4).double()
    image = ImagePrediction(nothing, nothing, nothing, nothing, nothing, image_logit, nothing, torch.zeros(1, 4))
    view = prediction_of(boxes)
    camera = Outputs(None, None, None, candidates_of(label, view=True), None, image, view, None)
    twice = BoxPrediction(*(torch.cat([p, p], 2) for p in view))
    fusion = camera._replace(lidar_candidates=candidates_of(label), point=view, fusion=twice)
    high = 1 / (1 + math.exp(-4))
    alone, fused = class_scores(camera), class_scores(fusion)
    np.testing.assert_allclose(alone.amax(1)[0], [0.5 * high] * 3 + [0])
    np.testing.assert_allclose(fused.amax(1)[0], [0.5 * high] * 4 + [0.25 * high] * 3 + [0])
    assert detect(fusion, CONFIG).label[0, 7] == 0  # a score of zero has the first label


def test_half_precision_does_not_move_boxes():
    """Centres of 180 cells have steps of half a metre in bfloat16; codes come in float32, logits may be halved."""
    prediction = prediction_of(random_boxes(1, 5), torch.float32)
    half = prediction._replace(logit=prediction.logit.bfloat16())
    outputs = Outputs(None, None, candidates_of(np.zeros(5, np.int64)), None, prediction, None, None, None)
    halved = detect(outputs._replace(point=half), CONFIG)
    assert halved.box.dtype == torch.float32
    torch.testing.assert_close(halved.box, detect(outputs, CONFIG).box)


def greedy(center, score, label, radius_squared):
    """The released code's loop, restated: by falling score, each box that stays drops the strictly worse near it."""
    out = np.zeros(len(score), bool)
    for i in np.argsort(-score, kind="stable"):
        if out[i]:
            continue
        near = ((center - center[i]) ** 2).sum(1) <= radius_squared[label[i]]
        out |= near & (label == label[i]) & (score[i] > score)
    return out


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 60), st.booleans())
def test_suppression_equals_the_greedy_loop(seed, count, ties):
    rng = np.random.default_rng(seed)
    center, label = rng.uniform(0, 3, (count, 2)), rng.integers(0, 3, count)
    score = rng.integers(0, 4, count) / 4 if ties else rng.uniform(0, 1, count)
    radius_squared = np.array([0.5, 0.1, -1.0])
    out = suppressed(center, score, label, radius_squared)
    np.testing.assert_array_equal(out, greedy(center, score, label, radius_squared))
    assert not out[label == 2].any()


def test_a_chain_of_boxes_keeps_every_second():
    """Each is near the next one alone: the second falls to the first, so the third stays."""
    center = np.stack([np.arange(7.0), np.zeros(7)], 1)
    out = suppressed(center, np.linspace(1, 0.4, 7), np.zeros(7, np.int64), np.array([1.0]))
    assert out.tolist() == [False, True] * 3 + [False]


def test_detections_out_of_range_or_below_the_threshold_are_dropped():
    box = torch.tensor([[[0.0, 0, 0], [62, 0, 0], [0, 10, -11], [0, 20, 0]]])
    rest = torch.tensor([1.0, 1, 1, 0, 0, 0]).expand(1, 4, 6)
    detections = Detections(
        torch.cat([box, rest], -1), torch.tensor([[0.9, 0.9, 0.9, 0.1]]), torch.zeros(1, 4, dtype=torch.int64)
    )
    (all_,) = to_boxes3d(detections, CONFIG, [Pose.identity()], [0])
    np.testing.assert_allclose(all_.center, [[0, 0, 0.5], [0, 20, 0.5]])
    strict = CONFIG.model_copy(update={"score_threshold": 0.2})
    (best,) = to_boxes3d(detections, strict, [Pose.identity()], [0])
    np.testing.assert_allclose(best.center, [[0, 0, 0.5]])


def test_a_map_of_other_cells_moves_the_code():
    lidar = LidarConfig(range_m=(-9.0, -18.0, -5.0, 9.0, 18.0, 3.0), encoder_channels=(8, 16, 32))
    code = encode_boxes(torch.tensor([[1.0, 2.0, -1.0, 2.0, 4.0, 1.0, 0.5, 0.1, 0.2]]), lidar)
    assert code[0, :3].tolist() == pytest.approx([10 / 0.3, 20 / 0.3, -0.5], rel=1e-6)


@pytest.mark.parametrize("part", ["box", "score"])
def test_boxes_that_are_not_numbers_are_told(part: str):
    """Left to the filters they would be dropped without a word."""
    detections = Detections(torch.zeros(1, 3, 9), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int64))
    getattr(detections, part)[0, 1] = torch.nan
    with pytest.raises(PerceptionError, match=r"1 of 3 boxes are not numbers\n.*precision=float32"):
        to_boxes3d(detections, CONFIG, [Pose.identity()], [0])
