"""Losses and matches of cases worked out by hand; the official numbers are compared in tests/parity."""

from __future__ import annotations

import math

import pytest
import torch

from perception.errors import PerceptionError
from perception.networks.sparsefusion.config import ImageConfig, LidarConfig, SparseFusionConfig
from perception.networks.sparsefusion.losses import Matches, losses, match
from perception.networks.sparsefusion.matching import assign
from perception.networks.sparsefusion.targets import BoxTargets, ImageTargets, Targets, level_shapes
from perception.networks.sparsefusion.tensors import BoxPrediction, Calibration, ImagePrediction, Outputs

CONFIG = SparseFusionConfig(
    classes=("car", "pedestrian"),
    cameras=("front", "back"),
    lidar=LidarConfig(range_m=(-24.0, -24.0, -5.0, 24.0, 24.0, 3.0)),  # 80 cells of 0.6 m
    image=ImageConfig(canvas_px=(64, 32)),
)
TOKENS = sum(h * w for h, w in level_shapes((64, 32)))
CODE = torch.tensor([40.0, 40, 0, math.log(2), math.log(4), math.log(1.5), 0, 1, 0, 0])


def boxes_at(*cells: float) -> BoxTargets:
    """Cars at these columns of the middle row, alike in all else."""
    code = CODE.repeat(1, len(cells), 1)
    code[0, :, 0] = torch.tensor(cells)
    ones = torch.ones(1, len(cells), dtype=torch.bool)
    return BoxTargets(code, torch.zeros(1, len(cells), dtype=torch.int64), ones, ones)


def prediction_at(*cells: float, logit: float = 0.0) -> BoxPrediction:
    code = boxes_at(*cells).code.transpose(1, 2)
    return BoxPrediction(
        code[:, :2], code[:, 2:3], code[:, 3:6], code[:, 6:8], code[:, 8:], torch.full((1, 2, len(cells)), logit)
    )


def lidar_outputs(prediction: BoxPrediction) -> Outputs:
    return Outputs(None, None, None, None, prediction, None, None, None)


def lidar_targets(boxes: BoxTargets) -> Targets:
    return Targets(boxes, None, None, None)


def test_each_true_box_takes_the_query_on_it():
    found = match(lidar_outputs(prediction_at(10, 20, 30, 41)), lidar_targets(boxes_at(40.5, 11)), CONFIG)
    assert found.point.tolist() == [[1, -1, -1, 0]]
    assert found.image is None and found.view is None and found.fusion is None


def test_the_view_layer_is_matched_with_what_a_camera_sees():
    boxes = boxes_at(40, 11)._replace(visible=torch.tensor([[False, True]]))
    prediction = prediction_at(40, 60)
    outputs = lidar_outputs(prediction)._replace(view=prediction)
    found = match(outputs, lidar_targets(boxes), CONFIG)
    assert found.point.tolist() == [[0, 1]] or found.point.tolist() == [[1, 0]]
    assert sorted(found.view[0].tolist()) == [-1, 1]


def test_losses_of_one_match():
    """Logits of 0: focal 0.25 * 0.25 * log 2 for the label, 0.75 * 0.25 * log 2 for every other of 2 x 2."""
    prediction = prediction_at(10, 41)
    terms = losses(lidar_outputs(prediction), lidar_targets(boxes_at(40)), None, CONFIG)
    assert set(terms) == {"point_label", "point_box"}
    assert float(terms["point_label"]) == pytest.approx((0.25 + 3 * 0.75) * 0.25 * math.log(2), rel=1e-6)
    assert float(terms["point_box"]) == pytest.approx(0.25 * 1.0, rel=1e-6)


def test_velocity_counts_a_fifth():
    prediction = prediction_at(40)
    faster = prediction._replace(vel=prediction.vel + 1)
    terms = losses(lidar_outputs(faster), lidar_targets(boxes_at(40)), None, CONFIG)
    assert float(terms["point_box"]) == pytest.approx(0.25 * 2 * 0.2, rel=1e-6)


def test_without_true_boxes_there_are_labels_to_learn_and_finite_gradients():
    prediction = prediction_at(10, 20)
    prediction = BoxPrediction(*(p.clone().requires_grad_() for p in prediction))
    terms = losses(lidar_outputs(prediction), lidar_targets(boxes_at()), None, CONFIG)
    assert terms["point_label"].item() == pytest.approx(4 * 0.75 * 0.25 * math.log(2), rel=1e-6)
    assert terms["point_box"].item() == 0
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in prediction if p.grad is not None)


def test_padding_is_never_matched():
    boxes = boxes_at(40, 10)._replace(exists=torch.tensor([[True, False]]))
    found = match(lidar_outputs(prediction_at(10, 40, 70)), lidar_targets(boxes), CONFIG)
    assert found.point.tolist() == [[-1, 0, -1]]


