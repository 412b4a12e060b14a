"""Functions of tensors replayed as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_WARM_UP = 3  # runs before a capture: libraries choose algorithms and allocate their workspaces then


class _Captured(NamedTuple, Generic[T]):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: T


class CudaGraphs(Generic[T]):
    """A function, captured once for every set of shapes that it is called with.

    The function must be of fixed shapes inside, must not wait for the device, and must keep what it refers to beside
    its arguments where it is. Its result is overwritten by the next call of the same shapes.

    Args:
        run: the function of CUDA tensors. Keyword arguments are part of what is captured; tensors in tuples among them
            are read where they are, each time.
        capacity: how many graphs are kept; the one used longest ago makes room.
    """

    def __init__(self, run: Callable[..., T], capacity: int = 8) -> None:
        self._run = run
        self._capacity = capacity
        self._captured: OrderedDict[Hashable, _Captured[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._captured)

    def __call__(self, *inputs: Tensor, **fixed: Hashable) -> T:
        key = (tuple((t.shape, t.dtype, t.stride()) for t in inputs), tuple(fixed.items()))
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(inputs, fixed)
            if len(self._captured) > self._capacity:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        for mine, given in zip(captured.inputs, inputs, strict=True):
            mine.copy_(given)
        captured.graph.replay()
        return captured.result

    def _capture(self, inputs: tuple[Tensor, ...], fixed: dict[str, Hashable]) -> _Captured[T]:
        mine = tuple(t.clone(memory_format=torch.preserve_format) for t in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with _measured_algorithms():
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._run(*mine, **fixed)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = self._run(*mine, **fixed)
        return _Captured(graph, mine, result)


def _measured_algorithms() -> AbstractContextManager[None]:
    """cuDNN takes the algorithms that it measures to be fastest: shapes are fixed, so that it measures once."""
    cudnn = torch.backends.cudnn
    flags: AbstractContextManager[None] = cudnn.flags(
        enabled=cudnn.enabled, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=cudnn.allow_tf32
    )
    return flags
