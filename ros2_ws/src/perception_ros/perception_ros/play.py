"""`perception play`: publish a bag's messages, byte for byte, as if the vehicle drove; with /clock and /tf_static.

Freely played, messages come at the pace of the recording times `--rate`, whatever a listener makes of them. In lock
step with a node (`--wait /perception`) they come one at a time: the node answers each on `<node>/received`
(std_msgs/String, the topic's name) once it has taken the message in and published all that came of it. Nothing is
dropped or overtaken then, so that predictions are those of `perception predict` on the same bag.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rclpy
import typer
from pydantic import Field
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args
from rosgraph_msgs.msg import Clock
from std_msgs.msg import String

from perception.config import Config, validate
from perception.datasets.rosbag_file import Logged, OfferedQos
from perception.errors import DataError, PerceptionError
from perception.playback import CLOCK_TOPIC, Playback, PlaybackConfig, PlayedTopic, Tick
from perception_ros.cdr import CdrWriter, put_time
from perception_ros.interfaces import ensure
from perception_ros.up import choose_profile

LISTENERS_S = 2.0
"""Longest wait for a first subscriber before a free run begins."""
_SETTLED_S = 0.5
"""How long a node's subscriptions have to stay the same to be taken for all of them."""


class PlayConfig(Config):
    """How a bag is played."""

    playback: PlaybackConfig
    rate: float = Field(1.0, gt=0)
    """Speed against the recording; without meaning in lock step."""
    loop: bool = False
    wait: str | None = None
    """Full name of the node that is played to in lock step."""
    wait_s: float = Field(30.0, gt=0)
    """Longest wait for its subscriptions, and for each of its answers."""


class Player:
    """Publishes a bag.

    Attributes:
        published: messages so far, the latched ones of every round included.
        late_s: of each message published freely, how far behind its time it was.
        stopping: set when playing is to end.
    """

    def __init__(self, config: PlayConfig) -> None:
        self.config = config
        self.playback = Playback(config.playback)
        self.published = 0
        self.late_s: list[float] = []
        self.stopping = threading.Event()
        ensure()  # perception_msgs and tf2_msgs
        types = {topic.name: _message_type(topic) for topic in self.playback.topics.values()}
        self.node = Node("perception_play", start_parameter_services=False)
        self._publishers = {
            topic.name: self.node.create_publisher(types[topic.name], topic.name, _qos(topic.offered))
            for topic in self.playback.topics.values()
        }
        self._clock = self.node.create_publisher(Clock, CLOCK_TOPIC, 10) if config.playback.clock_hz else None
        self._answers: Counter[str] = Counter()
        if config.wait is not None:
            self.node.create_subscription(String, f"{config.wait}/received", self._take_answer, 1000)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)

    def play(self) -> None:
        """Play the bag to its end, or until ROS shuts down where it loops.

        Raises:
            DataError: the node that is waited for is not there, or does not answer.
            ExternalShutdownException: ROS was shut down, or `stopping` set.
        """
        listening = self._await_node(self.config.wait) if self.config.wait is not None else None
        if listening is None:
            self._until(lambda: any(p.get_subscription_count() for p in self._publishers.values()), LISTENERS_S)
        while True:
            self._play_once(listening)
            if not self.config.loop:
                break
        for publisher in self._publishers.values():
            publisher.wait_for_all_acked(Duration(seconds=1))

    def close(self) -> None:
        self._executor.shutdown()
        self.node.destroy_node()

    def _play_once(self, listening: frozenset[str] | None) -> None:
        self._tick(self.playback.begin_ns)
        for message in self.playback.latched:
            self._publish(message, listening)
        begun_s = time.monotonic()
        for event in self.playback.events():
            if listening is None:
                due_s = begun_s + (event.log_ns - self.playback.begin_ns) / 1e9 / self.config.rate
                self._sleep_until(due_s)
                if isinstance(event, Logged):
                    self.late_s.append(time.monotonic() - due_s)
            if isinstance(event, Tick):
                self._tick(event.log_ns)
            else:
                self._publish(event, listening)

    def _publish(self, message: Logged, listening: frozenset[str] | None) -> None:
        self._check_running()
        before = self._answers[message.topic]
        self._publishers[message.topic].publish(bytes(message.raw))
        self.published += 1
        if listening is None or message.topic not in listening:
            return
        if not self._until(lambda: self._answers[message.topic] > before, self.config.wait_s):
            raise DataError(
                f"{self.config.wait} did not answer to {message.topic} of log time {message.log_ns} ns within "
                f"{self.config.wait_s} s",
                "see what the node says; a larger --wait-s suits a slower predictor; where it never came, messages get "
                "lost: set FASTDDS_DEFAULT_PROFILES_FILE to configs/fastdds_shm.xml",
            )

    def _tick(self, log_ns: int) -> None:
        if self._clock is None:
            return
        self._check_running()
        out = CdrWriter()
        put_time(out, log_ns)
        self._clock.publish(out.finish())

    def _await_node(self, name: str) -> frozenset[str]:
        """The played topics that the node listens to, once it does and can be answered by."""
        found: frozenset[str] = frozenset()
        since_s = time.monotonic()

        def settled() -> bool:
            nonlocal found, since_s
            now = self._listened_by(name)
            matched = all(self._publishers[topic].get_subscription_count() for topic in now)
            if now != found or not matched:
                found, since_s = now, time.monotonic()
            answers = self.node.count_publishers(f"{name}/received") > 0
            return bool(found) and answers and time.monotonic() - since_s > _SETTLED_S

        if not self._until(settled, self.config.wait_s):
            others = ", ".join(sorted(self._other_nodes())) or "none"
            raise DataError(
                f"{name} listens to none of the bag's topics, or does not answer on {name}/received, after "
                f"{self.config.wait_s} s; nodes there are: {others}",
                "start the node first; it must be active; --wait takes its full name",
            )
        return found

    def _listened_by(self, name: str) -> frozenset[str]:
        return frozenset(
            topic
            for topic in self._publishers
            for end in self.node.get_subscriptions_info_by_topic(topic)
            if f"{end.node_namespace.rstrip('/')}/{end.node_name}" == name
        )

    def _other_nodes(self) -> list[str]:
        return [
            f"{namespace.rstrip('/')}/{name}"
            for name, namespace in self.node.get_node_names_and_namespaces()
            if name != self.node.get_name()
        ]

    def _take_answer(self, answer: String) -> None:
        self._answers[answer.data] += 1

    def _until(self, done: Any, deadline_s: float) -> bool:
        """Spin until it is done; False when the deadline passes first."""
        end_s = time.monotonic() + deadline_s
        while not done():
            if time.monotonic() > end_s:
                return False
            self._check_running()
            self._executor.spin_once(timeout_sec=0.05)
        return True

    def _check_running(self) -> None:
        if self.stopping.is_set() or not rclpy.ok():
            raise ExternalShutdownException

    def _sleep_until(self, due_s: float) -> None:
        """In slices, for only this thread sees that it is to stop."""
        while (left_s := due_s - time.monotonic()) > 0:
            self._check_running()
            time.sleep(min(left_s, 0.1))


