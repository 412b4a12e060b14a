from __future__ import annotations

import pytest
import torch
from torch import nn

from perception.networks.layers.folding import convolve_relu, fold_norms
from perception.networks.layers.image import EfficientNetLite0, ResNet50
from perception.networks.layers.sparse import SparseConv3d, SparseSequential, SparseTensor, SubMConv3d


def randomised(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return network.double().eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


@torch.no_grad()
@pytest.mark.parametrize("backbone", [ResNet50, EfficientNetLite0])
def test_backbones_keep_their_values(backbone):
    network = randomised(backbone())
    images = torch.randn(1, 3, 64, 64).double()
    want = network(images)
    fold_norms(network)
    assert norms(network) == 0
    for got, level in zip(network(images), want, strict=True):
        torch.testing.assert_close(got, level, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_biases_transposed_1d_and_sparse_convolutions_keep_their_values():
    dense = randomised(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ConvTranspose2d(5, 4, 2, stride=2),
                                     nn.BatchNorm2d(4), nn.ReLU()))  # fmt: skip
    line = randomised(nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)))
    down = SparseConv3d(4, 6, 3, stride=2, padding=1)
    sparse = randomised(SparseSequential(SubMConv3d(3, 4, 3, bias=False), nn.BatchNorm1d(4), down, nn.BatchNorm1d(6)))
    image, row = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 7).double()
    indices = (torch.rand(1, 5, 6, 7) < 0.3).nonzero().int()
    voxels = SparseTensor(torch.randn(len(indices), 3).double(), indices, (5, 6, 7), 1)
    want = dense(image), line(row), sparse(voxels).features
    for network in (dense, line, sparse):
        fold_norms(network)
        assert norms(network) == 0
    for got, value in zip((dense(image), line(row), sparse(voxels).features), want, strict=True):
        torch.testing.assert_close(got, value, atol=1e-10, rtol=1e-10)


def test_a_norm_that_follows_no_convolution_stays():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)).eval()
    fold_norms(network)
    assert norms(network) == 2


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"training mode.*call \.eval"):
        fold_norms(ResNet50())


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
def test_convolution_norm_sum_and_relu(residual: bool):
    conv, norm = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
    pair = randomised(nn.Sequential(conv, norm)).float()
    x, other = torch.randn(2, 8, 9, 9), torch.randn(2, 16, 5, 5) if residual else None
    want = (pair(x) + (other if other is not None else 0)).relu()
    torch.testing.assert_close(convolve_relu(conv, norm, x, other), want)
    fold_norms(pair)
    torch.testing.assert_close(convolve_relu(pair[0], pair[1], x, other), want, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_one_kernel_gives_the_same(residual: bool, dtype: torch.dtype):
    pair = randomised(nn.Sequential(nn.Conv2d(64, 32, 3, padding=1), nn.BatchNorm2d(32))).float().cuda()
    fold_norms(pair)
    x, other = torch.randn(2, 64, 16, 24).cuda(), torch.randn(2, 32, 16, 24).cuda() if residual else None
    want = convolve_relu(pair[0], pair[1], x, other)
    pair.to(dtype=dtype, memory_format=torch.channels_last)
    x, other = (t if t is None else t.to(dtype, memory_format=torch.channels_last) for t in (x, other))
    got = convolve_relu(pair[0], pair[1], x, other)
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() < 0.02 * want.abs().max()
