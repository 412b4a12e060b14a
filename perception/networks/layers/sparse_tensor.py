"""Features at the active sites of a voxel grid, and the kernel maps found over those sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.errors import PerceptionError
from perception.networks.layers import sparse_spconv, sparse_torch, sparse_triton
from perception.networks.layers.sparse_torch import Triple, site_keys

Backend = Literal["auto", "torch", "spconv", "triton"]

BACKENDS: dict[str, ModuleType] = {"torch": sparse_torch, "spconv": sparse_spconv, "triton": sparse_triton}
"""Each offers `submanifold_map`, `strided_map` and `convolve`."""


def choose_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> str:
    """The backend's name, `auto` resolved. PerceptionError if one is asked for where it is absent or wrong."""
    if backend == "auto":
        if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
            return "torch"
        if not torch.is_grad_enabled() and dtype in sparse_triton.DTYPES and sparse_triton.installed():
            return "triton"
        suits = dtype in (torch.float32, torch.float16) and sparse_spconv.installed_for_cuda()
        return "spconv" if suits else "torch"
    if backend not in BACKENDS:
        raise PerceptionError(
            f"sparse convolution: unknown backend {backend!r}", "use 'auto', 'torch', 'spconv' or 'triton'"
        )
    if backend != "torch":
        BACKENDS[backend].check_usable(device, dtype)
    return backend


class Sites:
    """The active sites of a voxel grid, with the kernel maps found over them so far.

    Attributes:
        indices: (V, 4) int32 (batch, z, y, x).
        spatial_shape: the grid's size (z, y, x).
        batch_size: grids in the batch.
        backend: "torch", "spconv" or "triton".
        room: None, or of backend "triton", whose host then never waits: rows for the sites of each strided convolution
            to come, one after the other. Rows of `indices` without a site are -1, and their features mean nothing.
        counts: where there is room: () int64 each, how many sites the strided convolutions before reached. Where they
            are more than their room, some were left out, and all that follows is wrong.
    """

    def __init__(
        self,
        indices: Tensor,
        spatial_shape: Triple,
        batch_size: int,
        backend: str,
        room: tuple[int, ...] | None = None,
        counts: tuple[Tensor, ...] = (),
    ) -> None:
        self.indices = indices
        self.spatial_shape = spatial_shape
        self.batch_size = batch_size
        self.backend = backend
        self.room, self.counts = room, counts
        self._submanifold: dict[tuple[Triple, ...], Any] = {}
        self._strided: dict[tuple[Triple, ...], tuple[Any, Sites]] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def submanifold(self, kernel_size: Triple, dilation: Triple) -> Any:
        """The kernel map from these sites to themselves."""
        key = (kernel_size, dilation)
        if key not in self._submanifold:
            find = BACKENDS[self.backend].submanifold_map
            self._submanifold[key] = find(self.indices, self.batch_size, self.spatial_shape, kernel_size, dilation)
        return self._submanifold[key]

    def strided(
        self, out_shape: Triple, kernel_size: Triple, stride: Triple, padding: Triple, dilation: Triple
    ) -> tuple[Any, Sites]:
        """The kernel map from these sites to those they reach, and the latter; `padding` is that before each axis."""
        key = (out_shape, kernel_size, stride, padding, dilation)
        if key not in self._strided:
            of_same_kind = out_shape, self.batch_size, self.backend
            if self.room is None:
                found, indices = BACKENDS[self.backend].strided_map(self.indices, self.batch_size, *key)
                self._strided[key] = found, Sites(indices, *of_same_kind)
            else:
                rows, *left = self.room
                found, indices, count = sparse_triton.padded_strided_map(self.indices, self.batch_size, *key, rows)
                self._strided[key] = found, Sites(indices, *of_same_kind, tuple(left), (*self.counts, count))
        return self._strided[key]


@dataclass(frozen=True, slots=True, eq=False)
class Rulebook:
    """What an inverse convolution needs of the convolution that it undoes."""

    kernel_map: Any
    kernel_size: Triple
    inputs: Sites
    outputs: Sites


