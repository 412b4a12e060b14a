"""The released checkpoints' keys and layouts, brought to ours.

Each table maps the start of an official key, a regular expression, to the start of ours; the rest of the key stays.
The first pattern that fits decides. Every official key is mapped, or dropped with a reason; an unknown one is refused.

Layouts: linear, convolution and norm tensors are taken as they are, but for the order of the tokens that Swin merges.
The kernels of sparse convolutions are (out, z, y, x, in) in checkpoints of spconv 2.2 and later, ours too; (z, y, x,
in, out) in those of spconv 1 and mmdetection3d; (z, y, x, out, in) in those of spconv 2.0 and 2.1. Kernels with as many
inputs as outputs do not tell the last two apart, so the first convolution, from the points' 5 values, decides for all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from perception.errors import DataError
from perception.networks.layers.sparse import krsc_from_rsck, krsc_from_rskc
from perception.networks.layers.swin import merge_order_from_unfold
from perception.networks.sparsefusion.config import ImageConfig, SparseFusionConfig

LIDAR = {
    r"pts_middle_encoder\.conv_input\.": "lidar.encoder.input.",
    r"pts_middle_encoder\.encoder_layers\.encoder_layer1\.": "lidar.encoder.stages.0.",
    r"pts_middle_encoder\.encoder_layers\.encoder_layer2\.": "lidar.encoder.stages.1.",
    r"pts_middle_encoder\.encoder_layers\.encoder_layer3\.": "lidar.encoder.stages.2.",
    r"pts_middle_encoder\.encoder_layers\.encoder_layer4\.": "lidar.encoder.stages.3.",
    r"pts_middle_encoder\.conv_out\.": "lidar.encoder.output.",
    r"pts_backbone\.": "lidar.backbone.",
    r"pts_neck\.": "lidar.neck.",
}

IMAGE = {
    # Swin's names in mmdetection, to those of timm
    r"img_backbone\.patch_embed\.projection\.": "image.backbone.patch_embed.proj.",
    r"img_backbone\.stages\.(\d)\.blocks\.(\d)\.attn\.w_msa\.": r"image.backbone.layers.\1.blocks.\2.attn.",
    r"img_backbone\.stages\.(\d)\.blocks\.(\d)\.ffn\.layers\.0\.0\.": r"image.backbone.layers.\1.blocks.\2.mlp.fc1.",
    r"img_backbone\.stages\.(\d)\.blocks\.(\d)\.ffn\.layers\.1\.": r"image.backbone.layers.\1.blocks.\2.mlp.fc2.",
    r"img_backbone\.stages\.": "image.backbone.layers.",
    # ResNet's are torchvision's
    r"img_backbone\.": "image.backbone.",
    r"img_neck\.lateral_convs\.(\d)\.conv\.": r"image.neck.lateral.\1.",
    r"img_neck\.fpn_convs\.(\d)\.conv\.": r"image.neck.output.\1.",
}

# Tensors over the four tokens that Swin's patch merging joins: mmdetection has their channels first.
_MERGING = r"img_backbone\.stages\.\d\.downsample\."

_LAYERS = {
    r"cross_heatmap_decoder\.": "semantic.layer.",
    r"point_transformer\.decoder\.0\.": "point_decoder.layer.",
    r"img_transformer\.decoder\.0\.": "image_decoder.layer.",
}

_SELF_LAYERS = {
    r"view_transformer\.decoder\.": "view_transformation.layer.",
    r"fusion_transformer\.decoder\.0\.": "fusion.layer.",
}

_FEED_FORWARD = {r"linear1\.": "feed_forward.0.", r"linear2\.": "feed_forward.3.", r"norm3\.": "norm_feed_forward."}

_POSITIONS = {
    r"self_posembed\.position_embedding_head\.": "query_position.",
    r"cross_posembed\.position_embedding_head\.": "key_position.",
}

_LAYER = {
    r"self_attn\.": "self_attention.",
    r"multihead_attn\.": "cross_attention.",
    r"norm1\.": "norm_self.",
    r"norm2\.": "norm_cross.",
    **_FEED_FORWARD,
    **_POSITIONS,
}

_SELF_LAYER = {
    r"multihead_attn\.": "attention.",
    r"norm2\.": "norm_attention.",
    **_FEED_FORWARD,
    **_POSITIONS,
}

_BOX_HEADS = {
    r"point_transformer\.": "point_decoder.",
    r"view_transformer\.": "view_transformation.",
    r"fusion_transformer\.": "fusion.",
}

_BOX_HEAD = {
    r"(center|height|dim|rot|vel)(?:_view)?\.0\.conv\.": r"\1.0.",
    r"(center|height|dim|rot|vel)(?:_view)?\.0\.bn\.": r"\1.1.",
    r"(center|height|dim|rot|vel)(?:_view)?\.1\.": r"\1.3.",
    r"heatmap(?:_view)?\.0\.conv\.": "logit.0.",
    r"heatmap(?:_view)?\.0\.bn\.": "logit.1.",
    r"heatmap(?:_view)?\.1\.": "logit.3.",
}

_HEAD = {
    **{a + b: own_a + own_b for a, own_a in _LAYERS.items() for b, own_b in _LAYER.items()},
    **{a + b: own_a + own_b for a, own_a in _SELF_LAYERS.items() for b, own_b in _SELF_LAYER.items()},
    **{
        f"{a}prediction_heads\\.{b}": f"{own_a}heads.{own_b}"
        for a, own_a in _BOX_HEADS.items()
        for b, own_b in _BOX_HEAD.items()
    },
    r"shared_conv\.": "lidar_projection.",
    r"level_pos$": "level_embedding",
    r"class_encoding\.": "lidar_label.",
    r"img_class_encoding\.": "image_label.",
    r"depth_resnet\.conv_depth\.": "geometric.stem.",
    r"depth_resnet\.layers\.(\d)\.0\.": r"geometric.blocks.\1.",
    r"depth_resnet\.fuse_layers\.": "geometric.fuse.",
    r"heatmap_pts_proj\.": "semantic.lidar_projection.",
    r"heatmap_img_proj\.": "semantic.image_projection.",
    r"reduce_conv\.module\.": "semantic.reduce.",
    r"cross_heatmap_head\.0\.": "lidar_heatmap.",
    r"img_heatmap_head\.(\d)\.0\.module\.": r"image_heatmaps.\1.0.",
    r"img_heatmap_head\.(\d)\.1\.": r"image_heatmaps.\1.1.",
    r"img_transformer\.prediction_heads\.(center|depth|dim|rot|vel)_2d\.": r"image_decoder.heads.\1.",
    r"img_transformer\.prediction_heads\.cls\.": "image_decoder.heads.logit.",
    r"view_transformer\.camera_net\.bn\.": "view_transformation.gate.norm.",
    r"view_transformer\.camera_net\.mlp_depth\.": "view_transformation.gate.mlp.",
    r"view_transformer\.view_projection\.feat_proj\.": "view_transformation.projection.0.",
    r"view_transformer\.view_projection\.norm\.": "view_transformation.projection.1.",
    r"fusion_transformer\.pts_projection\.feat_proj\.": "fusion.lidar_projection.0.",
    r"fusion_transformer\.pts_projection\.norm\.": "fusion.lidar_projection.1.",
    r"fusion_transformer\.img_projection\.feat_proj\.": "fusion.image_projection.0.",
    r"fusion_transformer\.img_projection\.norm\.": "fusion.image_projection.1.",
}

HEAD = {rf"pts_bbox_head\.{official}": f"head.{own}" for official, own in _HEAD.items()}

DROPPED = {
    r".*\.relative_position_index$": "Swin's index of relative positions is computed, not learned",
    r"pts_bbox_head\.heatmap_head\.": "the heatmap of the LiDAR alone is not used by the released configurations",
    r"pts_bbox_head\.(view_transformer\.decoder|fusion_transformer\.decoder\.0)\.norm1\.": (
        "the norm of a self-attention that this layer does not have"
    ),
    r"pts_bbox_head\.fusion_transformer\.decoder\.0\.cross_posembed\.": (
        "one module with self_posembed, which is kept"
    ),
}
"""Official keys that nothing of ours takes, with the reason; looked up before the other tables."""

# Equal by construction: the same module registered under two names.
_SAME = ("fusion_transformer.decoder.0.cross_posembed.", "fusion_transformer.decoder.0.self_posembed.")

_BACKBONES: dict[str, ImageConfig] = {
    "img_backbone.conv1.weight": ImageConfig(backbone="resnet50"),
    "img_backbone.patch_embed.projection.weight": ImageConfig(backbone="swin_tiny"),
}

_FIRST = "pts_middle_encoder.conv_input.0.weight"
_POINT_VALUES = 5  # x, y, z, intensity, time lag


class Conversion(NamedTuple):
    """An official state in our names.

    Attributes:
        state: our key -> tensor.
        mapped: official key -> our key.
        dropped: official key -> why nothing takes it.
        layout: of the sparse kernels in the official state, "spconv 2.2 and later" say.
    """

    state: dict[str, Tensor]
    mapped: dict[str, str]
    dropped: dict[str, str]
    layout: str


def from_original(state_dict: Mapping[str, Tensor], config: SparseFusionConfig) -> dict[str, Tensor]:
    """Our state of an official one; see `convert`."""
    return convert(state_dict, config).state


def convert(state_dict: Mapping[str, Tensor], config: SparseFusionConfig) -> Conversion:
    """Map every key and bring sparse kernels to our layout.

    Whether the result is complete and of the right shapes shows when it is loaded: that is strict.

    Raises:
        DataError: keys that no table knows; sparse kernels in no known layout; two copies of one module that differ.
    """
    _check_copies(state_dict)
    permute, layout = _kernel_layout(state_dict, config)
    state: dict[str, Tensor] = {}
    mapped: dict[str, str] = {}
    dropped: dict[str, str] = {}
    unknown = []
    for key, tensor in state_dict.items():
        if (reason := _lookup(DROPPED, key)) is not None:
            dropped[key] = reason[0]
        elif (found := _lookup(LIDAR | IMAGE | HEAD, key)) is not None:
            mapped[key] = own = found[0] + found[1]
            if _is_sparse_kernel(key, tensor):
                tensor = permute(tensor).contiguous()
            elif re.match(_MERGING, key):
                tensor = merge_order_from_unfold(tensor)
            state[own] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(state_dict)} tensors are not SparseFusion's: {', '.join(unknown[:5])}"
            + (", ..." if len(unknown) > 5 else ""),
            "give a checkpoint of the official LiDAR-camera model (sparsefusion_nusc_voxel_LC_r50 or ..._SwinT)",
        )
    return Conversion(state, mapped, dropped, layout)


def detect_config(state_dict: Mapping[str, Tensor]) -> SparseFusionConfig:
    """The released configuration that an official state belongs to, by its image backbone's keys.

    Raises:
        DataError: it has the keys of neither.
    """
    for key, image in _BACKBONES.items():
        if key in state_dict:
            return SparseFusionConfig(image=image)
    some = ", ".join(list(state_dict)[:3]) or "none"
    raise DataError(
        f"neither of the released image backbones is among {len(state_dict)} tensors (the first: {some})",
        "give a checkpoint of the official LiDAR-camera model (sparsefusion_nusc_voxel_LC_r50 or ..._SwinT)",
    )


def _lookup(table: Mapping[str, str], key: str) -> tuple[str, str] | None:
    """What the first pattern that fits the key's start gives, and the rest of the key."""
    for pattern, value in table.items():
        if match := re.match(pattern, key):
            return match.expand(value), key[match.end() :]
    return None


