"""Boxes of SparseFusion: the code that layers predict, scores with the candidates' priors, suppression, boxes in ego.

A box in the network's frame is a row (x, y, z of the bottom face's centre, width, length, height, theta, vx, vy) in
metres, radians and m/s, with theta = -yaw - pi/2: mmdetection3d's convention before 1.0. Layers predict its *code*
(x, y in BEV cells from the map's corner, z of the geometric centre in m, log width, log length, log height, sin theta,
cos theta, vx, vy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perception.errors import PerceptionError
from perception.geometry import transform_boxes, wrap_angle
from perception.networks.layers.attention import full_precision
from perception.networks.sparsefusion.config import LidarConfig, SparseFusionConfig
from perception.networks.sparsefusion.tensors import BoxPrediction, Candidates, Outputs
from perception.types import Array, Boxes3D, Pose

# What a camera candidate's heatmap counts beside a LiDAR candidate's.
_CAMERA_WEIGHT = 0.5


class Detections(NamedTuple):
    """Scored boxes of all queries in the network's frame, before suppression.

    Attributes:
        box: (B, Q, 9) see this module.
        score: (B, Q) of the best class.
        label: (B, Q) int64, the best class.
    """

    box: Tensor
    score: Tensor
    label: Tensor


def encode_boxes(box: Tensor, lidar: LidarConfig) -> Tensor:
    """Boxes (..., 9) as codes (..., 10)."""
    xy, z, size, theta, velocity = box.split([2, 1, 3, 1, 2], -1)
    corner = box.new_tensor(lidar.range_m[:2])
    code = [(xy - corner) / lidar.cell_m, z + size[..., 2:] / 2, size.log(), theta.sin(), theta.cos(), velocity]
    return torch.cat(code, -1)


def decode_boxes(prediction: BoxPrediction, lidar: LidarConfig) -> Tensor:
    """(B, Q, 9) boxes of a layer's prediction, in float32 at least."""
    center, height, dim, rot, vel = (full_precision(p).transpose(1, 2) for p in prediction[:5])  # each (B, Q, values)
    size = dim.exp()
    # The corner enters number by number: a tensor made of them on the host would make it wait for the device.
    x, y = (center[..., i : i + 1] * lidar.cell_m + lidar.range_m[i] for i in (0, 1))
    theta = torch.atan2(rot[..., :1], rot[..., 1:])
    return torch.cat([x, y, height - size[..., 2:] / 2, size, theta, vel], -1)


def prediction_code(prediction: BoxPrediction) -> Tensor:
    """(B, Q, 10) codes of a layer's prediction, in float32 at least."""
    return torch.cat([full_precision(p) for p in prediction[:5]], 1).transpose(1, 2)


def class_scores(outputs: Outputs) -> Tensor:
    """(B, C, Q) sigmoid of the last layer's logits times the candidates' priors.

    The prior of a candidate is its heatmap's score at its own class, 0 at the others. A camera candidate keeps half of
    it, and only while the image decoder agrees on the class. The ablations score their own candidates alone.
    """
    priors = []
    if outputs.lidar_candidates is not None:
        priors.append(_own_class(outputs.lidar_candidates))
    if outputs.image_candidates is not None and outputs.image is not None:
        candidates = outputs.image_candidates
        agrees = outputs.image.logit.argmax(1) == candidates.label  # (B, Q)
        weight = _CAMERA_WEIGHT if outputs.fusion is not None else 1.0
        priors.append(weight * _own_class(candidates) * agrees[:, None])
    return full_precision(last_layer(outputs).logit).sigmoid() * torch.cat(priors, 2)


def last_layer(outputs: Outputs) -> BoxPrediction:
    """The layer whose boxes are the detections: the fusion's, or the only detector's there is."""
    for prediction in (outputs.fusion, outputs.point, outputs.view):
        if prediction is not None:
            return prediction
    raise ValueError("the network predicted no boxes in LiDAR space")


def detect(outputs: Outputs, config: SparseFusionConfig) -> Detections:
    """The best class and the box of every query, on the outputs' device, without waiting for it."""
    score, label = class_scores(outputs).max(1)
    return Detections(decode_boxes(last_layer(outputs), config.lidar), score, label)


