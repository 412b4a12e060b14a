"""Samples for training: in an order that a seed and a step number tell, augmented by worker processes.

What step n sees depends on the configuration and n alone, so that a training taken up at step n of a data set goes on
as if it had never stopped. The city has no such places: taken up again, it goes on with other streets.
"""

from __future__ import annotations

import atexit
import itertools
import os
import pickle
import signal
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from perception.augment import AugmentConfig, augment
from perception.errors import DataError
from perception.synthetic.city import CityConfig
from perception.synthetic.stream import Pair, pairs
from perception.training.config import StreamConfig, TrainingConfig
from perception.training.distributed import Place
from perception.training.pool import SharedPool
from perception.types import Dataset, Needs, PointCloud, Sample, Truth

Draw = tuple[int, int]
"""Which sample, and the number of the draw, which seeds its augmentation."""


_ALIGNMENT = 64


class Packed:
    """A pair on its way between processes: what is large lies in one block of shared memory.

    A worker's numpy arrays would otherwise be copied through a pipe, which is slower than the training.
    """

    def __init__(self, pair: Pair) -> None:
        buffers: list[pickle.PickleBuffer] = []
        self._header = pickle.dumps(pair, protocol=5, buffer_callback=buffers.append)
        raw = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
        # Every array begins where its numbers are aligned.
        ends = np.cumsum([0, *(-(-len(view) // _ALIGNMENT) * _ALIGNMENT for view in raw)]).tolist()
        self._places = [(start, start + len(view)) for start, view in zip(ends, raw, strict=False)]
        block = np.empty(ends[-1], np.uint8)
        for (start, end), view in zip(self._places, raw, strict=True):
            block[start:end] = view
        self._block = torch.from_numpy(block)

    def open(self) -> Pair:
        """The pair, its arrays being views of the block."""
        view = self._block.numpy().data
        pair: Pair = pickle.loads(self._header, buffers=[view[a:b] for a, b in self._places])  # noqa: S301 - our own
        return pair


def trimmed(sample: Sample, truth: Truth, needs: Needs) -> Pair:
    """Only what a network reads, and boxes and occupancy of the truth: less to keep and to hand on.

    A cloud that it does not read keeps its place without its points: `augment` turns the world about the LiDAR.
    """
    found = replace(
        sample,
        lidars={role: _trimmed_cloud(cloud, needs.lidar) for role, cloud in sample.lidars.items()},
        radars={role: _trimmed_cloud(cloud, needs.radar) for role, cloud in sample.radars.items()},
        cameras={role: image for role, image in sample.cameras.items() if role in needs.cameras},
    )
    return found, Truth(truth.boxes, truth.occupancy)


def _trimmed_cloud(cloud: PointCloud, fields: tuple[str, ...] | None) -> PointCloud:
    if fields is None:
        return PointCloud(cloud.xyz[:0], {}, cloud.ego_from_sensor, cloud.stamp_ns)
    return replace(cloud, fields={n: v for n, v in cloud.fields.items() if n in fields or n == "time_lag"})


class Augmented(TorchDataset):
    """The samples of a data set by `Draw`, as `Packed` pairs."""

    def __init__(self, dataset: Dataset, needs: Needs, config: AugmentConfig | None, seed: int) -> None:
        self._dataset, self._needs, self._config, self._seed = dataset, needs, config, seed

    def __getitem__(self, draw: Draw) -> Packed:
        index, number = draw
        truth = self._dataset.truth(index)
        if truth is None:
            raise DataError(
                f"sample {self._dataset.tokens[index]} has no truth to learn from", "train on a split that has it"
            )
        return _packed(trimmed(self._dataset[index], truth, self._needs), self._config, [self._seed, number])


def _packed(pair: Pair, config: AugmentConfig | None, seed: Sequence[int]) -> Packed:
    return Packed(pair if config is None else augment(*pair, config, np.random.default_rng(seed)))


class Order:
    """Draws of a process without end: epoch by epoch, each shuffled by seed and epoch, the processes taking turns.

    Args:
        groups: the samples that each draw of a class may take (`class_groups`), or None for all samples alike.
        size: samples of the data set.
        first: how many draws this process has made before.
    """

    def __init__(self, size: int, groups: Sequence[Sequence[int]] | None, seed: int, place: Place, first: int) -> None:
        self._size, self._groups, self._seed, self._place, self._first = size, groups, seed, place, first

    def __iter__(self) -> Iterator[Draw]:
        length = self._size if self._groups is None else sum(map(len, self._groups))
        number = self._first * self._place.count + self._place.rank
        epoch, order = -1, np.zeros(0, np.int64)
        while True:
            if number // length != epoch:
                epoch = number // length
                order = self._shuffled(epoch)
            yield int(order[number % length]), number
            number += self._place.count

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        if self._groups is None:
            return rng.permutation(self._size)
        # As many draws as samples are in the groups together, every class having the same number of them.
        total = sum(map(len, self._groups))
        share = np.diff(np.linspace(0, total, len(self._groups) + 1).astype(int))
        drawn = [rng.choice(group, n) for group, n in zip(self._groups, share, strict=True)]
        return rng.permutation(np.concatenate(drawn))


def class_groups(dataset: Dataset, classes: Collection[str] | None = None) -> list[list[int]]:
    """For each class that the data set's truth has: the samples with a box of it, with a LiDAR point where counted.

    Args:
        classes: only these; None takes all.

    Raises:
        DataError: there is no such box.
    """
    groups: dict[str, list[int]] = {}
    for i in range(len(dataset)):
        truth = dataset.truth(i)
        if truth is None or truth.boxes is None:
            continue
        boxes = truth.boxes
        label = boxes.label if boxes.num_points is None else boxes.label[boxes.num_points > 0]
        for name in (boxes.classes[k] for k in np.unique(label)):
            if classes is None or name in classes:
                groups.setdefault(name, []).append(i)
    if not groups:
        which = "" if classes is None else f" of {', '.join(classes)}"
        raise DataError(
            f"class_balanced: no sample of the data set has a box{which}", "train on a split that has such truth"
        )
    return [groups[name] for name in sorted(groups)]


class CityStream(IterableDataset):
    """The city without end, as `Packed` pairs: each worker simulates its own streets and draws from its own pool.

    A worker simulates `together` key frames, keeps them (in the oldest ones' places), then hands on `reuse` times as
    many, drawn at random and augmented anew. The same for the same seeds, number of processes and workers.
    """

    def __init__(
        self,
        city: CityConfig,
        needs: Needs,
        stream: StreamConfig,
        augment: AugmentConfig | None,
        seed: int,
        place: Place,
    ) -> None:
        self._city, self._needs, self._stream = city, needs, stream
        self._augment, self._seed, self._place = augment, seed, place

    def __iter__(self) -> Iterator[Packed]:
        worker = get_worker_info()
        w, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            torch.set_num_threads(1)
        first, step = self._place.rank * workers + w, self._place.count * workers
        rng = np.random.default_rng([self._seed, first])
        drawn = self._own(first, step, workers, rng) if self._stream.folder is None else self._shared(first, rng)
        for pair in drawn:
            yield _packed(pair, self._augment, rng.integers(2**31, size=2).tolist())

    def _own(self, first: int, step: int, workers: int, rng: np.random.Generator) -> Iterator[Pair]:
        """Draws from a pool of this worker's own."""
        size = max(1, self._stream.pool // workers)
        pool: list[Pair] = []
        source = pairs(self._city, self._stream.together, first, step, self._stream.per_scene)
        count = 0
        while True:
            if self._stream.refresh or len(pool) < size:
                for _ in range(self._stream.together):
                    pair = trimmed(*next(source), self._needs)
                    if len(pool) < size:
                        pool.append(pair)
                    else:
                        pool[count % size] = pair
                    count += 1
            for _ in range(self._stream.reuse * self._stream.together):
                yield pool[rng.integers(len(pool))]

    def _shared(self, first: int, rng: np.random.Generator) -> Iterator[Pair]:
        """Draws from the folder, to which this worker adds the streets that it is the first to claim."""
        assert self._stream.folder is not None
        pool = SharedPool(self._stream.folder)
        streets = -(-self._stream.pool // self._stream.per_scene)
        for street in np.roll(np.arange(streets), -first).tolist():  # workers begin at different places
            if not pool.claim(street):
                continue
            made = pairs(self._city, self._stream.together, street, 1, self._stream.per_scene)
            for i, pair in enumerate(itertools.islice(made, self._stream.per_scene), 1):
                pool.add(_for_any(*pair))
                if i % self._stream.together == 0:
                    pool.refresh()
                    for _ in range(self._stream.reuse * self._stream.together):
                        yield trimmed(*pool.draw(rng), self._needs)
        for count in itertools.count():
            if count % 100 == 0:
                pool.refresh()  # others may still be at work
            yield trimmed(*pool.draw(rng), self._needs)


def _for_any(sample: Sample, truth: Truth) -> Pair:
    """Trimmed to what any network may read: trainings that share a pool may be of different ones."""
    radar = {name for cloud in sample.radars.values() for name in cloud.fields}
    return trimmed(sample, truth, Needs(("intensity",), tuple(radar), tuple(sample.cameras)))


def batches(
    config: TrainingConfig,
    dataset: Dataset | CityConfig,
    needs: Needs,
    place: Place,
    first_step: int,
    classes: Collection[str] | None = None,
) -> Iterator[list[Pair]]:
    """Batches of this process without end, from a step on; the network's classes, where known, are what is balanced."""
    if isinstance(dataset, CityConfig):
        city = dataset.model_copy(update={"seed": dataset.seed + first_step})
        source: Any = CityStream(city, needs, config.stream, config.augment, config.seed + first_step, place)
        order = None
    else:
        groups = class_groups(dataset, classes) if config.class_balanced else None
        order = Order(len(dataset), groups, config.seed, place, first_step * config.batch_size)
        source = Augmented(dataset, needs, config.augment, config.seed)
    loader = DataLoader(
        source,
        batch_size=None,  # single samples travel; the training process puts batches together
        sampler=order,
        num_workers=config.workers,
        multiprocessing_context="spawn" if config.workers else None,  # a fork has no CUDA
        prefetch_factor=8 if config.workers else None,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else the loader's seed is drawn from dropout's
        worker_init_fn=_begin_worker if config.workers else None,
    )
    batch: list[Pair] = []
    for packed in loader:
        batch.append(packed.open())
        if len(batch) == config.batch_size:
            yield batch
            batch = []


def _as_it_is(packed: Any) -> Any:
    return packed


def _begin_worker(worker: int) -> None:
    """Signals to the whole group are the training process's to answer; it ends its workers when it has.

    A worker then goes at once. The thread that feeds its queue may be inside torch, and an interpreter that ends its
    threads there aborts: "terminate called without an active exception".
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    atexit.register(os._exit, 0)
