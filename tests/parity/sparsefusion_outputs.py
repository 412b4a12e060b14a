"""The kit's stored predictions as our tensors, so that what follows the network is tested without it."""

from __future__ import annotations

import numpy as np
import torch
from parity.kit import Kit
from torch import Tensor

from perception.networks.sparsefusion.boxes import encode_boxes
from perception.networks.sparsefusion.config import ImageConfig, LidarConfig, SparseFusionConfig
from perception.networks.sparsefusion.losses import Matches
from perception.networks.sparsefusion.targets import (
    BoxTargets,
    ImageTargets,
    Targets,
    image_heatmap,
    lidar_heatmap,
)
from perception.networks.sparsefusion.tensors import (
    BoxPrediction,
    Candidates,
    ImagePrediction,
    Outputs,
)

_BOX = ("center", "height", "dim", "rot", "vel", "heatmap")
_IMAGE = ("center_2d", "depth_2d", "dim_2d", "rot_2d", "vel_2d", "cls", "loc_cam_3d")


def config_of(kit: Kit, case: str) -> SparseFusionConfig:
    """The released configuration with the kit's canvas of `full` or `small`."""
    return SparseFusionConfig(lidar=LidarConfig(), image=ImageConfig(canvas_px=kit.size(case)[1]))


def head_outputs(kit: Kit, file: str, dtype: torch.dtype = torch.float64) -> Outputs:
    """The outputs stored in head_full or head_small_b2; None for a heatmap of which only a sample is stored."""

    def get(name: str) -> Tensor:
        return kit.tensor(file, name, dtype)

    def boxes(layer: str, suffix: str = "") -> BoxPrediction:
        return BoxPrediction(*(get(f"{layer}_head_{name}{suffix}") for name in _BOX))

    def integers(name: str) -> Tensor:
        return kit.tensor(file, name, torch.int64)

    lidar = Candidates(integers("lidar_top_class"), integers("lidar_top_cell"), None, get("pred_query_heatmap_score"))
    view = integers("img_top_view")
    camera = Candidates(integers("img_top_class"), integers("img_top_token"), view, get("pred_img_query_heatmap_score"))
    image = ImagePrediction(*(get(f"img_head_{name}") for name in _IMAGE), view)
    lidar_heatmap, image_heatmap = "lidar_heatmap_logits", "img_heatmap_logits"
    return Outputs(
        get(lidar_heatmap) if lidar_heatmap in kit.names(file) else None,
        get(image_heatmap) if image_heatmap in kit.names(file) else None,
        lidar,
        camera,
        boxes("point"),
        image,
        boxes("view", "_view"),
        boxes("fusion"),
    )


def camera_rows_7(rows: np.ndarray) -> Tensor:
    """Camera boxes (x, y of the bottom, z, l, h, w, ry, ...) as rows of `iou.iou_3d`."""
    x, y, z, length, height, width, angle = torch.from_numpy(rows).double()[:, :7].unbind(1)
    return torch.stack([x, z, y - height / 2, length, width, height, angle], 1)


def lidar_rows_7(rows: np.ndarray) -> Tensor:
    """Boxes in the network's frame (..., 9) as rows of `iou.iou_3d`."""
    rows = torch.from_numpy(rows).double()
    return torch.cat([rows[:, :2], rows[:, 2:3] + rows[:, 5:6] / 2, rows[:, 3:7]], 1)


def train_outputs(kit: Kit, dtype: torch.dtype = torch.float64) -> Outputs:
    """The predictions of the training step stored in loss_trainp0; its heatmaps are stored in part and left out."""

    def get(name: str) -> Tensor:
        return kit.tensor("loss_trainp0", f"pred_{name}", dtype)

    queries = get("center_2d").shape[2]
    both = [get(name) for name in _BOX]
    view = kit.tensor("loss_trainp0", "pred_view", torch.int64)
    return Outputs(
        None,
        None,
        None,
        None,
        BoxPrediction(*(p[:, :, :queries] for p in both)),
        ImagePrediction(*(get(name) for name in _IMAGE), view),
        BoxPrediction(*(get(f"{name}_view") for name in _BOX)),
        BoxPrediction(*(p[:, :, queries:] for p in both)),
    )


def pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def kit_targets(kit: Kit, config: SparseFusionConfig) -> Targets:
    """The true boxes stored in loss_eval, with heatmaps drawn here."""
    count = sum(name.endswith("_gt_bboxes_3d") for name in kit.names("loss_eval"))

    def get(name: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [kit.tensor("loss_eval", f"in_s{s}_gt_{name}", dtype) for s in range(count)]

    label = get("labels_3d", torch.int64)
    boxes = BoxTargets(
        pad([encode_boxes(b, config.lidar) for b in get("bboxes_3d")]),
        pad(label),
        pad([torch.ones_like(v, dtype=torch.bool) for v in label]),
        pad(get("visible_3d", torch.bool)),
    )
    canvas = torch.tensor(config.image.canvas_px)
    codes, centers = [], []
    for camera, uvd in zip(get("bboxes_cam_view"), get("img_centers_uvd"), strict=True):
        center, size, angle, velocity = camera.split([3, 3, 1, 2], 1)
        centers.append(center - torch.tensor([0, 0.5, 0]) * size[:, 1:2])
        parts = [uvd[:, :2] / canvas, uvd[:, 2:], size.log(), angle.sin(), angle.cos(), velocity]
        codes.append(torch.cat(parts, 1))
    class_view = get("labels_2d_class_view", torch.int64)
    image = ImageTargets(
        pad(codes),
        pad(centers),
        pad([r[:, 2:] for r in get("bboxes_2d_cxcywh")]),
        pad([cv[:, 0] for cv in class_view]),
        pad([cv[:, 1] for cv in class_view]),
        pad([torch.ones(len(cv), dtype=torch.bool) for cv in class_view]),
    )
    return Targets(boxes, image, lidar_heatmap(boxes, config), image_heatmap(image, config))


def kit_matches(kit: Kit, file: str) -> Matches:
    """The matches stored in loss_eval or loss_trainp0."""

    def get(name: str) -> Tensor:
        return kit.tensor(file, f"bbox_assigner_{name}_gt_inds", torch.int64) - 1

    truths = [kit.tensor("loss_eval", f"in_s{s}_gt_visible_3d", torch.bool) for s in (0, 1)]
    view = []
    for s, call in ((0, "call4"), (1, "call5")):  # these count the visible boxes alone
        seen = torch.cat([truths[s].nonzero()[:, 0], torch.tensor([-1])])
        view.append(seen[get(call)])
    return Matches(
        torch.stack([get("call0"), get("call2")]),
        torch.stack([get("2d_call0"), get("2d_call1")]),
        torch.stack(view),
        torch.stack([get("call1"), get("call3")]),
    )
