"""The whole network agrees with the official one, from points and images to boxes, for both released configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from parity.kit import Kit, Level
from parity.sparsefusion_inputs import DTYPE, calibration, points
from torch import Tensor

from perception.networks.sparsefusion import SparseFusion, SparseFusionConfig
from perception.networks.sparsefusion.boxes import class_scores, detect, keep, to_boxes3d
from perception.networks.sparsefusion.config import ImageConfig
from perception.networks.sparsefusion.tensors import BoxPrediction, Inputs, Outputs
from perception.types import Pose

BACKBONE = {"r50": "resnet50", "swint": "swin_tiny"}
BOX = ("center", "height", "dim", "rot", "vel", "heatmap")
IMAGE = ("center_2d", "depth_2d", "dim_2d", "rot_2d", "vel_2d", "cls", "loc_cam_3d")


def rule_images(kit: Kit, dtype: torch.dtype) -> Tensor:
    """(1, K, 3, H, W): coarse and fine tiles, zero beyond the images' width."""
    content, (width, height) = kit.size("full")
    image = torch.zeros(())
    for tiles in (kit.input("e2e:img16"), kit.input("e2e:img4")):
        rows, columns = height // tiles.shape[2], width // tiles.shape[3]
        image = image + tiles.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    image[..., content[0] :] = 0
    return image[None].to(dtype)


class Run(NamedTuple):
    """One variant at one level."""

    file: str
    level: Level
    network: SparseFusion
    neck: Tensor
    pyramid: list[Tensor]
    outputs: Outputs


@pytest.fixture(scope="module", params=[(v, level) for v in BACKBONE for level in DTYPE], ids="-".join)
def run(request: pytest.FixtureRequest, parity_dir: Any) -> Run:
    variant, level = request.param
    kit, dtype = Kit(parity_dir / "sparsefusion"), DTYPE[level]
    file = f"e2e_{variant}"
    kit.names(file)  # skips where the kit lacks it
    image = ImageConfig(backbone=BACKBONE[variant], canvas_px=kit.size("full")[1])
    network = SparseFusion.from_original(kit.state_dict(variant), SparseFusionConfig(image=image))
    network = network.to(dtype).eval()
    assert network.lidar is not None and network.image is not None
    seen: dict[str, Any] = {}
    network.lidar.register_forward_hook(lambda _, __, out: seen.update(neck=out))
    network.image.register_forward_hook(lambda _, __, out: seen.update(pyramid=out))
    cameras = calibration(kit, "full", dtype)
    cloud = points(kit, 0).to(dtype)
    with torch.inference_mode():
        depth = network.encoder.sparse_depth(cloud, type(cameras)(*(t[0] for t in cameras)))
        voxels = network.encoder.voxels([cloud])
        outputs = network(Inputs(*voxels, rule_images(kit, dtype), depth[None], cameras, 1))
    return Run(file, level, network, seen["neck"], seen["pyramid"], outputs)


def in_kit_order(kit: Kit, run: Run) -> tuple[Tensor, Tensor]:
    """Our LiDAR and camera queries in the kit's order: float32 may swap candidates of nearly equal score."""
    lidar, camera = run.outputs.lidar_candidates, run.outputs.image_candidates
    assert lidar is not None and camera is not None and camera.view is not None

    def order(*columns: tuple[Tensor, str]) -> Tensor:
        ours = list(zip(*(values[0].tolist() for values, _ in columns), strict=True))
        theirs = list(zip(*(kit.array(run.file, name)[0].tolist() for _, name in columns), strict=True))
        assert set(ours) == set(theirs), f"other candidates: {sorted(set(ours) ^ set(theirs))[:4]}"
        if run.level == "float64":
            assert ours == theirs
        return torch.tensor([ours.index(candidate) for candidate in theirs])

    return (
        order((lidar.label, "lidar_top_class"), (lidar.location, "lidar_top_cell")),
        order((camera.label, "img_top_class"), (camera.view, "img_top_view"), (camera.location, "img_top_token")),
    )


@pytest.mark.slow
def test_branches_and_heatmaps(kit: Kit, run: Run):
    kit.assert_close(run.file, "neck", run.neck, run.level)
    for i, level in enumerate(run.pyramid):
        kit.assert_close(run.file, f"fpn_l{i}", level, run.level)
    assert run.outputs.lidar_heatmap is not None and run.outputs.image_heatmap is not None
    kit.assert_close(run.file, "img_heatmap_logits", run.outputs.image_heatmap, run.level)
    kit.assert_close(run.file, "lidar_heatmap_logits", run.outputs.lidar_heatmap, run.level)


@pytest.mark.slow
def test_predictions_of_every_layer(kit: Kit, run: Run):
    lidar, camera = in_kit_order(kit, run)
    out = run.outputs
    assert out.lidar_candidates is not None and out.image_candidates is not None and out.image is not None

    def check(prediction: BoxPrediction | None, layer: str, order: Tensor, suffix: str = "") -> None:
        assert prediction is not None
        for value, name in zip(prediction, BOX, strict=True):
            kit.assert_close(run.file, f"{layer}_head_{name}{suffix}", value[..., order], run.level)

    both = torch.cat([lidar, camera + len(lidar)])
    check(out.point, "point", lidar)
    check(out.view, "view", camera, "_view")
    check(out.fusion, "fusion", both)
    for value, name in zip(out.image, IMAGE, strict=False):
        kit.assert_close(run.file, f"img_head_{name}", value[..., camera], run.level)
    kit.assert_close(run.file, "pred_query_heatmap_score", out.lidar_candidates.score[..., lidar], run.level)
    kit.assert_close(run.file, "pred_img_query_heatmap_score", out.image_candidates.score[..., camera], run.level)


@pytest.mark.slow
def test_boxes(kit: Kit, run: Run):
    lidar, camera = in_kit_order(kit, run)
    order = torch.cat([lidar, camera + len(lidar)])
    config = run.network.config
    detections = detect(run.outputs, config)
    kit.assert_close(run.file, "dec0_scores400x10", class_scores(run.outputs)[0].T[order], run.level)
    kit.assert_close(run.file, "dec0_boxes400", detections.box[0][order], run.level)
    kit.assert_close(run.file, "dec0_score400", detections.score[0][order], run.level)
    kit.assert_close(run.file, "dec0_label400", detections.label[0][order], run.level)
    columns = (detections.box[0], detections.score[0, :, None], detections.label[0, :, None])
    rows = torch.cat([c.double() for c in columns], 1)[order].numpy()
    kept = kit.array(run.file, "final0_keep400")
    assert_array_equal(keep(rows, config), kept)

    (boxes,) = to_boxes3d(detections, config, [Pose.identity()], [0])
    assert len(boxes) == kept.sum()
    if run.level == "float64":  # the kit's order
        want = kit.array(run.file, "dec0_boxes400")[kept]
        assert_allclose(boxes.center, want[:, :3] + [0, 0, 0.5] * want[:, 3:6], atol=2e-5)
        assert_allclose(boxes.size, want[:, [4, 3, 5]], rtol=1e-5)
        assert_allclose(np.cos(boxes.yaw + want[:, 6] + np.pi / 2), 1, atol=1e-9)
        assert_allclose(boxes.velocity, want[:, 7:], atol=2e-5)
