"""Sparse convolution against dense conv3d in float64, on every device and backend there is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.errors import PerceptionError
from perception.networks.layers import sparse_spconv, sparse_torch
from perception.networks.layers.sparse import (
    SparseConv3d,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SparseTensor,
    SubMConv3d,
    krsc_from_rsck,
    krsc_from_rskc,
    pointwise,
)

SHAPE = (9, 11, 10)
CPU = ("cpu", "torch")
CUDA = pytest.param(("cuda", "torch"), marks=pytest.mark.gpu, id="cuda-torch")
SPCONV = pytest.param(("cuda", "spconv"), marks=pytest.mark.gpu, id="cuda-spconv")
EVERYWHERE = [pytest.param(CPU, id="cpu-torch"), CUDA, SPCONV]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Largest error over the largest value."""


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A device and a backend, skipped where that backend is not installed."""
    device, backend = request.param
    if backend == "spconv" and not sparse_spconv.installed_for_cuda():
        pytest.skip("spconv with CUDA is not installed")
    return device, backend


@dataclass(frozen=True)
class Case:
    """A convolution over a random grid; `fill` is the share of active sites, or "one" site."""

    kernel: int | tuple[int, int, int]
    stride: int | tuple[int, int, int]
    padding: int | tuple
    dilation: int
    fill: float | str
    batch_size: int
    seed: int


FILLS = (0.0, "one", 0.02, 0.3, 1.0)


def strided_cases() -> Iterator[Case]:
    """Kernels, strides, paddings and dilations in full; fills and batches in turns that meet them all."""
    paddings = (0, 1, (0, 1, 1), ((0, 1), (1, 0), (2, 1)))
    kernels = (3, 5, (3, 1, 3), (1, 3, 3), 2, (2, 3, 4))
    for seed, (s, p, d, k) in enumerate(itertools.product((1, 2, (2, 1, 2), 3), paddings, (1, 2), kernels)):
        yield Case(k, s, p, d, FILLS[seed % 5], 1 + seed // 7 % 3, seed)


def submanifold_cases() -> Iterator[Case]:
    for seed, (k, d, fill) in enumerate(itertools.product((3, 5, (3, 1, 3), (1, 3, 3), (3, 1, 1)), (1, 2), FILLS)):
        yield Case(k, 1, 0, d, fill, 1 + seed % 3, seed)


SOME = [
    Case(3, 2, (0, 1, 1), 1, 0.3, 2, 0),
    Case((3, 1, 1), (2, 1, 1), 0, 1, 1.0, 1, 1),
    Case((2, 3, 4), 1, 1, 2, 0.02, 3, 2),
    Case(3, 2, 1, 1, "one", 1, 3),
    Case(3, 2, 1, 1, 0.0, 2, 4),
]


def random_sparse(
    case: Case, channels: int, place: tuple[str, str] = CPU, dtype: torch.dtype = torch.float64
) -> SparseTensor:
    """Random features that ask for gradients, at random sites in random order."""
    generator = torch.Generator().manual_seed(case.seed)
    chance = torch.rand(case.batch_size, *SHAPE, generator=generator)
    active = chance == chance.max() if case.fill == "one" else chance < case.fill
    indices = active.nonzero().int()
    indices = indices[torch.randperm(len(indices), generator=generator)]
    features = torch.randn(len(indices), channels, generator=generator, dtype=torch.float64)
    device, backend = place
    return SparseTensor(
        features.to(device, dtype).requires_grad_(), indices.to(device), SHAPE, case.batch_size, backend
    )


def rows(dense: Tensor, indices: Tensor) -> Tensor:
    """The values (V, C) of a dense (B, C, Z, Y, X) at sites (V, 4)."""
    batch, z, y, x = indices.long().unbind(1)
    return dense[batch, :, z, y, x]


def scatter(features: Tensor, indices: Tensor, batch_size: int, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `rows`, zero elsewhere."""
    batch, z, y, x = indices.long().unbind(1)
    dense = features.new_zeros(batch_size, *shape, features.shape[1]).index_put((batch, z, y, x), features)
    return dense.permute(0, 4, 1, 2, 3)


