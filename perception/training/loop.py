"""The training loop: one process a GPU, bfloat16 where asked for, checkpoints, a clean stop."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from perception.config import Config
from perception.errors import ConfigError
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
from perception.training.log import Log, Progress
from perception.training.optimiser import freeze, make_optimiser, schedule, training_mode
from perception.training.prefetch import Prefetcher
from perception.types import Needs, Sample, Truth
from perception.weights import load_state


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


class Training:
    """A training under way.

    Args:
        network: a Trainable module on the place's device.
        config: how.
        place: of this process.
        folder: for checkpoint and logs.
        predictor: settings of the network, which a checkpoint keeps beside `config`.
        resume: go on from the folder's checkpoint; ConfigError where its configuration is another one, DataError where
            its network is.
        report: called with each line of the log, in the leading process.

    Raises:
        ConfigError: the folder holds a checkpoint that would be overwritten, not being resumed.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TrainingConfig,
        place: Place,
        folder: Path,
        *,
        predictor: Config | None = None,
        resume: bool = False,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.network, self.config, self.place, self.folder, self._report = network, config, place, folder, report
        self._predictor = predictor
        self.step, self.overflows = 0, 0
        if not resume and place.any(self.checkpoint_path.exists()):
            raise ConfigError(
                f"{folder}: holds the checkpoint of a training",
                "--resume goes on from it; another --out starts anew",
            )
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
        """Train to the schedule's end, or break off after `minutes` or where SIGTERM or SIGINT asks for it.

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
        log = Log(self.folder, config, self.place, self._report)
        with _stop_asked_for() as stop, log, Prefetcher(self.network, batches, self.place.device) as ready:
            while (share := self._share(start)) < 1:
                began = time.monotonic()
                inputs, targets = next(ready)
                waited = time.monotonic() - began
                losses, norm, factor = self._learn(inputs, targets, share)
                self.step += 1
                log.add(self.step, losses, norm, factor, waited, self.overflows)
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
        do = "resume with what the training was started with, or name the weights in training.weights"
        if there.config != self._identity():
            names = _differing(json.loads(there.config), json.loads(self._identity()))
            raise ConfigError(f"{self.checkpoint_path}: of another configuration, by {', '.join(names)}", do)
        if len(there.generators) != self.place.count:
            count = len(there.generators)
            raise ConfigError(f"{self.checkpoint_path}: of {count} processes where {self.place.count} run", do)
        load_state(self.network, there.network, str(self.checkpoint_path))
        self.optimiser.load_state_dict(there.optimiser)
        if self.average is not None:
            self.average.load_state_dict(there.average)
        set_generator_states(there.generators[self.place.rank], self.place.device)
        self.step = there.step

    def _identity(self) -> str:
        """What must be the same to go on, as JSON; how often to write may differ."""
        free = {"log_every", "checkpoint_every", "tensorboard", "workers"}
        predictor = {} if self._predictor is None else self._predictor.model_dump(mode="json", exclude={"weights"})
        return json.dumps({"predictor": predictor, "training": self.config.model_dump(mode="json", exclude=free)})


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings that differ: `training.optimiser.lr`."""
    names = []
    for name in sorted({*one, *other}):
        a, b = one.get(name), other.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += _differing(a, b, f"{prefix}{name}.")
        elif a != b:
            names.append(prefix + name)
    return names


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)


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
