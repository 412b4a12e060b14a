"""The tree of coordinate frames: who sits on whom, static or timed, and where any frame is at any stamp.

Each frame but the roots has one parent. A lookup walks from both frames to their lowest common ancestor, so a gap above
it does not matter. Between two neighbouring stamps translations are interpolated linearly and rotations spherically.
Nothing is extrapolated and nothing becomes identity: what is not known is a FrameError that says why and by how much.
"""

from __future__ import annotations

import difflib
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from perception.errors import PerceptionError
from perception.geometry import interpolate_pose, slerp
from perception.types import Array, Pose

FrameReason = Literal[
    "missing_frame", "not_connected", "before_buffer", "after_buffer", "two_parents", "static_and_timed", "cycle"
]

PosesAt = Callable[[Array], tuple[Array, Array]]
"""Stamps (T,) int64 -> rotations (T, 3, 3) and translations (T, 3); `partial(frames.poses, "odom", "base_link")`."""


class FrameError(PerceptionError):
    """A transform that is not known, or that contradicts the tree.

    Attributes:
        reason: which kind of fault it is, for counting.
    """

    def __init__(self, what: str, do: str, reason: FrameReason) -> None:
        super().__init__(what, do)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.do, self.reason)


@dataclass(slots=True)
class _Edge:
    """One child's transform to its parent: `static`, or readings sorted by stamp."""

    parent: str
    static: Pose | None = None
    stamps_ns: list[int] = field(default_factory=list)
    poses: dict[int, Pose] = field(default_factory=dict)


