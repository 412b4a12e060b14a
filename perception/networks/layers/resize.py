"""Bilinear resizing of uint8 images on any device, to the bit as OpenCV resizes them on the CPU.

cv2.resize(INTER_LINEAR) of uint8 works in integers: weights are rounded to 1 / 2048; rows are blended first and cut to
15 bits, then columns. Exactly half the size is the mean of four pixels. The released networks saw images made so;
floating-point resizing differs by a grey level or two.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

IMAGE_RESIZE = "bilinear in OpenCV's integers"
"""What result files say of it."""

_ONE = 2048  # OpenCV's INTER_RESIZE_COEF_SCALE


def resize_uint8(images: Tensor, width_px: int, height_px: int) -> Tensor:
    """Images (K, H, W, C) uint8 to (K, height_px, width_px, C) uint8, the same values on every device."""
    _, height, width, _ = images.shape
    if (height, width) == (height_px, width_px):
        return images
    if images.device.type == "cpu":
        size = (width_px, height_px)
        resized = [cv2.resize(image.numpy(), size, interpolation=cv2.INTER_LINEAR) for image in images]
        return torch.from_numpy(np.stack(resized)).view(len(images), height_px, width_px, -1)
    return blend_bilinear(images, width_px, height_px)


def blend_bilinear(images: Tensor, width_px: int, height_px: int) -> Tensor:
    """`resize_uint8` in integer tensor operations."""
    _, height, width, _ = images.shape
    pixels = images.int()
    if (height, width) == (2 * height_px, 2 * width_px):
        upper, lower = pixels[:, ::2], pixels[:, 1::2]
        return (upper[:, :, ::2] + upper[:, :, 1::2] + lower[:, :, ::2] + lower[:, :, 1::2] + 2 >> 2).to(torch.uint8)
    left, right, weight_left, weight_right = _taps(width, width_px, images.device, inside=True)
    top, bottom, weight_top, weight_bottom = _taps(height, height_px, images.device, inside=False)
    rows = pixels[:, :, left] * weight_left[:, None] + pixels[:, :, right] * weight_right[:, None]
    rows = rows >> 4  # (K, H, width_px, C)
    upper = rows[:, top] * weight_top[:, None, None] >> 16
    lower = rows[:, bottom] * weight_bottom[:, None, None] >> 16
    return (upper + lower + 2 >> 2).to(torch.uint8)


@lru_cache(maxsize=64)
def _taps(size: int, resized: int, device: torch.device, inside: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both source indices and both integer weights of each resized pixel.

    `inside`: OpenCV moves columns beyond the border onto it, weights and all, but clamps the indices of rows alone.
    """
    place = ((np.arange(resized) + 0.5) * (size / resized) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    fraction = place - first.astype(np.float32)
    if inside:
        fraction = np.where((first < 0) | (first >= size - 1), np.float32(0), fraction)
    weights = [np.rint(f * np.float32(_ONE)).astype(np.int32) for f in (np.float32(1) - fraction, fraction)]
    indices = [np.clip(i, 0, size - 1) for i in (first, first + 1)]
    first_index, second_index, first_weight, second_weight = (
        torch.from_numpy(values).to(device) for values in (*indices, *weights)
    )
    return first_index, second_index, first_weight, second_weight
