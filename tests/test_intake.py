"""The live half against the bag reader: the same messages, one by one, give the same samples; and what goes wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags (extra: bag) is not installed")

from short_drive import COUNT, NEEDS, PERIOD_NS, START_NS, VEHICLE, Recorder, write_drive

from perception.datasets.rosbag import Rosbag, RosbagConfig
from perception.datasets.rosbag_file import BagFile, Logged, typestore
from perception.errors import DataError
from perception.intake import Intake
from perception.systems import System, SystemConfig, vehicle_for
from perception.types import Sample
from perception.worker import Predicted, Worker

SMALL_TOPICS = {"/tf": "take_transforms", "/tf_static": "take_transforms", "/imu": "take_imu", "/odom": "take_odometry"}


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    return write_drive(tmp_path_factory.mktemp("bag") / "drive")


class Live:
    """Systems fed with messages of a bag."""

    def __init__(self, bag: Path, wait_s: float = 5.0) -> None:
        self.file = BagFile(bag)
        self.intake = Intake(lambda kind, raw: typestore().deserialize_cdr(raw, kind), VEHICLE.clock_jump_s)
        self.pool, self.workers, self._wait_s = ThreadPoolExecutor(2), [], wait_s
        self.published: list[Predicted] = []
        self.fatal: list[str] = []
        self.wanted = True

    def system(self, predictor: Recorder, name: str = "recorder", **keys) -> Worker:
        config = SystemConfig.model_validate({"predictor": SystemConfig.model_construct(), **keys})
        narrow = vehicle_for(VEHICLE, config, predictor.needs, name)
        system = System(name, config, predictor, narrow, narrow)
        worker = Worker(
            system, self.intake, self.pool, self._wait_s, lambda: self.wanted, self._publish, self.fatal.append
        )
        self.workers.append(worker)
        worker.start()
        return worker

    def _publish(self, predicted: Predicted) -> None:
        predicted.stages["end_to_end"] = 0.0
        self.published.append(predicted)

    def take(self, message: Logged) -> None:
        topic, raw = message.topic, bytes(message.raw)
        if topic == "/lidar_top":
            self.intake.take("lidar_top", topic, raw)
        elif topic == "/cam_front/image_rect_compressed":
            self.intake.take("cam_front", topic, raw)
        elif topic == "/cam_front/camera_info":
            self.intake.take_camera_info("cam_front", VEHICLE.sensors.cameras["front"], raw)
        elif topic in SMALL_TOPICS:
            decoded = self.file.decode(topic, message.raw)
            keys = {"static": topic == "/tf_static"} if topic.startswith("/tf") else {}
            getattr(self.intake, SMALL_TOPICS[topic])(decoded, topic, **keys)

    def messages(self) -> Iterator[Logged]:
        return self.file.messages(self.file.topics)

    def settle(self, deadline_s: float = 20.0) -> None:
        end = time.monotonic() + deadline_s
        while not all(worker.settled for worker in self.workers):
            assert time.monotonic() < end, "a worker is stuck"
            time.sleep(0.0005)

    def play(self, edit: Callable[[Logged], Logged | None] = lambda message: message) -> None:
        """In lock step: each message, then all that comes of it."""
        for message in self.messages():
            if (edited := edit(message)) is not None:
                self.take(edited)
                self.settle()

    def close(self) -> None:
        for worker in self.workers:
            assert worker.stop(5.0)
        self.pool.shutdown()


@pytest.fixture
def live(bag) -> Iterator[Live]:
    found = Live(bag)
    yield found
    found.close()


def assert_same(a: Sample, b: Sample) -> None:
    assert (a.stamp_ns, a.token) == (b.stamp_ns, b.token)
    np.testing.assert_array_equal(a.odom_from_ego.matrix, b.odom_from_ego.matrix)
    assert a.lidars.keys() == b.lidars.keys() and a.cameras.keys() == b.cameras.keys()
    for role, cloud in a.lidars.items():
        other = b.lidars[role]
        np.testing.assert_array_equal(cloud.xyz, other.xyz)
        np.testing.assert_array_equal(cloud.ego_from_sensor.matrix, other.ego_from_sensor.matrix)
        assert cloud.fields.keys() == other.fields.keys()
        for name in cloud.fields:
            np.testing.assert_array_equal(cloud.fields[name], other.fields[name])
    for role, image in a.cameras.items():
        np.testing.assert_array_equal(image.rgb, b.cameras[role].rgb)
        np.testing.assert_array_equal(image.ego_from_camera.matrix, b.cameras[role].ego_from_camera.matrix)
    for kind in ("imu", "odometry"):
        one, two = getattr(a, kind), getattr(b, kind)
        assert (one is None) == (two is None), kind
        for name in ("stamp_ns", "angular_velocity") if one is not None else ():
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_in_lock_step_the_samples_are_the_bag_readers(live, bag):
    recorder = Recorder()
    worker = live.system(recorder)
    live.play()
    offline = Rosbag(RosbagConfig(root=bag, **dict(worker.system.vehicle)))
    assert len(recorder.samples) == len(offline) == COUNT
    for online, expected in zip(recorder.samples, offline, strict=True):
        assert_same(online, expected)
    last = live.published[-1]
    assert last.used["lidar_top"] == tuple(START_NS + (COUNT - 1 - k) * PERIOD_NS for k in range(10))
    assert list(last.stages)[:5] == ["wait", "decode", "wait_transforms", "transforms", "assemble"]
    assert (worker.offered, worker.published, sum(worker.dropped.values())) == (COUNT, COUNT, 0)


def test_a_slow_predictor_gets_the_newest_samples_with_all_their_sweeps(live):
    """The stamps decide: while one prediction is made, three sweeps come, and none of them is lost."""
    go = []
    recorder = Recorder(act=lambda sample: go.append(live_wait(lambda: len(go) < live.allowed)))
    live.allowed = 0
    worker = live.system(recorder)
    sweeps = 0
    for message in live.messages():
        live.take(message)
        if message.topic == "/lidar_top":
            sweeps += 1
            if sweeps % 3 == 0:
                live.allowed += 1
                live_wait(lambda: worker.published == live.allowed)
    live.allowed = COUNT
    live.settle()
    stamps = [sample.stamp_ns for sample in recorder.samples]
    assert len(stamps) < COUNT and stamps == sorted(stamps)
    assert worker.dropped["superseded"] == COUNT - len(stamps) > 0
    for found in recorder.samples:
        had = min((found.stamp_ns - START_NS) // PERIOD_NS + 1, 10)
        lags = np.unique(found.lidars["top"].field("time_lag"))
        np.testing.assert_allclose(lags, np.arange(had) * 0.05, atol=1e-6)
    counts = worker.sync.counts["lidar_top"]
    assert (counts.received, counts.used) == (COUNT, COUNT)


def live_wait(done: Callable[[], bool], deadline_s: float = 20.0) -> None:
    end = time.monotonic() + deadline_s
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)


def test_systems_do_not_wait_for_one_another(live):
    gate = []
    slow = live.system(Recorder(act=lambda sample: live_wait(lambda: bool(gate))), "slow")
    fast = live.system(Recorder(), "fast")
    live_play = [m for m in live.messages()]
    sweeps = 0
    for message in live_play:
        live.take(message)
        if message.topic == "/lidar_top":
            sweeps += 1
            live_wait(lambda sweeps=sweeps: fast.published == sweeps)
    assert fast.published == COUNT and slow.published == 0
    gate.append(True)
    live.settle()
    assert slow.published == 2 and slow.dropped["superseded"] == COUNT - 2
    assert fast.sync is slow.sync  # what sees the same shares its sets, and their samples
    np.testing.assert_array_equal(
        slow.system.predictor.samples[-1].lidars["top"].xyz, fast.system.predictor.samples[-1].lidars["top"].xyz
    )


def test_nothing_is_decoded_that_nobody_listens_to(live):
    live.wanted = False
    worker = live.system(Recorder())
    live.play()
    assert worker.dropped == {"no_listener": COUNT} and not worker.system.predictor.samples
    assert all(m.payload.reading is None for m in worker.sync._held["lidar_top"])


def test_a_rate_is_kept_by_stamps(live):
    worker = live.system(Recorder(), max_rate_hz=10)
    live.play()
    stamps = np.array([sample.stamp_ns for sample in worker.system.predictor.samples])
    assert (np.diff(stamps) == 100_000_000).all() and len(stamps) == COUNT // 2
    assert worker.dropped["rate_limited"] == COUNT // 2


def test_a_clock_that_jumps_back_begins_afresh(live):
    recorder = Recorder()
    worker = live.system(recorder)
    live.play()
    live.play()
    assert recorder.resets == 1 and live.intake.jumps == 1
    assert worker.published == 2 * COUNT
    assert_same(recorder.samples[-1], recorder.samples[COUNT - 1])
    assert "sweep" in recorder.samples[COUNT].lidars["top"].fields
    assert len(recorder.samples[COUNT].lidars["top"]) == 200  # no sweep of the time before


def test_without_transforms_nothing_comes_and_the_reason_is_told(bag):
    live = Live(bag, wait_s=0.0)
    worker = live.system(Recorder())
    live.play(lambda message: None if message.topic == "/tf_static" else message)
    assert worker.published == 0 and worker.dropped == {"no_transform": COUNT}
    stamp, error = worker.last_error
    assert stamp == START_NS + (COUNT - 1) * PERIOD_NS
    assert error.reason == "missing_frame" and "no frame 'lidar_top'" in str(error)
    live.close()
    standing = Live(bag, wait_s=0.0)
    worker = standing.system(Recorder())
    standing.play(lambda message: None if message.topic == "/tf" else message)
    assert worker.dropped == {"no_transform": COUNT} and "'odom'" in str(worker.last_error[1])
    standing.close()


def test_late_transforms_are_waited_for(live):
    worker = live.system(Recorder())
    held = []
    for message in live.messages():
        if message.topic == "/tf":
            held.append(message)
            continue
        live.take(message)
        live.settle()
        if message.topic == "/lidar_top":
            before = worker.published
            for transform in held:
                live.take(transform)
            held.clear()
            live_wait(lambda before=before: worker.published == before + 1)
    assert worker.published == COUNT


def test_a_sensor_without_calibration_or_message_is_left_out(bag):
    live = Live(bag, wait_s=0.0)
    worker = live.system(Recorder())
    live.play(lambda message: None if message.topic == "/cam_front/camera_info" else message)
    assert worker.published == COUNT and not worker.system.predictor.samples[-1].cameras
    assert worker.masked == {("cam_front", "no calibration"): COUNT}
    live.close()


def test_a_broken_message_costs_its_sample_alone(live):
    def broken(message: Logged) -> Logged:
        if message.topic == "/lidar_top" and message.log_ns == START_NS + 3 * PERIOD_NS:
            return replace_raw(message, bytes(message.raw).replace(b"intensity\0", b"intensitx\0"))
        return message

    worker = live.system(Recorder(replace(NEEDS, sweeps=1)))
    live.play(broken)
    assert worker.dropped == {"bad_message": 1} and worker.published == COUNT - 1
    stamp, error = worker.last_error
    assert stamp == START_NS + 3 * PERIOD_NS and isinstance(error, DataError)
    assert "/lidar_top: point cloud has fields (x, y, z, intensitx); intensity is needed" in str(error)


def test_a_message_that_is_cut_off_is_refused(live):
    live.system(Recorder())
    live.intake.take("lidar_top", "/lidar_top", b"\0\1\0\0")
    assert live.intake.refused == {"/lidar_top": 1}
    assert "a message of /lidar_top is damaged" in str(live.intake.faults["/lidar_top"])


def test_a_transform_that_is_none_is_refused_and_the_others_count(live):
    header = SimpleNamespace(stamp=SimpleNamespace(sec=1, nanosec=0), frame_id="base_link")

    def mount(child: str, w: float):
        zero = SimpleNamespace(x=0.0, y=0.0, z=0.0)
        turn = SimpleNamespace(x=0.0, y=0.0, z=0.0, w=w)
        return SimpleNamespace(
            header=header, child_frame_id=child, transform=SimpleNamespace(translation=zero, rotation=turn)
        )

    message = SimpleNamespace(transforms=[mount("bad", 0.0), mount("good", 1.0)])
    live.intake.take_transforms(message, "/tf_static", static=True)
    assert live.intake.frames.frames == ("base_link", "good")
    assert live.intake.refused == {"/tf_static": 1} and "'base_link' -> 'bad'" in str(live.intake.faults["/tf_static"])


def test_a_predictor_that_fails_is_told_and_the_next_frame_is_a_new_chance(live):
    def fail_once(sample: Sample) -> None:
        if sample.stamp_ns == START_NS + 2 * PERIOD_NS:
            raise FloatingPointError("no such number")

    worker = live.system(Recorder(act=fail_once))
    live.play()
    assert worker.dropped == {"failed": 1} and worker.published == COUNT - 1
    assert worker.last_error[0] == START_NS + 2 * PERIOD_NS and "no such number" in str(worker.last_error[1])


def test_a_full_device_ends_the_system_and_says_why(live):
    import torch

    def full(sample: Sample) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    worker = live.system(Recorder(act=full), device="cuda:1")
    live.play()
    assert live.fatal == ["recorder: cuda:1 is out of memory: tried to allocate 2 GiB"]
    assert worker.published == 0 and worker.dropped["failed"] == 1


def replace_raw(message: Logged, raw: bytes) -> Logged:
    return message._replace(raw=raw)
