"""A checkpoint as the authors' code writes it, converted by the command: whole, or refused by what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from parity.kit import Kit
from typer.testing import CliRunner

from perception import cli
from perception.errors import DataError, PerceptionError
from perception.networks.sparsefusion import SparseFusion, SparseFusionConfig
from perception.weights import load_weights, read_manifest, read_weights
from perception.weights_conversion import convert_weights

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def write_checkpoint(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """mmcv's file: meta with strings and numbers of numpy, and the optimizer's state."""
    meta = {
        "env_info": "sys.platform: linux", "config": "model = dict(type='SparseFusionDetector')", "seed": np.int64(0),
        "mmcv_version": "1.2.7", "epoch": 6, "iter": 46380, "time": "Sun Jan  1 00:00:00 2023", "hook_msgs": {},
        "CLASSES": ("car", "truck"), "PALETTE": None,
    }  # fmt: skip
    optimizer = {
        "state": {0: {"step": 1, "exp_avg": torch.zeros(16), "exp_avg_sq": torch.zeros(16)}},
        "param_groups": [{"lr": np.float64(1e-4), "betas": (0.95, 0.99), "weight_decay": 0.01, "params": [0]}],
    }
    torch.save({"meta": meta, "state_dict": state, "optimizer": optimizer}, path)
    return path


def rsck(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A sparse kernel as spconv 1 and mmdetection3d store it."""
    return tensor.permute(1, 2, 3, 4, 0) if key.startswith("pts_middle_encoder") and tensor.ndim == 5 else tensor


@pytest.mark.parametrize(("variant", "backbone"), [("r50", "resnet50"), ("swint", "swin_tiny")])
def test_every_official_tensor_is_mapped_or_dropped_and_all_of_ours_are_there(
    kit: Kit, tmp_path: Path, variant: str, backbone: str
):
    official = kit.state_dict(variant)
    file = write_checkpoint(tmp_path / "epoch_6.pth", official)
    report = convert_weights("sparsefusion", file, tmp_path / "new.safetensors")
    assert set(report.mapped) | set(report.dropped) == set(official)
    assert not set(report.mapped) & set(report.dropped)
    assert len(set(report.mapped.values())) == len(report.mapped)
    assert report.config.image.backbone == backbone
    network = SparseFusion(report.config)
    load_weights(network, tmp_path / "new.safetensors")
    assert len(network.state_dict()) == len(report.mapped)
    stem = "img_backbone.conv1.weight" if variant == "r50" else "img_backbone.patch_embed.projection.weight"
    assert torch.equal(network.state_dict()[report.mapped[stem]], official[stem])
    manifest = read_manifest(tmp_path / "new.safetensors")
    assert SparseFusionConfig(**manifest.config) == report.config
    assert manifest.source == report.source and manifest.source.note == "epoch_6.pth"


def test_the_command_converts_either_layout_to_the_same_weights(kit: Kit, tmp_path: Path):
    official = kit.state_dict("r50")
    texts = []
    for name, state in (("new", official), ("old", {k: rsck(k, t) for k, t in official.items()})):
        file = write_checkpoint(tmp_path / f"{name}.pth", state)
        done = CliRunner().invoke(
            cli.app, ["weights", "convert", "sparsefusion", str(file), "--out", str(tmp_path / f"{name}.safetensors")]
        )
        assert done.exit_code == 0, done.output
        texts.append(" ".join(done.output.split()))
    assert "sparse kernels as of spconv 2.2 and later" in texts[0]
    assert "sparse kernels as of spconv 1" in texts[1]
    assert '"backbone":"resnet50"' in texts[0]
    assert "tensors mapped" in texts[0] and "dropped, pts_bbox_head.heatmap_head" in texts[0]
    new, old = (read_weights(tmp_path / f"{name}.safetensors")[0] for name in ("new", "old"))
    assert all(torch.equal(new[key], old[key]) for key in new)
    shown = CliRunner().invoke(cli.app, ["weights", "show", str(tmp_path / "old.safetensors")])
    assert '"system": "sparsefusion"' in shown.output and '"note": "old.pth"' in shown.output


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(kit: Kit, tmp_path: Path):
    official = {k: torch.zeros((), dtype=t.dtype).expand(t.shape) for k, t in kit.state_dict("r50").items()}  # small
    changed = dict(official)
    del changed["pts_neck.deblocks.0.0.weight"]
    changed["img_neck.fpn_convs.0.conv.weight"] = torch.zeros(256, 256, 1, 1)
    file, out = write_checkpoint(tmp_path / "epoch_6.pth", changed), tmp_path / "out.safetensors"
    with pytest.raises(DataError) as caught:
        convert_weights("sparsefusion", file, out)
    assert "epoch_6.pth does not fit the network" in str(caught.value)
    assert "1 missing: lidar.neck" in str(caught.value)
    assert "1 of another shape: image.neck.output.0.weight (256, 256, 1, 1) for (256, 256, 3, 3)" in str(caught.value)
    write_checkpoint(file, official | {"roi_head.weight": torch.zeros(1)})
    with pytest.raises(DataError, match=r"epoch_6.pth: 1 of 1034 tensors are not SparseFusion's: roi_head.weight"):
        convert_weights("sparsefusion", file, out)
    write_checkpoint(file, {"backbone.conv1.weight": torch.zeros(64, 3, 7, 7)})
    with pytest.raises(DataError, match=r"epoch_6.pth: neither of the released image backbones"):
        convert_weights("sparsefusion", file, out)
    write_checkpoint(file, official)
    with pytest.raises(
        DataError, match=r"does not fit the network of its configuration: \d+ missing: image.backbone.patch"
    ):
        convert_weights("sparsefusion", file, out, CONFIGS / "sparsefusion_nuscenes_swint.yaml")
    with pytest.raises(PerceptionError, match=r"nuscenes_detection.yaml: .*predictor"):
        convert_weights("sparsefusion", file, out, CONFIGS / "nuscenes_detection.yaml")
    assert not out.exists()
    convert_weights("sparsefusion", file, out, CONFIGS / "sparsefusion_nuscenes_r50.yaml")
    assert read_manifest(out).config["image"]["backbone"] == "resnet50"
