"""`perception play` through DDS: bytes, QoS and order of the recording, /clock, latched transforms, lock step, end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS (extra: ros) is not installed")
from perception_ros.detections import detections
from perception_ros.play import PlayConfig, Player
from perception_ros.up import choose_profile
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, PointCloud2
from std_msgs.msg import String

from perception.datasets.rosbag_file import BagFile, Header, read_header
from perception.errors import DataError, PerceptionError
from perception.playback import PlaybackConfig
from perception.predict import load_jobs, predict
from perception.predictor import PREDICTORS

RELIABLE = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
BEST_EFFORT = QoSProfile(depth=1000, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
FRAMES = 8


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    return builders.write_small_bag(tmp_path_factory.mktemp("bag") / "drive", FRAMES)


@contextmanager
def spinning(*nodes: Node) -> Iterator[None]:
    """Their callbacks run in a thread of their own."""
    executor = SingleThreadedExecutor()
    for node in nodes:
        executor.add_node(node)
    stop = threading.Event()

    def spin() -> None:
        with suppress(ExternalShutdownException):
            while not stop.is_set():
                executor.spin_once(timeout_sec=0.05)

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        executor.shutdown()
        for node in nodes:
            node.destroy_node()


class Probe(Node):
    """Keeps the bytes of what it hears, by topic in order; `answer` makes it one to play to in lock step."""

    def __init__(self, name: str = "probe", answer: bool = False) -> None:
        super().__init__(name)
        self.heard: dict[str, list[bytes]] = {}
        self.before: list[tuple[str, int]] = []
        self._answers = self.create_publisher(String, "~/received", 1000) if answer else None
        self._new = threading.Condition()

    def listen(self, kind: Any, topic: str, qos: QoSProfile = BEST_EFFORT) -> None:
        self.heard[topic] = []

        def take(raw: bytes) -> None:
            with self._new:
                self.heard[topic].append(raw)
                self._new.notify_all()
            if self._answers is not None:
                self._answers.publish(String(data=topic))

        self.create_subscription(kind, topic, take, qos, raw=True)

    def wait(self, holds: Callable[[], bool], deadline_s: float = 10.0) -> None:
        with self._new:
            assert self._new.wait_for(holds, deadline_s), {t: len(m) for t, m in self.heard.items()}


def player(bag: Path, *, rate: float = 1.0, loop: bool = False, wait: str | None = None, wait_s: float = 20.0, **keys):
    playback = PlaybackConfig(bag=bag, **keys)
    return Player(PlayConfig(playback=playback, rate=rate, loop=loop, wait=wait, wait_s=wait_s))


def recorded(bag: Path, topic: str) -> list[bytes]:
    return [bytes(message.raw) for message in BagFile(bag).messages({topic})]


def seconds(clock: bytes) -> float:
    sec, nanosec = np.frombuffer(clock[4:], "<u4")
    return float(sec) + nanosec / 1e9


@pytest.mark.usefixtures("ros", "interfaces")
class TestFreely:
    def test_bytes_and_order_are_those_of_the_recording(self, bag):
        probe = Probe()
        probe.listen(PointCloud2, "/lidar_top")
        probe.listen(CompressedImage, "/pictures")
        probe.listen(CameraInfo, "/cam_front/camera_info")
        playing = player(bag, remap={"/cam_front/image_rect_compressed": "/pictures"})
        with spinning(probe):
            playing.play()
            probe.wait(lambda: all(len(messages) == FRAMES for messages in probe.heard.values()))
        playing.close()
        assert probe.heard["/lidar_top"] == recorded(bag, "/lidar_top")
        assert probe.heard["/pictures"] == recorded(bag, "/cam_front/image_rect_compressed")
        assert len(playing.late_s) == sum(
            1 for t in BagFile(bag).messages(playing.playback.topics) if t.topic != "/tf_static"
        )

    def test_the_qos_is_the_recorded_one(self, bag):
        playing = player(bag)
        infos = {
            topic: playing.node.get_publishers_info_by_topic(topic)[0].qos_profile
            for topic in ("/lidar_top", "/tf", "/tf_static")
        }
        playing.close()
        assert infos["/lidar_top"].reliability == ReliabilityPolicy.BEST_EFFORT
        assert infos["/tf"].reliability == ReliabilityPolicy.RELIABLE
        assert infos["/tf"].durability == DurabilityPolicy.VOLATILE
        assert infos["/tf_static"].durability == DurabilityPolicy.TRANSIENT_LOCAL

    def test_who_joins_late_has_the_static_transforms(self, bag):
        from tf2_msgs.msg import TFMessage

        playing = player(bag, rate=100.0)
        playing.play()
        probe = Probe()
        probe.listen(TFMessage, "/tf_static", LATCHED)
        with spinning(probe):
            probe.wait(lambda: len(probe.heard["/tf_static"]) == 1)
        playing.close()
        (found,) = (BagFile(bag).decode("/tf_static", raw).transforms for raw in probe.heard["/tf_static"])
        frames = {"lidar_top", "radar_front", "cam_front", "cam_back"}
        assert {transform.child_frame_id for transform in found} == frames

    def test_the_clock_leads_from_the_first_stamp_to_the_last(self, bag):
        probe = Probe()
        probe.listen(Clock, "/clock", RELIABLE)
        probe.listen(PointCloud2, "/lidar_top")
        playing = player(bag)
        with spinning(probe):
            playing.play()
            probe.wait(lambda: seconds(probe.heard["/clock"][-1]) >= playing.playback.end_ns / 1e9 - 1e-6)
        playing.close()
        times = [seconds(raw) for raw in probe.heard["/clock"]]
        assert times == sorted(times) and times[0] == pytest.approx(playing.playback.begin_ns / 1e9, abs=0.011)

    def test_a_loop_sets_the_clock_back_and_gives_the_static_transforms_again(self, bag):
        from tf2_msgs.msg import TFMessage

        probe = Probe()
        probe.listen(Clock, "/clock", RELIABLE)
        probe.listen(TFMessage, "/tf_static", LATCHED)
        playing = player(bag, loop=True)
        runner = threading.Thread(target=_until_shutdown, args=(playing,))
        with spinning(probe):
            runner.start()
            probe.wait(lambda: jumps(probe) >= 2 and len(probe.heard["/tf_static"]) >= 3)
            _shut_down()
            runner.join(5)
        assert not runner.is_alive()
        assert len(set(probe.heard["/tf_static"])) == 1

    def test_a_type_that_is_not_installed_is_named(self, bag, monkeypatch):
        monkeypatch.setitem(sys.modules, "nav_msgs.msg", None)
        with pytest.raises(PerceptionError, match=r"/odom has type nav_msgs/msg/Odometry, .*\n.*--exclude /odom"):
            player(bag)
        player(bag, exclude=("/odom",)).close()


def jumps(probe: Probe) -> int:
    """How often the clock was set back to the start."""
    return int((np.diff([seconds(raw) for raw in list(probe.heard["/clock"])]) < -0.3).sum())


def _until_shutdown(playing: Player) -> None:
    with pytest.raises(ExternalShutdownException):
        playing.play()


def _shut_down() -> None:
    import rclpy

    rclpy.try_shutdown()


@pytest.mark.usefixtures("ros", "interfaces")
class TestLockStep:
    def test_a_message_comes_when_the_one_before_is_answered(self, bag):
        probe = Probe("listener", answer=True)
        order: list[tuple[str, int]] = []
        for topic in ("/lidar_top", "/cam_front/image_rect_compressed", "/cam_back/image_rect_compressed"):
            probe.listen(PointCloud2 if "lidar" in topic else CompressedImage, topic)
        playing = player(bag, wait="/listener")
        publish, answers = playing._publish, playing._answers

        def watched(message: Any, listening: Any) -> None:
            order.append((message.topic, sum(answers.values())))
            publish(message, listening)

        playing._publish = watched
        with spinning(probe):
            playing.play()
        playing.close()
        for topic, messages in probe.heard.items():
            assert messages == recorded(bag, topic)
        asked = [answered for topic, answered in order if topic in probe.heard]
        assert asked == list(range(len(asked))) and len(asked) == 2 * FRAMES + FRAMES // 2

    def test_a_node_that_does_not_answer_is_an_error_in_time(self, bag):
        probe = Probe("listener")
        probe.listen(PointCloud2, "/lidar_top")
        probe.create_publisher(String, "~/received", 10)
        playing = player(bag, wait="/listener", wait_s=1.5)
        with spinning(probe), pytest.raises(DataError, match=r"/listener did not answer to /lidar_top of log time \d+"):
            playing.play()
        playing.close()

    def test_a_node_that_is_not_there_is_an_error_that_names_those_there_are(self, bag):
        probe = Probe("bystander")
        playing = player(bag, wait="/perception", wait_s=1.0)
        message = r"/perception listens to none of the bag's topics.*nodes there are: /bystander"
        with spinning(probe), pytest.raises(DataError, match=message):
            playing.play()
        playing.close()


class TestTheNode:
    """A bag through the node and the same bag through `perception predict`."""

    @pytest.fixture
    def vehicle(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setitem(PREDICTORS, "fingerprint", "builders:Fingerprint")
        path = tmp_path / "vehicle.yaml"
        path.write_text(builders.BAG_VEHICLE)
        return path

    @pytest.fixture
    def offline(self, bag, vehicle) -> dict[int, tuple[bytes, dict[str, tuple[int, ...]]]]:
        """Stamp -> what `predict` gives as a message, and the stamps that it used."""
        (job,) = load_jobs(vehicle, bag)
        return {
            sample.stamp_ns: (detections(frame.prediction, Header(sample.stamp_ns, "base_link")), dict(frame.used))
            for sample, frame in predict(job)
        }

    @contextmanager
    def listening(self, vehicle: Path) -> Iterator[Probe]:
        """The node, active, and a probe that hears its boxes and reports."""
        from perception_msgs.msg import Detections3D, PredictionReport
        from perception_ros.node import PerceptionNode
        from rclpy.parameter import Parameter

        overrides = [Parameter("config", value=str(vehicle)), Parameter("use_sim_time", value=True)]
        node, probe = PerceptionNode(parameter_overrides=overrides), Probe()
        probe.listen(Detections3D, "/perception/fingerprint/detections", RELIABLE)
        probe.listen(PredictionReport, "/perception/fingerprint/report", RELIABLE)
        assert node.autostart(), node.failure
        with spinning(probe, node):
            yield probe
            node.trigger_deactivate()

    @pytest.mark.usefixtures("ros", "interfaces")
    def test_in_lock_step_every_prediction_is_the_same(self, bag, vehicle, offline):
        with self.listening(vehicle) as probe:
            playing = player(bag, wait="/perception")
            playing.play()
            probe.wait(lambda: all(len(messages) == FRAMES for messages in probe.heard.values()))
            playing.close()
        assert len(offline) == FRAMES
        assert {stamp: message for stamp, (message, _) in offline.items()} == by_stamp(probe, "detections")
        assert {stamp: used for stamp, (_, used) in offline.items()} == used_stamps(probe)

    @pytest.mark.usefixtures("ros", "interfaces")
    def test_so_it_is_where_one_message_completes_several_samples(self, bag, vehicle, request):
        """With `wait_s` a LiDAR's message waits for cameras, so that one image may complete two samples."""
        vehicle.write_text("wait_s: 0.1\n" + builders.BAG_VEHICLE)
        offline = request.getfixturevalue("offline")
        with self.listening(vehicle) as probe:
            playing = player(bag, wait="/perception")
            playing.play()
            probe.wait(lambda: all(len(messages) >= FRAMES - 3 for messages in probe.heard.values()))
            playing.close()
        found = by_stamp(probe, "detections")  # the last ones still wait for images when the bag has ended
        assert list(found) == sorted(offline)[: len(found)]
        assert found == {stamp: offline[stamp][0] for stamp in found}

    @pytest.mark.usefixtures("ros", "interfaces")
    def test_freely_they_are_the_same_wherever_the_used_stamps_agree(self, bag, vehicle, offline):
        with self.listening(vehicle) as probe:
            playing = player(bag, rate=0.5)
            playing.play()
            probe.wait(lambda: min(len(messages) for messages in probe.heard.values()) >= FRAMES // 2)
            playing.close()
        found, used = by_stamp(probe, "detections"), used_stamps(probe)
        agreeing = [stamp for stamp in found if used.get(stamp) == offline[stamp][1]]
        assert agreeing
        for stamp in agreeing:
            # IMU and odometry have no stamps of their own in the report; what comes of the sensors is compared.
            boxes, expected = (rows(message) for message in (found[stamp], offline[stamp][0]))
            assert boxes == expected


def by_stamp(probe: Probe, output: str) -> dict[int, bytes]:
    return {read_header(raw).stamp_ns: raw for raw in list(probe.heard[f"/perception/fingerprint/{output}"])}


def used_stamps(probe: Probe) -> dict[int, dict[str, tuple[int, ...]]]:
    from perception_msgs.msg import PredictionReport
    from rclpy.serialization import deserialize_message

    found = {}
    for stamp, raw in by_stamp(probe, "report").items():
        used: dict[str, tuple[int, ...]] = {}
        for sensor in deserialize_message(raw, PredictionReport).sensors:
            at = sensor.stamp.sec * 10**9 + sensor.stamp.nanosec
            used[sensor.channel] = (*used.get(sensor.channel, ()), at)
        found[stamp] = used
    return found


def rows(raw: bytes) -> dict[str, Any]:
    """Name of a reading -> its box, of the sensors alone."""
    from perception_msgs.msg import Detections3D
    from rclpy.serialization import deserialize_message

    message = deserialize_message(raw, Detections3D)
    return {
        message.classes[box.label]: (box.pose, box.size, box.velocity)
        for box in message.detections
        if message.classes[box.label] not in ("imu", "odometry")
    }


class TestProfile:
    """Without a profile Fast DDS loses most clouds on the publisher's side."""

    def test_the_shipped_one_is_taken_where_none_is_chosen(self, monkeypatch):
        for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("ROS_DISTRO", "kilted")
        choose_profile()
        assert "segment_size" in Path(os.environ["FASTDDS_DEFAULT_PROFILES_FILE"]).read_text()

    def test_a_chosen_one_stays(self, monkeypatch):
        monkeypatch.setenv("FASTDDS_DEFAULT_PROFILES_FILE", "mine.xml")
        monkeypatch.delenv("FASTRTPS_DEFAULT_PROFILES_FILE", raising=False)
        choose_profile()
        assert os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] == "mine.xml"
        assert "FASTRTPS_DEFAULT_PROFILES_FILE" not in os.environ


