"""The transforms of a bag as arrays: any stamp's frames at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from perception.frames import FrameTree
from perception.types import Array, Pose

_FOREVER_S = 1e9


@dataclass(frozen=True)
class TimedEdge:
    """The readings of one timed transform, by epoch, then stamp.

    Attributes:
        parent, child: frames.
        epoch, stamp_ns: (T,) int64.
        pose: (T, 7) translation x y z, quaternion x y z w, of `parent_from_child`.
    """

    parent: str
    child: str
    epoch: Array
    stamp_ns: Array
    pose: Array


@dataclass(frozen=True)
class Transforms:
    """All transforms of a bag, small enough to travel to a worker process."""

    static: Mapping[str, tuple[str, Pose]]  # child -> parent, parent_from_child
    timed: tuple[TimedEdge, ...]

    def tree(self, epoch: int, first_ns: int | None = None, last_ns: int | None = None) -> FrameTree:
        """The frames of an epoch: exact between two stamps, and knowing the ends of what the bag covers.

        Without stamps only the ends are there: enough to tell what is covered, not where anything is.
        """
        tree = FrameTree(_FOREVER_S)
        for child, (parent, pose) in self.static.items():
            tree.add_static(parent, child, pose)
        for edge in self.timed:
            begin, end = np.searchsorted(edge.epoch, [epoch, epoch + 1]).tolist()
            if begin == end:
                continue
            rows = {begin, end - 1}
            if first_ns is not None and last_ns is not None:
                stamps = edge.stamp_ns[begin:end]
                before = begin + max(int(np.searchsorted(stamps, first_ns, "right")) - 1, 0)
                after = begin + min(int(np.searchsorted(stamps, last_ns, "left")), end - begin - 1)
                rows |= set(range(before, after + 1))
            for row in rows:
                pose = Pose.from_quaternion(edge.pose[row, 3:], edge.pose[row, :3].copy())
                tree.add(edge.parent, edge.child, int(edge.stamp_ns[row]), pose)
        return tree
