"""The kit's stored predictions as our tensors, so that what follows the network is tested without it."""

from __future__ import annotations

import numpy as np
import torch
from parity.kit import Kit
from torch import Tensor

from perception.networks.sparsefusion.config import ImageConfig, LidarConfig, SparseFusionConfig
from perception.networks.sparsefusion.tensors import BoxPrediction, Candidates, ImagePrediction, Outputs

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
