"""The head of SparseFusion: from the two branches' features to boxes.

    BEV features (B, 2 neck, Y, X)                         levels of the images (B K, neck, H / 4 / 2^l, W / 4 / 2^l)
      3 x 3 convolution                                      geometric transfer <── sparse depth (B, K, 2, H / 4, W / 4)
    BEV map (B, C, Y, X) ──> semantic transfer <────────── pyramid (B, K, T, C)
      │                        heatmap (B, classes, Y, X)     heatmap (B, classes, K, T)
      │                        Q candidates                   Q candidates
      └──────────────────────> point decoder                  image decoder, view transformation
                                   └───────> fusion <─────────────┘
                                         2 Q boxes

The ablations leave out the other modality: `lidar` makes its heatmap of the BEV map itself and ends with the point
decoder, `camera` maps the levels to C channels by a convolution that they share and ends with the view transformation.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perception.networks.layers.attention import DeformableAttention, full_precision
from perception.networks.sparsefusion.candidates import (
    LabelEmbedding,
    NormedConv,
    image_candidates,
    lidar_candidates,
    pick,
)
from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.decoders import ImageDecoder, PointDecoder, of_view
from perception.networks.sparsefusion.fusion import Fusion
from perception.networks.sparsefusion.geometric import GeometricTransfer
from perception.networks.sparsefusion.pyramid import Pyramid, cells, pyramid
from perception.networks.sparsefusion.semantic import SemanticTransfer, Sight, count_visible, look
from perception.networks.sparsefusion.tensors import BoxPrediction, Calibration, Candidates, ImagePrediction, Outputs
from perception.networks.sparsefusion.view import ViewTransformation

LEVELS = 4
"""Of the image pyramid."""


class LidarDetections(NamedTuple):
    """What the LiDAR's candidates became; features (B, Q, C), heatmap (B, classes, Y, X) logits."""

    features: Tensor
    heatmap: Tensor
    candidates: Candidates
    point: BoxPrediction

    def into(self, outputs: Outputs) -> Outputs:
        return outputs._replace(lidar_heatmap=self.heatmap, lidar_candidates=self.candidates, point=self.point)


class ImageDetections(NamedTuple):
    """What the cameras' candidates became; features (B, Q, C), heatmap (B, classes, K, T) logits."""

    features: Tensor
    heatmap: Tensor
    candidates: Candidates
    image: ImagePrediction
    view: BoxPrediction

    def into(self, outputs: Outputs) -> Outputs:
        return outputs._replace(
            image_heatmap=self.heatmap, image_candidates=self.candidates, image=self.image, view=self.view
        )


