"""Batches encoded before their turn: while one is learnt from, a thread makes tensors and targets of the next ones.

On a GPU the thread works on a stream of its own, and the stream that learns waits for it by an event, not on the host.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from perception.errors import PerceptionError
from perception.synthetic.stream import Pair

_AHEAD = 2
"""Batches that are encoded before their turn."""


class Prefetcher:
    """Inputs and targets of one batch after another; what the thread raises is raised where its batch is asked for.

    Args:
        network: encodes; a `loop.Trainable`.
        batches: without end; closed with this.
        device: of the network.
    """

    def __init__(self, network: nn.Module, batches: Iterator[list[Pair]], device: torch.device) -> None:
        self._network, self._batches, self._device = network, batches, device
        self._ready: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="encode", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # a thread that waits for a place in the queue gets one
                self._ready.get(timeout=0.05)

    def __next__(self) -> tuple[Any, Any]:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        encoded, made = item
        if made is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(made)
            _keep_for(encoded, here)
        return encoded

    def _work(self) -> None:
        try:
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            with torch.cuda.stream(stream):
                for batch in self._batches:
                    samples, truths = zip(*batch, strict=True)
                    with torch.no_grad():
                        encoded = self._network.encode(samples), self._network.encode_targets(samples, truths)  # type: ignore[operator]
                    self._ready.put((encoded, stream.record_event() if stream else None))
                    if self._closed.is_set():
                        return
            raise PerceptionError("training: the data ended", "give batches without end")
        except BaseException as error:  # told to whoever waits
            self._ready.put(error)
        finally:
            if hasattr(self._batches, "close"):
                self._batches.close()


def _keep_for(values: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that the tensors in nested tuples are used on a stream beside the one that made them."""
    if isinstance(values, Tensor):
        if values.is_cuda:
            values.record_stream(stream)
    elif isinstance(values, tuple | list):
        for value in values:
            _keep_for(value, stream)
