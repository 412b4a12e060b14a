"""The city as an endless source of training samples, without files.

`fresh` simulates every sample when it is asked for, in worker processes; on a GPU each of them measures several key
frames of its scene in one cast. `Replay` keeps the latest samples in memory and draws from them, for training that is
faster than the simulation; a callable augments what is drawn. Samples are numpy, as from any data set: a network's
`encode` takes them to its device.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np
import torch

from perception.errors import PerceptionError
from perception.synthetic.city import City, CityConfig
from perception.types import Sample, Truth

Pair = tuple[Sample, Truth]
Augment = Callable[[Sample, Truth], Pair]


def fresh(city: CityConfig, workers: int = 0, together: int = 1) -> Iterator[Pair]:
    """Samples with truth, for ever: the city's scenes in turn and again, each one's key frames in an order by its seed.

    The same every time for the same arguments. Worker w simulates scenes w, w + workers, ...; their samples take
    turns, so that neighbours in the stream are of different streets. A worker holds at most 3 `together` samples.

    Args:
        city: `city.scenes` is the number of different streets.
        workers: processes that simulate; 0 is this one. They are ended when the iterator is closed or dropped.
        together: key frames of one scene that are measured at once: a GPU is faster with 4 to 8, a CPU is not.

    Raises:
        PerceptionError: a worker failed, with its message, or was killed.
    """
    if not workers:
        yield from pairs(city, together, 0, 1)
        return
    context = multiprocessing.get_context("spawn")  # a fork has no CUDA
    pipes, processes = [], []
    try:
        for w in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(city, together, w, workers, sender), daemon=True)
            process.start()
            sender.close()  # the worker's alone, so that its end is seen here
            pipes.append(receiver)
            processes.append(process)
        for w in itertools.cycle(range(workers)):
            yield _receive(pipes[w], processes[w], w)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def pairs(city: CityConfig, together: int, first: int, step: int, per_scene: int | None = None) -> Iterator[Pair]:
    """Of scenes first, first + step, ..., counted on for ever; of each, `per_scene` key frames or all of them."""
    for n in itertools.count(first, step):
        scene = City(city.model_copy(update={"seed": city.seed + n % city.scenes, "scenes": 1}))
        order = np.random.default_rng([city.seed, n]).permutation(city.key_frames)[:per_scene].tolist()
        for k in range(0, len(order), together):
            yield from scene.key_frames(order[k : k + together])


def _work(city: CityConfig, together: int, first: int, step: int, pipe: Connection) -> None:
    """A worker's life: a thread sends what is made; the next samples are made while these wait for their turn."""
    torch.set_num_threads(1)
    made: queue.Queue[Pair | str] = queue.Queue(2 * together)

    def send() -> None:
        try:
            while True:
                item = made.get()
                pipe.send(item)
                if isinstance(item, str):
                    os._exit(1)
        except OSError:  # whom it was made for is gone
            os._exit(0)

    sender = threading.Thread(target=send, name="send")
    sender.start()
    try:
        for pair in pairs(city, together, first, step):
            made.put(pair)
    except Exception as error:
        made.put(f"{error}\n{traceback.format_exc()}")
    sender.join()


def _receive(pipe: Connection, process: multiprocessing.process.BaseProcess, w: int) -> Pair:
    try:
        item = pipe.recv()
    except (EOFError, OSError):
        process.join()
        raise PerceptionError(
            f"city: worker {w} ended unexpectedly, exit code {process.exitcode}",
            "a negative code is the signal that killed it: -9 is most often for want of memory, take fewer workers",
        ) from None
    if isinstance(item, str):
        message, _, trace = item.partition("\nTraceback")
        raise PerceptionError(f"city: worker {w} failed: {message}", f"where:\nTraceback{trace}")
    return item


class Replay:
    """An endless iterator over a pool of the latest `size` pairs of a stream, shuffled anew each time it was all drawn.

    Drawing begins when the pool is full. A thread fills it and, with `refresh`, goes on for ever, each new pair in the
    oldest one's place; without, it ends there, and so do the stream's workers: then the same seed draws the same pairs
    in the same order. Use it as a context manager, or `close` it.

    Args:
        stream: of `fresh`, or of anything else that gives pairs.
        augment: applied to each pair when it is drawn.

    Iterating raises PerceptionError, from its cause, when the stream failed or ended before the pool was full.
    """

    def __init__(
        self, stream: Iterator[Pair], size: int, augment: Augment | None = None, seed: int = 0, refresh: bool = True
    ) -> None:
        if size < 1:
            raise ValueError(f"Replay: size must be at least 1, got {size}")
        self.size, self._augment, self._refresh = size, augment, refresh
        self._rng, self._order = np.random.default_rng(seed), np.zeros(0, np.int64)
        self._pool: list[Pair] = []
        self._error: BaseException | None = None
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._fill, args=(stream,), name="replay", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Pair]:
        return self

    def __next__(self) -> Pair:
        with self._changed:
            self._changed.wait_for(lambda: len(self._pool) == self.size or self._error is not None)
            if self._error is not None:
                raise PerceptionError(
                    f"replay: the stream failed with {len(self._pool)} of {self.size} samples: {self._error}",
                    "mend its cause, or replay without refresh",
                ) from self._error
            if not len(self._order):
                self._order = self._rng.permutation(self.size)
            pair, self._order = self._pool[self._order[0]], self._order[1:]
        return pair if self._augment is None else self._augment(*pair)

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, and with it the stream's workers, once the sample under way has come."""
        self._closed = True
        self._thread.join()

    def _fill(self, stream: Iterator[Pair]) -> None:
        try:
            for count, pair in enumerate(stream):
                with self._changed:
                    if count < self.size:
                        self._pool.append(pair)
                    else:
                        self._pool[count % self.size] = pair
                    self._changed.notify_all()
                if self._closed or (count + 1 == self.size and not self._refresh):
                    return
            raise PerceptionError("the stream ended", "give an endless one, or a smaller pool")
        except BaseException as error:  # told to whoever draws
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            if hasattr(stream, "close"):
                stream.close()
