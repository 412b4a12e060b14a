"""The Triton backend against the torch backend: the same maps and sites, products equal up to rounding."""

from __future__ import annotations

import pytest
import torch

from perception.errors import PerceptionError
from perception.networks.layers import sparse_torch, sparse_triton
from perception.networks.layers.sparse import SparseConv3d, SparseInverseConv3d, SparseTensor, SubMConv3d
from perception.networks.layers.sparse_tensor import choose_backend

SHAPE = (9, 11, 10)
GEOMETRIES = [
    ((3, 3, 3), (2, 2, 2), (0, 1, 1), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    ((3, 1, 1), (2, 1, 1), (0, 0, 0), (1, 1, 1)),
    ((2, 3, 4), (1, 1, 1), (1, 1, 1), (2, 2, 2)),
    ((3, 3, 3), (3, 2, 1), (0, 2, 1), (1, 2, 1)),
]
FILLS = [0.0, 0.01, 0.2, 1.0]


def random_sites(fill: float, batch_size: int) -> torch.Tensor:
    indices = (torch.rand(batch_size, *SHAPE) < fill).nonzero().int()
    return indices[torch.randperm(len(indices))]


def out_shape(kernel, stride, padding, dilation) -> tuple[int, ...]:
    axes = zip(SHAPE, kernel, stride, padding, dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


@pytest.mark.gpu
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_strided_maps_sites_and_inverses_are_equal(geometry, fill, batch_size):
    indices, out = random_sites(fill, batch_size), out_shape(*geometry)
    want, want_sites = sparse_torch.strided_map(indices, batch_size, out, *geometry)
    got, got_sites = sparse_triton.strided_map(indices.cuda(), batch_size, out, *geometry)
    assert torch.equal(got_sites.cpu(), want_sites)
    assert torch.equal(got.table.cpu().long(), want.forward.table)
    assert torch.equal(got.inverse.table.cpu().long(), want.backward.table)


@pytest.mark.gpu
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3, 3), (1, 1, 1)), ((1, 3, 5), (1, 2, 1))])
def test_submanifold_maps_are_equal(kernel, dilation, fill):
    indices = random_sites(fill, 2)
    want = sparse_torch.submanifold_map(indices, 2, SHAPE, kernel, dilation)
    got = sparse_triton.submanifold_map(indices.cuda(), 2, SHAPE, kernel, dilation)
    assert torch.equal(got.table.cpu().long(), want.forward.table)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("channels", [(5, 16), (16, 32), (64, 128), (128, 128), (40, 200)])
def test_products_are_equal_up_to_rounding(channels, dtype, tolerance):
    dtype = getattr(torch, dtype)
    indices = random_sites(0.3, 2)
    features, weight = torch.randn(len(indices), channels[0]), torch.randn(channels[1], 3, 3, 3, channels[0])
    features, weight = features.to(dtype), weight.to(dtype)
    geometry = GEOMETRIES[0]
    want_map, _ = sparse_torch.strided_map(indices, 2, out_shape(*geometry), *geometry)
    got_map, _ = sparse_triton.strided_map(indices.cuda(), 2, out_shape(*geometry), *geometry)
    want = sparse_torch.convolve(features.double(), weight.double(), want_map)
    got = sparse_triton.convolve(features.cuda(), weight.cuda(), got_map)
    assert got.dtype == dtype
    assert (got.cpu().double() - want).abs().max() <= tolerance * want.abs().max()
    again = sparse_triton.convolve(features.cuda(), weight.cuda(), got_map)
    assert torch.equal(got, again)
    back = torch.randn(len(want), channels[0]).to(dtype)
    want = sparse_torch.convolve(back.double(), weight.double(), want_map, inverse=True)
    got = sparse_triton.convolve(back.cuda(), weight.cuda(), got_map, inverse=True)
    assert (got.cpu().double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.gpu
@torch.no_grad()
def test_a_grid_beyond_the_dense_tables_is_searched(monkeypatch):
    indices = random_sites(0.2, 2)
    features = torch.randn(len(indices), 4)

    def run(device: str, backend: str) -> torch.Tensor:
        torch.manual_seed(1)
        x = SparseTensor(features.to(device), indices.to(device), SHAPE, 2, backend)
        down = SparseConv3d(4, 6, 3, stride=2, padding=1, indice_key="down").to(device)
        up = SparseInverseConv3d(6, 5, 3, indice_key="down").to(device)
        return up(SubMConv3d(6, 6, 3).to(device)(down(x))).features.cpu()

    want = run("cpu", "torch")
    torch.testing.assert_close(run("cuda", "triton"), want, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(sparse_triton, "_MOST_CELLS", 10)
    torch.testing.assert_close(run("cuda", "triton"), want, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_auto_takes_triton_while_gradients_are_off():
    cuda = torch.device("cuda")
    with torch.no_grad():
        assert choose_backend("auto", cuda, torch.float16) == "triton"
        assert choose_backend("auto", cuda, torch.float64) == "torch"
    assert choose_backend("auto", cuda, torch.float32) != "triton"


@pytest.mark.gpu
def test_gradients_are_refused():
    x = SparseTensor(torch.randn(1, 4, device="cuda"), torch.zeros(1, 4, device="cuda").int(), SHAPE, 1, "triton")
    with pytest.raises(PerceptionError, match=r"no backward pass\n.*torch\.no_grad"):
        SubMConv3d(4, 4, 3).cuda()(x)


def test_a_machine_without_it_says_so(monkeypatch):
    monkeypatch.setattr(sparse_triton, "installed", lambda: False)
    with pytest.raises(PerceptionError, match=r"Triton is not installed\n.*backend='torch'"):
        choose_backend("triton", torch.device("cuda"), torch.float32)
    monkeypatch.setattr(sparse_triton, "installed", lambda: True)
    with pytest.raises(PerceptionError, match=r"no kernels for torch\.float32 on cpu"):
        choose_backend("triton", torch.device("cpu"), torch.float32)
