"""What a bag plays: order and bytes of the recording, the clock between, latched transforms at the start."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import builders
import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags (extra: bag) is not installed")
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer

from perception.datasets import rosbag_messages as messages
from perception.datasets.rosbag_file import TRANSFORMS, BagFile, Logged, OfferedQos, typestore
from perception.errors import ConfigError, DataError
from perception.playback import Playback, PlaybackConfig, Tick
from perception.types import Pose

STRING = "std_msgs/msg/String"
SECOND = 1_000_000_000


@pytest.fixture(scope="module", params=["mcap", "sqlite3"])
def bag(request, tmp_path_factory) -> Path:
    return builders.write_small_bag(tmp_path_factory.mktemp("bag") / "drive", storage=request.param)


def playback(bag: Path, **keys) -> Playback:
    return Playback(PlaybackConfig(bag=bag, **keys))


def handmade(
    path: Path, logged: list[tuple[str, str, int, object]], offered: dict[str, list[Qos]] | None = None
) -> Path:
    """A bag of (topic, type, log_ns, message)."""
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {}
        for topic, kind, log_ns, message in logged:
            if topic not in connections:
                profiles = (offered or {}).get(topic, [])
                connections[topic] = writer.add_connection(
                    topic, kind, typestore=typestore(), offered_qos_profiles=profiles
                )
            writer.write(connections[topic], log_ns, typestore().serialize_cdr(message, kind))
    return path


def qos(depth: int, reliable: bool = True, latched: bool = False, history: QosHistory = QosHistory.KEEP_LAST) -> Qos:
    never = QosTime(9223372036, 854775807)
    reliability = QosReliability.RELIABLE if reliable else QosReliability.BEST_EFFORT
    durability = QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE
    return Qos(history, depth, reliability, durability, never, never, QosLiveliness.AUTOMATIC, never, False)


def text(data: str) -> object:
    return typestore().types[STRING](data)


def mount(child: str, x: float) -> object:
    return messages.transforms([("base_link", child, 0, Pose.from_yaw(0.0, (x, 0, 0)))])


class TestMessages:
    def test_every_message_keeps_its_bytes_order_and_time(self, bag):
        played = [event for event in playback(bag).events() if isinstance(event, Logged)]
        recorded = BagFile(bag)
        assert played == list(recorded.messages([t for t in recorded.topics if t != "/tf_static"]))
        assert len(played) > 60

    def test_a_second_round_is_the_same(self, bag):
        whole = playback(bag)
        assert list(whole.events()) == list(whole.events())

    def test_the_clock_ticks_between_messages_and_at_each(self, bag):
        events = list(playback(bag, clock_hz=100).events())
        times = [event.log_ns for event in events]
        assert times == sorted(times)
        ticks = [event.log_ns for event in events if isinstance(event, Tick)]
        assert max(np.diff(ticks)) <= 10_000_000
        for before, after in pairwise(events):
            if isinstance(after, Logged):
                assert before == Tick(after.log_ns)
        assert not any(isinstance(event, Tick) for event in playback(bag, clock_hz=0).events())

    def test_a_start_leaves_out_what_was_before(self, bag):
        late = playback(bag, start_s=0.2)
        assert late.begin_ns == playback(bag).begin_ns + 200_000_000
        played = [event for event in late.events() if isinstance(event, Logged)]
        assert played and min(message.log_ns for message in played) >= late.begin_ns

    def test_topics_are_chosen_and_renamed(self, bag):
        chosen = playback(bag, topics=("/cam_*", "/tf"), exclude=("*/camera_info",), remap={"/tf": "/recorded/tf"})
        assert set(chosen.topics) == {"/cam_front/image_rect_compressed", "/cam_back/image_rect_compressed", "/tf"}
        names = {event.topic for event in chosen.events() if isinstance(event, Logged)}
        assert names == {"/cam_front/image_rect_compressed", "/cam_back/image_rect_compressed", "/recorded/tf"}

    def test_a_recorded_clock_is_left_out(self, tmp_path):
        clock = "rosgraph_msgs/msg/Clock"
        now = typestore().types[clock](typestore().types["builtin_interfaces/msg/Time"](1, 2))
        path = handmade(tmp_path / "bag", [("/a", STRING, 5, text("a")), ("/clock", clock, 6, now)])
        assert set(playback(path).topics) == {"/a"}


class TestLatched:
    def test_static_transforms_are_joined_at_the_start_and_the_newest_of_a_child_holds(self, tmp_path):
        path = handmade(
            tmp_path / "bag",
            [
                ("/tf_static", TRANSFORMS, 0, mount("lidar", 1.0)),
                ("/a", STRING, SECOND, text("a")),
                ("/tf_static", TRANSFORMS, 2 * SECOND, mount("camera", 2.0)),
                ("/tf_static", TRANSFORMS, 3 * SECOND, mount("lidar", 3.0)),
            ],
        )
        for start_s in (0.0, 1.0):
            played = playback(path, start_s=start_s)
            (message,) = played.latched
            found = {
                t.child_frame_id: t.transform.translation.x
                for t in BagFile(path).decode("/tf_static", message.raw).transforms
            }
            assert found == {"lidar": 3.0, "camera": 2.0} and message.log_ns == played.begin_ns
            assert [e.topic for e in played.events() if isinstance(e, Logged)] == ["/a"]

    def test_what_a_late_joiner_would_have_comes_first_when_a_start_skips_it(self, tmp_path):
        logged = [("/map", STRING, k * SECOND, text(str(k))) for k in range(4)]
        path = handmade(tmp_path / "bag", logged, {"/map": [qos(2, latched=True)]})
        assert playback(path).latched == ()
        late = playback(path, start_s=2.5)
        assert [BagFile(path).decode("/map", m.raw).data for m in late.latched] == ["1", "2"]
        assert len([e for e in late.events() if isinstance(e, Logged)]) == 1


class TestOfferedQos:
    @pytest.mark.parametrize(
        ("profiles", "expected"),
        [
            ([], OfferedQos(10)),
            ([qos(5, reliable=False)], OfferedQos(5, reliable=False)),
            ([qos(1, latched=True)], OfferedQos(1, latched=True)),
            ([qos(5, reliable=False), qos(3)], OfferedQos(5)),  # of several publishers: what most can listen to
            ([qos(0, history=QosHistory.KEEP_ALL)], OfferedQos(1000)),
        ],
    )
    def test_as_recorded(self, tmp_path, profiles, expected):
        path = handmade(tmp_path / "bag", [("/a", STRING, 5, text("a"))], {"/a": profiles})
        assert playback(path).topics["/a"].offered == expected

    def test_of_our_own_bags(self, bag):
        topics = playback(bag).topics
        assert topics["/lidar_top"].offered == OfferedQos(5, reliable=False)
        assert topics["/tf_static"].offered == OfferedQos(1, latched=True)


class TestRefused:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"topics": ("/lidar_9",)}, r"--topics /lidar_9: no topic of .* is named so\n.*there are: .*/lidar_top"),
            ({"exclude": ("/x",)}, r"--exclude /x: no topic"),
            ({"remap": {"/x": "/y"}}, r"--remap /x: no topic"),
            ({"exclude": ("*",)}, r"no topic is left to play"),
            ({"remap": {"/tf": "/odom"}}, r"two topics would be published as /odom"),
            ({"start_s": 100.0}, r"--start 100.0: .* is 0\.\d s long\n.*start earlier"),
        ],
    )
    def test_what_a_bag_does_not_have(self, bag, keys, message):
        with pytest.raises(ConfigError, match=message):
            playback(bag, **keys)

    def test_a_bag_that_is_not_there(self, tmp_path):
        with pytest.raises(DataError, match=r"none: no such bag"):
            playback(tmp_path / "none")

    def test_a_bag_without_messages(self, tmp_path):
        with pytest.raises(DataError, match="no messages"):
            playback(handmade(tmp_path / "bag", []))