def dense_weight(weight: Tensor) -> Tensor:
    """(out, kz, ky, kx, in) as torch's (out, in, kz, ky, kx)."""
    return weight.permute(0, 4, 1, 2, 3)


def ends(padding: int | tuple) -> list[int]:
    """Padding in the order of `torch.nn.functional.pad`: x before, x after, y before, ..."""
    axes = (padding,) * 3 if isinstance(padding, int) else padding
    return [end for axis in reversed(axes) for end in ((axis, axis) if isinstance(axis, int) else axis)]


def sites(indices: Tensor) -> list[tuple[int, ...]]:
    return [tuple(site) for site in indices.tolist()]


def error(value: Tensor, oracle: Tensor) -> float:
    """Largest difference over the oracle's largest value."""
    assert value.shape == oracle.shape
    if not oracle.numel():
        return 0.0
    value, oracle = value.detach().double().cpu(), oracle.detach()
    return float((value - oracle).abs().max() / oracle.abs().max().clamp(min=1e-30))


def check_equal(out: Tensor, oracle: Tensor, inputs: list[Tensor], copies: list[Tensor]) -> None:
    """Values and the gradients of all inputs agree with the oracle's, a function of their float64 copies."""
    tolerance = TOLERANCE[out.dtype]
    assert error(out, oracle) < tolerance
    upstream = torch.randn(oracle.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad(out, inputs, upstream.to(out.device))
    oracle_grads = torch.autograd.grad(oracle, copies, upstream.double())
    for grad, oracle_grad in zip(grads, oracle_grads, strict=True):
        assert error(grad, oracle_grad) < tolerance


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().cpu().requires_grad_() for t in tensors]


def check_strided(case: Case, place: tuple[str, str], dtype: torch.dtype) -> None:
    layer = SparseConv3d(5, 6, case.kernel, stride=case.stride, padding=case.padding, dilation=case.dilation)
    layer = layer.to(place[0], dtype)
    x = random_sparse(case, 5, place, dtype)
    out = layer(x)

    inputs = [x.features, layer.weight, layer.bias]
    features, weight, bias = copies = doubles(*inputs)
    conv = {"stride": layer.stride, "dilation": case.dilation}
    padded = F.pad(scatter(features, x.indices.cpu(), x.batch_size, SHAPE), ends(case.padding))
    dense = F.conv3d(padded, dense_weight(weight), bias, **conv)
    assert out.spatial_shape == tuple(dense.shape[2:])
    active = F.pad(scatter(torch.ones(len(features), 1), x.indices.cpu(), x.batch_size, SHAPE), ends(case.padding))
    reached = F.conv3d(active, torch.ones(1, 1, *layer.kernel_size), **conv)[:, 0].round() > 0
    found = sites(out.indices)
    assert sorted(found) == sites(reached.nonzero())
    assert place[1] == "spconv" or found == sorted(found)
    check_equal(out.features, rows(dense, out.indices.cpu()), inputs, copies)


