"""A rosbag2 on disk, in MCAP or sqlite3: its topics, and its messages by topic and log time.

The library `rosbags` does the reading; every fault it meets in a file becomes a DataError. Messages are decoded by the
definitions that ROS 2 ships, never by those that a bag brings along: the library runs generated code for the latter.
All types used here are the same from Humble to Kilted.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from perception.errors import DataError, PerceptionError

POINT_CLOUD, IMAGE, COMPRESSED_IMAGE, CAMERA_INFO, TRANSFORMS, ODOMETRY, IMU, GNSS, POSE = (
    "sensor_msgs/msg/PointCloud2",
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/CompressedImage",
    "sensor_msgs/msg/CameraInfo",
    "tf2_msgs/msg/TFMessage",
    "nav_msgs/msg/Odometry",
    "sensor_msgs/msg/Imu",
    "sensor_msgs/msg/NavSatFix",
    "geometry_msgs/msg/PoseStamped",
)
TF_TOPIC, TF_STATIC_TOPIC = "/tf", "/tf_static"

_UNKNOWN_DEPTH = 10
"""Where a bag does not say: the default of ROS."""
_ALL = 1000
"""In place of a history without end."""

_MCAP_MAGIC, _SQLITE_MAGIC = b"\x89MCAP0\r\n", b"SQLite format 3\0"


@lru_cache(maxsize=1)
def typestore() -> Any:
    """The message definitions of ROS 2, as `rosbags` has them."""
    try:
        from rosbags.typesys import Stores, get_typestore
    except ImportError as error:
        raise PerceptionError(
            "rosbags is not installed; it reads and writes bags", "pip install 'perception[bag]'"
        ) from error
    return get_typestore(Stores.ROS2_HUMBLE)


class OfferedQos(NamedTuple):
    """What a topic's publisher offers; the last `depth` messages are kept, for those who join late where `latched`."""

    depth: int
    reliable: bool = True
    latched: bool = False


class Topic(NamedTuple):
    """A topic's message type and number of messages, and what its publishers offered together."""

    type: str
    messages: int
    offered: OfferedQos = OfferedQos(_UNKNOWN_DEPTH)


class Logged(NamedTuple):
    """One message: its topic, when it was recorded, its CDR bytes."""

    topic: str
    log_ns: int
    raw: bytes


class BagFile:
    """An open bag. Safe to pickle and to use after a fork: every process opens the file for itself.

    Args:
        path: a bag's folder, or one .mcap or .db3 file.

    Raises:
        DataError: there is none, it is damaged, unfinished or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check(path)
        self._opened: tuple[int, Any] | None = None
        self.topics: dict[str, Topic] = {}
        for connection in self._reader().connections:
            known = self.topics.get(connection.topic, Topic(connection.msgtype, 0))
            if known.type != connection.msgtype:
                raise DataError(
                    f"{path}: topic {connection.topic!r} has messages of {known.type} and of {connection.msgtype}",
                    "record it again with one type a topic",
                )
            offered = _offered(connection, known.offered if connection.topic in self.topics else None)
            self.topics[connection.topic] = Topic(known.type, known.messages + connection.msgcount, offered)

    @property
    def span_ns(self) -> tuple[int, int]:
        """Log times of the first message and of the last."""
        reader = self._reader()
        return reader.start_time, reader.end_time - 1

    def messages(
        self, topics: Collection[str], start_ns: int | None = None, stop_ns: int | None = None
    ) -> Iterator[Logged]:
        """Messages of some topics in order of log time, from `start_ns` to before `stop_ns`."""
        reader = self._reader()
        connections = [c for c in reader.connections if c.topic in topics]
        if not connections:
            return
        try:
            for connection, log_ns, raw in reader.messages(connections, start_ns, stop_ns):
                yield Logged(connection.topic, log_ns, raw)
        except Exception as error:  # whatever a damaged file makes the library raise
            raise self._damaged(error) from error

    def topics_of(self, *types: str) -> list[str]:
        """The topics that have one of the message types."""
        return [name for name, topic in self.topics.items() if topic.type in types]

    def decode(self, topic: str, raw: bytes) -> Any:
        """A message's bytes as an object with the attributes of its type.

        Raises:
            DataError: the bytes do not fit the type.
        """
        try:
            return typestore().deserialize_cdr(raw, self.topics[topic].type)
        except Exception as error:  # SerdeError, and what its generated code raises beside it
            raise DataError(
                f"{self.path}: a message of {topic} is no {self.topics[topic].type}: {error}",
                "the bag is damaged, or its recorder had another version of the type",
            ) from error

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        opened, self._opened = self._opened, None
        if opened is not None and opened[0] == os.getpid():
            opened[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _reader(self) -> Any:
        """The library's reader, opened in this process: a forked one would share its file position."""
        if self._opened is None or self._opened[0] != os.getpid():
            typestore()
            from rosbags.rosbag2 import Reader

            reader = Reader(self.path)
            try:
                reader.open()
            except Exception as error:  # whatever a damaged file makes the library raise
                raise self._damaged(error) from error
            self._opened = (os.getpid(), reader)
        return self._opened[1]

    def _damaged(self, error: Exception) -> DataError:
        return DataError(
            f"{self.path}: not a readable rosbag2: {type(error).__name__}: {error}",
            "check it with `ros2 bag info`; `mcap doctor` and `mcap recover` (the MCAP command line) mend MCAP files",
        )


