"""Both branches agree with the official model, stage by stage, with weights through the conversion of checkpoints."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from parity.kit import Kit, Level
from parity.sparsefusion_inputs import DTYPE, points, samples
from torch import Tensor, nn

from perception.networks.layers.sparse_tensor import Sites, SparseTensor
from perception.networks.sparsefusion.config import ImageConfig, LidarConfig, SparseFusionConfig
from perception.networks.sparsefusion.image import ImageBranch
from perception.networks.sparsefusion.lidar import LidarBranch, heights
from perception.networks.sparsefusion.official import from_original
from perception.types import Pose, VoxelGrid
from perception.voxelize import HardVoxels, hard_voxels

BACKBONE = {"r50": "resnet50", "swint": "swin_tiny"}
LIDAR = LidarConfig()
GRID = VoxelGrid(LIDAR.range_m[:3], LIDAR.voxel_size_m, LIDAR.grid, Pose.identity())


def load(module: nn.Module, kit: Kit, variant: str, branch: str, level: Level) -> nn.Module:
    """The branch with the kit's weights: every tensor of it, and no other."""
    config = SparseFusionConfig(image=ImageConfig(backbone=BACKBONE[variant]))
    state = from_original(kit.state_dict(variant), config)
    own = {k.removeprefix(f"{branch}."): v for k, v in state.items() if k.startswith(f"{branch}.")}
    module.load_state_dict(own, strict=True)
    return module.to(DTYPE[level]).eval()


def voxels(cloud: Tensor, max_points: int = LIDAR.max_points, max_voxels: int = LIDAR.max_voxels) -> HardVoxels[Tensor]:
    return hard_voxels(cloud, GRID, max_points, max_voxels, stop_when_full=True)


@pytest.mark.parametrize("sample", [0, 1])
def test_voxels_and_heights(kit: Kit, sample: int):
    found = voxels(points(kit, sample))
    zyx = kit.array("inputs", f"s{sample}_voxel_zyx")
    np.testing.assert_array_equal(found.index.flip(1).numpy(), zyx)
    np.testing.assert_array_equal(found.count.numpy(), kit.array("inputs", f"s{sample}_voxel_num"))
    for name, got in zip(("height_min", "height_max"), heights(found, LIDAR), strict=True):
        np.testing.assert_array_equal(got.numpy(), kit.array("inputs", name)[sample])


def test_the_first_voxel_too_many_ends_it_all(kit: Kit):
    caps = [found for name in kit.names("units") if (found := re.fullmatch(r"(voxcap(\d+)_max(\d+))_zyx", name))]
    assert caps
    for name, max_voxels, max_points in (cap.groups() for cap in caps):
        found = voxels(points(kit, 1).double(), int(max_points), int(max_voxels))
        np.testing.assert_array_equal(found.index.flip(1).numpy(), kit.array("units", f"{name}_zyx"))
        np.testing.assert_array_equal(found.count.numpy(), kit.array("units", f"{name}_num"))
        np.testing.assert_allclose(found.points.sum(1), kit.array("units", f"{name}_sum"), rtol=1e-6, atol=1e-6)
        assert found.voxels_dropped > 0 and found.points_dropped > 0


@pytest.mark.parametrize("level", DTYPE)
def test_z_of_exactly_zero_is_an_unused_slot(kit: Kit, level: Level):
    found = voxels(kit.tensor("units", "height0_points", DTYPE[level]))
    low, high = heights(found, LIDAR)
    np.testing.assert_array_equal(low.float().numpy(), kit.array("units", "height0_min"))
    np.testing.assert_array_equal(high.float().numpy(), kit.array("units", "height0_max"))


