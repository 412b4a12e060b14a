"""One thread a system: the newest Draft becomes a Sample, a Prediction, and whatever `publish` makes of it.

Latest only: a Draft that comes while the thread is busy replaces the one that waits, and is counted. So a slow system
predicts less often but never from old data, and systems do not wait for one another. Every Draft offered ends in
exactly one of `Drop`'s reasons or in `published`, or is the one that waits or is being worked on.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Literal

import torch

from perception.draft import Draft, Prepared
from perception.frames import FrameError
from perception.intake import Intake
from perception.systems import System, above_threshold, is_due
from perception.types import Prediction, Sample

Drop = Literal["superseded", "rate_limited", "no_listener", "no_transform", "bad_message", "failed", "stopped"]

_KEPT = 100
"""Latest published predictions whose times are remembered."""


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """A prediction on its way to `publish`.

    Attributes:
        draft: the set that it was made of.
        sample, prediction: the latter above the system's threshold.
        used: channel -> stamps of its messages, newest first.
        stages: name -> seconds, in the order they ran; `publish` adds its own.
    """

    draft: Draft
    sample: Sample
    prediction: Prediction
    used: Mapping[str, tuple[int, ...]]
    stages: dict[str, float]


class Worker:
    """Runs one system.

    Args:
        system: loaded.
        intake: where its Drafts come from.
        pool: decodes images.
        wait_s: longest wait for transforms, and for motion up to the stamp.
        wanted: whether anybody listens; without, nothing is computed.
        publish: called in the worker's thread.
        fatal: called in the worker's thread when the device's memory is full; the thread has ended then.

    Attributes:
        score_threshold: may be changed at any time.
        offered, published: Drafts.
        dropped: reason -> Drafts.
        masked: (channel, reason) -> predictions that it is missing from.
        latencies: of the latest predictions, when each was done (time.monotonic()) and its stages.
        last_error: what went wrong last, and the stamp.
    """

    def __init__(
        self,
        system: System,
        intake: Intake,
        pool: Executor,
        wait_s: float,
        wanted: Callable[[], bool],
        publish: Callable[[Predicted], None],
        fatal: Callable[[str], None],
    ) -> None:
        self.system = system
        self.score_threshold = system.config.score_threshold
        self.offered = self.published = 0
        self.dropped: Counter[Drop] = Counter()
        self.masked: Counter[tuple[str, str]] = Counter()
        self.latencies: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=_KEPT)
        self.last_error: tuple[int, Exception] | None = None
        self.sync = intake.watch(system.watched, self.offer)
        self._backlog = intake.backlog(system.vehicle)
        self._intake, self._pool, self._wait_s = intake, pool, wait_s
        self._wanted, self._publish, self._fatal = wanted, publish, fatal
        self._waiting: Draft | None = None
        self._stopping = False
        self._changed = threading.Condition()
        self._epoch = 0
        self._last_ns: int | None = None
        self._thread = threading.Thread(target=self._run, name=system.name, daemon=True)

    def start(self) -> None:
        """Begin; once."""
        self._thread.start()

    def stop(self, timeout_s: float = 1.0) -> bool:
        """End after the prediction that is being made; whether that was within the time."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def offer(self, draft: Draft) -> None:
        """A newer Draft, from the thread that feeds the intake."""
        with self._changed:
            self.offered += 1
            if self._waiting is not None:
                self.dropped["superseded"] += 1
            self._waiting = draft
            self._changed.notify()

    @property
    def in_hand(self) -> int:
        """Drafts offered that have met no fate yet: at most the one that waits and the one being worked on."""
        return self.offered - self.published - sum(self.dropped.values())

    @property
    def settled(self) -> bool:
        """Whether nothing comes of what the intake has taken so far: idle, or waiting for more."""
        return not self.in_hand or not self._thread.is_alive() or self._intake.is_waited_on(self._thread.ident)

    def _next(self) -> Draft | None:
        """The Draft that waits; None when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._stopping)
            draft, self._waiting = self._waiting, None
            if self._stopping and draft is not None:
                self.dropped["stopped"] += 1
            return None if self._stopping else draft

    def _run(self) -> None:
        while (draft := self._next()) is not None:
            if (reason := self._unwanted(draft)) is not None:
                self.dropped[reason] += 1
                continue
            start_s = time.monotonic()
            try:
                prepared = draft.prepare(self.system.vehicle, self._pool, self._wait_s)
            except Exception as error:  # whatever a broken message makes a library raise
                self._drop(draft, "no_transform" if isinstance(error, FrameError) else "bad_message", error)
                continue
            try:
                self._predict(draft, prepared, start_s)
                self.published += 1
            except torch.OutOfMemoryError as error:
                self._drop(draft, "failed", error)
                self._stopping = True
                self._fatal(f"{self.system.name}: {self.system.config.device} is out of memory: {error}")
            except Exception as error:  # whatever a network may raise: the next frame may be a better one
                self._drop(draft, "failed", error)

    def _drop(self, draft: Draft, reason: Drop, error: Exception) -> None:
        self.dropped[reason] += 1
        self.last_error = draft.synced.stamp_ns, error

    def _unwanted(self, draft: Draft) -> Drop | None:
        """Why not to predict; also notices a new epoch."""
        if draft.synced.epoch != self._epoch:
            self._epoch, self._last_ns = draft.synced.epoch, None
            self.system.predictor.reset()
        if not self._wanted():
            return "no_listener"
        due = is_due(self.system.config.max_rate_hz, self._last_ns, draft.synced.stamp_ns)
        return None if due else "rate_limited"

    def _predict(self, draft: Draft, prepared: Prepared, start_s: float) -> None:
        system, stamp = self.system, draft.synced.stamp_ns
        self.masked.update(prepared.masked.items())
        begun_s = time.monotonic()
        if system.predictor.needs.motion:
            self._intake.wait_until(lambda: self._backlog.reaches(stamp), start_s + self._wait_s)
        motion_s = time.monotonic() - begun_s
        imu, odometry, gnss = self._backlog.take(system.vehicle, self._intake.frames, stamp)
        sample = replace(prepared.sample, imu=imu, odometry=odometry, gnss=gnss)
        predict_s = time.monotonic()
        prediction = above_threshold(system.predictor.predict(sample), self.score_threshold)
        stages = {"wait": start_s - draft.received_s, **prepared.stages, "predict": time.monotonic() - predict_s}
        stages["wait_transforms"] += motion_s
        self._last_ns = stamp
        self._publish(Predicted(draft, sample, prediction, prepared.used, stages))
        self.latencies.append((time.monotonic(), stages))
