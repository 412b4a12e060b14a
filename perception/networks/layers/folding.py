"""Fewer passes over the features at inference: norms folded into convolutions, and cuDNN's kernels with a ReLU."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.networks.layers.sparse import SparseConv3d, SubMConv3d

_OUT_AXIS = {nn.Conv1d: 0, nn.Conv2d: 0, nn.ConvTranspose2d: 1, SubMConv3d: 0, SparseConv3d: 0}
"""Which axis of the weight counts output channels."""


@torch.no_grad()
def fold_norms(module: nn.Module) -> None:
    """Fold, in place, every batch norm that was registered right after a convolution.

    That a norm registered next is applied next is how all networks here are written; `torch.nn.Identity` takes its
    place. The module has to be in evaluation mode, and gives the same values up to rounding.

    Raises:
        ValueError: the module is in training mode.
    """
    if module.training:
        raise ValueError(
            "fold_norms: the module is in training mode, whose norms follow the batch; call .eval() before"
        )
    for parent in list(module.modules()):
        for (_, conv), (name, norm) in itertools.pairwise(list(parent.named_children())):
            axis = next((axis for kind, axis in _OUT_AXIS.items() if isinstance(conv, kind)), None)
            if axis is not None and isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                _fold(conv, norm, axis)
                setattr(parent, name, nn.Identity())


def _fold(conv: Any, norm: nn.BatchNorm1d | nn.BatchNorm2d, axis: int) -> None:
    """y = (w x + b - mean) * scale + shift, as one convolution."""
    weight: Tensor = conv.weight
    bias: Tensor | None = conv.bias
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    along = [1] * weight.ndim
    along[axis] = -1
    conv.weight = nn.Parameter(weight * scale.view(along), requires_grad=False)
    before = norm.running_mean if bias is None else norm.running_mean - bias
    conv.bias = nn.Parameter(norm.bias - before * scale, requires_grad=False)


def convolve_relu(conv: nn.Conv2d, norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(conv(x)) + residual), by one kernel on a GPU in half precision where the norm was folded."""
    if not isinstance(norm, nn.Identity) or not _in_one_kernel(x, conv):
        out = norm(conv(x))
        return F.relu(out if residual is None else out + residual)
    geometry: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)
    fused: Tensor
    if residual is None:
        fused = torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *geometry)
    else:
        fused = torch.cudnn_convolution_add_relu(x, conv.weight, residual, 1.0, conv.bias, *geometry)
    return fused


def _in_one_kernel(x: Tensor, conv: nn.Conv2d) -> bool:
    half = x.dtype in (torch.float16, torch.bfloat16) and x.dtype == conv.weight.dtype
    return x.is_cuda and half and conv.bias is not None and torch.version.hip is None and not torch.is_grad_enabled()