def _offered(connection: Any, before: OfferedQos | None) -> OfferedQos:
    """A connection's offer joined with that of earlier ones of its topic: the one that suits most subscribers."""
    offers = [before] if before is not None else []
    for profile in connection.ext.offered_qos_profiles:
        reliable, latched = profile.reliability.name != "BEST_EFFORT", profile.durability.name == "TRANSIENT_LOCAL"
        keeps_all = profile.history.name == "KEEP_ALL"
        offers.append(OfferedQos(_ALL if keeps_all else profile.depth or _UNKNOWN_DEPTH, reliable, latched))
    if not offers:
        return OfferedQos(_UNKNOWN_DEPTH)
    depths, reliables, latches = zip(*offers, strict=True)
    return OfferedQos(max(depths), any(reliables), any(latches))


class Header(NamedTuple):
    """The std_msgs/Header at the front of a message."""

    stamp_ns: int
    frame: str


def read_header(raw: bytes) -> Header:
    """The header of a serialised message, without decoding the rest (CDR: 4 bytes of encapsulation, then fields).

    Raises:
        ValueError: the bytes end before it does.
    """
    order = "<" if len(raw) > 1 and raw[1] & 1 else ">"
    try:
        sec, nanosec, length = struct.unpack_from(order + "iII", raw, 4)
        if len(raw) < 16 + length:
            raise ValueError(f"a frame_id of {length} bytes in a message of {len(raw)}")
        return Header(sec * 1_000_000_000 + nanosec, bytes(raw[16 : 16 + length]).rstrip(b"\0").decode().lstrip("/"))
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"no header: {error}") from error


def is_bag(path: Path) -> bool:
    """Whether this looks like a bag: a .mcap or .db3 file, or a folder with such files or a bag's metadata.yaml."""
    if path.is_dir():
        return bool(_storage_files(path)) or _has_metadata(path)
    return path.suffix in (".mcap", ".db3")


def _has_metadata(folder: Path) -> bool:
    path = folder / "metadata.yaml"
    return path.is_file() and b"rosbag2_bagfile_information" in path.read_bytes()[:4096]


def _storage_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".mcap", ".db3"))


def _check(path: Path) -> None:
    """Raise DataError where something simple is wrong, in words that the library does not have."""
    if path.suffix == ".bag":
        raise DataError(f"{path}: a bag of ROS 1", f"convert it:  rosbags-convert --src {path} --dst {path.stem}")
    if not path.exists():
        raise DataError(f"{path}: no such bag", "give the folder of a rosbag2, or its .mcap or .db3 file")
    if not path.is_dir() and path.suffix not in (".mcap", ".db3"):
        raise DataError(f"{path}: not a rosbag2", "give the folder of a rosbag2, or its .mcap or .db3 file")
    files = _storage_files(path) if path.is_dir() else [path]
    if path.is_dir() and not (path / "metadata.yaml").is_file():
        holds = ", ".join(p.name for p in files[:4]) or "no bag"
        raise DataError(
            f"{path}: has no metadata.yaml, its recorder did not finish; it holds {holds}",
            f"run  ros2 bag reindex {path}  or give one of its files",
        )
    for file in files:
        _check_file(file)


def _check_file(path: Path) -> None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        begin = file.read(16)
        file.seek(max(size - 8, 0))
        end = file.read(8)
    magic = _MCAP_MAGIC if path.suffix == ".mcap" else _SQLITE_MAGIC
    if not begin.startswith(magic):
        raise DataError(f"{path}: {size:,} bytes that are no {path.suffix} file", "copy it again from its recorder")
    if path.suffix == ".mcap" and end != _MCAP_MAGIC:
        raise DataError(
            f"{path}: the file of {size:,} bytes has no end: its recorder was killed, or the copy was cut off",
            f"copy it again, or rebuild it with the MCAP command line:  mcap recover {path} -o recovered.mcap",
        )
    log = path.with_name(path.name + "-wal")
    if log.is_file() and log.stat().st_size:
        raise DataError(
            f"{path}: messages are still in {log.name}: its recorder did not finish",
            f"run  sqlite3 {path} 'PRAGMA wal_checkpoint(TRUNCATE)'  or  ros2 bag reindex",
        )
