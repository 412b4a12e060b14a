"""The losses of SparseFusion: both heatmaps and each layer's boxes.

Heatmaps: the penalty-reduced focal loss of CornerNet (arXiv 1808.01244, eq. 1), over the peaks. Boxes of a layer, after
matching: sigmoid focal loss (arXiv 1708.02002) of every query's class and L1 of the matched queries' codes, both over
the number of matches in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.networks.layers.attention import full_precision
from perception.networks.sparsefusion.boxes import prediction_code
from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.matching import FOCAL_ALPHA, FOCAL_GAMMA, assign, box_cost, image_cost
from perception.networks.sparsefusion.pyramid import valid_tokens
from perception.networks.sparsefusion.targets import BoxTargets, ImageTargets, Targets, level_shapes
from perception.networks.sparsefusion.tensors import BoxPrediction, Calibration, ImagePrediction, Outputs

_BOX_WEIGHT = 0.25
_IMAGE_CENTER_WEIGHT = 5.0
_VELOCITY_WEIGHT = 0.2  # beside the code's other values


class Matches(NamedTuple):
    """For each layer (B, Q) int64: the true box of each query, -1 for none; None for what a modality lacks."""

    point: Tensor | None
    image: Tensor | None
    view: Tensor | None
    fusion: Tensor | None


def match(outputs: Outputs, targets: Targets, config: SparseFusionConfig) -> Matches:
    """Match every layer's boxes with the truth; the camera's boxes in space with those alone that a camera sees."""
    boxes, lidar = targets.boxes, config.lidar
    costs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("point", "fusion", "view"):
        prediction = getattr(outputs, name)
        if prediction is not None:
            exists = boxes.exists & boxes.visible if name == "view" else boxes.exists
            costs[name] = box_cost(prediction, boxes, lidar), exists
    if outputs.image is not None and targets.image is not None:
        costs["image"] = image_cost(outputs.image, targets.image, lidar), targets.image.exists
    found = assign([cost for cost, _ in costs.values()], [exists for _, exists in costs.values()])
    matched = dict(zip(costs, found, strict=True))
    return Matches(*(matched.get(name) for name in Matches._fields))


def losses(
    outputs: Outputs,
    targets: Targets,
    calibration: Calibration | None,
    config: SparseFusionConfig,
    matches: Matches | None = None,
) -> dict[str, Tensor]:
    """Every weighted loss term; training minimises their sum. Terms of what a modality lacks are absent.

    Args:
        outputs: in training mode, of the samples that `targets` and `calibration` belong to.
        targets: `encode_targets` of them.
        calibration: what the samples were encoded with; None for the modality `lidar`.
        config: of the network.
        matches: instead of matching here.
    """
    matches = match(outputs, targets, config) if matches is None else matches
    terms: dict[str, Tensor] = {}
    weight = config.heatmap_weight
    if outputs.lidar_heatmap is not None and targets.lidar_heatmap is not None:
        terms["lidar_heatmap"] = weight * _heatmap_loss(outputs.lidar_heatmap, targets.lidar_heatmap)
    if outputs.image_heatmap is not None and targets.image_heatmap is not None and calibration is not None:
        seen = valid_tokens(level_shapes(config.image.canvas_px), calibration)[:, None]
        terms["image_heatmap"] = weight * _heatmap_loss(outputs.image_heatmap, targets.image_heatmap, seen)
    for name in ("point", "view", "fusion"):
        prediction, matched = getattr(outputs, name), getattr(matches, name)
        if prediction is not None:
            terms |= {f"{name}_{k}": v for k, v in _box_losses(prediction, targets.boxes, matched).items()}
    if outputs.image is not None and targets.image is not None and matches.image is not None:
        terms |= {f"image_{k}": v for k, v in _image_losses(outputs.image, targets.image, matches.image).items()}
    return terms


def _heatmap_loss(logit: Tensor, target: Tensor, counts: Tensor | None = None) -> Tensor:
    """Focal loss whose penalty fades towards peaks, over the number of peaks; `counts` masks cells."""
    p = full_precision(logit).sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = target == 1
    loss = torch.where(peak, -p.log() * (1 - p) ** 2, -(1 - p).log() * p**2 * (1 - target.to(p)) ** 4)
    if counts is not None:
        loss = loss * counts
    return loss.sum() / peak.sum().clamp(min=1)


def _box_losses(prediction: BoxPrediction, boxes: BoxTargets, matched: Tensor) -> dict[str, Tensor]:
    code = prediction_code(prediction)  # (B, Q, 10)
    label, target, positive = _matched(matched, boxes.label, boxes.code)
    count = positive.sum().clamp(min=1)
    weight = positive[..., None] * _code_weight(code)
    return {
        "label": _focal_loss(prediction.logit, label).sum() / count,
        "box": _BOX_WEIGHT * ((code - target.to(code)).abs() * weight).sum() / count,
    }


def _image_losses(prediction: ImagePrediction, boxes: ImageTargets, matched: Tensor) -> dict[str, Tensor]:
    code = torch.cat([full_precision(p) for p in prediction[:5]], 1).transpose(1, 2)  # (B, Q, 10)
    label, target, positive = _matched(matched, boxes.label, boxes.code)
    count = positive.sum().clamp(min=1)
    # A view may hold more true boxes than queries: what is left is matched across views, and does not count.
    elsewhere = positive & (boxes.view.gather(1, matched.clamp(min=0)) != prediction.view)
    weight = (positive & ~elsewhere)[..., None] * _code_weight(code)
    center, rest = ((code - target.to(code)).abs() * weight).split([2, 8], -1)
    focal = _focal_loss(prediction.logit, label) * ~elsewhere[:, None]
    return {
        "label": focal.sum() / count,
        "center": _IMAGE_CENTER_WEIGHT * center.sum() / count,
        "box": _BOX_WEIGHT * rest.sum() / count,
    }


def _matched(matched: Tensor, label: Tensor, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query: label (B, Q), -1 for background; code (B, Q, 10) and whether it is matched (B, Q)."""
    positive = matched >= 0
    if not label.shape[1]:  # no true box in the whole batch
        return matched, code.new_zeros(*matched.shape, code.shape[2]), positive
    index = matched.clamp(min=0)
    target = code.gather(1, index[..., None].expand(-1, -1, code.shape[2]))
    return torch.where(positive, label.gather(1, index), -1), target, positive


def _code_weight(code: Tensor) -> Tensor:
    """(10,) of each value of a code: velocities count less."""
    return torch.cat([code.new_ones(8), code.new_full((2,), _VELOCITY_WEIGHT)])


def _focal_loss(logit: Tensor, label: Tensor) -> Tensor:
    """(B, C, Q) sigmoid focal loss of logits (B, C, Q) for labels (B, Q), -1 for background."""
    logit = full_precision(logit)
    classes = torch.arange(logit.shape[1], device=logit.device)[:, None]
    is_label = (label[:, None] == classes).to(logit)
    p = logit.sigmoid()
    away = p * (1 - is_label) + (1 - p) * is_label
    alpha = FOCAL_ALPHA * is_label + (1 - FOCAL_ALPHA) * (1 - is_label)
    return F.binary_cross_entropy_with_logits(logit, is_label, reduction="none") * alpha * away**FOCAL_GAMMA
