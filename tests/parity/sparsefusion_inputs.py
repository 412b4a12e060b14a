"""The kit's stored inputs as a cloud, and as the tensors that `encode` makes of a sample."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from parity.kit import Kit
from torch import Tensor

from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.tensors import Calibration

DTYPE = {"float64": torch.float64, "float32": torch.float32}


def points(kit: Kit, sample: int) -> Tensor:
    """(N, 5) float32 as the kit's README says."""
    xyz = (kit.array("inputs", f"s{sample}_points_q").astype(np.float32) + np.float32(0.5)) / np.float32(512)
    intensity = kit.array("inputs", f"s{sample}_intensity").astype(np.float32)
    lag = np.float32(0.05) * kit.array("inputs", f"s{sample}_sweep").astype(np.float32)
    return torch.from_numpy(np.column_stack([xyz, intensity, lag]))


def calibration(kit: Kit, sample: int, case: str, dtype: torch.dtype) -> Calibration:
    """Of one sample, with the batch axis; `full` predicts, `small` has the views' valid sizes, as in training."""

    def get(name: str) -> Tensor:
        return kit.tensor("inputs", f"s{sample}_{case}_{name}", dtype)[None]

    rotation = get("lidar2cam_r")
    views = rotation.shape[1]
    content, canvas = (torch.tensor(size, dtype=dtype).expand(1, views, 2) for size in kit.size(case))
    trains = f"s{sample}_{case}_valid_shape" in kit.names("inputs")
    valid, visible = (get("valid_shape"), get("valid_shape")) if trains else (content, canvas)
    present = torch.ones(1, views, dtype=torch.bool)
    return Calibration(rotation, get("lidar2cam_t"), get("cam_intrinsic"), valid, visible, present)


VIEW_GAIN = (1, 1.04, 0.9, 1.06, 0.97, 1.02)
"""Of each view's features, by the kit's rule."""


class HeadInputs(NamedTuple):
    """The arguments of `Head.forward`, in its order."""

    bev: Tensor
    height_min: Tensor
    height_max: Tensor
    levels: list[Tensor]
    sparse_depth: Tensor
    calibration: Calibration


def head_inputs(kit: Kit, case: str, config: SparseFusionConfig, dtype: torch.dtype) -> HeadInputs:
    """Features by the kit's rule, heights, depth and calibration from its file; `full` has one sample, `small` two."""
    of_samples = [calibration(kit, sample, case, dtype) for sample in range(1 if case == "full" else 2)]
    batch, (width, height) = len(of_samples), config.image.canvas_px
    bev = kit.input(f"{case}:bev", (batch, 2 * config.lidar.neck_channels, *config.lidar.bev_shape), 1).to(dtype)
    gain = torch.tensor(VIEW_GAIN).to(dtype).repeat(batch)[:, None, None, None]
    levels = []
    for level in range(4):
        shape = (len(gain), config.image.neck_channels, height // 4 // 2**level, width // 4 // 2**level)
        levels.append(kit.input(f"{case}:fpn{level}", shape, 1).to(dtype) * gain)
    depth = torch.stack([kit.tensor("inputs", f"s{s}_{case}_sparse_depth", dtype)[:, 0] for s in range(batch)])
    low, high = (kit.tensor("inputs", name, dtype)[:batch] for name in ("height_min", "height_max"))
    cameras = Calibration(*(torch.cat(parts) for parts in zip(*of_samples, strict=True)))
    return HeadInputs(bev, low, high, levels, depth, cameras)
