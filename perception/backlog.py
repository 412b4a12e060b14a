"""The IMU, odometry and GNSS messages that one system has not been given yet."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from perception.decode import stamp_ns
from perception.frames import FrameError, FrameTree
from perception.readings import decode_gnss, decode_imu, decode_odometry
from perception.types import Gnss, Imu, Odometry
from perception.vehicle import VehicleConfig

_KEPT = 2000
"""Of each kind, while the system does not predict: ten seconds at 200 Hz."""


class Backlog:
    """Messages in the order they came, until a sample takes those up to its stamp; a late one goes to the next sample.

    One thread appends, another takes.
    """

    def __init__(self) -> None:
        self.imu: deque[Any] = deque(maxlen=_KEPT)
        self.odometry: deque[Any] = deque(maxlen=_KEPT)
        self.gnss: deque[Any] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget all, as after a jump of the clock."""
        with self._lock:
            for kept in (self.imu, self.odometry, self.gnss):
                kept.clear()

    def take(
        self, vehicle: VehicleConfig, frames: FrameTree, until_ns: int
    ) -> tuple[Imu | None, Odometry | None, Gnss | None]:
        """The readings up to a stamp, the latest fix alone. Without the transform of its frame there is no IMU."""
        with self._lock:
            imu, odometry, fixes = (_take(kept, until_ns) for kept in (self.imu, self.odometry, self.gnss))
        turned = None
        if imu:
            try:
                frame = imu[0].header.frame_id.lstrip("/")
                turned = decode_imu(imu, frames.lookup(vehicle.base_frame, frame, until_ns).rotation)
            except FrameError:
                turned = None
        known = [fix for message in fixes if (fix := decode_gnss(message)) is not None]
        return turned, decode_odometry(odometry, vehicle.base_frame) if odometry else None, known[-1] if known else None


def _take(kept: deque[Any], until_ns: int) -> list[Any]:
    """The messages up to a stamp, in order of their stamps."""
    taken = []
    while kept and stamp_ns(kept[0].header) <= until_ns:
        taken.append(kept.popleft())
    return sorted(taken, key=lambda message: stamp_ns(message.header))