def test_more_true_boxes_than_queries_match_as_many_as_there_are():
    (found,) = assign([torch.tensor([[[3.0, 1, 2]]])], [torch.ones(1, 3, dtype=torch.bool)])
    assert found.tolist() == [[1]]


def test_a_diverged_network_is_told():
    broken = prediction_at(float("nan"))
    with pytest.raises(PerceptionError, match=r"boxes are not finite.*\n  the training diverged"):
        match(lidar_outputs(broken), lidar_targets(boxes_at(40)), CONFIG)


def camera_case(views: tuple[int, ...], true_views: tuple[int, ...]) -> tuple[Outputs, Targets]:
    def center(count: int) -> torch.Tensor:
        return torch.tensor([[0.0, 0, 10]]).expand(1, count, 3).clone()

    def code(count: int) -> torch.Tensor:
        row = [0.5, 0.5, 10, math.log(4), math.log(1.5), math.log(2), 0, 1, 0, 0]
        return torch.tensor(row).expand(1, count, 10).clone()

    parts = code(len(views)).transpose(1, 2).split([2, 1, 3, 2, 2], 1)
    image = ImagePrediction(
        *parts, torch.zeros(1, 2, len(views)), center(len(views)).transpose(1, 2), torch.tensor([views])
    )
    count = len(true_views)
    truth = ImageTargets(
        code(count), center(count), torch.ones(1, count, 2), torch.zeros(1, count, dtype=torch.int64),
        torch.tensor([true_views]), torch.ones(1, count, dtype=torch.bool),
    )  # fmt: skip
    outputs = Outputs(None, None, None, None, None, image, None, None)
    return outputs, Targets(boxes_at(), truth, None, None)


def test_camera_boxes_are_matched_within_their_view():
    outputs, targets = camera_case(views=(0, 1), true_views=(1, 0))
    assert match(outputs, targets, CONFIG).image.tolist() == [[1, 0]]


def test_a_match_across_views_counts_for_nothing():
    """Two true boxes in a view of one query: the other view's query takes one, and learns neither label nor box."""
    outputs, targets = camera_case(views=(0, 1), true_views=(0, 0))
    shifted = outputs.image._replace(depth=outputs.image.depth + torch.tensor([[[1.0, 5.0]]]))
    terms = losses(outputs._replace(image=shifted), targets, None, CONFIG)
    assert float(terms["image_box"]) == pytest.approx(0.25 * 1.0 / 2, rel=1e-5)  # over two matches
    assert float(terms["image_label"]) == pytest.approx((0.25 + 0.75) * 0.25 * math.log(2) / 2, rel=1e-5)
    assert float(terms["image_center"]) == 0


def heatmap_case(valid_px: tuple[float, float], present: bool = True) -> dict[str, torch.Tensor]:
    heatmap = torch.zeros(1, 2, 2, TOKENS)
    heatmap[0, 0, 0, 0] = 1
    outputs = Outputs(None, torch.zeros_like(heatmap), None, None, None, None, None, prediction_at(40))
    targets = Targets(boxes_at(40), None, None, heatmap)
    eye = torch.eye(3).expand(1, 2, 3, 3)
    valid = torch.tensor(valid_px).expand(1, 2, 2)
    calibration = Calibration(eye, eye[..., 0], eye, valid, valid, torch.tensor([[True, present]]))
    return losses(outputs, targets, calibration, CONFIG, Matches(None, None, None, torch.zeros(1, 1).long()))


@pytest.mark.parametrize(
    ("valid_px", "present", "tokens"),
    [((64.0, 32.0), True, 2 * TOKENS), ((64.0, 32.0), False, TOKENS), ((31.0, 32.0), True, 2 * (56 + 12 + 2))],
)
def test_the_camera_heatmap_counts_on_the_image_alone(valid_px, present, tokens):
    """Logits of 0: a quarter of log 2 from every token and class; the penalty of the peak is the same there."""
    value = heatmap_case(valid_px, present)["image_heatmap"]
    assert float(value) == pytest.approx(0.1 * tokens * 2 * 0.25 * math.log(2), rel=1e-6)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_losses():
    outputs, targets = camera_case(views=(0, 1, 1, 0), true_views=(1, 0, 0))
    point = prediction_at(10, 20, 30, 41)
    outputs, boxes = outputs._replace(point=point, fusion=point, view=point), boxes_at(40.5, 11)

    def there(value, device):
        return type(value)(
            *(there(v, device) if isinstance(v, tuple) else v.to(device) for v in value if v is not None)
        )

    here = losses(outputs, targets._replace(boxes=boxes), None, CONFIG)
    moved = outputs._replace(**{n: there(getattr(outputs, n), "cuda") for n in ("image", "point", "view", "fusion")})
    on_gpu = Targets(there(boxes, "cuda"), there(targets.image, "cuda"), None, None)
    for name, value in losses(moved, on_gpu, None, CONFIG).items():
        assert value.item() == pytest.approx(here[name].item(), rel=1e-5), name
