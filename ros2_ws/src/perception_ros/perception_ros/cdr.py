"""Messages as CDR, the bytes that DDS carries, written by numpy instead of from message objects.

Objects of nested messages are what makes rclpy slow: 20,000 cubes take a second to build and serialise, their bytes
some milliseconds. `Publisher.publish` takes a complete message as bytes.

Layout (OMG DDS-XTypes 7.4, plain CDR version 1, little endian; what rmw_fastrtps writes): four bytes of encapsulation,
then the fields in the order of the definition. A number lies at a multiple of its size, counted from behind the
encapsulation; zeros fill the gap. A string is its length with the closing zero (uint32), UTF-8, a zero. A sequence is
its length (uint32) and its elements; without elements nothing is padded. An array has no length.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from perception.datasets.rosbag_file import Header
from perception.types import Array, Pose

ENCAPSULATION = b"\x00\x01\x00\x00"
"""Plain CDR, little endian, no options."""

_SIZE = {"b": 1, "B": 1, "?": 1, "H": 2, "i": 4, "I": 4, "f": 4, "d": 8}


@lru_cache(maxsize=512)
def _packer(kinds: str, start: int) -> struct.Struct:
    """What packs fields that begin at a position (mod 8), gaps included; `kinds` as in `CdrWriter.record`."""
    parts, position = ["<"], start
    for count, kind in re.findall(r"(\d*)([a-zA-Z?])", kinds):
        each, repeats = (int(count), 1) if kind == "s" else (_SIZE[kind], int(count or 1))
        gap = -position % (4 if kind == "s" else each)
        parts.append(f"{gap}x{count}{kind}")
        position += gap + each * repeats
    return struct.Struct("".join(parts))


class CdrWriter:
    """One message, written field by field."""

    def __init__(self) -> None:
        self._parts: list[bytes | memoryview] = [ENCAPSULATION]
        self._size = 0

    def numbers(self, kind: str, *values: float) -> None:
        """Fields of one type that follow each other; `kind` is struct's letter (i int32, I uint32, f, d, B, ?)."""
        self._align(_SIZE[kind])
        self._append(struct.pack(f"<{len(values)}{kind}", *values))

    def record(self, kinds: str, *values: float | bytes) -> None:
        """Fields of fixed size that follow each other, packed at once, which is what many small structs need.

        `kinds` are struct's letters with counts (`B4fI`); `12s` is a block of twelve bytes as in `block`.
        """
        self._append(_packer(kinds, self._size % 8).pack(*values))

    def string(self, text: str) -> None:
        encoded = text.encode() + b"\0"
        gap = -self._size % 4
        self._append(bytes(gap) + len(encoded).to_bytes(4, "little") + encoded)

    def array(self, values: Array) -> None:
        """The elements of an array in C order, without a length; it is not copied until `finish`."""
        if not values.size:
            return
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        if values.dtype.names is None:
            self._align(values.dtype.itemsize)
        self._append(values.reshape(-1).view(np.uint8).data)

    def sequence(self, values: Array) -> None:
        """A sequence of numbers, or with (N, C) values of N structs of C numbers of one type (Point, ColorRGBA)."""
        self.numbers("I", len(values))
        self.array(values)

    def block(self, encoded: bytes) -> None:
        """Fields of at most four bytes each, encoded by `block_of`: what repeats in a message is encoded once."""
        self._align(4)
        self._append(encoded)

    def finish(self) -> bytes:
        """The complete message."""
        return b"".join(self._parts)

    def _align(self, size: int) -> None:
        if gap := -self._size % size:
            self._append(bytes(gap))

    def _append(self, part: bytes | memoryview) -> None:
        self._parts.append(part)
        self._size += len(part)


def block_of(fill: Callable[[CdrWriter], None]) -> bytes:
    """The bytes of the fields that `fill` writes, none wider than four bytes, for `CdrWriter.block`."""
    out = CdrWriter()
    fill(out)
    return out.finish()[len(ENCAPSULATION) :]


def begin(header: Header) -> CdrWriter:
    """A message that starts with this std_msgs/Header."""
    out = CdrWriter()
    put_header(out, header)
    return out


def put_header(out: CdrWriter, header: Header) -> None:
    """std_msgs/Header."""
    put_time(out, header.stamp_ns)
    out.string(header.frame)


def put_time(out: CdrWriter, time_ns: int) -> None:
    """builtin_interfaces/Time or Duration."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    out.numbers("i", seconds)
    out.numbers("I", nanoseconds)


def put_pose(out: CdrWriter, pose: Pose) -> None:
    """geometry_msgs/Pose or Transform: position, quaternion (x, y, z, w)."""
    out.numbers("d", *pose.translation, *pose.quaternion)


def put_pose_with_covariance(out: CdrWriter, pose: Pose, covariance: Array) -> None:
    """geometry_msgs/PoseWithCovariance; `covariance` (6, 6) in ROS order."""
    put_pose(out, pose)
    out.array(covariance.astype(np.float64))
