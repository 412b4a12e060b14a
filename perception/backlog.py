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

    One thread adds, another takes.
    """

    def __init__(self) -> None:
        self._imu: deque[Any] = deque(maxlen=_KEPT)
        self._odometry: deque[Any] = deque(maxlen=_KEPT)
        self._gnss: deque[Any] = deque(maxlen=_KEPT)
        self._newest_ns: dict[str, int] = {}  # of IMU and odometry
        self._lock = threading.Lock()

    def add_imu(self, message: Any) -> None:
        """A sensor_msgs/Imu."""
        with self._lock:
            self._imu.append(message)
            self._newest_ns["imu"] = stamp_ns(message.header)

    def add_odometry(self, message: Any) -> None:
        """A nav_msgs/Odometry."""
        with self._lock:
            self._odometry.append(message)
            self._newest_ns["odometry"] = stamp_ns(message.header)

    def add_gnss(self, message: Any) -> None:
        """A sensor_msgs/NavSatFix; they are too rare to be waited for."""
        with self._lock:
            self._gnss.append(message)

    def clear(self) -> None:
        """Forget all, as after a jump of the clock."""
        with self._lock:
            for kept in (self._imu, self._odometry, self._gnss):
                kept.clear()
            self._newest_ns.clear()

    def reaches(self, stamp: int) -> bool:
        """Whether no more IMU and odometry up to a stamp are to come; of those that have ever come."""
        with self._lock:
            return all(newest >= stamp for newest in self._newest_ns.values())

    def take(
        self, vehicle: VehicleConfig, frames: FrameTree, until_ns: int
    ) -> tuple[Imu | None, Odometry | None, Gnss | None]:
        """The readings up to a stamp, the latest fix alone. Without the transform of its frame there is no IMU."""
        with self._lock:
            imu, odometry, fixes = (_take(kept, until_ns) for kept in (self._imu, self._odometry, self._gnss))
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
