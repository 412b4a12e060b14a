"""A sample in the making: one synchronised set of messages that wait, as bytes, to be wanted.

It is made into a Sample in the thread that asks for it, which waits a bounded time for the transforms and calibrations
that are still on their way. A message is decoded once, however many samples and systems use it. The bag reader makes
its samples of the same parts (`sync`, `assembly`), so both are the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from perception.assembly import Placed, Reading, decode_reading, ego_from_sensor, merge
from perception.datasets.rosbag_file import COMPRESSED_IMAGE, IMAGE, POINT_CLOUD
from perception.errors import PerceptionError
from perception.frames import FrameError
from perception.sync import SyncedSet
from perception.types import PointCloud, Sample
from perception.vehicle import CameraSensor, CloudSensor, VehicleConfig

if TYPE_CHECKING:
    from perception.intake import Intake


@dataclass(slots=True, eq=False)
class Received:
    """A sensor's message as it came; `reading` once it was decoded."""

    raw: bytes
    received_s: float
    reading: Reading | None = None


class Prepared(NamedTuple):
    """A Draft made into a Sample.

    Attributes:
        sample: without IMU, odometry and GNSS.
        used: channel -> stamps of its messages, newest first.
        masked: channel -> why it is not in the sample though it had a message.
        stages: name -> seconds; `wait_transforms` is the time in which transforms and calibrations were awaited.
    """

    sample: Sample
    used: Mapping[str, tuple[int, ...]]
    masked: Mapping[str, str]
    stages: Mapping[str, float]