class FrameTree:
    """Static and timed transforms between named frames.

    Safe to share between the thread that receives transforms and the one that looks them up.

    Args:
        buffer_s: timed transforms older than the newest of the same child by more than this are forgotten.
    """

    def __init__(self, buffer_s: float = 30.0) -> None:
        self._buffer_ns = round(buffer_s * 1e9)
        self._edges: dict[str, _Edge] = {}
        self._lock = threading.RLock()

    @property
    def frames(self) -> tuple[str, ...]:
        """The names of all frames, sorted."""
        with self._lock:
            return tuple(sorted({*self._edges, *(edge.parent for edge in self._edges.values())}))

    def add_static(self, parent: str, child: str, parent_from_child: Pose) -> None:
        """State a transform that holds at all times; stated again, it replaces the former."""
        with self._lock:
            self._edge(parent, child, timed=False).static = parent_from_child

    def add(self, parent: str, child: str, stamp_ns: int, parent_from_child: Pose) -> None:
        """State a transform at one stamp, in any order; the same stamp again replaces the former.

        Raises:
            FrameError: `child` has another parent or a static transform, or would become its own ancestor.
        """
        with self._lock:
            edge = self._edge(parent, child, timed=True)
            if stamp_ns not in edge.poses:
                insort(edge.stamps_ns, stamp_ns)
            edge.poses[stamp_ns] = parent_from_child
            old = bisect_left(edge.stamps_ns, edge.stamps_ns[-1] - self._buffer_ns)
            for stamp in edge.stamps_ns[:old]:
                del edge.poses[stamp]
            del edge.stamps_ns[:old]

    def clear(self) -> None:
        """Forget the timed transforms, as after a jump of the clock; static ones stay."""
        with self._lock:
            self._edges = {child: edge for child, edge in self._edges.items() if edge.static is not None}

    def lookup(self, dst: str, src: str, stamp_ns: int) -> Pose:
        """`dst_from_src` at a stamp.

        Raises:
            FrameError: a frame is unknown, the two are not connected, or the stamp is outside what a buffer covers.
        """
        return Pose(*self._at(dst, src, stamp_ns))

    def lookup_across(self, dst: str, dst_stamp_ns: int, src: str, src_stamp_ns: int, fixed: str) -> Pose:
        """`dst` at one stamp from `src` at another, through a frame that does not move meanwhile (`odom`)."""
        rotation, translation = self._at(dst, fixed, dst_stamp_ns)
        then_rotation, then_translation = self._at(fixed, src, src_stamp_ns)
        return Pose(rotation @ then_rotation, rotation @ then_translation + translation)

    def poses(self, dst: str, src: str, stamps_ns: Array) -> tuple[Array, Array]:
        """`dst_from_src` at many stamps (T,) int64: rotations (T, 3, 3) and translations (T, 3), float64.

        Raises:
            FrameError: as `lookup`.
        """
        with self._lock:
            to_dst, to_src, ancestor = self._paths(dst, src)
            dst_rotation, dst_translation = self._ascend(to_dst, ancestor, stamps_ns)
            src_rotation, src_translation = self._ascend(to_src, ancestor, stamps_ns)
        dst_from_ancestor = dst_rotation.transpose(0, 2, 1)
        offset = src_translation - dst_translation
        return dst_from_ancestor @ src_rotation, (dst_from_ancestor @ offset[..., None])[..., 0]

    def _at(self, dst: str, src: str, stamp_ns: int) -> tuple[Array, Array]:
        """`dst_from_src` at a stamp: rotation (3, 3), translation (3,)."""
        with self._lock:
            to_dst, to_src, ancestor = self._paths(dst, src)
            dst_rotation, dst_translation = self._ascend_at(to_dst, ancestor, stamp_ns)
            src_rotation, src_translation = self._ascend_at(to_src, ancestor, stamp_ns)
        back = dst_rotation.T
        return back @ src_rotation, back @ (src_translation - dst_translation)

    def _edge(self, parent: str, child: str, timed: bool) -> _Edge:
        """The edge above `child`, made where there is none."""
        edge = self._edges.get(child)
        if edge is None:
            ancestors = [parent]
            while ancestors[-1] in self._edges:
                ancestors.append(self._edges[ancestors[-1]].parent)
            if child in ancestors:
                raise FrameError(
                    f"transform {parent!r} -> {child!r} closes a cycle: {' -> '.join(ancestors)}",
                    "a frame cannot be its own ancestor; swap or remove one transform",
                    "cycle",
                )
            edge = self._edges[child] = _Edge(parent)
        elif edge.parent != parent:
            raise FrameError(
                f"frame {child!r} has the parent {edge.parent!r} and is now given {parent!r}",
                "a frame has one parent: stop one of the two publishers, or publish the inverse",
                "two_parents",
            )
        elif timed == (edge.static is not None):
            raise FrameError(
                f"transform {parent!r} -> {child!r} is published both as static and with stamps",
                "stop one of the two publishers",
                "static_and_timed",
            )
        return edge

    def _paths(self, dst: str, src: str) -> tuple[list[str], list[str], str]:
        """Both frames' paths to their roots, and their lowest common ancestor."""
        to_dst, to_src = self._path(dst), self._path(src)
        for frame in to_dst:
            if frame in to_src:
                return to_dst, to_src, frame
        raise FrameError(
            f"no transform connects {dst!r} and {src!r}: {' -> '.join(to_dst)} and {' -> '.join(to_src)} "
            "are separate trees",
            f"publish the transform that joins {to_dst[-1]!r} and {to_src[-1]!r}",
            "not_connected",
        )

    def _path(self, frame: str) -> list[str]:
        """`frame` and its ancestors up to the root."""
        if frame not in self._edges and frame not in (known := self.frames):
            near = difflib.get_close_matches(frame, known, n=1)
            raise FrameError(
                f"no frame {frame!r}; there are: {', '.join(known) or 'none at all'}",
                f"{f'did you mean {near[0]!r}? ' if near else ''}publish it on /tf or /tf_static",
                "missing_frame",
            )
        path = [frame]
        while path[-1] in self._edges:
            path.append(self._edges[path[-1]].parent)
        return path

    def _ascend_at(self, path: list[str], ancestor: str, stamp_ns: int) -> tuple[Array, Array]:
        """`_ascend` at one stamp: rotation (3, 3), translation (3,). A sample asks for dozens."""
        rotation, translation = np.eye(3), np.zeros(3)
        for child in path[: path.index(ancestor)]:
            edge = self._edges[child]
            pose = edge.static if edge.static is not None else edge.poses.get(stamp_ns)
            if pose is not None:
                up, shift = pose.rotation, pose.translation
            else:
                up, shift = _interpolate_at(edge, child, stamp_ns)
            rotation, translation = up @ rotation, up @ translation + shift
        return rotation, translation

    def _ascend(self, path: list[str], ancestor: str, stamps_ns: Array) -> tuple[Array, Array]:
        """`ancestor_from_<path[0]>` at stamps (T,): rotations (T, 3, 3), translations (T, 3)."""
        rotation, translation = np.tile(np.eye(3), (len(stamps_ns), 1, 1)), np.zeros((len(stamps_ns), 3))
        for child in path[: path.index(ancestor)]:
            edge = self._edges[child]
            if edge.static is not None:
                up, shift = edge.static.rotation, edge.static.translation
            else:
                up, shift = _interpolate(edge, child, stamps_ns)
            translation = (up @ translation[..., None])[..., 0] + shift
            rotation = up @ rotation
        return rotation, translation


