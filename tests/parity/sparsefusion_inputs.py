"""The kit's stored inputs as a cloud, and as the tensors that `encode` makes of a sample."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from parity.kit import Kit
from torch import Tensor

from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.tensors import Calibration

DTYPE = {"float64": torch.float64, "float32": torch.float32}

Case = Literal["full", "small"]
"""Sizes of the images. `full` predicts, one sample; `small` has several, and the views' valid sizes as in training."""


def points(kit: Kit, sample: int) -> Tensor:
    """(N, 5) float32 as the kit's README says."""
    xyz = (kit.array("inputs", f"s{sample}_points_q").astype(np.float32) + np.float32(0.5)) / np.float32(512)
    intensity = kit.array("inputs", f"s{sample}_intensity").astype(np.float32)
    lag = np.float32(0.05) * kit.array("inputs", f"s{sample}_sweep").astype(np.float32)
    return torch.from_numpy(np.column_stack([xyz, intensity, lag]))


def samples(kit: Kit, case: Case) -> range:
    """The samples of the head's inputs."""
    stored = sum(name.endswith("_small_valid_shape") for name in kit.names("inputs"))
    return range(1 if case == "full" else stored)


def calibration(kit: Kit, case: Case, dtype: torch.dtype, of: range | None = None) -> Calibration:
    """Of the samples `of`, by default those of the head's inputs."""
    of = samples(kit, case) if of is None else of

    def get(name: str) -> Tensor:
        return torch.stack([kit.tensor("inputs", f"s{s}_{case}_{name}", dtype) for s in of])

    rotation = get("lidar2cam_r")
    views = rotation.shape[:2]
    content, canvas = (torch.tensor(size, dtype=dtype).expand(*views, 2) for size in kit.size(case))
    valid = get("valid_shape") if case == "small" else content
    visible = valid if case == "small" else canvas
    present = torch.ones(views, dtype=torch.bool)
    return Calibration(rotation, get("lidar2cam_t"), get("cam_intrinsic"), valid, visible, present)


def level_shapes(kit: Kit, case: Case) -> list[tuple[int, int]]:
    """(rows, columns) of the image pyramid's levels."""
    width, height = kit.size(case)[1]
    return [(height // 4 // 2**level, width // 4 // 2**level) for level in range(4)]


class HeadInputs(NamedTuple):
    """The arguments of `Head.forward`, in its order."""

    bev: Tensor
    height_min: Tensor
    height_max: Tensor
    levels: list[Tensor]
    sparse_depth: Tensor
    calibration: Calibration


def head_inputs(kit: Kit, case: Case, config: SparseFusionConfig, dtype: torch.dtype) -> HeadInputs:
    """Features by the kit's rule, heights, depth and calibration from its file."""
    cameras = calibration(kit, case, dtype)
    batch, views = cameras.present.shape
    shape = (batch, 2 * config.lidar.neck_channels, *config.lidar.bev_shape)
    bev = kit.input("case:bev", shape, case).to(dtype)
    gain = torch.tensor([float(g) for g in kit.said(r"gain float32 \[([\d., ]+)\]")[1].split(",")])  # of each view
    assert len(gain) == views
    gain = gain.to(dtype).repeat(batch)[:, None, None, None]
    levels = []
    for level, size in enumerate(level_shapes(kit, case)):
        shape = (batch * views, config.image.neck_channels, *size)
        levels.append(kit.input("case:fpn{l}", shape, case, level).to(dtype) * gain)
    depth = torch.stack([kit.tensor("inputs", f"s{s}_{case}_sparse_depth", dtype)[:, 0] for s in range(batch)])
    low, high = (kit.tensor("inputs", name, dtype)[:batch] for name in ("height_min", "height_max"))
    return HeadInputs(bev, low, high, levels, depth, cameras)