class Draft:
    """One synchronised set, on its way to a Sample; its anchor's message came at `received_s` (time.monotonic())."""

    def __init__(self, intake: Intake, synced: SyncedSet, anchor: str) -> None:
        self.synced = synced
        self.received_s: float = synced.matches[anchor].payload.received_s
        self._intake = intake
        self._lock = threading.Lock()
        self._prepared: list[tuple[VehicleConfig, Prepared | PerceptionError]] = []

    def prepare(self, vehicle: VehicleConfig, pool: Executor, wait_s: float) -> Prepared:
        """The Sample that a vehicle's part makes of the set; made once, also for several systems that see the same.

        Args:
            vehicle: the sensors to read, of those that the set was made for.
            pool: decodes images.
            wait_s: longest wait for transforms and calibrations.

        Raises:
            DataError: a bad message.
            FrameError: no transforms for the anchor's message.
        """
        with self._lock:
            result = next((result for known, result in self._prepared if known == vehicle), None)
            if result is None:
                result = self._try(vehicle, pool, time.monotonic() + wait_s)
                self._prepared.append((vehicle, result))
        if isinstance(result, PerceptionError):
            raise result
        return result

    def frame_of(self, channel: str) -> str:
        """The coordinate frame of a sensor whose message was decoded."""
        reading = self.synced.matches[channel].payload.reading
        assert reading is not None
        return reading.frame

    def _try(self, vehicle: VehicleConfig, pool: Executor, deadline_s: float) -> Prepared | PerceptionError:
        try:
            return self._make(vehicle, pool, deadline_s)
        except PerceptionError as error:
            return error

    def _make(self, vehicle: VehicleConfig, pool: Executor, deadline_s: float) -> Prepared:
        intake, start_s = self._intake, time.monotonic()
        messages = self._messages(vehicle)
        cameras = {c for c in messages if isinstance(vehicle.sensors.channels[c], CameraSensor)}
        intake.wait_until(lambda: cameras <= intake.models.keys(), deadline_s)
        masked = dict.fromkeys(cameras - intake.models.keys(), "no calibration")
        messages = {channel: received for channel, received in messages.items() if channel not in masked}
        decode_s = time.monotonic()
        readings = self._decode(vehicle, messages, pool)
        decoded_s = time.monotonic()
        place_s, placed, uncovered = self._place(vehicle, readings, deadline_s)
        merge_s = time.monotonic()
        sample = merge(vehicle, self.synced.stamp_ns, placed, intake.frames)
        used = {channel: tuple(one.reading.stamp_ns for one in found) for channel, found in placed.items()}
        stages = {
            "decode": decoded_s - decode_s,
            "wait_transforms": decode_s - start_s + merge_s - decoded_s - place_s,
            "transforms": place_s,
            "assemble": time.monotonic() - merge_s,
        }
        return Prepared(replace(sample, token=str(sample.stamp_ns)), used, {**masked, **uncovered}, stages)

    def _messages(self, vehicle: VehicleConfig) -> dict[str, list[Received]]:
        """Channel -> messages, newest first."""
        found = {}
        for channel, sensor in vehicle.sensors.channels.items():
            if channel in self.synced.matches:
                matches = [self.synced.matches[channel], *self.synced.past[channel]][: vehicle.depth(sensor)]
                found[channel] = [match.payload for match in matches]
        return found

    def _decode(
        self, vehicle: VehicleConfig, messages: Mapping[str, Sequence[Received]], pool: Executor
    ) -> dict[str, list[Reading]]:
        """Images in the pool, clouds meanwhile in this thread."""
        sensors = vehicle.sensors.channels
        images = {
            channel: pool.submit(self._reading, channel, sensors[channel], received[0])
            for channel, received in messages.items()
            if isinstance(sensors[channel], CameraSensor)
        }
        return {
            channel: [images[channel].result()]
            if channel in images
            else [self._reading(channel, sensors[channel], one) for one in received]
            for channel, received in sorted(messages.items(), key=lambda item: item[0] in images)
        }

    def _place(
        self, vehicle: VehicleConfig, readings: dict[str, list[Reading]], deadline_s: float
    ) -> tuple[float, dict[str, list[Placed]], dict[str, str]]:
        """The readings that the transforms place once these have come, or the time is up; and why others are not.

        Before them, how long the last attempt took: what was not waiting.

        Raises:
            FrameError: the anchor's is not among them.
        """
        frames, stamp, anchor = self._intake.frames, self.synced.stamp_ns, vehicle.sync.anchor
        placed: dict[str, list[Placed]] = {}
        missing: dict[str, FrameError] = {}
        spent_s = 0.0

        def known() -> bool:
            nonlocal spent_s
            begun_s = time.monotonic()
            try:
                return place()
            finally:
                spent_s = time.monotonic() - begun_s

        def place() -> bool:
            placed.clear()
            missing.clear()
            try:  # A bag may be without odometry; on the road it is late, or the vehicle's motion is not known.
                frames.lookup(vehicle.odom_frame, vehicle.base_frame, stamp)
            except FrameError as error:
                missing[anchor] = error
                return error.reason == "before_buffer"
            for channel, found in readings.items():
                deskewed = getattr(vehicle.sensors.channels[channel], "deskew", False)
                for i, reading in enumerate(found):
                    try:
                        pose = ego_from_sensor(vehicle, frames, stamp, reading.frame, reading.stamp_ns)
                        for end_ns in _ends(reading) if deskewed else ():
                            frames.lookup(vehicle.odom_frame, reading.frame, end_ns)
                    except FrameError as error:
                        missing.setdefault(channel, error)
                        if i == 0:  # without its key reading a channel is missing
                            break
                        continue
                    placed.setdefault(channel, []).append(Placed(reading, pose))
            return all(error.reason == "before_buffer" for error in missing.values())

        self._intake.wait_until(known, deadline_s)
        if anchor not in placed:
            raise missing[anchor]
        return spent_s, placed, {c: f"no transform ({missing[c].reason})" for c in readings if c not in placed}

    def _reading(self, channel: str, sensor: CloudSensor | CameraSensor, received: Received) -> Reading:
        """A message decoded, the first time that it is asked for.

        Raises:
            DataError: as `decode_reading`.
        """
        if received.reading is None or _lacks(received.reading, sensor):
            if isinstance(sensor, CloudSensor):
                kind = POINT_CLOUD
            else:
                kind = COMPRESSED_IMAGE if sensor.is_compressed else IMAGE
            message = self._intake.deserialize(kind, received.raw)
            received.reading = decode_reading(message, sensor, self._intake.models.get(channel))
            self._intake.dropped_nonfinite[channel] += received.reading.dropped_nonfinite
        return received.reading


def _ends(reading: Reading) -> tuple[int, ...]:
    """The stamps of a cloud's first and last point, where points have times."""
    assert isinstance(reading.data, PointCloud)
    offset = reading.data.fields.get("time_offset")
    if offset is None or not len(offset):
        return ()
    return tuple(reading.stamp_ns + round(float(end) * 1e9) for end in (offset.min(), offset.max()))


def _lacks(reading: Reading, sensor: CloudSensor | CameraSensor) -> bool:
    """Whether a reading that another system asked for is without a field that this one needs."""
    if not isinstance(sensor, CloudSensor) or not isinstance(reading.data, PointCloud):
        return False
    return any(name not in reading.data.fields for name in sensor.needed)