def check_submanifold(case: Case, place: tuple[str, str], dtype: torch.dtype) -> None:
    layer = SubMConv3d(5, 6, case.kernel, dilation=case.dilation).to(place[0], dtype)
    x = random_sparse(case, 5, place, dtype)
    out = layer(x)
    assert out.indices is x.indices
    assert out.spatial_shape == SHAPE

    inputs = [x.features, layer.weight, layer.bias]
    features, weight, bias = copies = doubles(*inputs)
    padding = tuple(k // 2 * case.dilation for k in layer.kernel_size)
    dense = scatter(features, x.indices.cpu(), x.batch_size, SHAPE)
    dense = F.conv3d(dense, dense_weight(weight), bias, padding=padding, dilation=case.dilation)
    check_equal(out.features, rows(dense, x.indices.cpu()), inputs, copies)


def check_inverse(case: Case, place: tuple[str, str], dtype: torch.dtype) -> None:
    down = SparseConv3d(
        4, 5, case.kernel, stride=case.stride, padding=case.padding, dilation=case.dilation, indice_key="down"
    ).to(place[0], dtype)
    up = SparseInverseConv3d(5, 3, case.kernel, indice_key="down").to(place[0], dtype)
    x = random_sparse(case, 4, place, dtype)
    coarse = down(x)
    coarse = coarse.with_features(coarse.features.detach().requires_grad_())
    out = up(coarse)
    assert out.indices is x.indices
    assert out.spatial_shape == SHAPE

    inputs = [coarse.features, up.weight, up.bias]
    features, weight, bias = copies = doubles(*inputs)
    dense = scatter(features, coarse.indices.cpu(), x.batch_size, coarse.spatial_shape)
    transposed = weight.permute(4, 0, 1, 2, 3)  # conv_transpose3d takes (in, out, kz, ky, kx)
    dense = F.conv_transpose3d(dense, transposed, bias, down.stride, 0, dilation=case.dilation)
    # An axis that the convolution did not use up to its end is short: nothing reaches there but the bias.
    at = x.indices.cpu() + torch.tensor([0, *down.padding_before], dtype=torch.int32)
    room = [max(0, int(at[:, i + 1].max()) + 1 - dense.shape[i + 2]) if len(at) else 0 for i in range(3)]
    dense = F.pad(dense - bias[:, None, None, None], [0, room[2], 0, room[1], 0, room[0]]) + bias[:, None, None, None]
    check_equal(out.features, rows(dense, at), inputs, copies)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", list(strided_cases()), ids=lambda c: str(c.seed))
def test_strided_equals_dense(case: Case, dtype: torch.dtype) -> None:
    check_strided(case, CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", list(submanifold_cases()), ids=lambda c: str(c.seed))
def test_submanifold_equals_dense(case: Case, dtype: torch.dtype) -> None:
    check_submanifold(case, CPU, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", SOME, ids=lambda c: str(c.seed))
@pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
def test_every_device_and_dtype(place: tuple[str, str], case: Case, dtype: torch.dtype) -> None:
    if place[1] == "spconv" and dtype == torch.float64:
        pytest.skip("spconv has no float64 kernels")
    check_strided(case, place, dtype)
    check_inverse(case, place, dtype)
    check_submanifold(Case(3, 1, 0, case.dilation, case.fill, case.batch_size, case.seed), place, dtype)
    check_submanifold(Case(5, 1, 0, 1, case.fill, case.batch_size, case.seed), place, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("place", [CUDA, SPCONV], indirect=True)
def test_all_cases_on_cuda(place: tuple[str, str]) -> None:
    for case in strided_cases():
        check_strided(case, place, torch.float32)
        check_inverse(case, place, torch.float32)
    for case in submanifold_cases():
        check_submanifold(case, place, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SOME, ids=lambda c: str(c.seed))
def test_the_way_of_cuda_is_right_on_the_cpu(monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype) -> None:
    """All taps at once, in several parts."""
    monkeypatch.setattr(sparse_torch, "_at_once", lambda device: True)
    monkeypatch.setattr(sparse_torch, "_AT_ONCE", 20_000)
    check_strided(case, CPU, dtype)
    check_inverse(case, CPU, dtype)
    check_submanifold(Case(3, 1, 0, case.dilation, case.fill, case.batch_size, case.seed), CPU, dtype)


@pytest.mark.parametrize("case", list(strided_cases())[::5], ids=lambda c: str(c.seed))
def test_inverse_equals_dense_transpose(case: Case) -> None:
    check_inverse(case, CPU, torch.float64)


@pytest.mark.parametrize("place", [pytest.param(CPU, id="cpu"), CUDA], indirect=True)
def test_repeats_to_the_bit(monkeypatch: pytest.MonkeyPatch, place: tuple[str, str]) -> None:
    """The torch backend always; with deterministic algorithms asked for, `auto` is the torch backend."""
    case = Case(3, 2, 1, 1, 0.3, 2, 0)
    layer = SparseSequential(SubMConv3d(16, 32, 3), SparseConv3d(32, 16, 3, stride=2, padding=1)).to(place[0])

    def run(backend: str) -> list[Tensor]:
        x = random_sparse(case, 16, (place[0], backend), torch.float32)
        out = layer(x)
        return [out.features, *torch.autograd.grad(out.features.square().sum(), [x.features, *layer.parameters()])]

    for first, second in zip(run("torch"), run("torch"), strict=True):
        assert torch.equal(first, second)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    assert random_sparse(case, 16, (place[0], "auto"), torch.float32).backend == "torch"
    for first, second in zip(run("auto"), run("torch"), strict=True):
        assert torch.equal(first, second)


def test_gradcheck() -> None:
    indices = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1], [1, 0, 1, 0]], dtype=torch.int32)
    features = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    submanifold, down = SubMConv3d(2, 3, 3).double(), SparseConv3d(3, 2, 2, stride=2, indice_key="down").double()
    up = SparseInverseConv3d(2, 2, 2, indice_key="down").double()

    def chain(features: Tensor, *_: Tensor) -> Tensor:
        return up(down(submanifold(SparseTensor(features, indices, (2, 2, 2), 2)))).features

    parameters = [*submanifold.parameters(), *down.parameters(), *up.parameters()]
    assert torch.autograd.gradcheck(chain, (features, *parameters))


def test_a_real_sweep_equals_dense(shared_data: Path) -> None:
    """Occupied 0.5 m voxels of a nuScenes sweep, as clustered as real ones are."""
    (path,) = (shared_data / "nuscenes_keyframe").rglob("*LIDAR_TOP*.bin")
    xyz = np.fromfile(path, np.float32).reshape(-1, 5)[:, :3]
    cells = np.unique(np.floor((xyz[:, ::-1] - (-5, -50, -50)) / 0.5).astype(np.int32), axis=0)
    shape = (16, 200, 200)
    cells = cells[((cells >= 0) & (cells < shape)).all(1)]
    indices = torch.from_numpy(np.pad(cells, ((0, 0), (1, 0))))
    assert len(indices) > 2000
    x = SparseTensor(torch.randn(len(indices), 3), indices, shape, 1)
    dense = scatter(x.features, indices, 1, shape)
    layer, down = SubMConv3d(3, 4, 3), SparseConv3d(3, 4, 3, stride=2, padding=(0, 1, 1))
    with torch.no_grad():
        oracle = F.conv3d(dense, dense_weight(layer.weight), layer.bias, padding=1)
        torch.testing.assert_close(layer(x).features, rows(oracle, indices), rtol=1e-5, atol=1e-5)
        oracle = F.conv3d(dense, dense_weight(down.weight), down.bias, 2, (0, 1, 1))
        out = down(x)
        torch.testing.assert_close(out.features, rows(oracle, out.indices), rtol=1e-5, atol=1e-5)


def test_pointwise_reads_the_weight_as_spconv_does() -> None:
    """The buffer of (out, 1, 1, 1, in) is an (in, out) matrix: transposed for square weights."""
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).view(2, 1, 1, 1, 3)
    assert pointwise(torch.tensor([[1.0, 10.0, 100.0]]), weight).tolist() == [[1 + 30 + 500, 2 + 40 + 600]]
    x = random_sparse(Case(1, 1, 0, 1, 0.3, 1, 0), 4)
    for layer in (SubMConv3d(4, 4, 1), SparseConv3d(4, 4, 1)):
        square = layer.double().weight.view(4, 4)
        assert torch.equal(layer(x).features, x.features @ square + layer.bias)
        assert not torch.allclose(layer(x).features, x.features @ square.t() + layer.bias)
        assert layer(x).sites is x.sites


