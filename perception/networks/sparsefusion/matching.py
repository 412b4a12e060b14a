"""One-to-one matching of predictions with true boxes: Hungarian, on a cost of class, place and overlap.

The costs of DETR (arXiv 2005.12872) as TransFusion and SparseFusion weigh them. They are made on the predictions'
device for all samples and layers, and fetched at once; the assignment itself runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from perception.errors import PerceptionError
from perception.networks.layers.attention import full_precision
from perception.networks.sparsefusion.boxes import prediction_code
from perception.networks.sparsefusion.config import LidarConfig
from perception.networks.sparsefusion.iou import iou_3d
from perception.networks.sparsefusion.targets import BoxTargets, ImageTargets
from perception.networks.sparsefusion.tensors import BoxPrediction, ImagePrediction

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0

_CLASS_WEIGHT = 0.15
_PLACE_WEIGHT = 0.25
_OVERLAP_WEIGHT = 0.25
_OTHER_VIEW = 1000.0  # a match across cameras is worse than any other


@torch.no_grad()
def box_cost(prediction: BoxPrediction, boxes: BoxTargets, lidar: LidarConfig) -> Tensor:
    """(B, Q, M) cost of matching each query with each true box in space.

    Class cost (focal) + L1 distance of centres as shares of the map - IoU in space, each weighted.
    """
    code, truth = prediction_code(prediction), boxes.code
    extent = code.new_tensor(lidar.bev_shape[::-1])  # cells along x, y
    place = torch.cdist(code[..., :2] / extent, truth[..., :2].to(code) / extent, p=1)
    overlap = iou_3d(_upright(code, lidar.cell_m), _upright(truth.to(code), lidar.cell_m))
    return (
        _CLASS_WEIGHT * _class_cost(prediction.logit, boxes.label) + _PLACE_WEIGHT * place - _OVERLAP_WEIGHT * overlap
    )


@torch.no_grad()
def image_cost(prediction: ImagePrediction, boxes: ImageTargets, lidar: LidarConfig) -> Tensor:
    """(B, Q, M) cost of matching each camera query with each true box that a camera sees, in that camera's frame.

    The distance is that of the bottom faces' x and y (right and down), as shares of the BEV map: so the released models
    were trained.
    """
    center, truth = full_precision(prediction.center_camera).transpose(1, 2), boxes.center_camera
    truth = truth.to(center)
    low, high = np.array(lidar.range_m[:2]), np.array(lidar.range_m[3:5])
    extent = center.new_tensor(high - low)
    code = torch.cat([full_precision(p) for p in (prediction.dim, prediction.rot)], 1).transpose(1, 2)
    true_code = boxes.code[..., 3:8].to(center)
    place = torch.cdist(_bottom(center, code) / extent, _bottom(truth, true_code) / extent, p=1)
    overlap = iou_3d(_in_camera(center, code), _in_camera(truth, true_code))
    cost = _CLASS_WEIGHT * _class_cost(prediction.logit, boxes.label) + _PLACE_WEIGHT * place
    cost = cost - _OVERLAP_WEIGHT * overlap
    return cost + _OTHER_VIEW * (prediction.view[:, :, None] != boxes.view[:, None])


def assign(costs: Sequence[Tensor], exists: Sequence[Tensor]) -> list[Tensor]:
    """The matching of least total cost for each layer and sample.

    Args:
        costs: of each layer, (B, Q, M).
        exists: of each layer, (B, M) bool: which columns are true boxes.

    Returns:
        for each layer (B, Q) int64, the true box of each query, -1 for none; on the costs' device.

    Raises:
        PerceptionError: a cost is not finite, so a prediction is not.
    """
    parts = [t.flatten().double() for pair in zip(costs, exists, strict=True) for t in pair]
    fetched = torch.cat(parts).cpu().numpy()
    sizes = np.cumsum([0] + [len(part) for part in parts])
    matches = []
    for i, cost in enumerate(costs):
        values = fetched[sizes[2 * i] : sizes[2 * i + 1]].reshape(cost.shape)
        real = fetched[sizes[2 * i + 1] : sizes[2 * i + 2]].reshape(len(cost), -1) > 0
        match = np.full(cost.shape[:2], -1)
        for b in range(len(cost)):
            columns = np.flatnonzero(real[b])
            if not np.isfinite(values[b][:, columns]).all():
                raise PerceptionError(
                    "the network's boxes are not finite, so they cannot be matched with the truth",
                    "the training diverged: lower the learning rate, or start again from an earlier checkpoint",
                )
            row, column = linear_sum_assignment(values[b][:, columns])
            match[b, row] = columns[column]
        matches.append(match)
    device = costs[0].device
    flat = torch.from_numpy(np.concatenate([m.ravel() for m in matches])).to(device)
    return [f.view(m.shape) for f, m in zip(flat.split([m.size for m in matches]), matches, strict=True)]


def _class_cost(logit: Tensor, label: Tensor) -> Tensor:
    """(B, Q, M) what the focal loss of logits (B, C, Q) would gain by a match with labels (B, M)."""
    p = full_precision(logit).sigmoid()
    eps = 1e-12
    as_other = -(1 - p + eps).log() * (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA
    as_label = -(p + eps).log() * FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA
    index = label[:, :, None].expand(-1, -1, p.shape[2])  # (B, M, Q)
    return (as_label - as_other).gather(1, index).transpose(1, 2)


def _upright(code: Tensor, cell_m: float) -> Tensor:
    """Codes (..., 10) in space as rows of `iou_3d`, up to a shift."""
    theta = torch.atan2(code[..., 6:7], code[..., 7:8])
    return torch.cat([code[..., :2] * cell_m, code[..., 2:3], code[..., 3:6].exp(), theta], -1)


def _bottom(center: Tensor, code: Tensor) -> Tensor:
    """(..., 2) x and y of the bottom face's centre in a camera's frame; arguments as `_in_camera`."""
    return torch.stack([center[..., 0], center[..., 1] + code[..., 1].exp() / 2], -1)


def _in_camera(center: Tensor, code: Tensor) -> Tensor:
    """Centres (..., 3) and codes (..., 5: log l, h, w, sin, cos) in a camera's frame as rows of `iou_3d`.

    Seen from above the camera's x is right and its z forward; its y, down, is the height.
    """
    length, height, width = code[..., :3].exp().unbind(-1)
    x, y, z = center.unbind(-1)
    return torch.stack([x, z, y, length, width, height, torch.atan2(code[..., 3], code[..., 4])], -1)
