"""The log of a training: a line for every few steps, to `log.jsonl`, TensorBoard and whoever is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perception.errors import PerceptionError
from perception.training.config import TrainingConfig
from perception.training.distributed import Place


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


class Log:
    """Means of the losses. One wait for the device a line.

    Args:
        folder: of `log.jsonl` and TensorBoard's files; made where it is missing.
        config: of the training.
        place: of this process; the leading one writes.
        report: called with each line, in the leading process.
    """

    def __init__(self, folder: Path, config: TrainingConfig, place: Place, report: Callable[[Progress], None]) -> None:
        self._folder, self._config, self._place, self._report = folder, config, place, report
        self._sums: Tensor | None = None
        self._names: list[str] = []
        self._steps, self._waited, self._since = 0, 0.0, time.monotonic()

    def __enter__(self) -> Log:
        self._board = _board(self._folder) if self._config.tensorboard and self._place.leads else None
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def add(
        self, step: int, losses: dict[str, Tensor], norm: Tensor, lr_factor: float, waited_s: float, overflows: int
    ) -> None:
        """Count a step; write a line where one is due. All processes must.

        Args:
            step: its number, from 1.
            losses: its terms.
            norm: of its gradient.
            lr_factor: of the learning rate.
            waited_s: for its data.
            overflows: steps left out so far.

        Raises:
            PerceptionError: a mean of the losses is not finite.
        """
        values = torch.stack([*(term.detach().float() for term in losses.values()), norm.float()])
        self._sums = values if self._sums is None else self._sums + values
        self._names, self._steps, self._waited = list(losses), self._steps + 1, self._waited + waited_s
        if step % self._config.log_every:
            return
        *means, norm_mean = self._place.mean(self._sums / self._steps).tolist()
        terms = dict(zip(self._names, means, strict=True))
        self._check(step, terms)
        now = time.monotonic()
        elapsed = now - self._since
        samples = self._steps * self._config.batch_size * self._place.count
        device = self._place.device
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        rates = (samples / elapsed, self._waited / elapsed)
        self._sums, self._steps, self._waited, self._since = None, 0, 0.0, now
        if self._place.leads:
            self._write(Progress(step, terms, norm_mean, lr_factor, *rates, memory, overflows))

    def _check(self, step: int, losses: dict[str, float]) -> None:
        wrong = [name for name, value in losses.items() if not abs(value) < float("inf")]
        if wrong:
            raise PerceptionError(
                f"training: step {step}: {', '.join(wrong)} is not finite",
                "lower training.optimiser.lr and start anew",
            )

    def _write(self, progress: Progress) -> None:
        with (self._folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(progress._asdict()) + "\n")
        if self._board is not None:
            for name, value in progress.losses.items():
                self._board.add_scalar(f"loss/{name}", value, progress.step)
            for name in ("gradient_norm", "lr_factor", "samples_per_s"):
                self._board.add_scalar(name, getattr(progress, name), progress.step)
        self._report(progress)


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise PerceptionError(
            f"TensorBoard cannot be imported: {error}",
            "pip install 'perception[train]', or set training.tensorboard to false",
        ) from error
    return SummaryWriter(str(folder))