def _check_copies(state_dict: Mapping[str, Tensor]) -> None:
    for key, tensor in state_dict.items():
        twin = key.replace(*_SAME)
        if twin != key and (twin not in state_dict or not torch.equal(tensor, state_dict[twin])):
            raise DataError(
                f"{key} and {twin} differ, but they are one module in the official model",
                "this checkpoint was edited or comes of other code; give the released file",
            )


def _is_sparse_kernel(key: str, tensor: Tensor) -> bool:
    return key.startswith("pts_middle_encoder.") and tensor.ndim == 5


def _kernel_layout(
    state_dict: Mapping[str, Tensor], config: SparseFusionConfig
) -> tuple[Callable[[Tensor], Tensor], str]:
    """How to bring a sparse kernel to (out, z, y, x, in), and the layout's name."""
    if _FIRST not in state_dict:
        raise DataError(f"there is no {_FIRST}", "give a checkpoint of the official LiDAR-camera model")
    shape = tuple(state_dict[_FIRST].shape)
    out = config.lidar.encoder_channels[0]
    if shape == (out, 3, 3, 3, _POINT_VALUES):
        return (lambda kernel: kernel), "spconv 2.2 and later"
    if shape == (3, 3, 3, _POINT_VALUES, out):
        return krsc_from_rsck, "spconv 1"
    if shape == (3, 3, 3, out, _POINT_VALUES):
        return krsc_from_rskc, "spconv 2.0 and 2.1"
    raise DataError(
        f"{_FIRST} is {shape}, which is no known layout of a kernel from {_POINT_VALUES} to {out} channels",
        f"expected ({out}, 3, 3, 3, {_POINT_VALUES}), (3, 3, 3, {_POINT_VALUES}, {out}) or "
        f"(3, 3, 3, {out}, {_POINT_VALUES})",
    )
