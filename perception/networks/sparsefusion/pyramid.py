"""The image pyramid as tokens, and small things of geometry that several parts need."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from perception.networks.layers.attention import Shapes
from perception.networks.sparsefusion.tensors import Calibration

IMAGE_STRIDE = 4
"""Canvas pixels along a cell of the first level; it doubles with every level."""


class Pyramid(NamedTuple):
    """Image features of all levels.

    Attributes:
        tokens: (B, K, T, C).
        shapes: (height, width) of the levels.
        position: (T, 2) x, y of each token's centre as shares of the canvas.
        valid: (B, K, T) bool: within the image (not the canvas' padding) of a camera that is present.
    """

    tokens: Tensor
    shapes: Shapes
    position: Tensor
    valid: Tensor

    def maps(self) -> list[Tensor]:
        """(B K, C, H, W) of every level; views of the tokens."""
        sizes = [height * width for height, width in self.shapes]
        levels = self.tokens.flatten(0, 1).transpose(1, 2).split(sizes, dim=-1)
        return [level.unflatten(-1, shape) for level, shape in zip(levels, self.shapes, strict=True)]


def pyramid(levels: list[Tensor], calibration: Calibration) -> Pyramid:
    """The pyramid of `levels`, (B K, C, H, W) each."""
    batch, views = calibration.present.shape
    shapes = tuple((level.shape[-2], level.shape[-1]) for level in levels)
    # Channels of a token together in memory: as channels-last levels have them, and as linear layers want them.
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1).unflatten(0, (batch, views))
    positions = []
    for height, width in shapes:
        column, row = cells(height, width, calibration.valid_px.device)
        center = column.to(calibration.intrinsic.dtype) + 0.5, row.to(calibration.intrinsic.dtype) + 0.5
        positions.append(torch.stack((center[0] / width, center[1] / height), -1))
    return Pyramid(tokens, shapes, torch.cat(positions), valid_tokens(shapes, calibration))


def valid_tokens(shapes: Shapes, calibration: Calibration) -> Tensor:
    """(B, K, T) bool: tokens wholly within the image (not the canvas' padding) of a camera that is present."""
    valid = []
    for index, (height, width) in enumerate(shapes):
        column, row = cells(height, width, calibration.valid_px.device)
        filled = calibration.valid_px.div(IMAGE_STRIDE * 2**index, rounding_mode="floor")[:, :, None]  # (B, K, 1, 2)
        valid.append((column < filled[..., 0]) & (row < filled[..., 1]))
    return torch.cat(valid, -1) & calibration.present[..., None]


def cells(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(height * width,) column and row of the cells of a map, row by row."""
    index = torch.arange(height * width, device=device)
    return index % width, index.div(width, rounding_mode="floor")


def inverse_sigmoid(share: Tensor, eps: float = 1e-5) -> Tensor:
    """log(p / (1 - p)) with p clipped to [0, 1] and both terms to at least `eps`."""
    share = share.clamp(0, 1)
    return (share.clamp(min=eps) / (1 - share).clamp(min=eps)).log()


def inverse_3x3(matrix: Tensor) -> Tensor:
    """Inverse of (..., 3, 3) by the adjugate: unlike torch.linalg.inv it never waits for the device."""
    a, b, c = matrix.unbind(-2)
    adjugate = torch.stack((torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)), -1)
    return adjugate / (a * adjugate[..., 0]).sum(-1)[..., None, None]
