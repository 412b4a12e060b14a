"""The image branch: a backbone and a feature pyramid, shared by all cameras."""

from __future__ import annotations

from torch import Tensor, nn

from perception.networks.layers.image import FPN, EfficientNetLite0, ResNet50
from perception.networks.layers.swin import SwinTiny
from perception.networks.sparsefusion.config import ImageConfig


class ImageBranch(nn.Module):
    """Images to four levels of features."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.backbone = _backbone(config)
        self.neck = FPN(self.backbone.channels, config.neck_channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B * K, 3, H, W) normalised -> (B * K, neck_channels, H / 2^(l+2), W / 2^(l+2)) for l = 0 to 3."""
        levels: list[Tensor] = self.neck(self.backbone(images))
        return levels


def _backbone(config: ImageConfig) -> ResNet50 | SwinTiny | EfficientNetLite0:
    if config.backbone == "efficientnet_lite0":
        return EfficientNetLite0(config.coarse_blocks)
    return {"resnet50": ResNet50, "swin_tiny": SwinTiny}[config.backbone]()