class SparseTensor:
    """Features at the active sites of a batch of voxel grids.

    Args:
        features: (V, C) floating point.
        indices: (V, 4) int32 (batch, z, y, x), each site once, in any order, on the features' device.
        spatial_shape: the grid's size (z, y, x).
        batch_size: grids in the batch.
        backend: what computes convolutions of this tensor and of those that come of it; `.backend` tells the choice.

    Raises PerceptionError for shapes or types that do not fit, a site outside the grid or twice, and a backend that
    cannot be used here.
    """

    __slots__ = ("features", "rulebooks", "sites")

    def __init__(
        self, features: Tensor, indices: Tensor, spatial_shape: Triple, batch_size: int, backend: Backend = "auto"
    ) -> None:
        shape = triple(spatial_shape, "spatial_shape", least=1)
        _check_sites(features, indices, shape, batch_size)
        self.features = features
        self.sites = Sites(indices, shape, batch_size, choose_backend(backend, features.device, features.dtype))
        self.rulebooks: Mapping[str, Rulebook] = {}

    @classmethod
    def at(cls, sites: Sites, features: Tensor, rulebooks: Mapping[str, Rulebook]) -> SparseTensor:
        """A tensor over sites that are known to be right: what convolutions return."""
        tensor = cls.__new__(cls)
        tensor.features, tensor.sites, tensor.rulebooks = features, sites, rulebooks
        return tensor

    @property
    def indices(self) -> Tensor:
        """(V, 4) int32 (batch, z, y, x)."""
        return self.sites.indices

    @property
    def spatial_shape(self) -> Triple:
        return self.sites.spatial_shape

    @property
    def batch_size(self) -> int:
        return self.sites.batch_size

    @property
    def backend(self) -> str:
        """ "torch", "spconv" or "triton"."""
        return self.sites.backend

    def __repr__(self) -> str:
        return (
            f"SparseTensor({tuple(self.features.shape)} {self.features.dtype} on {self.features.device}, "
            f"spatial_shape={self.spatial_shape}, batch_size={self.batch_size}, backend={self.backend!r})"
        )

    def with_features(self, features: Tensor) -> SparseTensor:
        """Other features (V, C') at the same sites."""
        if len(features) != len(self.sites):
            raise PerceptionError(
                f"SparseTensor.with_features: {len(features)} rows for {len(self.sites)} sites",
                "give one row of features for each site",
            )
        return SparseTensor.at(self.sites, features, self.rulebooks)

    def map(self, layer: Callable[[Tensor], Tensor]) -> SparseTensor:
        """A layer of (V, C) rows (normalisation, activation, linear) applied to the features.

        A training `nn.BatchNorm1d` that gets fewer than two rows, of which no variance can be told, applies its running
        statistics and leaves them as they are. (`nn.SyncBatchNorm` pools the rows of all ranks and is not concerned.)
        """
        if isinstance(layer, nn.BatchNorm1d) and layer.training and len(self.features) < 2:
            mean, variance = layer.running_mean, layer.running_var
            if mean is not None:
                normalised = F.batch_norm(self.features, mean, variance, layer.weight, layer.bias, eps=layer.eps)
                return self.with_features(normalised)
        return self.with_features(layer(self.features))

    def to_dense(self) -> Tensor:
        """(B, C, Z, Y, X), zero at inactive sites."""
        grid = (self.batch_size, *self.spatial_shape)
        channels, cells = self.features.shape[1], math.prod(grid)
        keys, spare = site_keys(self.indices, self.spatial_shape), 0
        if self.sites.room is not None:
            keys, spare = torch.where(self.indices[:, 0] < 0, cells, keys), 1  # it takes the rows without a site
        dense = self.features.new_zeros(channels, cells + spare)
        dense.index_copy_(1, keys, self.features.t())
        return dense[:, :cells].unflatten(1, grid).transpose(0, 1).contiguous()


def triple(value: int | Triple, name: str, least: int) -> Triple:
    """One number per axis (z, y, x), each at least `least`."""
    values = (value,) * 3 if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != 3 or min(values) < least:
        raise PerceptionError(
            f"sparse convolution: {name} {value!r}", f"give one integer or three (z, y, x), each at least {least}"
        )
    return values


def _check_sites(features: Tensor, indices: Tensor, shape: Triple, batch_size: int) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        raise PerceptionError(
            f"SparseTensor: features {tuple(features.shape)} {features.dtype}", "give (V, C) floating-point features"
        )
    if indices.shape != (len(features), 4) or indices.dtype != torch.int32 or indices.device != features.device:
        raise PerceptionError(
            f"SparseTensor: indices {tuple(indices.shape)} {indices.dtype} on {indices.device} "
            f"for features {tuple(features.shape)} on {features.device}",
            f"give ({len(features)}, 4) int32 indices (batch, z, y, x) on the features' device",
        )
    if batch_size < 1 or batch_size * math.prod(shape) >= 2**62:
        raise PerceptionError(
            f"SparseTensor: batch_size {batch_size} of grids {shape}",
            "give 1 grid or more, of less than 2^62 cells in all",
        )
    outside = ((indices < 0) | (indices >= indices.new_tensor([batch_size, *shape]))).any(1)
    keys = site_keys(indices, shape).sort().values
    repeated = keys[1:] == keys[:-1]
    num_outside, num_repeated = torch.stack([outside.sum(), repeated.sum()]).tolist()
    if num_outside:
        raise PerceptionError(
            f"SparseTensor: {num_outside} of {len(indices)} sites lie outside {batch_size} grids of {shape}; the first "
            f"is {tuple(indices[outside][0].tolist())}",
            "indices are (batch, z, y, x), in that order, and drop points out of range before",
        )
    if num_repeated:
        raise PerceptionError(
            f"SparseTensor: {num_repeated} of {len(indices)} sites repeat another",
            "merge the points of one voxel before",
        )
