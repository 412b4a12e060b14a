"""What training compares SparseFusion's outputs with: true boxes in space and in each image, and both heatmaps.

As the released models were trained (their info files and head): a box counts with a LiDAR point or more inside, its
centre on the BEV map and a known class. It is seen by a camera whose image its projected centre falls on, and by two
where images overlap. A heatmap has a Gaussian peak at each box's centre, its radius from the box's size (CornerNet,
arXiv 1808.01244, eq. 1, with the released code's variant of the roots); a box in an image has it on the one level of
the pyramid that fits the size of its projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from perception.errors import DataError
from perception.geometry import box_corners, project, transform_boxes
from perception.networks.sparsefusion.boxes import encode_boxes, network_rows
from perception.networks.sparsefusion.config import ImageConfig, SparseFusionConfig
from perception.networks.sparsefusion.pyramid import IMAGE_STRIDE
from perception.networks.sparsefusion.tensors import Calibration
from perception.types import Array, Boxes3D, Pose, Truth

LEVEL_SIZES_PX = (48.0, 96.0, 192.0)
"""A box whose longer side in the image is below the first lies on level 0, below the second on level 1, and so on."""

_MIN_OVERLAP = 0.1
_MIN_RADIUS, _MAX_RADIUS = 2, 999


class BoxTargets(NamedTuple):
    """True boxes in the network's frame, padded to the most that a sample of the batch has (M).

    Attributes:
        code: (B, M, 10) see `boxes`.
        label: (B, M) int64.
        exists: (B, M) bool, False for padding.
        visible: (B, M) bool: some camera sees it.
    """

    code: Tensor
    label: Tensor
    exists: Tensor
    visible: Tensor


class ImageTargets(NamedTuple):
    """True boxes as cameras see them, once for each camera that does; padded like BoxTargets.

    Attributes:
        code: (B, M, 10) projected centre as a share of the canvas, depth (m), log of length, height, width (m), sin and
            cos of rotation_y, vx, vz (m/s) along the camera's axes.
        center_camera: (B, M, 3) geometric centre in the camera's frame, m.
        size_px: (B, M, 2) width and height of the projected box within the image, on the canvas.
        label, view: (B, M) int64.
        exists: (B, M) bool.
    """

    code: Tensor
    center_camera: Tensor
    size_px: Tensor
    label: Tensor
    view: Tensor
    exists: Tensor


class Targets(NamedTuple):
    """Of a batch; None for what the modality does not predict.

    Attributes:
        boxes: in space.
        image: in the images.
        lidar_heatmap: (B, C, Y, X) in [0, 1].
        image_heatmap: (B, C, K, T) in [0, 1].
    """

    boxes: BoxTargets
    image: ImageTargets | None
    lidar_heatmap: Tensor | None
    image_heatmap: Tensor | None


def encode_targets(
    truths: Sequence[Truth],
    network_from_ego: Sequence[Pose],
    calibration: Calibration | None,
    config: SparseFusionConfig,
    device: torch.device | str = "cpu",
) -> Targets:
    """The targets of a batch.

    Args:
        truths: of each sample, after augmentation.
        network_from_ego: of each sample, as its points were encoded.
        calibration: that the samples were encoded with; None for the modality `lidar`.
        config: of the network.
        device: where the targets go.

    Raises:
        DataError: a sample's truth has no boxes.
    """
    cameras = None if calibration is None else Calibration(*(t.cpu() for t in calibration))
    spaces, images = [], []
    for b, (truth, pose) in enumerate(zip(truths, network_from_ego, strict=True)):
        if truth.boxes is None:
            raise DataError("a sample's truth has no boxes", "train on a data set and a split with annotated boxes")
        boxes = _trained_on(transform_boxes(pose, truth.boxes), config)
        visible = np.zeros(len(boxes), bool)
        if cameras is not None:
            seen, views = _seen_by(boxes, Calibration(*(t[b] for t in cameras)), config.image)
            visible[seen] = True
            images.append(views)
        code = encode_boxes(torch.from_numpy(network_rows(boxes)), config.lidar).numpy()
        spaces.append((code, boxes.label, np.ones(len(boxes), bool), visible))
    space = BoxTargets(*_pad(spaces, device))
    image = None if cameras is None else ImageTargets(*_pad(images, device))
    return Targets(
        space,
        image,
        None if config.modality == "camera" else lidar_heatmap(space, config),
        None if image is None else image_heatmap(image, config),
    )


def lidar_heatmap(boxes: BoxTargets, config: SparseFusionConfig) -> Tensor:
    """(B, C, Y, X): a peak in each box's cell, as wide as its length and width allow."""
    height, width = config.lidar.bev_shape
    radius = _gaussian_radius(boxes.code[..., 3:5].exp() / config.lidar.cell_m)
    x, y = boxes.code[..., :2].floor().long().unbind(-1)
    shape = (len(x), len(config.classes), height, width)
    row = torch.arange(len(x), device=x.device)[:, None] * shape[1] + boxes.label
    extent = torch.tensor([width, height], device=x.device).expand(*x.shape, 2)
    flat = boxes.code.new_zeros(math.prod(shape))
    return _draw_peaks(flat, row * (height * width), extent, x, y, radius, boxes.exists).view(shape)


