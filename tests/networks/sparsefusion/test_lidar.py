from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from perception.networks.layers.sparse import SparseConv3d, SubMConv3d
from perception.networks.sparsefusion.config import LidarConfig
from perception.networks.sparsefusion.lidar import EMPTY_HEIGHT_M, LidarBranch, heights
from perception.types import Pose, VoxelGrid
from perception.voxelize import hard_voxels

SMALL = LidarConfig(
    range_m=(-4.0, -3.2, -1.0, 4.0, 3.2, 3.0),
    voxel_size_m=(0.2, 0.2, 0.2),
    encoder_channels=(4, 6, 8),
    out_channels=5,
    backbone_channels=(7, 9),
    backbone_layers=1,
    neck_channels=3,
)
GRID = VoxelGrid(SMALL.range_m[:3], SMALL.voxel_size_m, SMALL.grid, Pose.identity())


def sites(n: int, batch_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    nx, ny, nz = SMALL.grid
    flat = rng.choice(batch_size * nz * ny * nx, n, replace=False)
    zyx = np.stack(np.unravel_index(flat, (batch_size, nz, ny, nx)), 1).astype(np.int32)
    return torch.from_numpy(rng.normal(size=(n, 5)).astype(np.float32)), torch.from_numpy(zyx)


def dense_encoder(encoder, voxels, coordinates, batch_size):
    """The encoder on dense grids, sites tracked by hand: the definition of a sparse convolution."""
    nz, ny, nx = encoder.spatial_shape
    x = torch.zeros(batch_size, 5, nz, ny, nx)
    active = torch.zeros(batch_size, 1, nz, ny, nx)
    b, z, y, c = coordinates.long().T
    x[b, :, z, y, c] = voxels
    active[b, :, z, y, c] = 1

    def conv(module, x, active):
        kernel = module.weight.permute(0, 4, 1, 2, 3)
        if isinstance(module, SubMConv3d):
            return F.conv3d(x, kernel, padding=1) * active, active
        assert isinstance(module, SparseConv3d)
        stride, padding = module.stride, module.padding_before
        reach = F.conv3d(active, torch.ones(1, 1, *module.kernel_size), stride=stride, padding=padding)
        active = (reach > 0).float()
        return F.conv3d(x, kernel, stride=stride, padding=padding) * active, active

    def norm(module, x, active):
        scale = module.weight / torch.sqrt(module.running_var + module.eps)
        shift = module.bias - module.running_mean * scale
        return (x * scale[:, None, None, None] + shift[:, None, None, None]) * active

    def unit(unit, x, active):
        x, active = conv(unit[0], x, active)
        return norm(unit[1], x, active).relu(), active

    x, active = unit(encoder.input, x, active)
    for i, stage in enumerate(encoder.stages):
        for block in list(stage)[:2]:
            out = norm(block.bn1, conv(block.conv1, x, active)[0], active).relu()
            x = (norm(block.bn2, conv(block.conv2, out, active)[0], active) + x).relu()
        if i < len(encoder.stages) - 1:
            x, active = unit(stage[2], x, active)
    return unit(encoder.output, x, active)[0]


def randomise_norms(module) -> None:
    for m in module.modules():
        if isinstance(m, torch.nn.BatchNorm1d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)


def test_encoder_is_its_dense_definition_with_channels_before_height():
    branch = LidarBranch(SMALL).eval()
    randomise_norms(branch)
    voxels, coordinates = sites(400, 2)
    with torch.no_grad():
        bev = branch.encoder(voxels, coordinates, 2)
        want = dense_encoder(branch.encoder, voxels, coordinates, 2)  # (2, 5, Z, 8, 10)
    assert want.shape[1:] == (5, 2, 8, 10)
    assert bev.shape == (2, branch.encoder.channels, *SMALL.bev_shape) == (2, 10, 8, 10)
    torch.testing.assert_close(bev, want.flatten(1, 2), atol=1e-5, rtol=1e-5)
    layers = want.shape[2]
    torch.testing.assert_close(bev[:, 3 * layers + 1], want[:, 3, 1], atol=1e-5, rtol=1e-5)


def test_released_configuration_has_the_released_sizes():
    branch = LidarBranch(LidarConfig())
    assert branch.encoder.channels == 256
    counts = [sum(p.numel() for p in part.parameters()) for part in (branch.encoder, branch.backbone, branch.neck)]
    assert counts == [2_694_352, 4_280_832, 295_936]


def test_branch_of_one_sample_does_not_depend_on_its_batch():
    branch = LidarBranch(SMALL).eval()
    randomise_norms(branch)
    voxels, coordinates = sites(300, 2, seed=1)
    with torch.no_grad():
        both = branch(voxels, coordinates, 2)
        second = coordinates[:, 0] == 1
        alone = branch(voxels[second], F.pad(coordinates[second][:, 1:], (1, 0)), 1)
    assert both.shape == (2, 6, *SMALL.bev_shape)
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


def test_no_voxel_gives_a_map_and_gradients_all_the_same():
    branch = LidarBranch(SMALL)
    out = branch(torch.zeros(0, 5), torch.zeros(0, 4, dtype=torch.int32), 1)
    assert out.shape == (1, 6, *SMALL.bev_shape) and torch.isfinite(out).all()
    out.sum().backward()
    assert all(p.grad is not None for p in branch.parameters())


def test_heights_are_the_extremes_of_the_points_kept():
    rng = np.random.default_rng(3)
    low, high = np.array(SMALL.range_m[:3]), np.array(SMALL.range_m[3:])
    points = np.concatenate([rng.uniform(low, high, (2000, 3)), np.zeros((2000, 2))], 1).astype(np.float32)
    points[:50, 2] = 0
    in_first_cell = (points[:, 0] < -3.2) & (points[:, 1] < -2.4)
    points = np.concatenate([points[~in_first_cell], np.float32([[-3.9, -3.1, 0, 0, 0]])])
    found = hard_voxels(torch.from_numpy(points), GRID, 2, 10_000)
    got_low, got_high = heights(found, SMALL)
    want = {}
    for voxel, index, count in zip(found.points, found.index, found.count, strict=True):
        for point in voxel[:count]:
            if point[2] != 0:
                want.setdefault((int(index[1]) // 4, int(index[0]) // 4), []).append(float(point[2]))
    for y in range(SMALL.bev_shape[0]):
        for x in range(SMALL.bev_shape[1]):
            zs = want.get((y, x))
            expected = (min(zs), max(zs)) if zs else EMPTY_HEIGHT_M
            assert (float(got_low[y, x]), float(got_high[y, x])) == expected
    assert (0, 0) not in want  # a cell whose only point has z = 0 is empty