class Head(nn.Module):
    """See the module. Its parts, and so its parameters, are those of the configuration's modality."""

    def __init__(self, config: SparseFusionConfig) -> None:
        super().__init__()
        self.config = config
        classes, channels = len(config.classes), config.channels
        if config.modality != "camera":
            self.lidar_projection = nn.Conv2d(2 * config.lidar.neck_channels, channels, 3, padding=1)
            self.lidar_heatmap = self._lidar_heatmap(channels, classes)
            self.lidar_label = LabelEmbedding(classes, channels)
            self.point_decoder = PointDecoder(config)
        if config.modality != "lidar":
            self.level_embedding = nn.Parameter(torch.empty(LEVELS, channels))
            heatmaps = (
                nn.Sequential(NormedConv(channels, channels), nn.Conv2d(channels, classes, 3, padding=1))
                for _ in range(LEVELS)
            )
            self.image_heatmaps = nn.ModuleList(heatmaps)
            self.image_label = LabelEmbedding(classes, channels)
            self.image_decoder = ImageDecoder(config)
            self.view_transformation = ViewTransformation(config)
        if config.modality == "camera":
            self.image_projection = nn.Conv2d(config.image.neck_channels, channels, 3, padding=1)
        if config.modality == "fusion":
            self.geometric = GeometricTransfer(config.image.neck_channels, channels, LEVELS)
            self.semantic = SemanticTransfer(config)
            self.fusion = Fusion(config)
        self.reset_parameters()

    def _lidar_heatmap(self, channels: int, classes: int) -> nn.Module:
        last = nn.Conv2d(channels, classes, 3, padding=1)
        if self.config.modality == "fusion":
            return last
        first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        return nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU(), last)

    def reset_parameters(self) -> None:
        """Xavier for all matrices and kernels, deformable attention's own start, levels from N(0, 1).

        With `config.class_prior`, the class logits' biases start at its logit; the released models have none.
        """
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        if self.config.modality != "lidar":
            nn.init.normal_(self.level_embedding)
        if (prior := self.config.class_prior) is not None:
            last = re.compile(r"(heatmaps?|logit)(\.\d+)*\.bias")
            for name, parameter in self.named_parameters():
                if last.search(name) and len(parameter) == len(self.config.classes):
                    nn.init.constant_(parameter, math.log(prior / (1 - prior)))

    def forward(
        self,
        lidar_features: Tensor | None,
        height_min: Tensor | None,
        height_max: Tensor | None,
        image_levels: list[Tensor] | None,
        sparse_depth: Tensor | None,
        calibration: Calibration | None,
    ) -> Outputs:
        """Candidates and boxes.

        Args:
            lidar_features: (B, 2 * neck_channels, Y, X); this and the heights are None in modality `camera`.
            height_min, height_max: (B, Y, X) m, see `Inputs`.
            image_levels: four of (B K, neck_channels, H / 4 / 2^l, W / 4 / 2^l); this and the calibration are None in
                modality `lidar`.
            sparse_depth: (B, K, 2, H / 4, W / 4), see `Inputs`; modality `fusion` alone.
            calibration: of the cameras.
        """
        outputs = Outputs(*[None] * len(Outputs._fields))
        if self.config.modality == "lidar":
            bev = self.bev_map(lidar_features)
            return self.detect_in_lidar(bev, self.lidar_heatmap(bev)).into(outputs)
        assert image_levels is not None, "the images' features are missing"
        assert calibration is not None, "the cameras' calibration is missing"
        images = self.image_pyramid(image_levels, sparse_depth, calibration)
        image = self.detect_in_images(images, calibration)
        if self.config.modality == "camera":
            return image.into(outputs)
        bev = self.bev_map(lidar_features)
        sight = self.look(height_min, height_max, calibration)
        enhanced = self.semantic(bev, images, sight, count_visible(sight))
        lidar = self.detect_in_lidar(bev, self.lidar_heatmap(enhanced))
        return lidar.into(image.into(outputs))._replace(fusion=self.fuse(lidar, image, calibration))

    def look(self, height_min: Tensor | None, height_max: Tensor | None, calibration: Calibration) -> Sight:
        """The BEV cells in the views."""
        assert height_min is not None, "the cells' heights are missing"
        assert height_max is not None, "the cells' heights are missing"
        return look(height_min, height_max, calibration, self.config.lidar, self.config.image.canvas_px)

    def bev_map(self, lidar_features: Tensor | None) -> Tensor:
        """(B, C, Y, X) of the LiDAR branch's features."""
        assert lidar_features is not None, "the LiDAR's features are missing"
        bev: Tensor = self.lidar_projection(lidar_features)
        return bev

    def image_pyramid(self, levels: list[Tensor], sparse_depth: Tensor | None, calibration: Calibration) -> Pyramid:
        """The images' features, with the LiDAR's depth in modality `fusion`."""
        if self.config.modality == "fusion":
            assert sparse_depth is not None, "the sparse depth is missing"
            levels = self.geometric(sparse_depth.flatten(0, 1).to(levels[0].dtype), levels)
        else:
            levels = [self.image_projection(level) for level in levels]
        embedded = zip(levels, self.level_embedding, strict=True)
        # In the levels' type: a sum with float32 would make all that follows twice as large under autocast.
        levels = [level + embedding.to(level.dtype)[:, None, None] for level, embedding in embedded]
        return pyramid(levels, calibration)

    def detect_in_images(self, images: Pyramid, calibration: Calibration) -> ImageDetections:
        """Camera candidates through their decoder and into LiDAR space."""
        batch, views = calibration.present.shape
        levels = zip(self.image_heatmaps, images.maps(), strict=True)
        heatmap = torch.cat([head(level).flatten(2) for head, level in levels], -1)  # (B K, classes, T)
        heatmap = heatmap.unflatten(0, (batch, views)).transpose(1, 2)
        candidates = image_candidates(heatmap, images, calibration.present, self.config)
        assert candidates.view is not None
        index = candidates.view * images.tokens.shape[2] + candidates.location
        x = pick(images.tokens.flatten(1, 2), index) + self.image_label(candidates.label)
        place = images.position[candidates.location]
        x, image, logit_center = self.image_decoder(x, place, candidates.view, images, calibration)
        x, view = self.view_transformation(x, image, logit_center, calibration)
        return ImageDetections(x, heatmap, candidates, image, view)

    def detect_in_lidar(self, bev: Tensor, heatmap: Tensor) -> LidarDetections:
        """LiDAR candidates of the heatmap (B, classes, Y, X) through their decoder, with features of the BEV map."""
        candidates = lidar_candidates(heatmap, self.config)
        memory = bev.flatten(2).transpose(1, 2)  # (B, Y X, C)
        column, row = cells(bev.shape[2], bev.shape[3], bev.device)
        centers = torch.stack((column, row), -1).to(full_precision(bev).dtype) + 0.5
        x = pick(memory, candidates.location) + self.lidar_label(candidates.label)
        x, point = self.point_decoder(x, centers[candidates.location], memory, centers[None])
        return LidarDetections(x, heatmap, candidates, point)

    def fuse(self, lidar: LidarDetections, image: ImageDetections, calibration: Calibration) -> BoxPrediction:
        """Boxes of the candidates of both, at the centers that their own decoders gave them."""
        position = torch.cat((lidar.point.center, image.view.center), -1).detach().transpose(1, 2)
        present = of_view(calibration.present, image.image.view)
        everyone = torch.cat((torch.ones_like(lidar.candidates.label, dtype=torch.bool), present), 1)
        return self.fusion(lidar.features, image.features, position, everyone)
