"""What a bag plays, and when: ROS-free; `perception_ros.play` publishes it.

Messages keep the bytes, the order and the offered QoS of the recording. Two things are not as recorded:

* Transforms on /tf_static are joined into one message at the start. Of several latched messages on one topic a late
  joiner would see the last alone, and a start in the middle of the bag none.
* /clock is made here, from log times; a recorded one is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from perception.config import Config
from perception.datasets.rosbag_file import (
    TF_STATIC_TOPIC,
    TRANSFORMS,
    BagFile,
    Logged,
    OfferedQos,
    typestore,
)
from perception.errors import ConfigError, DataError

CLOCK_TOPIC = "/clock"


class PlaybackConfig(Config):
    """What of a bag is played."""

    bag: Path
    topics: tuple[str, ...] = ("*",)
    """Topics to play, as recorded; `*` and `?` stand for any letters."""
    exclude: tuple[str, ...] = ()
    """Topics not to play, likewise."""
    remap: Mapping[str, str] = Field(default_factory=dict)
    """Recorded topic -> the name it is published under."""
    start_s: float = Field(0.0, ge=0)
    """Seconds of the bag to leave out at its beginning."""
    clock_hz: float = Field(100.0, ge=0)
    """Rate of /clock in the bag's time, which every message advances too; 0: there is none."""


class PlayedTopic(NamedTuple):
    """A topic under the name it is published as."""

    name: str
    type: str
    offered: OfferedQos


class Tick(NamedTuple):
    """The clock's new time."""

    log_ns: int


class Playback:
    """A bag, ready to be played any number of times.

    Attributes:
        topics: recorded name -> what is published.
        latched: what late joiners must have: published before all else, and again when the bag begins anew.
        begin_ns, end_ns: log times of the first moment and of the last message.

    Raises:
        ConfigError: no topic is left, a remapping of none or onto a taken name, a start behind the end.
        DataError: as BagFile.
    """

    def __init__(self, config: PlaybackConfig) -> None:
        self.config = config
        self._bag = BagFile(config.bag)
        self.topics = _selected(self._bag, config)
        first_ns, self.end_ns = self._bag.span_ns
        self.begin_ns = first_ns + round(config.start_s * 1e9)
        if self.begin_ns > self.end_ns:
            raise ConfigError(
                f"--start {config.start_s}: {config.bag} is {(self.end_ns - first_ns) / 1e9:.1f} s long",
                "start earlier",
            )
        self.latched = tuple(self._latched(first_ns))

    def events(self) -> Iterator[Logged | Tick]:
        """Messages under their published names, and ticks of the clock between them, in order of log time."""
        period_ns = round(1e9 / self.config.clock_hz) if self.config.clock_hz else None
        tick_ns = self.begin_ns
        for topic, log_ns, raw in self._bag.messages(self._in_time, self.begin_ns):
            while period_ns is not None and tick_ns < log_ns:
                yield Tick(tick_ns)
                tick_ns += period_ns
            if period_ns is not None:
                yield Tick(log_ns)
            yield Logged(self.topics[topic].name, log_ns, raw)

    @property
    def _in_time(self) -> list[str]:
        """The topics whose messages come when they were logged: all but the joined one."""
        return [name for name, topic in self.topics.items() if not _is_static(name, topic.type)]

    def _latched(self, first_ns: int) -> Iterator[Logged]:
        for name, topic in self.topics.items():
            if _is_static(name, topic.type):
                yield Logged(topic.name, self.begin_ns, self._static_transforms(name))
            elif topic.offered.latched and self.begin_ns > first_ns:
                before = list(self._bag.messages({name}, first_ns, self.begin_ns))[-topic.offered.depth :]
                yield from (Logged(topic.name, self.begin_ns, message.raw) for message in before)

    def _static_transforms(self, name: str) -> bytes:
        """All of the bag in one message, the newest of each child."""
        found: dict[str, Any] = {}
        for _, _, raw in self._bag.messages({name}):
            for transform in self._bag.decode(name, raw).transforms:
                found[transform.child_frame_id] = transform
        message = typestore().types[TRANSFORMS](list(found.values()))
        return bytes(typestore().serialize_cdr(message, TRANSFORMS))


def _is_static(name: str, message_type: str) -> bool:
    return name == TF_STATIC_TOPIC and message_type == TRANSFORMS


def _selected(bag: BagFile, config: PlaybackConfig) -> dict[str, PlayedTopic]:
    """Recorded name -> published topic, of those that the configuration asks for."""
    if not any(topic.messages for topic in bag.topics.values()):
        raise DataError(f"{bag.path}: no messages", "record again")
    for patterns, option in ((config.topics, "--topics"), (config.exclude, "--exclude"), (config.remap, "--remap")):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in bag.topics):
                raise ConfigError(
                    f"{option} {pattern}: no topic of {bag.path} is named so", f"there are: {', '.join(bag.topics)}"
                )
    names = [
        name
        for name in bag.topics
        if name != CLOCK_TOPIC
        and any(fnmatchcase(name, pattern) for pattern in config.topics)
        and not any(fnmatchcase(name, pattern) for pattern in config.exclude)
    ]
    if not names:
        raise ConfigError(f"{bag.path}: no topic is left to play", f"there are: {', '.join(bag.topics)}")
    published = [config.remap.get(name, name) for name in names]
    if twice := [name for name in published if published.count(name) > 1]:
        raise ConfigError(f"--remap: two topics would be published as {twice[0]}", "give each a name of its own")
    return {
        name: PlayedTopic(as_name, bag.topics[name].type, bag.topics[name].offered)
        for name, as_name in zip(names, published, strict=True)
    }
