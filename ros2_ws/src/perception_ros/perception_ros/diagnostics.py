"""What the node says of itself, once a second on /diagnostics: inputs, transforms, clock, and each system.

A status is OK, WARN (something is missing or slow, predictions still come) or ERROR (none come). Every message says
what, where and what to do; counts and rates are its values. Rates are those since the last time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node

from perception.datasets.rosbag_file import TF_TOPIC
from perception.frames import FrameError
from perception.intake import Arrivals, Intake
from perception.vehicle import CameraSensor, CloudSensor
from perception.worker import Worker
from perception_ros.inputs import Inputs

SILENT_S = 2.0
"""An input or a system that gives nothing for so long is said to be silent."""
CLOCK_OFF_S = 10.0
"""Stamps so far from the node's clock are of another clock."""

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


class Diagnostics:
    """Statuses of an active node."""

    def __init__(self, node: Node, intake: Intake, inputs: Inputs, workers: Sequence[Worker]) -> None:
        self._node, self._intake, self._inputs, self._workers = node, intake, inputs, workers
        self._since_s = self._last_s = time.monotonic()
        self._counts: dict[str, int] = {}

    def statuses(self) -> list[DiagnosticStatus]:
        """One a topic, one of the transforms, of the clock, and of each system."""
        now_s = time.monotonic()
        elapsed_s, self._last_s = max(now_s - self._last_s, 1e-3), now_s
        found = [self._input(topic, now_s, elapsed_s) for topic in self._inputs.types]
        found += [self._transforms(), self._clock()]
        return found + [self._system(worker, now_s, elapsed_s) for worker in self._workers]

    def _rate(self, name: str, count: int, elapsed_s: float) -> float:
        before = self._counts.get(name, 0)
        self._counts[name] = count
        return (count - before) / elapsed_s

    def _input(self, topic: str, now_s: float, elapsed_s: float) -> DiagnosticStatus:
        arrivals = self._intake.arrivals.get(topic, Arrivals())
        values: dict[str, Any] = {
            "received": arrivals.count,
            "rate_hz": f"{self._rate(topic, arrivals.count, elapsed_s):.1f}",
            "refused": self._intake.refused[topic],
        }
        if arrivals.count:
            values["age_s"] = f"{now_s - arrivals.last_s:.2f}"
        channels, optional = self._channels(topic), self._is_optional(topic)
        for worker, channel in channels:
            counts = worker.sync.counts[channel]
            for reason in ("used", "unused", "incomplete", "stale", "missing", "out_of_order", "clock_jump"):
                values[f"{worker.system.name}.{reason}"] = getattr(counts, reason)
            for (masked, why), times in worker.masked.items():
                if masked == channel:
                    values[f"{worker.system.name}.{why}"] = times
        left_out = self._left_out(channels, now_s)
        if dropped := sum(self._intake.dropped_nonfinite[channel] for channel in {c for _, c in channels}):
            values["points_not_finite"] = dropped
        silent_s = now_s - (arrivals.last_s or self._since_s)
        if silent_s > SILENT_S and not optional:
            anchor = any(channel == worker.system.watched.sync.anchor for worker, channel in channels)
            return status(f"input {topic}", ERROR if anchor else WARN, self._why_silent(topic, silent_s), values)
        if self._rate(f"refused {topic}", self._intake.refused[topic], 1.0) > 0:
            return status(f"input {topic}", WARN, f"messages are refused: {self._intake.faults[topic]}", values)
        if left_out:
            return status(f"input {topic}", WARN, left_out, values)
        return status(f"input {topic}", OK, f"{values['rate_hz']} Hz", values)

    def _left_out(self, channels: Sequence[tuple[Worker, str]], now_s: float) -> str:
        """Why a sensor that sends is not in most samples since the last time; empty where it is."""
        for worker, channel in channels:
            name, counts, sensor = worker.system.name, worker.sync.counts[channel], worker.system.watched.sensors
            stale = self._rate(f"{name} {channel} stale", counts.stale, 1.0)
            matched = self._rate(f"{name} {channel} matched", counts.matched, 1.0)
            if stale > matched:
                tolerance_s = sensor.channels[channel].tolerance_s
                return (
                    f"left out of {stale:.0f} of {stale + matched:.0f} samples of {name}: no stamp within "
                    f"{tolerance_s} s of the anchor's; check its clock, or set its offset_s or tolerance_s"
                )
            masked = {why: times for (one, why), times in dict(worker.masked).items() if one == channel}
            rising = [why for why, n in masked.items() if self._rate(f"{name} {channel} {why}", n, 1.0) > 0]
            if rising:
                return (
                    f"left out of predictions of {name}: {rising[0]}{self._calibration_fault(sensor.channels[channel])}"
                )
        return ""

    def _calibration_fault(self, sensor: CloudSensor | CameraSensor) -> str:
        """What is wrong with a camera's CameraInfo, for the end of a sentence."""
        if not isinstance(sensor, CameraSensor):
            return ""
        fault = self._intake.faults.get(sensor.camera_info)
        if fault is not None:
            return f"; {fault}"
        come = sensor.camera_info in self._intake.arrivals
        return "" if come else f"; nothing on {sensor.camera_info}, set info_topic"

    def _channels(self, topic: str) -> list[tuple[Worker, str]]:
        return [
            (worker, channel)
            for worker in self._workers
            for channel, sensor in worker.system.watched.sensors.channels.items()
            if sensor.topic == topic
        ]

    def _is_optional(self, topic: str) -> bool:
        """Whether the vehicle may do without: all that is no sensor's own topic says nothing by being silent."""
        return not self._channels(topic)

    def _why_silent(self, topic: str, silent_s: float) -> str:
        publishers = self._node.get_publishers_info_by_topic(topic)
        if publishers:
            names = ", ".join(sorted({end.node_name for end in publishers}))
            return (
                f"no message for {silent_s:.1f} s though {names} publishes it; "
                "check that process, and that it has the Fast DDS profile (configs/fastdds_shm.xml)"
            )
        wanted = self._inputs.types[topic]
        others = [name for name, types in self._node.get_topic_names_and_types() if wanted in types and name != topic]
        own = f"{self._node.get_namespace().rstrip('/')}/perception/"
        others = [name for name in others if self._node.count_publishers(name) and not name.startswith(own)]
        near = f"{wanted} is on: {', '.join(sorted(others)[:6])}" if others else f"nobody publishes {wanted}"
        return f"no message for {silent_s:.1f} s and no publisher; {near}; set the topic in the configuration"

    def _transforms(self) -> DiagnosticStatus:
        frames = self._intake.frames.frames
        values = {"frames": ", ".join(frames), "clock_jumps": self._intake.jumps}
        lost = {w.system.name: w.dropped["no_transform"] for w in self._workers if w.dropped["no_transform"]}
        values |= {f"{name}.dropped": count for name, count in lost.items()}
        rising = [name for name, count in lost.items() if self._rate(f"tf {name}", count, 1.0) > 0]
        for worker in self._workers:
            if worker.system.name in rising and worker.last_error and isinstance(worker.last_error[1], FrameError):
                error = worker.last_error[1]
                message = f"{error.reason}: {error.what}; {error.do}"
                return status("transforms", ERROR, f"{self._other_clock()}{message}", values)
        if not frames:
            return status("transforms", WARN, "nothing on /tf and /tf_static yet; publish the sensors' mounts", values)
        return status("transforms", OK, f"{len(frames)} frames", values)

    def _other_clock(self) -> str:
        """Where /tf has another clock than the sensors, what to do about it."""
        arrivals = self._intake.arrivals
        stamps = [arrivals[topic].last_stamp_ns for topic in self._sensor_topics() if topic in arrivals]
        if TF_TOPIC not in arrivals or not stamps:
            return ""
        ahead_s = (arrivals[TF_TOPIC].last_stamp_ns - max(stamps)) / 1e9
        if abs(ahead_s) < CLOCK_OFF_S:
            return ""
        where = "ahead of" if ahead_s > 0 else "behind"
        return (
            f"clock mismatch: {TF_TOPIC} is stamped {abs(ahead_s):.1f} s {where} the sensors; give their drivers and "
            "the publisher of odometry one clock (of a bag: use_sim_time true for all nodes); "
        )

    def _sensor_topics(self) -> set[str]:
        return {sensor.topic for w in self._workers for sensor in w.system.watched.sensors.channels.values()}

    def _clock(self) -> DiagnosticStatus:
        now_ns = self._node.get_clock().now().nanoseconds
        simulated = self._node.get_parameter("use_sim_time").value
        values = {"use_sim_time": simulated, "now_s": f"{now_ns / 1e9:.3f}"}
        if simulated and now_ns == 0:
            message = "use_sim_time is true and nothing is on /clock; play a bag with /clock, or set use_sim_time false"
            return status("clock", ERROR, message, values)
        topics = self._sensor_topics()
        stamps = [a.last_stamp_ns for topic, a in self._intake.arrivals.items() if topic in topics]
        if not stamps:
            return status("clock", OK, "no stamps to compare with yet", values)
        off_s = (now_ns - max(stamps)) / 1e9
        values["newest_stamp_is_behind_s"] = f"{off_s:.3f}"
        silent = time.monotonic() - max(a.last_s for a in self._intake.arrivals.values()) > SILENT_S
        if abs(off_s) > CLOCK_OFF_S and not silent:
            cure = "set use_sim_time true, as for a bag" if not simulated else "set use_sim_time false for live sensors"
            where = "behind" if off_s > 0 else "ahead of"
            message = f"sensors' stamps are {abs(off_s):.1f} s {where} the node's clock; {cure}, or mend the stamps"
            return status("clock", WARN, message, values)
        return status("clock", OK, f"stamps are {off_s:.3f} s old", values)

    def _system(self, worker: Worker, now_s: float, elapsed_s: float) -> DiagnosticStatus:
        system = worker.system
        rate = self._rate(f"system {system.name}", worker.published, elapsed_s)
        recent = [stages for done_s, stages in list(worker.latencies) if now_s - done_s < max(2 * elapsed_s, SILENT_S)]
        values: dict[str, Any] = {"rate_hz": f"{rate:.1f}", "offered": worker.offered, "published": worker.published}
        values |= {f"dropped.{reason}": count for reason, count in worker.dropped.items()}
        for name in recent[-1] if recent else ():
            times = [1e3 * stages[name] for stages in recent if name in stages]
            p50, p95 = np.percentile(times, [50, 95])
            values[f"{name}_ms"] = f"p50 {p50:.1f}, p95 {p95:.1f}"
        degraded = system.predictor.degraded
        if degraded:
            values["degraded"] = degraded
        if worker.last_error is not None:
            stamp, error = worker.last_error
            values["last_error"] = f"at {stamp / 1e9:.3f} s: {type(error).__name__}: {error}"
        level, message = self._verdict(worker, now_s, [stages["end_to_end"] for stages in recent])
        if level == OK and degraded and recent:
            level, message = WARN, f"predictions do without: {degraded}"
        return status(f"system {system.name}", level, message or f"{rate:.1f} Hz", values)

    def _verdict(self, worker: Worker, now_s: float, ages_s: Sequence[float]) -> tuple[bytes, str]:
        """How a system does; an empty message where all is well."""
        name, budget_s = worker.system.name, worker.system.config.latency_budget_s
        fates = self._counts_since(worker)
        bad = {reason: n for reason, n in fates.items() if reason in ("bad_message", "failed", "no_transform") and n}
        if bad and worker.last_error is not None:
            level = WARN if ages_s else ERROR
            return level, f"{_listed(bad)}; the last at {worker.last_error[0] / 1e9:.3f} s: {worker.last_error[1]}"
        if not ages_s and fates.get("no_listener"):
            return OK, "nobody listens, so nothing is computed"
        if not ages_s and now_s - self._since_s > SILENT_S:
            return ERROR, self._why_no_sample(worker)
        late = [age for age in ages_s if budget_s is not None and age > budget_s]
        if late and budget_s is not None:
            level = ERROR if len(late) == len(ages_s) and len(late) > 2 else WARN
            what = f"{len(late)} of {len(ages_s)} predictions were later than {1e3 * budget_s:.0f} ms"
            return (
                level,
                f"{what} (worst {1e3 * max(late):.0f} ms): use a faster device, or set systems.{name}.max_rate_hz",
            )
        degraded = worker.system.predictor.degraded
        return (WARN, f"predicts without all it needs: {degraded}") if degraded and ages_s else (OK, "")

    def _counts_since(self, worker: Worker) -> dict[str, int]:
        """Reason -> Drafts dropped for it since the last time."""
        return {
            reason: round(self._rate(f"{worker.system.name} {reason}", count, 1.0))
            for reason, count in list(worker.dropped.items())
        }

    def _why_no_sample(self, worker: Worker) -> str:
        anchor = worker.system.watched.sync.anchor
        counts = worker.sync.counts[anchor]
        topic = worker.system.watched.sensors.channels[anchor].topic
        if not counts.received:
            return f"no predictions: nothing on {topic}, whose messages make the samples"
        if counts.incomplete and worker.sync.last_incomplete is not None:
            absent = worker.sync.last_incomplete.absent
            sensors = worker.system.watched.sensors.channels
            why = [f"{channel} is {reason}" for channel, reason in absent.items() if sensors[channel].required]
            return f"no predictions: {', '.join(why)}, and it is required"
        if worker.in_hand:
            return "no predictions: one is being made, or waits for transforms"
        return f"no predictions: {topic} has stopped"


def array(node: Node, statuses: Sequence[DiagnosticStatus]) -> DiagnosticArray:
    """The message of statuses, each under the node's name."""
    message = DiagnosticArray()
    message.header.stamp = node.get_clock().now().to_msg()
    for one in statuses:
        one.name = f"{node.get_name()}: {one.name}"
        one.hardware_id = node.get_fully_qualified_name()
    message.status = list(statuses)
    return message


def status(name: str, level: bytes, message: str, values: Mapping[str, Any]) -> DiagnosticStatus:
    """A status."""
    pairs = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
    return DiagnosticStatus(name=name, level=level, message=message, values=pairs)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
