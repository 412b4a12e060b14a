"""The transforms of a bag as arrays: any stamp's frames at random, and which stamps they cover."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from perception.frames import FrameError, FrameTree
from perception.types import Array, Pose
from perception.vehicle import VehicleConfig

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


def covered_readings(
    config: VehicleConfig,
    tree: FrameTree,
    frame: str,
    sample_stamp_ns: Array,
    stamp_ns: Array,
    used: Array,
    errors: list[FrameError],
) -> Array:
    """(S, k) bool: the readings that can be brought into ego at their sample's stamp.

    Args:
        config: the vehicle.
        tree: knowing at least the ends of what is covered.
        frame: the sensor's.
        sample_stamp_ns: (S,).
        stamp_ns: (S, k) of the readings.
        used: (S, k), false where there is no reading.
        errors: what the tree says of those that are not covered is added here.
    """
    odom, base = config.odom_frame, config.base_frame
    at_once = used & (stamp_ns == sample_stamp_ns[:, None])
    moved = used & ~at_once
    good = np.zeros_like(moved)
    good[at_once] = _known(tree, base, frame, stamp_ns[at_once], errors)
    if odom in tree.frames or moved.any():
        good[moved] = _known(tree, odom, frame, stamp_ns[moved], errors)
        good &= _known(tree, odom, base, sample_stamp_ns, errors)[:, None]
    return good


def _known(tree: FrameTree, dst: str, src: str, stamps: Array, errors: list[FrameError]) -> Array:
    """(T,) bool: the stamps at which the tree knows `dst_from_src`; what it says of others is added to `errors`."""
    if not len(stamps):
        return np.zeros(0, bool)
    try:
        tree.poses(dst, src, stamps)
    except FrameError as error:
        errors.append(error)
        if len(stamps) == 1 or error.reason not in ("before_buffer", "after_buffer"):
            return np.zeros(len(stamps), bool)
        middle = len(stamps) // 2
        return np.concatenate([_known(tree, dst, src, half, errors) for half in (stamps[:middle], stamps[middle:])])
    return np.ones(len(stamps), bool)
