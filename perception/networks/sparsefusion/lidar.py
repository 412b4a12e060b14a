"""The LiDAR branch: voxels, SECOND's sparse encoder, its two-dimensional backbone and its pyramid (Sensors 18, 3337).

    points (N, 5) -> voxels (V, P, 5) -> means (V, 5) -> sparse encoder -> (B, C * Z, Y, X)
                       |                                  -> Second -> (B, 128, Y, X), (B, 256, Y/2, X/2)
                       +-> heights (Y, X)                 -> SecondFPN -> (B, 512, Y, X)

Rows of a BEV map are y, columns x. Channels of the encoder's output are c * Z + z, of Z layers of height.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.networks.layers.folding import convolve_relu
from perception.networks.layers.sparse import (
    Backend,
    SparseConv3d,
    SparseModule,
    SparseSequential,
    SparseTensor,
    SubMConv3d,
)
from perception.networks.layers.sparse_tensor import Sites, choose_backend
from perception.networks.sparsefusion.config import LidarConfig
from perception.voxelize import HardVoxels, PaddedVoxels

POINT_CHANNELS = 5
"""x, y, z (m), intensity (0 to 255), time lag (s)."""

EMPTY_HEIGHT_M = (100.0, -200.0)
"""The least and the greatest z of a BEV cell without points."""


def heights(voxels: HardVoxels[Tensor] | PaddedVoxels, config: LidarConfig) -> tuple[Tensor, Tensor]:
    """(Y, X) and (Y, X): least and greatest z (m) of the points in each BEV cell's voxels, `EMPTY_HEIGHT_M` if none.

    A point with z of exactly 0 does not count: the released models take it for an unused slot.
    """
    rows, columns = config.bev_shape
    z = voxels.points[..., 2]  # (V, P), 0 in unused slots
    least, greatest = EMPTY_HEIGHT_M
    cell = voxels.index[:, 1] // config.stride * columns + voxels.index[:, 0] // config.stride
    low = z.new_full((rows * columns,), least)
    low.scatter_reduce_(0, cell, torch.where(z == 0, least, z).amin(1), "amin")
    high = z.new_full((rows * columns,), greatest)
    high.scatter_reduce_(0, cell, torch.where(z == 0, greatest, z).amax(1), "amax")
    return low.view(rows, columns), high.view(rows, columns)


class LidarBranch(nn.Module):
    """Voxels to the BEV feature map."""

    def __init__(self, config: LidarConfig) -> None:
        super().__init__()
        self.encoder = SparseEncoder(config)
        self.backbone = Second(self.encoder.channels, config.backbone_channels, config.backbone_layers)
        self.neck = SecondFPN(config.backbone_channels, config.neck_channels)

    def forward(self, voxels: Tensor, coordinates: Tensor, batch_size: int) -> Tensor:
        """(V, 5) and (V, 4) int32 batch, z, y, x, each voxel once and in the grid -> (B, 2 * neck_channels, Y, X)."""
        bev = self.encoder(voxels, coordinates, batch_size)
        features: Tensor = self.neck(self.backbone(bev))
        return features


class SparseEncoder(SparseModule):
    """Voxels to a dense BEV map: residual submanifold blocks, the grid halved between stages.

    Attributes:
        spatial_shape: the grid (z, y, x); one layer higher than the voxels', as in SECOND.
        channels: of the BEV map.
        backend: of the sparse convolutions.
    """

    def __init__(self, config: LidarConfig) -> None:
        super().__init__()
        nx, ny, nz = config.grid
        self.backend: Backend = "auto"
        self.spatial_shape = (nz + 1, ny, nx)
        first, *wider = config.encoder_channels
        self.input = _unit(SubMConv3d(POINT_CHANNELS, first, 3, bias=False))
        self.stages = nn.ModuleList()
        channels, shape = first, self.spatial_shape
        for i, width in enumerate(wider):
            # The last step down does not pad heights: 11 layers become 5.
            padding = (0 if i == len(wider) - 1 else 1, 1, 1)
            down = SparseConv3d(channels, width, 3, stride=2, padding=padding, bias=False)
            self.stages.append(SparseSequential(BasicBlock(channels), BasicBlock(channels), _unit(down)))
            channels, shape = width, down.out_shape(shape)
        self.stages.append(SparseSequential(BasicBlock(channels), BasicBlock(channels)))
        flatten = SparseConv3d(channels, config.out_channels, (3, 1, 1), stride=(2, 1, 1), bias=False)
        self.output = _unit(flatten)
        self.channels = config.out_channels * flatten.out_shape(shape)[0]

    def forward(self, voxels: Tensor, coordinates: Tensor, batch_size: int) -> Tensor:
        """(V, 5), (V, 4) int32 batch, z, y, x -> (B, out_channels * Z, Y, X)."""
        # The sites are those that voxelisation made; checking them would cost a sort and make the host wait.
        backend = choose_backend(self.backend, voxels.device, voxels.dtype)
        x = self._run(Sites(coordinates, self.spatial_shape, batch_size, backend), voxels)
        return x.to_dense().flatten(1, 2)

    def padded(self, voxels: Tensor, coordinates: Tensor, room: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """`forward` of one cloud by Triton, without waiting for the device: for CUDA graphs.

        Args:
            voxels: (V, 5).
            coordinates: (V, 4) int32, -1 in rows without a voxel.
            room: rows for the sites of each strided convolution, `len(stages)` numbers.

        Returns:
            The BEV map, and (len(stages),) int64 of how many sites there were. It is wrong where they had no room.
        """
        x = self._run(Sites(coordinates, self.spatial_shape, 1, "triton", room), voxels)
        return x.to_dense().flatten(1, 2), torch.stack(x.sites.counts)

    def _run(self, sites: Sites, voxels: Tensor) -> SparseTensor:
        with torch.autocast(voxels.device.type, enabled=False):  # half precision would round places by up to 12 cm
            x = self.input(SparseTensor.at(sites, voxels, {}))
        x = x.with_features(x.features.to(self.output[0].weight.dtype))
        for stage in self.stages:
            x = stage(x)
        out: SparseTensor = self.output(x)
        return out


class BasicBlock(SparseModule):
    """Two submanifold convolutions beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = SubMConv3d(channels, channels, 3, bias=False)
        self.bn1 = _norm(channels)
        self.conv2 = SubMConv3d(channels, channels, 3, bias=False)
        self.bn2 = _norm(channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        out = self.conv1(x).map(self.bn1).map(F.relu)
        out = self.conv2(out).map(self.bn2)
        return out.with_features(F.relu(out.features + x.features))


def _unit(conv: SubMConv3d | SparseConv3d) -> SparseSequential:
    return SparseSequential(conv, _norm(conv.out_channels), nn.ReLU())


def _norm(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)


class Second(nn.Module):
    """Stages of 3x3 convolutions over the BEV map; every stage but the first halves it."""

    def __init__(self, in_channels: int, channels: Sequence[int], layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            modules: list[nn.Module] = []
            for j in range(layers + 1):
                stride = 2 if i and not j else 1
                modules += [nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False), *_norm_relu(width)]
                in_channels = width
            self.blocks.append(nn.Sequential(*modules))

    def forward(self, bev: Tensor) -> list[Tensor]:
        """(B, C, Y, X) -> (B, channels[i], Y / 2^i, X / 2^i) of each stage."""
        levels = []
        for block in self.blocks:
            layers = list(block.children())
            for conv, norm in zip(layers[::3], layers[1::3], strict=True):
                assert isinstance(conv, nn.Conv2d)
                bev = convolve_relu(conv, norm, bev)
            levels.append(bev)
        return levels


class SecondFPN(nn.Module):
    """Every level brought to the first one's size and the same width, then put side by side."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.deblocks = nn.ModuleList()
        for i, width in enumerate(in_channels):
            up: nn.Module
            if i == 0:
                up = nn.Conv2d(width, channels, 1, bias=False)
            else:
                up = nn.ConvTranspose2d(width, channels, 2**i, stride=2**i, bias=False)
            self.deblocks.append(nn.Sequential(up, *_norm_relu(channels)))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels of Second -> (B, levels * channels, Y, X)."""
        return torch.cat([deblock(x) for deblock, x in zip(self.deblocks, levels, strict=True)], 1)


def _norm_relu(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01), nn.ReLU()