def to_boxes3d(
    detections: Detections, config: SparseFusionConfig, ego_from_network: Sequence[Pose], stamps_ns: Sequence[int]
) -> list[Boxes3D]:
    """The boxes that stay, in ego, in the queries' order, one `Boxes3D` a sample. One transfer for the whole batch.

    A box stays with its centre (at the bottom face) in `center_range_m`, a score of `score_threshold` or more, and no
    better one of its class near (`suppressed`).

    Raises:
        PerceptionError: a number is NaN.
    """
    box, score, label = detections
    rows = torch.cat([box, score[..., None].to(box), label[..., None].to(box)], -1).double().cpu().numpy()
    if wrong := int(np.isnan(rows).any(-1).sum()):
        raise PerceptionError(
            f"sparsefusion: {wrong} of {rows.shape[0] * rows.shape[1]} boxes are not numbers",
            "predictor.precision=float32 if it is another, else other weights: these diverged in training",
        )
    return [
        transform_boxes(pose, _network_boxes(sample[keep(sample, config)], config.classes, stamp_ns))
        for sample, pose, stamp_ns in zip(rows, ego_from_network, stamps_ns, strict=True)
    ]


def keep(rows: Array, config: SparseFusionConfig) -> Array:
    """(Q,) bool: which rows (Q, 11: box, score, label) of one sample are detections."""
    low, high = np.array(config.center_range_m[:3]), np.array(config.center_range_m[3:])
    kept = ((rows[:, :3] >= low) & (rows[:, :3] <= high)).all(1) & (rows[:, 9] >= config.score_threshold)
    radius_squared = np.array([config.nms_radius_squared_m2.get(name, -1.0) for name in config.classes])
    at = np.flatnonzero(kept)
    label = rows[at, 10].astype(np.int64)
    kept[at] = ~suppressed(rows[at, :2], rows[at, 9], label, radius_squared)
    return kept


def suppressed(center: Array, score: Array, label: Array, radius_squared: Array) -> Array:
    """Circle suppression within each class: (Q,) bool, which boxes lie near a strictly better one that stays.

    Args:
        center: (Q, 2) m.
        score: (Q,).
        label: (Q,) int.
        radius_squared: (C,) m^2 of each class; below 0 a class is left as it is.
    """
    out = np.zeros(len(center), bool)
    for kind in np.flatnonzero(radius_squared >= 0):  # class by class: tables of all pairs are small then
        at = np.flatnonzero(label == kind)
        (x, y), s = center[at].T, score[at]
        dx, dy = x[:, None] - x, y[:, None] - y
        beats = (dx * dx + dy * dy <= radius_squared[kind]) & (s[:, None] > s)  # row beats column
        stays = ~beats.any(0)
        # Whether a box stays depends on better ones alone: each round settles at least the best ones not yet settled.
        while not np.array_equal(stays, settled := ~beats[stays].any(0)):
            stays = settled
        out[at] = ~stays
    return out


def _network_boxes(rows: Array, classes: tuple[str, ...], stamp_ns: int) -> Boxes3D:
    """Rows (M, 11: box, score, label) as Boxes3D in the network's frame."""
    width_length_height = rows[:, 3:6]
    center = rows[:, :3] + [0, 0, 0.5] * width_length_height
    yaw = wrap_angle(-rows[:, 6] - math.pi / 2)
    size = width_length_height[:, [1, 0, 2]]
    return Boxes3D(
        center, size, yaw, rows[:, 7:9], np.clip(rows[:, 9], 0, 1), rows[:, 10].astype(np.int64), classes, stamp_ns
    )


def network_rows(boxes: Boxes3D) -> Array:
    """(M, 9) float64 rows, see this module, of boxes in the network's frame."""
    bottom = boxes.center - [0, 0, 0.5] * boxes.size
    theta = wrap_angle(-boxes.yaw - math.pi / 2)
    return np.concatenate([bottom, boxes.size[:, [1, 0, 2]], theta[:, None], boxes.velocity], 1)


def _own_class(candidates: Candidates) -> Tensor:
    """(B, C, Q) the candidates' scores at their own class, 0 elsewhere."""
    one_hot = F.one_hot(candidates.label, candidates.score.shape[1]).transpose(1, 2)
    return full_precision(candidates.score) * one_hot
