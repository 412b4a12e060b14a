"""The kit's stored inputs as a cloud, and as the tensors that `encode` makes of a sample."""

from __future__ import annotations

import numpy as np
import torch
from parity.kit import Kit
from torch import Tensor

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