def test_a_strided_1x1x1_kernel_is_a_true_convolution() -> None:
    check_strided(Case(1, 2, 0, 1, 0.3, 2, 0), CPU, torch.float64)
    with pytest.raises(PerceptionError, match=r"padding \(\(1, 1, 1\), 0, 0\)\n  give one integer, or three"):
        SparseConv3d(2, 3, 3, padding=((1, 1, 1), 0, 0))
    with pytest.raises(PerceptionError, match="1x1x1 kernel of stride 1 with padding=1"):
        SparseConv3d(4, 4, 1, padding=1)


def test_older_weight_layouts() -> None:
    krsc = torch.randn(6, 3, 1, 2, 5)
    assert torch.equal(krsc_from_rsck(krsc.permute(1, 2, 3, 4, 0).contiguous()), krsc)
    assert torch.equal(krsc_from_rskc(krsc.permute(1, 2, 3, 0, 4).contiguous()), krsc)
    matrix = torch.randn(5, 6)
    features = torch.randn(7, 5)
    torch.testing.assert_close(pointwise(features, krsc_from_rsck(matrix.view(1, 1, 1, 5, 6))), features @ matrix)


def test_state_dict_is_spconvs() -> None:
    layer = SparseSequential(SubMConv3d(5, 16, 3, bias=False), nn.BatchNorm1d(16), nn.ReLU())
    assert layer.state_dict()["0.weight"].shape == (16, 3, 3, 3, 5)
    assert [k for k in layer.state_dict() if k.startswith("0.")] == ["0.weight"]
    assert {k: tuple(v.shape) for k, v in SparseConv3d(4, 6, (3, 1, 1)).state_dict().items()} == {
        "weight": (6, 3, 1, 1, 4),
        "bias": (6,),
    }


@pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
def test_to_dense_is_batch_channel_z_y_x(place: tuple[str, str]) -> None:
    indices = torch.tensor([[1, 2, 0, 4], [0, 1, 3, 0]], dtype=torch.int32, device=place[0])
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=place[0], requires_grad=True)
    dense = SparseTensor(features, indices, (3, 4, 5), 2, place[1]).to_dense()
    assert dense.shape == (2, 2, 3, 4, 5)
    assert dense.is_contiguous()
    assert dense[1, :, 2, 0, 4].tolist() == [1, 2]
    assert dense[0, :, 1, 3, 0].tolist() == [3, 4]
    assert dense.count_nonzero() == 4
    dense.square().sum().backward()
    assert features.grad.tolist() == [[2, 4], [6, 8]]


class Block(SparseModule):
    """A residual block, as networks write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = SubMConv3d(channels, channels, 3, bias=False)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        out = self.conv(x).map(self.norm)
        return out.with_features(F.relu(out.features + x.features))


def encoder() -> SparseSequential:
    return SparseSequential(
        SparseSequential(SubMConv3d(5, 8, 3, bias=False), nn.BatchNorm1d(8), nn.ReLU()),
        Block(8),
        SparseSequential(
            SparseConv3d(8, 16, 3, stride=2, padding=(0, 1, 1), bias=False), nn.BatchNorm1d(16), nn.ReLU()
        ),
        Block(16),
    )


def test_layers_share_the_maps_of_one_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    search = sparse_torch.submanifold_map
    monkeypatch.setattr(sparse_torch, "submanifold_map", lambda *a: found.append(a) or search(*a))
    x = random_sparse(SOME[0], 5, dtype=torch.float32)
    encoder()(x)
    assert len(found) == 2  # one per resolution, for four layers
    down = SparseConv3d(5, 4, 2, stride=2)
    assert down(x).sites is SparseConv3d(5, 4, 2, stride=2)(x).sites


@pytest.mark.parametrize("num", [0, 1])
@pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
def test_training_on_an_empty_or_single_site(place: tuple[str, str], num: int) -> None:
    """Shapes hold, every parameter gets a gradient (of zero without sites), running statistics stay."""
    network = encoder().to(place[0]).train()
    features = torch.randn(num, 5, device=place[0], requires_grad=True)
    indices = torch.full((num, 4), 1, dtype=torch.int32, device=place[0])
    out = network(SparseTensor(features, indices, (9, 16, 16), 2, place[1]))
    assert out.features.shape[1] == 16
    assert out.spatial_shape == (4, 8, 8)
    dense = out.to_dense()
    assert dense.shape == (2, 16, 4, 8, 8)
    dense.sum().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    if num == 0:
        assert not dense.any()
        assert features.grad.shape == (0, 5)
    norm = network[0][1]
    assert norm.num_batches_tracked == 0
    assert norm.running_mean.eq(0).all()
    assert norm.running_var.eq(1).all()


@pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
def test_a_convolution_may_reach_no_site(place: tuple[str, str]) -> None:
    """Padding 0 in z drops the last layer of an even grid; spconv alone would refuse it."""
    indices = torch.tensor([[0, 7, 3, 2]], dtype=torch.int32, device=place[0])
    x = SparseTensor(torch.ones(1, 4, device=place[0]), indices, (8, 9, 9), 1, place[1])
    out = SparseConv3d(4, 6, 3, stride=2, padding=(0, 1, 1)).to(place[0])(x)
    assert out.features.shape == (0, 6)
    assert out.indices.shape == (0, 4)
    assert out.spatial_shape == (3, 5, 5)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
def test_autocast(place: tuple[str, str], autocast_dtype: torch.dtype) -> None:
    network = encoder().to(place[0])
    x = random_sparse(SOME[0], 5, place, torch.float32)
    full = network(x).features
    with torch.autocast(place[0], autocast_dtype):
        convolved = network[0][0](x).features
        half = network(x).features
    assert convolved.dtype == autocast_dtype
    assert error(half, full.detach().double().cpu()) < 5e-2
    half.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


def bad(features: tuple[int, ...] = (2, 3), indices: list[list[int]] | None = None, dtype: torch.dtype = torch.int32):
    indices = [[0, 0, 0, 0], [0, 0, 0, 1]] if indices is None else indices
    return SparseTensor(torch.zeros(features), torch.tensor(indices, dtype=dtype), (4, 5, 6), 2)


def test_wrong_input_says_what_and_what_to_do() -> None:
    with pytest.raises(PerceptionError, match=r"1 of 2 sites lie outside 2 grids of \(4, 5, 6\).*is \(0, 6, 0, 4\)"):
        bad(indices=[[0, 0, 0, 0], [0, 6, 0, 4]])
    with pytest.raises(PerceptionError, match="1 of 2 sites lie outside"):
        bad(indices=[[0, 0, 0, 0], [-1, 0, 0, 0]])
    with pytest.raises(PerceptionError, match="1 of 3 sites repeat another"):
        bad((3, 3), [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    with pytest.raises(PerceptionError, match=r"torch.int64.*\n.*int32 indices \(batch, z, y, x\)"):
        bad(dtype=torch.int64)
    with pytest.raises(PerceptionError, match=r"give \(3, 4\) int32"):
        bad((3, 3))
    with pytest.raises(PerceptionError, match=r"features \(2,\)"):
        bad((2,))
    with pytest.raises(PerceptionError, match="spatial_shape"):
        SparseTensor(torch.zeros(0, 3), torch.zeros(0, 4, dtype=torch.int32), (4, 0, 6), 2)
    with pytest.raises(PerceptionError, match="less than 2\\^62 cells"):
        SparseTensor(torch.zeros(0, 3), torch.zeros(0, 4, dtype=torch.int32), (2**31, 2**31, 6), 2)
    with pytest.raises(PerceptionError, match="5 rows for 2 sites"):
        bad().with_features(torch.zeros(5, 3))
    with pytest.raises(PerceptionError, match="SubMConv3d: 3 channels of features for in_channels=4"):
        SubMConv3d(4, 4, 3)(bad())
    with pytest.raises(PerceptionError, match=r"torch.float32 features for a torch.float16 weight\n.*autocast"):
        SubMConv3d(3, 4, 3).half()(bad())
    with pytest.raises(PerceptionError, match="even on an axis"):
        SubMConv3d(4, 4, (3, 2, 3))
    with pytest.raises(PerceptionError, match=r"an input of \(4, 5, 6\) leaves an output of \(0, 1, 2\)"):
        SparseConv3d(3, 4, 5)(bad())
    with pytest.raises(PerceptionError, match="kernel_size"):
        SparseConv3d(3, 4, (3, 3))


def test_inverse_says_which_convolution_it_misses() -> None:
    down = SparseConv3d(3, 3, 3, stride=2, padding=1, indice_key="a")
    with pytest.raises(PerceptionError, match=r"indice_key='b' led here\n.*known keys: a"):
        SparseInverseConv3d(3, 3, 3, indice_key="b")(down(bad()))
    with pytest.raises(PerceptionError, match=r"cannot undo 'a': kernel \(3, 3, 3\)"):
        SparseInverseConv3d(3, 3, 2, indice_key="a")(down(bad()))
    further = SparseConv3d(3, 3, 3, stride=2, padding=1)
    with pytest.raises(PerceptionError, match="cannot undo 'a'"):
        SparseInverseConv3d(3, 3, 3, indice_key="a")(further(down(bad())))


def test_backend_choice() -> None:
    assert bad().backend == "torch"  # auto on the CPU, wherever spconv is installed
    with pytest.raises(PerceptionError, match="unknown backend 'minkowski'"):
        SparseTensor(torch.zeros(0, 3), torch.zeros(0, 4, dtype=torch.int32), (4, 5, 6), 1, "minkowski")  # type: ignore


def test_spconv_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_spconv, "find_spec", lambda name: None)
    with pytest.raises(PerceptionError, match=r"not installed\n.*perception\[cu126\].*backend='torch'"):
        random_sparse(SOME[0], 4, ("cpu", "spconv"), torch.float32)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_spconv_on_one_cpu_thread_agrees() -> None:
    pytest.importorskip("spconv.pytorch")
    for case in list(strided_cases())[::3]:
        down = SparseConv3d(5, 6, case.kernel, stride=case.stride, padding=case.padding, indice_key="down")
        up = SparseInverseConv3d(6, 4, case.kernel, indice_key="down")
        with torch.no_grad():
            a = down(random_sparse(case, 5, CPU, torch.float32))
            b = down(random_sparse(case, 5, ("cpu", "spconv"), torch.float32))
            torch.testing.assert_close(b.to_dense(), a.to_dense(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(up(b).features, up(a).features, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_spconvs_own_modules_agree() -> None:
    """Its modules with our parameters: submanifold, the 1x1x1 quirk, strided with padding, inverse."""
    spconv = pytest.importorskip("spconv.pytorch")
    settings = [
        (SubMConv3d(5, 6, 3), spconv.SubMConv3d(5, 6, 3)),
        (SubMConv3d(6, 6, 1), spconv.SubMConv3d(6, 6, 1)),
        (SubMConv3d(6, 6, (1, 3, 5), dilation=2), spconv.SubMConv3d(6, 6, (1, 3, 5), dilation=2)),
        (
            SparseConv3d(6, 4, 3, stride=2, padding=(0, 1, 1), indice_key="a"),
            spconv.SparseConv3d(6, 4, 3, stride=2, padding=(0, 1, 1), indice_key="a"),
        ),
        (SubMConv3d(4, 4, 3), spconv.SubMConv3d(4, 4, 3)),
        (SparseInverseConv3d(4, 5, 3, indice_key="a"), spconv.SparseInverseConv3d(4, 5, 3, indice_key="a")),
        (SparseConv3d(5, 5, (3, 1, 1), stride=(2, 1, 1)), spconv.SparseConv3d(5, 5, (3, 1, 1), (2, 1, 1))),
    ]
    x = random_sparse(SOME[0], 5, CPU, torch.float32)
    theirs = spconv.SparseConvTensor(x.features.detach(), x.indices, list(SHAPE), x.batch_size)
    with torch.no_grad():
        for ours, module in settings:
            module.load_state_dict(ours.state_dict())
            x, theirs = ours(x), module.train()(theirs)
            torch.testing.assert_close(x.to_dense(), theirs.dense(), rtol=1e-5, atol=1e-5)


def test_spconv_refuses_several_cpu_threads() -> None:
    pytest.importorskip("spconv.pytorch")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(PerceptionError, match="with 2 threads; its CPU kernels race"):
            random_sparse(SOME[0], 4, ("cpu", "spconv"), torch.float32)
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(PerceptionError, match=r"no kernels for torch\.float64"):
        random_sparse(SOME[0], 4, ("cpu", "spconv"), torch.float64)


@pytest.mark.usefixtures("one_thread")
def test_spconv_on_the_cpu_refuses_gradients() -> None:
    pytest.importorskip("spconv.pytorch")
    x = random_sparse(SOME[0], 4, ("cpu", "spconv"), torch.float32)
    with pytest.raises(PerceptionError, match="no backward pass"):
        SubMConv3d(4, 4, 3)(x)