def _qos(offered: OfferedQos) -> QoSProfile:
    return QoSProfile(
        depth=offered.depth,
        reliability=ReliabilityPolicy.RELIABLE if offered.reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if offered.latched else DurabilityPolicy.VOLATILE,
    )


def _message_type(topic: PlayedTopic) -> Any:
    package, _, name = topic.type.replace("/msg/", "/").partition("/")
    try:
        return getattr(import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError) as error:
        raise PerceptionError(
            f"{topic.name} has type {topic.type}, which this ROS does not have: {error}",
            f"source the workspace that has {package}, or leave it out: --exclude {topic.name}",
        ) from error


app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def play(
    bag: Annotated[
        Path | None,
        typer.Argument(help="A rosbag2's folder, or its .mcap or .db3 file. Without: a drive in the synthetic city."),
    ] = None,
    rate: Annotated[float, typer.Option(help="Speed against the recording.")] = 1.0,
    loop: Annotated[bool, typer.Option("--loop", help="Again and again, /clock going back each time.")] = False,
    start: Annotated[float, typer.Option(help="Seconds to leave out at the beginning.")] = 0.0,
    topics: Annotated[list[str] | None, typer.Option(help="Only these; * and ? are understood. Repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not these, likewise. Repeatable.")] = None,
    remap: Annotated[list[str] | None, typer.Option(metavar="FROM:=TO", help="Publish as. Repeatable.")] = None,
    clock_hz: Annotated[float, typer.Option(help="Rate of /clock; 0: none.")] = 100.0,
    wait: Annotated[str | None, typer.Option(metavar="NODE", help="Lock step: wait for its answers.")] = None,
    wait_s: Annotated[float, typer.Option(help="Longest wait for an answer.")] = 30.0,
) -> None:
    """Publish a bag as if the vehicle drove: recorded QoS, latched /tf_static, /clock."""
    keys = {
        "playback": {
            "bag": bag or _demo_bag(),
            "topics": tuple(topics or ("*",)),
            "exclude": tuple(exclude or ()),
            "remap": dict(_pair(text) for text in remap or ()),
            "start_s": start,
            "clock_hz": clock_hz,
        },
        "rate": rate,
        "loop": loop,
        "wait": wait,
        "wait_s": wait_s,
    }
    _run(validate(PlayConfig, keys, "the command line"))


def _run(config: PlayConfig) -> None:
    """Play in ROS of its own; Ctrl-C and SIGTERM end it quietly."""
    # What happens before the first message is broken off; from then on a signal is seen between two messages.
    rclpy.init(args=sys.argv, signal_handler_options=SignalHandlerOptions.NO)
    player = None
    try:
        player = Player(config)
        stopping = player.stopping
        _on_signals(lambda *_: stopping.set())
        span_s = (player.playback.end_ns - player.playback.begin_ns) / 1e9
        typer.echo(f"playing {len(player.playback.topics)} topics of {player.config.playback.bag}, {span_s:.1f} s")
        player.play()
        late = f"; late by {1e3 * np.percentile(player.late_s, 99):.1f} ms (p99)" if player.late_s else ""
        typer.echo(f"published {player.published:,} messages{late}")
    except ExternalShutdownException:
        pass
    finally:
        if player is not None:
            player.close()
        rclpy.try_shutdown()


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM; of a KeyboardInterrupt typer would make a failure."""


def _interrupt(*_: Any) -> None:
    raise _Interrupted


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts what is in its background deaf to it
        signal.signal(number, handler)


def _pair(text: str) -> tuple[str, str]:
    before, sign, after = text.partition(":=")
    if not (before and sign and after):
        raise PerceptionError(f"--remap {text}: expected FROM:=TO", "for example  --remap /lidar_top:=/points")
    return before, after


def _demo_bag() -> Path:
    from perception.synthetic.demo import demo_bag

    return demo_bag(lambda what, done, total: typer.echo(f"making a drive in a small city: {done} of {total}"))


def main() -> None:
    """Run `perception play`: what the user can mend is one message, and exit code 2."""
    choose_profile()
    _on_signals(_interrupt)
    try:
        app(args=remove_ros_args(sys.argv)[1:], prog_name="perception play")
    except _Interrupted:
        pass
    except PerceptionError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
