from __future__ import annotations

import pytest
import torch
from torch import nn

from perception.networks.layers.folding import fold_norms
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
