"""Synchroniser: one set per message of the anchor sensor, made by stamps alone.

For an anchor message stamped t, each other sensor gives the message nearest to t + offset, if that is within its
tolerance. A sensor that has none is absent from the set with a reason; only a `required` one keeps the set back.
With `wait_s` = 0 a set is made when its anchor message comes. With `wait_s` > 0 it is made once every sensor has sent a
message at or after its t + offset (no later one can be nearer), or once a stamp t + wait_s has been seen on any sensor.

Every message pushed ends in exactly one of `Counts`' fates, so that their sum accounts for all of them. A stamp that
falls back by more than `clock_jump_s` behind its own sensor's newest (a bag that loops, a simulator that restarts)
empties all buffers and begins a new epoch. Payloads are opaque: raw messages stay undecoded until they are used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from perception.config import Config
from perception.errors import PerceptionError


class SensorTiming(Config):
    """When a sensor's message belongs to an anchor message, and how much of its past a set carries."""

    offset_s: float = 0.0
    """Stamp of the wanted message minus the anchor's stamp."""
    tolerance_s: float = Field(0.12, ge=0)
    """Farthest a message may be from the wanted stamp."""
    required: bool = False
    """Without this sensor there is no set."""
    sweeps_s: float = Field(0.0, ge=0)
    """How far before its match a set carries this sensor's earlier messages, for accumulation."""


class SyncConfig(Config):
    """One synchroniser; `sensors` names all of them, the anchor too."""

    anchor: str
    sensors: dict[str, SensorTiming]
    wait_s: float = Field(0.0, ge=0)
    """Longest wait, in stamp time, for the other sensors; 0 emits at once."""
    keep_s: float = Field(default=0.5, gt=0)
    """Messages older than their sensor's newest by more than this (or by what the options above need) are let go."""
    keep_messages: int = Field(default=500, ge=1)
    """Most messages held per sensor, whatever their stamps."""
    clock_jump_s: float = Field(1.0, gt=0)
    """A stamp this far behind its sensor's newest is a jump of the clock; less is a message out of order."""

    @model_validator(mode="after")
    def _anchor_is_a_sensor(self) -> SyncConfig:
        if self.anchor not in self.sensors:
            raise ValueError(f"anchor {self.anchor!r} is none of the sensors ({', '.join(self.sensors)})")
        return self


@dataclass(slots=True)
class Counts:
    """What became of one sensor's messages, and what the sensor gave to the sets.

    received = used + unused + incomplete + out_of_order + clock_jump + those still held (`Synchronizer.held`).
    Anchor messages decided = matched + stale + missing, for each sensor.
    """

    received: int = 0
    used: int = 0
    """In at least one set."""
    unused: int = 0
    """Let go without ever having been in a set: another was nearer, or no anchor came."""
    incomplete: int = 0
    """Anchor messages that made no set because a required sensor was absent."""
    out_of_order: int = 0
    """Not newer than the sensor's newest: dropped on arrival."""
    clock_jump: int = 0
    """Held unused when the clock jumped."""
    matched: int = 0
    """Sets (incomplete ones too) in which the sensor had a message."""
    stale: int = 0
    """... in which its nearest message was outside the tolerance."""
    missing: int = 0
    """... before its first message."""


@dataclass(frozen=True, slots=True)
class Match:
    """One message in a set."""

    stamp_ns: int
    payload: Any


@dataclass(frozen=True, slots=True)
class Absent:
    """Why a sensor is not in a set; `distance_s` is that of its nearest message, None when it has sent none."""

    reason: Literal["missing", "stale"]
    distance_s: float | None = None

    def __str__(self) -> str:
        return self.reason if self.distance_s is None else f"{self.reason}: nearest is {self.distance_s:.3f} s away"


@dataclass(frozen=True, slots=True)
class SyncedSet:
    """What all sensors say about the anchor's stamp.

    Attributes:
        stamp_ns: the anchor message's stamp.
        matches: sensor -> its message, the anchor's own included.
        past: sensor -> its messages before the match, newest first, as far back as `sweeps_s`.
        absent: sensor -> why it is not in `matches`.
        epoch: how often the clock has jumped; state kept from another epoch is void.
    """

    stamp_ns: int
    matches: Mapping[str, Match]
    past: Mapping[str, tuple[Match, ...]]
    absent: Mapping[str, Absent]
    epoch: int


@dataclass(frozen=True, slots=True)
class ClockJump:
    """The stamp that fell back, the newest before it, and whose it was."""

    sensor: str
    from_ns: int
    to_ns: int


@dataclass(slots=True)
class _Held:
    stamp_ns: int
    payload: Any
    settled: bool = False  # its fate has been counted


