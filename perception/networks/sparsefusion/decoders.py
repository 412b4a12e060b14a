"""The two decoders, each of its own modality: LiDAR candidates in the BEV map, camera candidates in their images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perception.networks.layers.attention import full_precision
from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.pyramid import Pyramid, inverse_sigmoid
from perception.networks.sparsefusion.tensors import BoxPrediction, Calibration, ImagePrediction
from perception.networks.sparsefusion.transformer import BoxHeads, DecoderLayer, DeformableLayer


class PointDecoder(nn.Module):
    """LiDAR candidates attend each other and the BEV map."""

    def __init__(self, config: SparseFusionConfig) -> None:
        super().__init__()
        self.layer = DecoderLayer(config, position_channels=2)
        self.heads = BoxHeads(config)
        self.raw_queries = config.raw_queries

    def forward(
        self, x: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor
    ) -> tuple[Tensor, BoxPrediction]:
        """Features (B, Q, C) and boxes of candidates x (B, Q, C) at cells position (B, Q, 2).

        The memory is (B, Y X, C) at memory_position (B, Y X, 2).
        """
        if self.training and self.raw_queries:
            with torch.no_grad():
                self.heads(x, position)
        x = self.layer(x, position, memory, memory_position)
        return x, self.heads(x, position)


class ImageHeads(nn.Module):
    """Boxes in a camera's frame from queries; always in full precision."""

    def __init__(self, config: SparseFusionConfig) -> None:
        super().__init__()
        channels, hidden = config.channels, config.channels // 2

        def head(size: int) -> nn.Module:
            between = nn.Linear(hidden, hidden)
            return nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), between, nn.ReLU(), nn.Linear(hidden, size))

        self.center, self.depth, self.dim, self.rot, self.vel = head(2), head(1), head(3), head(2), head(2)
        self.logit = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, len(config.classes)),
        )
        self.canvas_px = config.image.canvas_px

    def forward(self, x: Tensor, position: Tensor, intrinsic: Tensor, view: Tensor) -> tuple[ImagePrediction, Tensor]:
        """Boxes of x (B, Q, C), and the logits (B, Q, 2) of their centers.

        Args:
            x: as above.
            position: (B, Q, 2) logits of the candidates' place; the centers are offsets from it.
            intrinsic: (B, Q, 3, 3) of each query's camera on the canvas.
            view: (B, Q).
        """
        with torch.autocast(x.device.type, enabled=False):
            x = full_precision(x)
            logit_center = self.center(x) + position
            center, depth = logit_center.sigmoid(), self.depth(x)
            prediction = ImagePrediction(
                center.transpose(1, 2),
                depth.transpose(1, 2),
                self.dim(x).transpose(1, 2),
                self.rot(x).transpose(1, 2),
                self.vel(x).transpose(1, 2),
                self.logit(x).transpose(1, 2),
                unproject(center, depth, intrinsic, self.canvas_px).transpose(1, 2),
                view,
            )
            return prediction, logit_center


class ImageDecoder(nn.Module):
    """Camera candidates attend those of their view and, deformably, its pyramid.

    The only candidate of a view gets zeros for features: the released models skip such views.
    """

    def __init__(self, config: SparseFusionConfig) -> None:
        super().__init__()
        self.layer = DeformableLayer(config, position_channels=2)
        self.heads = ImageHeads(config)

    def forward(
        self, x: Tensor, place: Tensor, view: Tensor, pyramid: Pyramid, calibration: Calibration
    ) -> tuple[Tensor, ImagePrediction, Tensor]:
        """Features (B, Q, C), boxes, and (B, Q, 2) logits of their centers.

        Args:
            x: (B, Q, C) candidates.
            place: (B, Q, 2) in the view, shares of the canvas.
            view: (B, Q).
            pyramid: of the images.
            calibration: of the cameras.
        """
        position = inverse_sigmoid(place)
        same_view = view[:, :, None] == view[:, None]
        x = self.layer(x, position, position.sigmoid(), same_view, pyramid, view)
        alone = same_view.sum(-1, keepdim=True) == 1
        x = x.masked_fill(alone, 0)
        prediction, logit_center = self.heads(x, position, of_view(calibration.intrinsic, view), view)
        return x, prediction, logit_center


def of_view(values: Tensor, view: Tensor) -> Tensor:
    """(B, Q, ...) of each query's view (B, Q), from values (B, K, ...)."""
    batch = torch.arange(view.shape[0], device=view.device)[:, None]
    return values[batch, view]


def unproject(center: Tensor, depth: Tensor, intrinsic: Tensor, canvas_px: tuple[int, int]) -> Tensor:
    """(B, Q, 3) points in the camera, m: center (B, Q, 2) as shares of the canvas, depth (B, Q, 1), no skew."""
    x = (center[..., 0] * canvas_px[0] - intrinsic[..., 0, 2]) / intrinsic[..., 0, 0]
    y = (center[..., 1] * canvas_px[1] - intrinsic[..., 1, 2]) / intrinsic[..., 1, 1]
    return torch.stack((x, y, torch.ones_like(x)), -1) * depth
