"""Every official key has its place, in either layout of sparse kernels; what does not fit is refused and named."""

from __future__ import annotations

import pytest
import torch

from perception.errors import DataError
from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.official import convert, detect_config

FIRST = "pts_middle_encoder.conv_input.0.weight"
OUTPUT = "pts_middle_encoder.conv_out.0.weight"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A part of an official state."""
    prefix = "pts_bbox_head.fusion_transformer.decoder.0."
    shared = torch.rand(128, 2, 1)
    return {
        FIRST: torch.rand(16, 3, 3, 3, 5),
        OUTPUT: torch.rand(128, 3, 1, 1, 128),
        "img_backbone.conv1.weight": torch.rand(64, 3, 7, 7),
        f"{prefix}self_posembed.position_embedding_head.0.weight": shared,
        f"{prefix}cross_posembed.position_embedding_head.0.weight": shared.clone(),
        f"{prefix}norm1.weight": torch.rand(128),
        "pts_bbox_head.heatmap_head.1.bias": torch.rand(10),
    }


@pytest.mark.parametrize(
    ("axes", "layout"),
    [
        ((0, 1, 2, 3, 4), "spconv 2.2 and later"),
        ((1, 2, 3, 4, 0), "spconv 1"),
        ((1, 2, 3, 0, 4), "spconv 2.0 and 2.1"),
    ],
)
def test_sparse_kernels_of_every_layout(state, axes, layout):
    """The first kernel decides for those that have as many inputs as outputs, too."""
    stored = {k: t.permute(axes) if t.ndim == 5 else t for k, t in state.items()}
    done = convert(stored, SparseFusionConfig())
    assert done.layout == layout
    for key in (FIRST, OUTPUT):
        assert torch.equal(done.state[done.mapped[key]], state[key])


def test_dropped_tensors_have_reasons(state):
    done = convert(state, SparseFusionConfig())
    assert set(done.mapped) | set(done.dropped) == set(state)
    assert {key.rpartition("decoder.0.")[2] for key in done.dropped} == {
        "cross_posembed.position_embedding_head.0.weight",
        "norm1.weight",
        "pts_bbox_head.heatmap_head.1.bias",
    }
    assert all(done.dropped.values())


def test_the_backbone_tells_the_configuration(state):
    assert detect_config(state).image.backbone == "resnet50"
    assert detect_config({"img_backbone.patch_embed.projection.weight": state[FIRST]}).image.backbone == "swin_tiny"
    with pytest.raises(DataError, match=r"neither of the released image backbones is among 1 tensors .*: fc.weight"):
        detect_config({"fc.weight": torch.zeros(1)})


def test_what_does_not_fit_is_named(state):
    with pytest.raises(DataError, match=r"1 of 8 tensors are not SparseFusion's: fc.weight"):
        convert(state | {"fc.weight": torch.zeros(1)}, SparseFusionConfig())
    with pytest.raises(DataError, match=r"conv_input.0.weight is \(3, 3, 3, 5, 17\), which is no known layout"):
        convert(state | {FIRST: torch.zeros(3, 3, 3, 5, 17)}, SparseFusionConfig())
    with pytest.raises(DataError, match=rf"there is no {FIRST}"):
        convert({k: t for k, t in state.items() if k != FIRST}, SparseFusionConfig())
    key = next(k for k in state if "cross_posembed" in k)
    with pytest.raises(DataError, match=r"cross_posembed.* and .*self_posembed.* differ"):
        convert(state | {key: torch.zeros(128, 2, 1)}, SparseFusionConfig())
