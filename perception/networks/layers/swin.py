"""Swin Transformer, tiny (arXiv 2103.14030): self-attention within windows of 7 x 7 tokens, shifted by 3 in odd blocks.

Parameters have the names of timm's and the authors' classification models. Facts of the detection variant, which the
released detectors are: maps are padded with zeros to whole windows after the norm, and padding tokens are attended to;
odd blocks shift however small the map is; each stage's output has a LayerNorm of its own, `norm0` to `norm3`.

Patch merging reads the four tokens of a 2 x 2 patch in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column), all
channels of a token together. `merge_order_from_unfold` converts weights of mmdetection, whose channels come first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 7
SHIFT = WINDOW // 2
_MASKED = -100.0
"""Added to the logits of tokens that the shift brought together; the models were trained with this finite value."""


class SwinTiny(nn.Module):
    """Swin-T: 96 channels, stages of 2, 2, 6 and 2 blocks, 4 strides to 32.

    Args:
        drop_path: in training, the share of samples that skip the last block's branches; the first block's skip none.
    """

    channels = (96, 192, 384, 768)
    depths = (2, 2, 6, 2)
    heads = (3, 6, 12, 24)

    def __init__(self, drop_path: float = 0.2) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(self.channels[0])
        count = sum(self.depths)
        rates = [drop_path * i / (count - 1) for i in range(count)]
        self.layers = nn.ModuleList()
        for i, depth in enumerate(self.depths):
            own, rates = rates[:depth], rates[depth:]
            self.layers.append(Stage(self.channels[i], self.heads[i], own, merge=i < len(self.depths) - 1))
            self.add_module(f"norm{i}", nn.LayerNorm(self.channels[i]))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> (N, 96 * 2^l, H / 2^(l+2), W / 2^(l+2)) for l = 0 to 3."""
        x = self.patch_embed(images)
        levels = []
        for i, stage in enumerate(self.layers):
            x = stage(x)  # (N, H, W, C)
            levels.append(self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2))
            x = stage.get_submodule("downsample")(x)
        return levels


class PatchEmbed(nn.Module):
    """(N, 3, H, W) -> (N, ceil(H / 4), ceil(W / 4), C), of patches of 4 x 4 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 4, stride=4)
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        x = self.proj(F.pad(images, (0, -width % 4, 0, -height % 4)))
        out: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return out


class Stage(nn.Module):
    """Blocks of one resolution, and, with `merge`, the step to the next in `downsample`, which the caller takes."""

    def __init__(self, channels: int, heads: int, drop_path: list[float], merge: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(channels, heads, SHIFT if i % 2 else 0, rate) for i, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(channels) if merge else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> the same shape."""
        height, width = x.shape[1] + -x.shape[1] % WINDOW, x.shape[2] + -x.shape[2] % WINDOW
        mask = shift_mask(height, width, x)
        for block in self.blocks:
            x = block(x, mask)
        return x


class Block(nn.Module):
    """Windowed self-attention and a two-layer perceptron, each after a LayerNorm and beside an identity."""

    def __init__(self, channels: int, heads: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.shift = shift
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, H, W, C) and the stage's shift mask -> (N, H, W, C)."""
        x = x + self._drop(self._attend(self.norm1(x), mask))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        rows, columns = x.shape[1] // WINDOW, x.shape[2] // WINDOW
        windows = x.view(n, rows, WINDOW, columns, WINDOW, channels).transpose(2, 3)
        windows = windows.reshape(n, rows * columns, WINDOW * WINDOW, channels)
        windows = self.attn(windows, mask if self.shift else None)
        x = windows.view(n, rows, columns, WINDOW, WINDOW, channels).transpose(2, 3)
        x = x.reshape(n, rows * WINDOW, columns * WINDOW, channels)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width]

    def _drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth: the branch, of whole samples at random zero and of the others scaled up to make up."""
        if not self.training or not self.drop_path:
            return branch
        keep = 1 - self.drop_path
        kept = branch.new_empty((len(branch), 1, 1, 1)).bernoulli_(keep)
        return branch * kept / keep


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias for each relative position and head."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(), persistent=False)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """(N, windows, 49, C), mask (windows, 49, 49) -> (N, windows, 49, C)."""
        n, count, tokens, channels = windows.shape
        qkv = self.qkv(windows).view(n, count, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # each (N, windows * heads, 49, C / heads)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(tokens, tokens, self.heads).permute(2, 0, 1)  # (heads, 49, 49)
        bias = bias.expand(count, -1, -1, -1) if mask is None else bias + mask[:, None].to(bias.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None].to(q.dtype))
        out = out.view(n, count, self.heads, tokens, -1).transpose(2, 3).reshape(n, count, tokens, channels)
        projected: Tensor = self.proj(out)
        return projected


class Mlp(nn.Module):
    """Two linear layers, four times as wide between, with a GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class PatchMerging(nn.Module):
    """(N, H, W, C) -> (N, ceil(H / 2), ceil(W / 2), 2 C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.view(n, x.shape[1] // 2, 2, x.shape[2] // 2, 2, channels)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # channels of (row, column) = (0, 0), (1, 0), (0, 1), (1, 1)
        out: Tensor = self.reduction(self.norm(x))
        return out


def shift_mask(height: int, width: int, like: Tensor) -> Tensor:
    """(windows, 49, 49) 0, or -100 between tokens that are not neighbours before the shift; of `like`'s type, device.

    `height` and `width` are whole windows. The shifted map's last window holds what wrapped around.
    """

    def bands(size: int) -> Tensor:
        place = torch.arange(size, device=like.device)
        return (place >= size - WINDOW).long() + (place >= size - SHIFT).long()

    region = 3 * bands(height)[:, None] + bands(width)[None]
    region = region.view(height // WINDOW, WINDOW, width // WINDOW, WINDOW).transpose(1, 2)
    region = region.reshape(-1, WINDOW * WINDOW)
    apart = region[:, :, None] != region[:, None]
    return apart.to(like.dtype) * _MASKED


def relative_position_index() -> Tensor:
    """(49, 49) int64: the row of the bias table for each pair of a window's tokens."""
    y, x = torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = (a[:, None] - a[None] + WINDOW - 1 for a in (y, x))
    return dy * (2 * WINDOW - 1) + dx


def merge_order_from_unfold(weight: Tensor) -> Tensor:
    """Reorder the last axis, of 4 C inputs to a patch merging, from c * 4 + 2 * row + column to this module's order."""
    by_place = weight.reshape(*weight.shape[:-1], -1, 2, 2)  # (..., C, row, column)
    return by_place.movedim(-3, -1).transpose(-3, -2).reshape(weight.shape)