class LidarStages:
    """The LiDAR branch at one level, stage by stage."""

    def __init__(self, kit: Kit, level: Level) -> None:
        branch = load(LidarBranch(LIDAR), kit, "r50", "lidar", level)
        assert isinstance(branch, LidarBranch)
        clouds = [voxels(points(kit, s)) for s in samples(kit, "small")]
        self.means = torch.cat([c.points.to(DTYPE[level]).sum(1) / c.count[:, None] for c in clouds])
        zyx = [torch.nn.functional.pad(c.index.flip(1), (1, 0), value=b) for b, c in enumerate(clouds)]
        sites = torch.cat(zyx).int()
        self.stages: dict[str, SparseTensor] = {}
        encoder = branch.encoder
        with torch.no_grad():
            x = SparseTensor.at(Sites(sites, encoder.spatial_shape, len(clouds), "torch"), self.means, {})
            self.stages["enc_conv_input"] = x = encoder.input(x)
            for i, stage in enumerate(encoder.stages):
                for j, block in enumerate(stage):
                    self.stages[f"enc_layer{i + 1}.{j}"] = x = block(x)
            self.stages["enc_conv_out"] = x = encoder.output(x)
            self.bev = x.to_dense().flatten(1, 2)
            self.levels = branch.backbone(self.bev)
            self.neck = branch.neck(self.levels)


@pytest.fixture(scope="module", params=["float32", pytest.param("float64", marks=pytest.mark.slow)])
def lidar_stages(request: pytest.FixtureRequest, parity_dir) -> tuple[Level, LidarStages]:
    return request.param, LidarStages(Kit(parity_dir / "sparsefusion"), request.param)


def test_lidar_branch(kit: Kit, lidar_stages: tuple[Level, LidarStages]):
    level, got = lidar_stages
    kit.assert_close("lidar", "voxel_feat", got.means, level)
    for name, x in got.stages.items():
        kit.assert_sites_close("lidar", name, x.features, x.indices, level)
    kit.assert_close("lidar", "bev", got.bev, level)
    kit.assert_close("lidar", "second_s0", got.levels[0], level)
    kit.assert_close("lidar", "second_s1", got.levels[1], level)
    kit.assert_close("lidar", "neck", got.neck, level)


def images(kit: Kit, file: str, level: Level) -> Tensor:
    """The input that weights.md tells: X("img_r50",(2,3,96,160),2), then image 1: last 4 columns set to 0."""
    x = kit.input(file)
    x[1, :, :, -int(kit.said(r"image 1: last (\d+) columns")[1]) :] = 0
    return x.to(DTYPE[level])


@torch.no_grad()
@pytest.mark.parametrize("level", DTYPE)
@pytest.mark.parametrize("variant", BACKBONE)
def test_image_branch(kit: Kit, variant: str, level: Level):
    file = f"img_{variant}"
    branch = load(ImageBranch(ImageConfig(backbone=BACKBONE[variant])), kit, variant, "image", level)
    stages: dict[str, Tensor] = {}

    def keep(name: str, module: str) -> None:
        def hook(_: nn.Module, __: object, out: Tensor) -> None:
            stages[name] = out if variant == "r50" else out.flatten(1, 2)

        branch.get_submodule(module).register_forward_hook(hook)

    if variant == "r50":
        keep("stem_pool", "backbone.maxpool")
        keep("layer1_block0", "backbone.layer1.0")
    else:
        keep("patch_embed", "backbone.patch_embed")
        for name in kit.names(file):
            stage, _, block = name.removesuffix("__sample").partition("_block")
            if stage.startswith("stage") and block.isdigit():
                keep(f"{stage}_block{block}", f"backbone.layers.{stage.removeprefix('stage')}.blocks.{block}")
        keep("stage0_merge", "backbone.layers.0.downsample")
    levels = branch.backbone(images(kit, file, level))
    pyramid = branch.neck(levels)
    stages |= {f"c{i}": x for i, x in enumerate(levels, start=2)}
    stages |= {f"p{i}": x for i, x in enumerate(pyramid, start=2)}
    stages["p6"] = pyramid[3][..., ::2, ::2]
    stored = {name.partition("__")[0] for name in kit.names(file)}
    assert stored <= set(stages)
    for name in sorted(stored):
        kit.assert_close(file, name, stages[name], level)
