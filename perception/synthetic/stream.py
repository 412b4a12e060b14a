"""The city as an endless source of training samples, without files.

`fresh` simulates every sample when it is asked for, in worker processes; on a GPU each of them measures several key
frames of its scene in one cast. `Replay` keeps the latest samples in memory and draws from them, for training that is
faster than the simulation; a callable augments what is drawn. Samples are numpy, as from any data set: a network's
`encode` takes them to its device.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from perception.errors import PerceptionError
from perception.synthetic.city import City, CityConfig
from perception.types import Sample, Truth

Pair = tuple[Sample, Truth]
Augment = Callable[[Sample, Truth], Pair]


def fresh(city: CityConfig, workers: int = 0, together: int = 1) -> Iterator[Pair]:
    """Samples with truth, for ever: the city's scenes in turn and again, each one's key frames in an order by its seed.

    The same every time for the same arguments. Worker w simulates scenes w, w + workers, ...; their samples are
    interleaved, so that neighbours in the stream are of different streets. Each worker holds two scenes, and up to
    2 * `together` samples wait for their turn in shared memory.

    Args:
        city: `city.scenes` is the number of different streets.
        workers: processes that simulate; 0 is this one. They are ended when the iterator is closed or dropped.
        together: key frames of one scene that are measured at once: a GPU is faster with 4 to 8, a CPU is not.

    Raises what a worker raised, with its message; RuntimeError when one was killed.
    """
    stream = _Stream(city, together)
    if not workers:
        yield from stream.pairs(0, 1)
        return
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, prefetch_factor=2 * together, multiprocessing_context="spawn"
    )
    for packed in loader:
        yield packed.open()


class _Stream(IterableDataset):
    """What a worker of the loader iterates over."""

    def __init__(self, city: CityConfig, together: int) -> None:
        self.city, self.together = city, together

    def __iter__(self) -> Iterator[_Packed]:
        worker = get_worker_info()
        assert worker is not None
        for pair in self.pairs(worker.id, worker.num_workers):
            yield _Packed.of(pair)

    def pairs(self, first: int, step: int) -> Iterator[Pair]:
        """Of scenes first, first + step, ..., counted on for ever."""
        for n in itertools.count(first, step):
            seed = self.city.seed + n % self.city.scenes
            scene = City(self.city.model_copy(update={"seed": seed, "scenes": 1}))
            order = np.random.default_rng([self.city.seed, n]).permutation(self.city.key_frames).tolist()
            for k in range(0, len(order), self.together):
                yield from scene.key_frames(order[k : k + self.together])


@dataclass(frozen=True)
class _Packed:
    """A pair on its way between processes: its arrays are in `data`, which the loader passes in shared memory."""

    pickled: bytes
    bounds: list[tuple[int, int]]
    data: Tensor

    @staticmethod
    def of(pair: Pair) -> _Packed:
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(pair, protocol=5, buffer_callback=buffers.append)
        arrays = [np.frombuffer(b.raw(), np.uint8) for b in buffers]
        ends = np.cumsum([len(a) + -len(a) % 16 for a in arrays])  # aligned for any type
        bounds = [(int(end) - len(a) - -len(a) % 16, len(a)) for end, a in zip(ends, arrays, strict=True)]
        data = np.empty(int(ends[-1]), np.uint8)
        for (start, size), array in zip(bounds, arrays, strict=True):
            data[start : start + size] = array
        return _Packed(pickled, bounds, torch.from_numpy(data))

    def open(self) -> Pair:
        """The pair, on this memory: nothing is copied."""
        data = self.data.numpy().data
        return pickle.loads(self.pickled, buffers=[data[a : a + n] for a, n in self.bounds])  # noqa: S301 (our worker's)


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
