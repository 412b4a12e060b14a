"""A function of tensors replayed as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_WARM_UP = 3  # runs before a capture: libraries choose algorithms and allocate their workspaces then

_CAPTURING = threading.Lock()
"""A process captures one graph at a time: a capture waits for the device, which another one must not see, and changes
settings of cuDNN that all threads share."""


@dataclass(frozen=True)
class _Captured(Generic[T]):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: T


class CudaGraph(Generic[T]):
    """A function as a graph, captured anew when it is called with other shapes.

    The function must be of fixed shapes inside, must not wait for the device, and must keep what it refers to beside
    its arguments where it is. Its result is overwritten by the next call.

    The graph is captured on a stream of its own, since graphs that were captured on one stream share a workspace of
    cuBLAS, and may neither run side by side nor outlive each other.
    """

    def __init__(self) -> None:
        self._captured: dict[Hashable, _Captured[T]] = {}  # none or one
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, run: Callable[..., T], *inputs: Tensor, **fixed: Hashable) -> T:
        """What `run(*inputs, **fixed)` gives, on the current stream.

        Args:
            run: the same function at every call, of CUDA tensors on the current device.
            inputs: copied to where the graph reads them. With other shapes, types or strides it is another graph.
            fixed: part of what is captured: with other values it is another graph. Tensors among them are read where
                they are; they are told apart by identity and kept alive.
        """
        key = (tuple((t.shape, t.dtype, t.stride()) for t in inputs), tuple(fixed.items()))
        captured = self._captured.get(key)
        if captured is None:
            with _CAPTURING:
                captured = self._captured[key] = self._capture(run, inputs, fixed)
        for mine, given in zip(captured.inputs, inputs, strict=True):
            mine.copy_(given)
        captured.graph.replay()
        return captured.result

    def _capture(self, run: Callable[..., T], inputs: tuple[Tensor, ...], fixed: dict[str, Any]) -> _Captured[T]:
        torch.cuda.synchronize()  # the graph before may still run
        self._captured.clear()  # its memory serves the next one
        here = torch.cuda.current_stream()
        if self._stream is None:
            self._stream = torch.cuda.Stream(here.device)
        mine = tuple(t.clone(memory_format=torch.preserve_format) for t in inputs)
        self._stream.wait_stream(here)
        with _measured_algorithms():
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UP):
                    run(*mine, **fixed)
            here.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = run(*mine, **fixed)
        return _Captured(graph, mine, result)


def _measured_algorithms() -> AbstractContextManager[None]:
    """cuDNN takes the algorithms that it measures to be fastest: shapes are fixed, so that it measures once."""
    cudnn = torch.backends.cudnn
    flags: AbstractContextManager[None] = cudnn.flags(
        enabled=cudnn.enabled, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=cudnn.allow_tf32
    )
    return flags