def image_heatmap(boxes: ImageTargets, config: SparseFusionConfig) -> Tensor:
    """(B, C, K, T): a peak at each box's projected centre, in its camera and on its level of the pyramid."""
    canvas = config.image.canvas_px
    levels = level_shapes(canvas)
    shape = (len(boxes.code), len(config.classes), len(config.cameras), sum(h * w for h, w in levels))
    thresholds = boxes.code.new_tensor(LEVEL_SIZES_PX)
    level = torch.bucketize(boxes.size_px.amax(-1).contiguous(), thresholds, right=True)
    # The radius of the finest level, halved for each coarser one: there it may fall below the least radius.
    radius = _gaussian_radius(boxes.size_px / IMAGE_STRIDE) >> level
    stride = IMAGE_STRIDE * 2**level
    center_px = boxes.code[..., :2] * boxes.code.new_tensor(canvas)
    x, y = (center_px / stride[..., None]).floor().long().unbind(-1)
    sample = torch.arange(len(x), device=x.device)[:, None]
    row = (sample * shape[1] + boxes.label) * shape[2] + boxes.view
    tokens = torch.tensor([0, *np.cumsum([h * w for h, w in levels])], device=x.device)
    extent = torch.tensor([(w, h) for h, w in levels], device=x.device)[level]
    flat = boxes.code.new_zeros(math.prod(shape))
    return _draw_peaks(flat, row * shape[3] + tokens[level], extent, x, y, radius, boxes.exists).view(shape)


