"""The Triton backend against the torch backend: the same maps and sites, products equal up to rounding."""

from __future__ import annotations

import pytest
import torch

from perception.errors import PerceptionError
from perception.networks.layers import sparse_torch, sparse_triton
from perception.networks.layers.sparse import SparseConv3d, SparseInverseConv3d, SparseTensor, SubMConv3d
from perception.networks.layers.sparse_tensor import Sites, choose_backend

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
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_with_room_maps_and_sites_are_equal_and_the_host_does_not_wait(geometry, fill):
    indices, out = random_sites(fill, 2), out_shape(*geometry)
    want, want_sites = sparse_torch.strided_map(indices, 2, out, *geometry)
    padded = torch.cat([indices, torch.full((5, 4), -1, dtype=torch.int32)]).cuda()
    number = len(want_sites)
    sparse_triton.padded_strided_map(padded, 2, out, *geometry, number + 7)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, sites, count = sparse_triton.padded_strided_map(padded, 2, out, *geometry, number + 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(count) == number
    assert torch.equal(sites[:number].cpu(), want_sites) and (sites[number:] == -1).all()
    table = want.forward.table.where(want.forward.table < len(indices), len(padded))
    assert torch.equal(got.table[:, :number].cpu().long(), table)
    assert (got.table[:, number:] == len(padded)).all()
    if number > 1:
        _, fewer, count = sparse_triton.padded_strided_map(padded, 2, out, *geometry, number - 1)
        assert torch.equal(fewer.cpu(), want_sites[:-1]) and int(count) == number


@pytest.mark.gpu
@torch.no_grad()
def test_a_chain_with_room_gives_the_same_map():
    indices = random_sites(0.1, 1)
    features, none = torch.randn(len(indices), 4).cuda(), torch.full((9, 4), -1, dtype=torch.int32)
    torch.manual_seed(1)
    first, down = SubMConv3d(4, 8, 3).cuda(), SparseConv3d(8, 8, 3, stride=2, padding=1).cuda()
    last, flat = SubMConv3d(8, 8, 3).cuda(), SparseConv3d(8, 6, (3, 1, 1), stride=(2, 1, 1)).cuda()

    def run(sites: Sites, rows: torch.Tensor) -> SparseTensor:
        return flat(last(down(first(SparseTensor.at(sites, rows, {})))))

    want = run(Sites(indices.cuda(), SHAPE, 1, "triton"), features)
    padded = Sites(torch.cat([indices, none]).cuda(), SHAPE, 1, "triton", room=(1000, 500))
    got = run(padded, torch.cat([features, torch.full((9, 4), 7.0, device="cuda")]))
    assert torch.equal(got.to_dense(), want.to_dense())
    assert [int(count) for count in got.sites.counts][1] == len(want.sites)


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


def test_a_grid_without_a_dense_table_has_no_room():
    with pytest.raises(PerceptionError, match=r"dense table of at most 1,073,741,824\n  use larger voxels"):
        sparse_triton.padded_strided_map(
            torch.zeros(1, 4, dtype=torch.int32), 1, (2000, 2000, 2000), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), 5
        )


def test_a_machine_without_it_says_so(monkeypatch):
    monkeypatch.setattr(sparse_triton, "installed", lambda: False)
    with pytest.raises(PerceptionError, match=r"Triton is not installed\n.*backend='torch'"):
        choose_backend("triton", torch.device("cuda"), torch.float32)
    monkeypatch.setattr(sparse_triton, "installed", lambda: True)
    with pytest.raises(PerceptionError, match=r"no kernels for torch\.float32 on cpu"):
        choose_backend("triton", torch.device("cpu"), torch.float32)
