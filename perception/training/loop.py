"""The training loop: one process a GPU, bfloat16 where asked for, checkpoints, a clean stop.

While one batch is learnt from, a thread makes tensors and targets of the next ones, on a stream of its own.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from perception.errors import ConfigError, PerceptionError
from perception.synthetic.stream import Pair
from perception.training.checkpoint import (
    Checkpoint,
    generator_states,
    read_checkpoint,
    set_generator_states,
    write_checkpoint,
)
from perception.training.config import TrainingConfig
from perception.training.distributed import Place
from perception.training.optimiser import freeze, make_optimiser, schedule, training_mode
from perception.types import Needs, Sample, Truth
from perception.weights import load_state

_AHEAD = 2
"""Batches that are encoded before their turn."""


class Trainable(Protocol):
    """What a network offers beside being an nn.Module; `Inputs`, `Outputs` and `Targets` are its own."""

    needs: Needs

    def encode(self, samples: Sequence[Sample]) -> Any:
        """Tensors on the network's device."""
        ...

    def encode_targets(self, samples: Sequence[Sample], truths: Sequence[Truth]) -> Any:
        """What `loss` compares with, on the network's device."""
        ...

    def loss(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Weighted terms, whose sum is minimised."""
        ...


class Progress(NamedTuple):
    """A line of the log: means since the line before."""

    step: int
    losses: dict[str, float]
    gradient_norm: float
    lr_factor: float
    samples_per_s: float
    waiting_share: float
    """Of the time, how much was spent waiting for data."""
    memory_gib: float
    overflows: int
    """Steps of the whole run so far that were left out, because something in them was not finite."""

    def __str__(self) -> str:
        terms = "  ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        return (
            f"step {self.step}  loss {sum(self.losses.values()):.3f}  {self.samples_per_s:.1f} samples/s, "
            f"{100 * self.waiting_share:.0f} % waiting  gradient {self.gradient_norm:.2f}  lr x{self.lr_factor:.3g}  "
            f"{self.memory_gib:.1f} GiB  {terms}" + (f"  {self.overflows} steps left out" if self.overflows else "")
        )


class Training:
    """A training under way.

    Args:
        network: a Trainable module on the place's device.
        config: how.
        place: of this process.
        folder: for checkpoint and logs.
        resume: go on from the folder's checkpoint; ConfigError where its configuration is another one, DataError where
            its network is.
        report: called with each line of the log, in the leading process.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TrainingConfig,
        place: Place,
        folder: Path,
        *,
        resume: bool = False,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.network, self.config, self.place, self.folder, self._report = network, config, place, folder, report
        self.step, self.overflows = 0, 0
        torch.manual_seed(config.seed + place.rank)  # dropout; the network was initialised by the caller
        freeze(network, config.freeze)
        self.optimiser = make_optimiser(network, config.optimiser)
        self.average: AveragedModel | None = None
        if config.average:
            self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.average), use_buffers=True)
        if resume:
            self._resume()
        self._statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self._kept_statistics = [buffer.clone() for buffer in self._statistics]
        self._wrapped: nn.Module = network
        if place.count > 1:
            ids = [place.device.index] if place.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(network, device_ids=ids, find_unused_parameters=True)

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state to predict with: the moving average where there is one."""
        trained: nn.Module = self.network if self.average is None else self.average.module
        return trained.state_dict()

    def run(self, batches: Iterator[list[Pair]], minutes: float | None = None) -> bool:
        """Train to the last step, until `minutes` have passed, or until SIGTERM or SIGINT asks to stop.

        A checkpoint is written in each case.

        Returns:
            Whether the schedule came to its end.

        Raises:
            PerceptionError: a loss is not finite.
        """
        config = self.config
        start = time.monotonic()
        end = start + 60 * minutes if minutes is not None else float("inf")
        training_mode(self.network, config.fixed_statistics)
        with _stop_asked_for() as stop, _Log(self) as log, _Ahead(self.network, batches, self.place.device) as ready:
            while (share := self._share(start)) < 1:
                began = time.monotonic()
                inputs, targets = next(ready)
                waited = time.monotonic() - began
                losses, norm, factor = self._learn(inputs, targets, share)
                self.step += 1
                log.add(losses, norm, factor, waited)
                done = self.place.any(stop.is_set() or time.monotonic() > end or self._share(start) >= 1)
                if done or self.step % config.checkpoint_every == 0:
                    self.save()
                if done:
                    break
        return self._share(start) >= 1

    def _share(self, start: float) -> float:
        """How much of the schedule is over, by steps or by time."""
        config = self.config
        elapsed = (time.monotonic() - start) / (60 * config.minutes) if config.minutes is not None else 0.0
        return min(1.0, max(self.step / config.steps, elapsed))

    def _learn(self, inputs: Any, targets: Any, share: float) -> tuple[dict[str, Tensor], Tensor, float]:
        config = self.config
        factor = schedule(self.optimiser, config.optimiser, share)
        dtype = getattr(torch, config.precision)
        with torch.autocast(self.place.device.type, dtype, enabled=dtype != torch.float32):
            outputs = self._wrapped(inputs)
        losses: dict[str, Tensor] = self.network.loss(outputs, targets)  # type: ignore[operator]
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack([term for term in losses.values()]).sum().backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), config.optimiser.clip_norm)
        if self._overflowed(norm):
            self.overflows += 1
            _copy(self._statistics, self._kept_statistics)
        else:
            self.optimiser.step()
            _copy(self._kept_statistics, self._statistics)
            if self.average is not None:
                self.average.update_parameters(self.network)
        return losses, norm, factor

    def _overflowed(self, norm: Tensor) -> bool:
        """Whether the gradient, or what a batch norm has taken in of the batch, is not finite, in any process.

        A batch whose variance overflows becomes zeros behind its norm: such a gradient is finite, and wrong.
        """
        statistics = nn.utils.get_total_norm(self._statistics, 1.0)
        return self.place.any(not torch.isfinite(norm + statistics))

    def save(self) -> None:
        """Write the checkpoint. All processes must ask; the leading one writes."""
        own = generator_states(self.place.device)
        every: list[Any] = [own]
        if self.place.count > 1:
            every = [None] * self.place.count
            dist.all_gather_object(every, own)
        if self.place.leads:
            average = {} if self.average is None else self.average.state_dict()
            state = (self.network.state_dict(), average, self.optimiser.state_dict())
            write_checkpoint(self.checkpoint_path, Checkpoint(self.step, self._identity(), *state, every))

    def _resume(self) -> None:
        there = read_checkpoint(self.checkpoint_path)
        if there.config != self._identity() or len(there.generators) != self.place.count:
            raise ConfigError(
                f"{self.checkpoint_path}: of another configuration, or of {len(there.generators)} processes where "
                f"{self.place.count} run",
                "resume with what the training was started with, or name the weights in training.weights",
            )
        load_state(self.network, there.network, str(self.checkpoint_path))
        self.optimiser.load_state_dict(there.optimiser)
        if self.average is not None:
            self.average.load_state_dict(there.average)
        set_generator_states(there.generators[self.place.rank], self.place.device)
        self.step = there.step

    def _identity(self) -> str:
        """What must be the same to go on; how often to write may differ."""
        return self.config.model_dump_json(exclude={"log_every", "checkpoint_every", "tensorboard", "workers"})


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)


class _Ahead:
    """The encoded batches, made by a thread on a stream of its own."""

    def __init__(self, network: nn.Module, batches: Iterator[list[Pair]], device: torch.device) -> None:
        self._network, self._batches, self._device = network, batches, device
        self._ready: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="encode", daemon=True)

    def __enter__(self) -> _Ahead:
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


@contextlib.contextmanager
def _stop_asked_for() -> Iterator[threading.Event]:
    """Set by SIGTERM or SIGINT while the block runs; the step under way is finished."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Log:
    """Means of the losses, to log.jsonl and TensorBoard. One wait for the device a line."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._sums: Tensor | None = None
        self._names: list[str] = []
        self._steps, self._waited, self._since = 0, 0.0, time.monotonic()

    def __enter__(self) -> _Log:
        training = self._training
        self._board = _board(training.folder) if training.config.tensorboard and training.place.leads else None
        training.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def add(self, losses: dict[str, Tensor], norm: Tensor, factor: float, waited: float) -> None:
        """Count a step; write a line where one is due."""
        training = self._training
        values = torch.stack([*(term.detach().float() for term in losses.values()), norm.float()])
        self._sums = values if self._sums is None else self._sums + values
        self._names, self._steps, self._waited = list(losses), self._steps + 1, self._waited + waited
        if training.step % training.config.log_every:
            return
        *means, norm_mean = training.place.mean(self._sums / self._steps).tolist()
        self._check(dict(zip(self._names, means, strict=True)))
        now = time.monotonic()
        samples = self._steps * training.config.batch_size * training.place.count
        device = training.place.device
        progress = Progress(
            training.step,
            dict(zip(self._names, means, strict=True)),
            norm_mean,
            factor,
            samples / (now - self._since),
            self._waited / (now - self._since),
            torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0,
            training.overflows,
        )
        self._sums, self._steps, self._waited, self._since = None, 0, 0.0, now
        if training.place.leads:
            self._write(progress)

    def _check(self, losses: dict[str, float]) -> None:
        wrong = [name for name, value in losses.items() if not abs(value) < float("inf")]
        if wrong:
            raise PerceptionError(
                f"training: step {self._training.step}: {', '.join(wrong)} is not finite",
                f"lower training.optimiser.lr and resume from {self._training.checkpoint_path}",
            )

    def _write(self, progress: Progress) -> None:
        with (self._training.folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(progress._asdict()) + "\n")
        if self._board is not None:
            for name, value in progress.losses.items():
                self._board.add_scalar(f"loss/{name}", value, progress.step)
            for name in ("gradient_norm", "lr_factor", "samples_per_s"):
                self._board.add_scalar(name, getattr(progress, name), progress.step)
        self._training._report(progress)


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise PerceptionError(
            f"TensorBoard cannot be imported: {error}",
            "pip install 'perception[train]', or set training.tensorboard to false",
        ) from error
    return SummaryWriter(str(folder))