class Synchronizer:
    """Matches messages of several sensors by stamp. Not thread-safe: push from one thread.

    Attributes:
        counts: sensor -> what became of its messages.
        epoch: number of clock jumps so far.
        last_jump: the latest of them.
        last_incomplete: the latest set kept back for want of a required sensor; its `absent` says which and why.
    """

    def __init__(self, config: SyncConfig) -> None:
        self.config = config
        self.counts = {sensor: Counts() for sensor in config.sensors}
        self.epoch = 0
        self.last_jump: ClockJump | None = None
        self.last_incomplete: SyncedSet | None = None
        self._wait_ns = _ns(config.wait_s)
        self._reset()

    def _reset(self) -> None:
        self._held: dict[str, list[_Held]] = {sensor: [] for sensor in self.config.sensors}
        self._pending: deque[_Held] = deque()
        self._seen_ns: int | None = None

    def held(self, sensor: str) -> int:
        """Messages of a sensor that are held and have met no fate yet."""
        return sum(not message.settled for message in self._held[sensor])

    def push(self, sensor: str, stamp_ns: int, payload: Any) -> list[SyncedSet]:
        """Take a message; the sets that it completes, oldest first.

        Raises:
            PerceptionError: the sensor is none of the configuration's.
        """
        if sensor not in self.counts:
            raise PerceptionError(
                f"synchroniser: no sensor {sensor!r} to take a message stamped {stamp_ns / 1e9:.3f} s",
                f"it was configured for: {', '.join(self.counts)}",
            )
        self.counts[sensor].received += 1
        newest_ns = self._held[sensor][-1].stamp_ns if self._held[sensor] else None
        if newest_ns is not None and stamp_ns <= newest_ns:
            if newest_ns - stamp_ns <= _ns(self.config.clock_jump_s):
                self.counts[sensor].out_of_order += 1
                return []
            self._jump(ClockJump(sensor, newest_ns, stamp_ns))
        message = _Held(stamp_ns, payload)
        self._held[sensor].append(message)
        if sensor == self.config.anchor:
            self._pending.append(message)
        sets = self.advance(stamp_ns)
        self._let_go(sensor)
        return sets

    def advance(self, stamp_ns: int) -> list[SyncedSet]:
        """Tell that stamp time has come this far, as a clock or a sensor outside the sets does; the sets then due."""
        self._seen_ns = stamp_ns if self._seen_ns is None else max(self._seen_ns, stamp_ns)
        sets = []
        while self._pending and self._due(self._pending[0].stamp_ns):
            sets.append(self._decide(self._pending.popleft()))
        return [s for s in sets if s is not None]

    def clock_jumped(self, jump: ClockJump) -> None:
        """Tell of a jump that a source outside the sets saw first (/tf, /clock): a new epoch begins at once."""
        self._jump(jump)

    def flush(self) -> list[SyncedSet]:
        """The sets of all anchor messages still waiting, made of what there is: the input has ended."""
        sets = [self._decide(self._pending.popleft()) for _ in range(len(self._pending))]
        return [s for s in sets if s is not None]

    def _due(self, stamp_ns: int) -> bool:
        """Whether the anchor message of this stamp is to be decided now."""
        assert self._seen_ns is not None
        if self._seen_ns >= stamp_ns + self._wait_ns or len(self._pending) > self.config.keep_messages:
            return True
        return all(
            held and held[-1].stamp_ns >= stamp_ns + _ns(self.config.sensors[sensor].offset_s)
            for sensor, held in self._held.items()
            if sensor != self.config.anchor
        )

    def _decide(self, anchor: _Held) -> SyncedSet | None:
        """The set of an anchor message, None where a required sensor is absent; counted either way."""
        used: list[tuple[str, _Held]] = []
        matches, past, absent = {}, {}, {}
        for sensor, timing in self.config.sensors.items():
            found = anchor if sensor == self.config.anchor else self._nearest(sensor, anchor.stamp_ns)
            if isinstance(found, Absent):
                absent[sensor] = found
                continue
            held = self._held[sensor]
            end = bisect_left(held, found.stamp_ns, key=_stamp)
            begin = bisect_left(held, found.stamp_ns - _ns(timing.sweeps_s), hi=end, key=_stamp)
            matches[sensor] = Match(found.stamp_ns, found.payload)
            past[sensor] = tuple(Match(m.stamp_ns, m.payload) for m in reversed(held[begin:end]))
            used += [(sensor, message) for message in (found, *held[begin:end])]
        for sensor, counts in self.counts.items():
            counts.matched += sensor in matches
            counts.stale += sensor in absent and absent[sensor].reason == "stale"
            counts.missing += sensor in absent and absent[sensor].reason == "missing"
        synced = SyncedSet(anchor.stamp_ns, matches, past, absent, self.epoch)
        if any(self.config.sensors[sensor].required for sensor in absent):
            self.last_incomplete = synced
            self.counts[self.config.anchor].incomplete += not anchor.settled
            anchor.settled = True
            return None
        for sensor, message in used:
            self.counts[sensor].used += not message.settled
            message.settled = True
        return synced

    def _nearest(self, sensor: str, anchor_ns: int) -> _Held | Absent:
        """The message nearest to the wanted stamp (of two as near, the earlier), or why there is none."""
        timing, held = self.config.sensors[sensor], self._held[sensor]
        if not held:
            return Absent("missing")
        wanted = anchor_ns + _ns(timing.offset_s)
        after = bisect_left(held, wanted, key=_stamp)
        nearest = min(held[max(after - 1, 0) : after + 1], key=lambda message: abs(message.stamp_ns - wanted))
        distance = abs(nearest.stamp_ns - wanted)
        return nearest if distance <= _ns(timing.tolerance_s) else Absent("stale", distance / 1e9)

    def _let_go(self, sensor: str) -> None:
        """Drop what no later anchor message can want; the newest always stays, as the measure of order."""
        timing, held = self.config.sensors[sensor], self._held[sensor]
        reach_s = self.config.wait_s + abs(timing.offset_s) + timing.tolerance_s + timing.sweeps_s
        oldest = held[-1].stamp_ns - _ns(max(self.config.keep_s, reach_s))
        begin = max(bisect_left(held, oldest, key=_stamp), len(held) - self.config.keep_messages)
        self.counts[sensor].unused += sum(not message.settled for message in held[:begin])
        del held[:begin]

    def _jump(self, jump: ClockJump) -> None:
        for sensor, counts in self.counts.items():
            counts.clock_jump += self.held(sensor)
        self._reset()
        self.epoch += 1
        self.last_jump = jump


def _stamp(message: _Held) -> int:
    return message.stamp_ns


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
