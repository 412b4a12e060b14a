"""What a running vehicle sends, as it comes: kept by time and matched by stamp. No ROS here.

`Intake` is fed by one thread (the ROS executor's) with serialised messages and hands out a `Draft` for each set that a
Synchronizer makes. The Synchronizers are the ring buffers: they hold the bytes of every sweep as long as a set may
want it, so that a slow predictor loses none. Nothing large is decoded in this thread.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perception.backlog import Backlog
from perception.datasets.rosbag_file import read_header
from perception.decode import decode_camera_info, stamp_ns
from perception.draft import Draft, Received
from perception.errors import DataError, PerceptionError
from perception.frames import FrameTree
from perception.readings import decode_odometry, decode_transform
from perception.rectify import CameraModel
from perception.sync import ClockJump, Synchronizer
from perception.vehicle import CameraSensor, VehicleConfig

Deserialize = Callable[[str, bytes], Any]
"""(message type such as sensor_msgs/msg/PointCloud2, its CDR bytes) -> the message."""


@dataclass(slots=True)
class Arrivals:
    """One topic's messages so far, times by time.monotonic()."""

    count: int = 0
    last_s: float = 0.0
    last_stamp_ns: int = 0


class Intake:
    """All that one vehicle sends. The `take` methods belong to one thread.

    Args:
        deserialize: makes messages of bytes.
        clock_jump_s: a stamp that falls back by more begins a new epoch.
        offered: called after each set; in lock step it waits, for of two sets of one message the second would
            supersede the first.

    Attributes:
        frames: the transforms.
        models: camera channel -> its lens.
        arrivals: topic -> its messages so far.
        dropped_nonfinite: channel -> points dropped because a number was not finite.
        refused: topic -> messages that were of no use.
        faults: topic -> what was wrong with the latest of them.
        jumps: how often the clock has jumped back.
    """

    def __init__(
        self, deserialize: Deserialize, clock_jump_s: float = 1.0, offered: Callable[[], object] = lambda: None
    ) -> None:
        self.frames = FrameTree()
        self.models: dict[str, CameraModel] = {}
        self.arrivals: dict[str, Arrivals] = {}
        self.dropped_nonfinite: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.faults: dict[str, PerceptionError] = {}
        self.jumps = 0
        self.deserialize = deserialize
        self._offered = offered
        self._jump_ns = round(clock_jump_s * 1e9)
        self._lanes: list[tuple[VehicleConfig, Synchronizer, list[Callable[[Draft], None]]]] = []
        self._backlogs: list[tuple[VehicleConfig, Backlog]] = []
        self._infos: dict[str, bytes] = {}
        self._newest_ns: dict[str, int] = {}  # of /tf, by child
        self._changed = threading.Condition()
        self._generation = 0  # of what `wait_until` waits for
        self._waiting: dict[int, int] = {}  # thread -> the generation that was not enough

    def watch(self, vehicle: VehicleConfig, offer: Callable[[Draft], None]) -> Synchronizer:
        """Offer the sets that a vehicle's part makes; parts that are equal share a Synchronizer and its Drafts."""
        for known, sync, offers in self._lanes:
            if known == vehicle:
                offers.append(offer)
                return sync
        sync = Synchronizer(vehicle.sync)
        self._lanes.append((vehicle, sync, [offer]))
        return sync

    def backlog(self, vehicle: VehicleConfig) -> Backlog:
        """IMU, odometry and GNSS messages from now on, for one system."""
        backlog = Backlog()
        self._backlogs.append((vehicle, backlog))
        return backlog

    def take(self, channel: str, topic: str, raw: bytes) -> None:
        """A sensor's message."""
        stamp = self._stamp_of(topic, raw)
        if stamp is None:
            return
        received = Received(raw, time.monotonic())
        for vehicle, sync, offers in self._lanes:
            if channel not in vehicle.sensors.channels:
                continue
            epoch = sync.epoch
            sets = sync.push(channel, stamp, received)
            if sync.epoch != epoch:
                assert sync.last_jump is not None
                self._jumped(sync.last_jump, sync)
            for synced in sets:
                draft = Draft(self, synced, sync.config.anchor)
                for offer in offers:
                    offer(draft)
                self._offered()

    def take_transforms(self, message: Any, topic: str, static: bool) -> None:
        """A tf2_msgs/TFMessage."""
        self._arrived(topic, max((stamp_ns(stated.header) for stated in message.transforms), default=0))
        for stated in message.transforms:
            try:
                transform = decode_transform(stated, topic)
                if static:
                    self.frames.add_static(transform.parent, transform.child, transform.pose)
                    continue
                newest = self._newest_ns.get(transform.child, transform.stamp_ns)
                if newest - transform.stamp_ns > self._jump_ns:
                    self._jumped(ClockJump(topic, newest, transform.stamp_ns))
                    newest = transform.stamp_ns
                self._newest_ns[transform.child] = max(newest, transform.stamp_ns)
                self.frames.add(transform.parent, transform.child, transform.stamp_ns, transform.pose)
            except PerceptionError as error:
                self.refuse(topic, error)
        self._notify()

    def take_camera_info(self, channel: str, sensor: CameraSensor, raw: bytes) -> None:
        """A sensor_msgs/CameraInfo; decoded where it says something new."""
        topic = sensor.camera_info
        if self._stamp_of(topic, raw) is None or self._infos.get(channel) == raw[12:]:  # all but the stamp
            return
        try:
            message = self.deserialize("sensor_msgs/msg/CameraInfo", raw)
            self.models[channel] = decode_camera_info(message, sensor.rectified, sensor.balance, topic)
        except PerceptionError as error:
            self.refuse(topic, error)
        self._infos[channel] = raw[12:]
        self._notify()

    def take_imu(self, message: Any, topic: str) -> None:
        self._arrived(topic, stamp_ns(message.header))
        for _, backlog in self._backlogs:
            backlog.add_imu(message)
        self._notify()

    def take_gnss(self, message: Any, topic: str) -> None:
        self._arrived(topic, stamp_ns(message.header))
        for _, backlog in self._backlogs:
            backlog.add_gnss(message)

    def take_odometry(self, message: Any, topic: str) -> None:
        self._arrived(topic, stamp_ns(message.header))
        for vehicle, backlog in self._backlogs:
            try:
                decode_odometry([message], vehicle.base_frame, topic)
            except PerceptionError as error:
                self.refuse(topic, error)
                return
            backlog.add_odometry(message)
        self._notify()

    def wait_until(self, predicate: Callable[[], bool], deadline_s: float) -> bool:
        """Whether the predicate holds, at the latest at a time of time.monotonic(); asked whenever /tf says more."""
        thread = threading.get_ident()
        with self._changed:
            try:
                while not (holds := predicate()) and (left_s := deadline_s - time.monotonic()) > 0:
                    self._waiting[thread] = self._generation
                    self._changed.wait(left_s)
                return holds
            finally:
                self._waiting.pop(thread, None)

    def is_waited_on(self, thread: int | None) -> bool:
        """Whether a thread (its `ident`) waits for more than has been taken so far."""
        with self._changed:
            return thread is not None and self._waiting.get(thread) == self._generation

    def _stamp_of(self, topic: str, raw: bytes) -> int | None:
        """A message's stamp, its arrival noted; None where it is damaged."""
        try:
            stamp = read_header(raw).stamp_ns
        except ValueError as error:
            self.refuse(topic, DataError(f"a message of {topic} is damaged: {error}", "check its publisher"))
            return None
        self._arrived(topic, stamp)
        return stamp

    def _arrived(self, topic: str, stamp: int) -> None:
        arrivals = self.arrivals.setdefault(topic, Arrivals())
        arrivals.count += 1
        arrivals.last_s, arrivals.last_stamp_ns = time.monotonic(), stamp

    def refuse(self, topic: str, error: PerceptionError) -> None:
        """Count a message that is of no use."""
        self.refused[topic] += 1
        self.faults[topic] = error

    def _jumped(self, jump: ClockJump, seen_by: Synchronizer | None = None) -> None:
        """Forget all that belongs to the time before the jump."""
        self.jumps += 1
        self.frames.clear()
        self._newest_ns.clear()
        for _, sync, _ in self._lanes:
            if sync is not seen_by:
                sync.clock_jumped(jump)
        for _, backlog in self._backlogs:
            backlog.clear()

    def _notify(self) -> None:
        with self._changed:
            self._generation += 1
            self._changed.notify_all()