class TestCommand:
    def run(self, *words: str, **keys: Any) -> subprocess.Popen:
        command = [sys.executable, "-c", "from perception.cli import main; main()", "play", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keys)

    def test_plays_to_the_end(self, bag):
        out, err = (running := self.run(str(bag), "--rate", "10")).communicate(timeout=60)
        assert running.returncode == 0, err
        assert "playing 11 topics" in out and "published" in out

    def test_ctrl_c_ends_a_loop_quietly(self, bag):
        running = self.run(str(bag), "--loop", env=os.environ | {"PYTHONUNBUFFERED": "1"})
        assert running.stdout is not None
        assert "playing" in running.stdout.readline()
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=10)
        assert running.returncode == 0 and "Traceback" not in err

    def test_ctrl_c_while_the_drive_is_made_ends_it_quietly(self, tmp_path):
        running = self.run(env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
        while not list(tmp_path.glob("perception/demo-drive-*/")):  # where it is made
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=20)
        assert running.returncode == 0 and "Traceback" not in err
        assert not list(tmp_path.glob("perception/demo-drive-*/"))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["/none.mcap"], "error: /none.mcap: no such bag\n  give the folder"),
            (["{bag}", "--topics", "/nothing"], "error: --topics /nothing: no topic of"),
            (["{bag}", "--remap", "/tf"], "error: --remap /tf: expected FROM:=TO"),
            (["{bag}", "--rate", "0"], "error: the command line: rate: Input should be greater than 0"),
        ],
    )
    def test_what_is_wrong_is_one_message(self, bag, words, message):
        running = self.run(*(word.format(bag=bag) for word in words))
        _, err = running.communicate(timeout=60)
        assert running.returncode == 2 and err.startswith(message)
