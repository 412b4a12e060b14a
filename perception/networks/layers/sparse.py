"""Sparse 3D convolution: the one door to it for every network.

A `SparseTensor` holds a feature row for each active site of a voxel grid; convolutions visit those alone::

    x = SparseTensor(features, indices, spatial_shape=(41, 1440, 1440), batch_size=1)
    layer = SparseSequential(SubMConv3d(5, 16, 3, bias=False), nn.BatchNorm1d(16), nn.ReLU())
    bev = layer(x).to_dense()                                      # (B, 16, 41, 1440, 1440)

Facts of the format:

* Sites are `(batch, z, y, x)` int32, shapes and kernels `(z, y, x)`. A site occurs once and lies in the grid: checked.
* A convolution is a cross-correlation, as `torch.nn.functional.conv3d` on the grid with zeros at inactive sites.
  `SubMConv3d` gives outputs at the input's sites alone, in their order; `SparseConv3d` at every site that an input
  reaches, sorted by (batch, z, y, x) with the torch backend, in an order of its own with spconv.
* Parameters are those of spconv 2.2 and later: `weight` (out, kz, ky, kx, in) and `bias` (out,), so its checkpoints
  load as they are, the 1x1x1 quirk included (`pointwise`). `krsc_from_rsck`, `krsc_from_rskc` convert older layouts.
* Kernel maps (which row meets which) are found once per geometry and set of sites, and shared by all layers: no key has
  to be given. An `indice_key` names a `SparseConv3d` whose sites a `SparseInverseConv3d` restores.
* No sites at all is a valid input everywhere, and keeps every parameter in the graph.

Backends: `torch` (any device and dtype, deterministic: the oracle, and the default on the CPU), `triton` (CUDA, no
gradients: the fast one for inference) and `spconv` (float32 and float16 on CUDA, fast in training). On CUDA `auto`
takes triton while gradients are off, else spconv, each where it is installed and fits, unless
`torch.use_deterministic_algorithms` is on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from perception.errors import PerceptionError
from perception.networks.layers.sparse_tensor import BACKENDS, Backend, Rulebook, SparseTensor, triple
from perception.networks.layers.sparse_torch import Triple

__all__ = [
    "Backend",
    "SparseConv3d",
    "SparseInverseConv3d",
    "SparseModule",
    "SparseSequential",
    "SparseTensor",
    "SubMConv3d",
    "krsc_from_rsck",
    "krsc_from_rskc",
    "pointwise",
]

Padding = int | Triple | tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Zeros around the grid: one number, one per axis (z, y, x), or (before, after) per axis."""


class SparseModule(nn.Module):
    """A module from SparseTensor to SparseTensor. Blocks that hold sparse convolutions derive from it."""


class SparseSequential(nn.Sequential, SparseModule):
    """`nn.Sequential` over a SparseTensor: a SparseModule gets the tensor, any other module its features."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        for module in self:
            x = module(x) if isinstance(module, SparseModule) else x.map(module)
        return x


class _Convolution(SparseModule):
    """Parameters of a sparse convolution: `weight` (out, kz, ky, kx, in) and `bias` (out,) or None."""

    bias: nn.Parameter | None

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Triple, bias: bool) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = triple(kernel_size, "kernel_size", least=1)
        self.weight = nn.Parameter(torch.empty(out_channels, *self.kernel_size, in_channels))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(inputs of one output), the default of torch's and spconv's convolutions."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}{bias}"

    def _features(self, x: SparseTensor, kernel_map: Any, inverse: bool = False) -> Tensor:
        """The convolved features; `kernel_map` None is the 1x1x1 convolution."""
        features: Tensor = x.features
        weight: Tensor = self.weight
        if features.shape[1] != self.in_channels:
            raise PerceptionError(
                f"{type(self).__name__}: {features.shape[1]} channels of features for in_channels={self.in_channels}",
                "match in_channels to the layer before",
            )
        device = features.device.type
        if torch.is_autocast_enabled(device):
            features, weight = (t.to(torch.get_autocast_dtype(device)) for t in (features, weight))
        if features.dtype != weight.dtype:
            raise PerceptionError(
                f"{type(self).__name__}: {features.dtype} features for a {weight.dtype} weight",
                "convert one of them, or run under torch.autocast",
            )
        with torch.autocast(device, enabled=False):
            if kernel_map is None:
                out = pointwise(features, weight)
            else:
                out = BACKENDS[x.backend].convolve(features, weight, kernel_map, inverse)
            return out if self.bias is None else out + self.bias.to(out.dtype)


class SubMConv3d(_Convolution):
    """Submanifold convolution: outputs at the input's sites alone, centred on them (Graham et al. 2018).

    Args:
        kernel_size: odd, one number or (z, y, x). Padding is implied: half the kernel times the dilation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        *,
        dilation: int | Triple = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias)
        self.dilation = triple(dilation, "dilation", least=1)
        if not all(k % 2 for k in self.kernel_size):
            raise PerceptionError(
                f"SubMConv3d: kernel_size {self.kernel_size} is even on an axis and has no centre",
                "use odd sizes, or SparseConv3d",
            )

    def forward(self, x: SparseTensor) -> SparseTensor:
        kernel_map = None if self.kernel_size == (1, 1, 1) else x.sites.submanifold(self.kernel_size, self.dilation)
        return x.with_features(self._features(x, kernel_map))