def level_shapes(canvas_px: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of the pyramid's levels."""
    shapes = [(-(-canvas_px[1] // IMAGE_STRIDE), -(-canvas_px[0] // IMAGE_STRIDE))]
    for _ in LEVEL_SIZES_PX:
        shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
    return tuple(shapes)


def _gaussian_radius(size: Tensor) -> Tensor:
    """(...) int64 radius of a peak of a box of size (..., 2) in cells: moved so far, it still overlaps its place."""
    total, area = size.double().sum(-1), size.double().prod(-1)
    o = _MIN_OVERLAP

    def larger_root(a: float, b: Tensor, c: Tensor) -> Tensor:
        return (b + (b * b - 4 * a * c).clamp(min=0).sqrt()) / 2

    roots = (
        larger_root(1, total, area * (1 - o) / (1 + o)),
        larger_root(4, 2 * total, (1 - o) * area),
        larger_root(4 * o, -2 * o * total, (o - 1) * area),
    )
    return torch.stack(roots).amin(0).long().clamp(_MIN_RADIUS, _MAX_RADIUS)


def _draw_peaks(
    flat: Tensor, start: Tensor, extent: Tensor, x: Tensor, y: Tensor, radius: Tensor, exists: Tensor
) -> Tensor:
    """Draw Gaussian peaks into many maps that follow one another in `flat`; the greatest value stays.

    Args:
        flat: (cells of all maps,) zeros.
        start: (B, M) where each peak's map begins.
        extent: (B, M, 2) its width and height.
        x, y, radius: (B, M) int64, in cells; sigma is a sixth of the diameter.
        exists: (B, M).
    """
    reach = int((radius * exists).max()) if exists.numel() else 0
    offset = torch.arange(-reach, reach + 1, device=x.device)
    dy, dx = offset[:, None], offset[None]  # of the window's cells
    x, y, radius = x[..., None, None], y[..., None, None], radius[..., None, None]  # (B, M, 1, 1)
    width, height = extent[..., None, None, 0], extent[..., None, None, 1]
    inside = (dx.abs() <= radius) & (dy.abs() <= radius) & exists[..., None, None]
    inside = inside & (x + dx >= 0) & (x + dx < width) & (y + dy >= 0) & (y + dy < height)
    sigma = (2 * radius + 1).to(flat) / 6
    value = (-(dx * dx + dy * dy) / (2 * sigma * sigma)).exp() * inside
    cell = (start[..., None, None] + (y + dy) * width + (x + dx)) * inside
    return flat.scatter_reduce_(0, cell.flatten(), value.flatten(), "amax")


def _trained_on(boxes: Boxes3D, config: SparseFusionConfig) -> Boxes3D:
    """The boxes in the network's frame that count, labelled by the network's classes; unknown velocities are 0."""
    index = {name: i for i, name in enumerate(config.classes)}
    label = np.array([index.get(name, -1) for name in boxes.classes], np.int64)[boxes.label]
    low, high = np.array(config.lidar.range_m)[[0, 1]], np.array(config.lidar.range_m)[[3, 4]]
    counts = (label >= 0) & ((boxes.center[:, :2] > low) & (boxes.center[:, :2] < high)).all(1)
    if boxes.num_points is not None:
        counts &= boxes.num_points > 0
    boxes = replace(boxes, label=np.maximum(label, 0), classes=config.classes, velocity=np.nan_to_num(boxes.velocity))
    return boxes.select(counts)


def _seen_by(boxes: Boxes3D, camera: Calibration, image: ImageConfig) -> tuple[Array, tuple[Array, ...]]:
    """Which boxes (n,) of the network's frame a camera sees, as often as one does, and the fields of ImageTargets.

    Args:
        boxes: in the network's frame.
        camera: of one sample, on the CPU.
        image: of the network.
    """
    corners = box_corners(boxes)
    heading = np.stack([np.cos(boxes.yaw), np.sin(boxes.yaw), np.zeros(len(boxes))], 1)
    velocity = np.concatenate([boxes.velocity, np.zeros((len(boxes), 1))], 1)
    seen, parts = [], []
    calibration = (t.double().numpy() for t in camera[:4])
    for k, (rotation, translation, intrinsic, limit) in enumerate(zip(*calibration, strict=True)):
        if not camera.present[k]:
            continue
        center = boxes.center @ rotation.T + translation
        center_px, depth = project(center, intrinsic)
        at = np.flatnonzero(((center_px >= 0) & (center_px < limit)).all(1))  # NaN behind the camera
        corner_px, _ = project(corners[at] @ rotation.T + translation, intrinsic)  # (n, 8, 2)
        low = np.nanmin(corner_px, 1).clip(0, limit) if len(at) else np.zeros((0, 2))
        high = np.nanmax(corner_px, 1).clip(0, limit) if len(at) else np.zeros((0, 2))
        turned, moved = heading[at] @ rotation.T, velocity[at] @ rotation.T
        angle = -np.arctan2(turned[:, 2], turned[:, 0])[:, None]  # rotation_y
        size = boxes.size[at][:, [0, 2, 1]]  # length, height, width
        share = center_px[at] / np.array(image.canvas_px)
        code = [share, depth[at, None], np.log(size), np.sin(angle), np.cos(angle), moved[:, [0, 2]]]
        label, one = boxes.label[at], np.ones(len(at), bool)
        parts.append((np.concatenate(code, 1), center[at], high - low, label, np.full(len(at), k), one))
        seen.append(at)
    none = (
        np.zeros((0, 10)),
        np.zeros((0, 3)),
        np.zeros((0, 2)),
        np.zeros(0, int),
        np.zeros(0, int),
        np.zeros(0, bool),
    )
    if not parts:
        return np.zeros(0, int), none
    return np.concatenate(seen), tuple(np.concatenate(fields) for fields in zip(*parts, strict=True))


def _pad(samples: Sequence[tuple[Array, ...]], device: torch.device | str) -> list[Tensor]:
    """Each field of the samples (m, ...) as one tensor (B, M, ...), zeros after a sample's last row."""
    most = max(len(fields[0]) for fields in samples)
    tensors = []
    for rows in zip(*samples, strict=True):
        padded = np.zeros((len(rows), most, *rows[0].shape[1:]), rows[0].dtype)
        for b, row in enumerate(rows):
            padded[b, : len(row)] = row
        tensor = torch.from_numpy(padded)
        tensors.append((tensor.float() if tensor.is_floating_point() else tensor).to(device))
    return tensors