def _interpolate_at(edge: _Edge, child: str, stamp_ns: int) -> tuple[Array, Array]:
    """`parent_from_child` at a stamp between two of the edge's readings: rotation (3, 3), translation (3,)."""
    _check_covered(edge, child, stamp_ns, stamp_ns)
    index = bisect_right(edge.stamps_ns, stamp_ns)
    before_ns, after_ns = edge.stamps_ns[index - 1], edge.stamps_ns[index]
    pose = interpolate_pose(
        edge.poses[before_ns], edge.poses[after_ns], (stamp_ns - before_ns) / (after_ns - before_ns)
    )
    return pose.rotation, pose.translation


def _check_covered(edge: _Edge, child: str, first_ns: int, last_ns: int) -> None:
    if first_ns < edge.stamps_ns[0]:
        raise _outside(edge, child, first_ns, "before_buffer", edge.stamps_ns[0] - first_ns)
    if last_ns > edge.stamps_ns[-1]:
        raise _outside(edge, child, last_ns, "after_buffer", last_ns - edge.stamps_ns[-1])


def _interpolate(edge: _Edge, child: str, stamps_ns: Array) -> tuple[Array, Array]:
    """`parent_from_child` at stamps (T,) within the edge's readings: rotations (T, 3, 3), translations (T, 3)."""
    if not len(stamps_ns):
        return np.zeros((0, 3, 3)), np.zeros((0, 3))
    first, last = int(stamps_ns.min()), int(stamps_ns.max())
    _check_covered(edge, child, first, last)
    window = edge.stamps_ns[bisect_right(edge.stamps_ns, first) - 1 : bisect_left(edge.stamps_ns, last) + 1]
    poses = [edge.poses[stamp] for stamp in window]
    if len(window) == 1:
        return (
            np.tile(poses[0].rotation, (len(stamps_ns), 1, 1)),
            np.tile(poses[0].translation, (len(stamps_ns), 1)),
        )
    # Seconds since the window's start: float64 holds its nanoseconds exactly, which it could not since 1970.
    known = np.array([stamp - window[0] for stamp in window]) * 1e-9
    asked = (stamps_ns - window[0]) * 1e-9
    before = np.clip(np.searchsorted(known, asked, side="right") - 1, 0, len(window) - 2)
    fraction = (asked - known[before]) / (known[before + 1] - known[before])
    quaternions = np.stack([pose.quaternion for pose in poses])
    translations = np.stack([pose.translation for pose in poses])
    step = translations[before + 1] - translations[before]
    return (
        slerp(quaternions[before], quaternions[before + 1], fraction),
        translations[before] + fraction[:, None] * step,
    )


def _outside(edge: _Edge, child: str, stamp_ns: int, reason: FrameReason, miss_ns: int) -> FrameError:
    if reason == "before_buffer":
        do = "the transform starts too late or was forgotten: raise buffer_s, or drop data from before it started"
    else:
        do = "wait for newer transforms, or publish them more often; stamps are never extrapolated"
    first_s, last_s = edge.stamps_ns[0] / 1e9, edge.stamps_ns[-1] / 1e9
    return FrameError(
        f"{edge.parent!r} -> {child!r} is known from {first_s:.3f} to {last_s:.3f} s; "
        f"{stamp_ns / 1e9:.3f} s is {miss_ns / 1e6:.1f} ms {reason.removesuffix('_buffer')}",
        do,
        reason,
    )