class SparseConv3d(_Convolution):
    """Convolution with outputs at every site that an active input reaches.

    Args:
        kernel_size, stride, dilation: one number or (z, y, x).
        padding: see `Padding`.
        indice_key: a name under which `SparseInverseConv3d` finds this convolution's sites.

    On each axis the output's size is `(size + before + after - dilation * (kernel_size - 1) - 1) // stride + 1`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        *,
        stride: int | Triple = 1,
        padding: Padding = 0,
        dilation: int | Triple = 1,
        bias: bool = True,
        indice_key: str | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias)
        self.stride = triple(stride, "stride", least=1)
        self.dilation = triple(dilation, "dilation", least=1)
        self.padding_before, self.padding_after = _both_ends(padding)
        self.indice_key = indice_key
        self.pointwise = self.kernel_size == self.stride == (1, 1, 1)
        if self.pointwise and any(self.padding_before + self.padding_after):
            raise PerceptionError(
                f"SparseConv3d: a 1x1x1 kernel of stride 1 with padding={padding}",
                "drop the padding, as spconv asks too",
            )

    def extra_repr(self) -> str:
        padding = f"padding={tuple(zip(self.padding_before, self.padding_after, strict=True))}"
        return f"{super().extra_repr()}, stride={self.stride}, {padding}, dilation={self.dilation}"

    def out_shape(self, shape: Triple) -> Triple:
        """The size (z, y, x) of the grid that comes of one of size `shape`."""
        sizes = [
            (size + before + after - d * (k - 1) - 1) // s + 1
            for size, before, after, d, k, s in zip(
                shape,
                self.padding_before,
                self.padding_after,
                self.dilation,
                self.kernel_size,
                self.stride,
                strict=True,
            )
        ]
        if min(sizes) < 1:
            raise PerceptionError(
                f"SparseConv3d({self.extra_repr()}): an input of {shape} leaves an output of {tuple(sizes)}",
                "enlarge the grid or the padding",
            )
        return sizes[0], sizes[1], sizes[2]

    def forward(self, x: SparseTensor) -> SparseTensor:
        if self.pointwise:
            return x.with_features(self._features(x, None))
        kernel_map, sites = x.sites.strided(
            self.out_shape(x.spatial_shape), self.kernel_size, self.stride, self.padding_before, self.dilation
        )
        rulebooks = x.rulebooks
        if self.indice_key is not None:
            rulebooks = {**rulebooks, self.indice_key: Rulebook(kernel_map, self.kernel_size, x.sites, sites)}
        return SparseTensor.at(sites, self._features(x, kernel_map), rulebooks)


class SparseInverseConv3d(_Convolution):
    """From the sites that a `SparseConv3d` gave back to those it was given: its transpose, at the latter alone.

    Args:
        kernel_size: that of the convolution undone.
        indice_key: its name.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Triple, *, indice_key: str, bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias)
        self.indice_key = indice_key

    def forward(self, x: SparseTensor) -> SparseTensor:
        rulebook = x.rulebooks.get(self.indice_key)
        if rulebook is None:
            raise PerceptionError(
                f"SparseInverseConv3d: no convolution with indice_key={self.indice_key!r} led here",
                f"known keys: {', '.join(x.rulebooks) or 'none'}; give the SparseConv3d to be undone that indice_key",
            )
        if rulebook.outputs is not x.sites or rulebook.kernel_size != self.kernel_size:
            raise PerceptionError(
                f"SparseInverseConv3d: kernel {self.kernel_size} at {len(x.sites)} sites of {x.spatial_shape} cannot "
                f"undo {self.indice_key!r}: kernel {rulebook.kernel_size}, {len(rulebook.outputs)} sites of "
                f"{rulebook.outputs.spatial_shape}",
                "undo it with the same kernel, at the sites it gave",
            )
        return SparseTensor.at(rulebook.inputs, self._features(x, rulebook.kernel_map, inverse=True), x.rulebooks)


def pointwise(features: Tensor, weight: Tensor) -> Tensor:
    """A 1x1x1 convolution of stride 1 as spconv computes it: (V, in) by `weight` (out, 1, 1, 1, in) to (V, out).

    spconv 2.x reads the buffer of this weight as an (in, out) matrix, not as the (out, in) that its layout says: a
    weight of C to C channels acts transposed. Checkpoints were trained so (spconv issue 450): every backend keeps it.
    """
    out_channels, *_, in_channels = weight.shape
    return features @ weight.reshape(in_channels, out_channels)


def krsc_from_rsck(weight: Tensor) -> Tensor:
    """spconv 1.x, mmcv and mmdet3d's (kz, ky, kx, in, out) as (out, kz, ky, kx, in).

    A 1x1x1 kernel keeps its buffer, an (in, out) matrix, which is how `pointwise` reads it.
    """
    if weight.shape[:3] == (1, 1, 1):
        return weight.reshape(weight.shape[4], 1, 1, 1, weight.shape[3])
    return weight.permute(4, 0, 1, 2, 3).contiguous()


def krsc_from_rskc(weight: Tensor) -> Tensor:
    """spconv 2.0 and 2.1's native (kz, ky, kx, out, in) as (out, kz, ky, kx, in)."""
    return weight.permute(3, 0, 1, 2, 4).contiguous()


def _both_ends(padding: Padding) -> tuple[Triple, Triple]:
    """Padding before and after each axis."""
    if isinstance(padding, int):
        padding = (padding,) * 3
    ends = [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
    if any(len(end) != 2 for end in ends):
        raise PerceptionError(
            f"sparse convolution: padding {padding!r}", "give one integer, or three of integers and (before, after)"
        )
    before, after = zip(*ends, strict=True)
    return triple(before, "padding", least=0), triple(after, "padding", least=0)
