"""The node: a lifecycle around inputs -> intake -> one worker a system -> outputs, and diagnostics once a second.

configure loads the systems and warms them up, activate subscribes, deactivate stops listening and predicting but keeps
the weights, cleanup lets go of them. It configures and activates itself unless `autostart` is false. All that is to be
known of the vehicle is in the file that the parameter `config` names.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin at barriers starve the others

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String

from perception.errors import PerceptionError
from perception.intake import Intake
from perception.systems import StackConfig, System, load_stack, load_systems, warm_up
from perception.worker import Worker
from perception_ros.diagnostics import ERROR, OK, Diagnostics, array, status
from perception_ros.inputs import Inputs, deserialize
from perception_ros.interfaces import ensure
from perception_ros.outputs import SystemOutputs

IMAGE_THREADS = 2
SAID_AGAIN_S = 10.0
"""What is wrong is logged when it begins, and again after so long."""
THRESHOLD = "score_threshold."
"""Parameter of each system: `score_threshold.<system>`."""


class PerceptionNode(LifecycleNode):
    """See the module.

    Attributes:
        failure: why the last configure or activate failed.
        stopping: set when the process is to end.
    """

    def __init__(self, name: str = "perception", **keys: Any) -> None:
        super().__init__(name, **keys)
        ensure()
        fixed = ParameterDescriptor(read_only=True)
        self.declare_parameter("config", "", ParameterDescriptor(description="the vehicle's YAML", read_only=True))
        self.declare_parameter("systems", [""], fixed)
        self.declare_parameter("autostart", True, fixed)
        self.failure: Exception | None = None
        self.stopping = threading.Event()
        self.stack: StackConfig | None = None
        self.systems: list[System] = []
        self.workers: list[Worker] = []
        self._outputs: list[SystemOutputs] = []
        self._inputs: Inputs | None = None
        self._diagnostics: Diagnostics | None = None
        self._fatal: str | None = None
        self._said: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(IMAGE_THREADS, thread_name_prefix="image")
        self._received = self.create_publisher(String, "~/received", 1000)
        self._status = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # A steady clock: what is wrong with /clock has to be said while it stands still.
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0, self._diagnose, clock=self._steady)
        self.add_on_set_parameters_callback(self._set_parameters)

    def autostart(self) -> bool:
        """Configure and activate, where the parameter says so; whether that went well."""
        if not self.get_parameter("autostart").value:
            return True
        success = TransitionCallbackReturn.SUCCESS
        return self.trigger_configure() == success and self.trigger_activate() == success

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm up."""
        return self._tried(self._load) or super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe and start the workers."""
        if failed := self._tried(self._subscribe):
            return failed
        done = super().on_activate(state)  # publishers first, or the first predictions are lost
        for worker in self.workers:
            worker.start()
        return done

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Listen and predict no more."""
        self._stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of the systems."""
        for outputs in self._outputs:
            outputs.close()
        self._outputs, self.systems, self.stack = [], [], None
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """An unforeseen fault in a transition: back to unconfigured, so that it can be tried again."""
        self._stop()
        self.on_cleanup(state)
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """End everything; a prediction that is being made is not waited for longer than a second."""
        self._stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.destroy_node()

    def _stop(self) -> None:
        if self._inputs is not None:
            self._inputs.close()
        for worker in self.workers:
            worker.stop(timeout_s=0.0)  # all at once, then each its time
        for worker in self.workers:
            if not worker.stop():
                self.get_logger().warning(f"{worker.system.name}: still predicting; its thread ends when it is done")
        self._inputs, self._diagnostics, self.workers = None, None, []

    def _load(self) -> None:
        path = self.get_parameter("config").value
        if not path:
            raise PerceptionError("parameter config is empty", "set it to the vehicle's YAML: configs/vehicle.yaml")
        self.stack = load_stack(Path(path), [name for name in self.get_parameter("systems").value if name])
        self.systems = load_systems(self.stack)
        for system in self.systems:
            start_s = time.monotonic()
            warm_up(system)
            self.get_logger().info(f"{system.name}: ready, warmed up in {time.monotonic() - start_s:.1f} s")
            if not self.has_parameter(THRESHOLD + system.name):
                self.declare_parameter(THRESHOLD + system.name, system.config.score_threshold)
        self._outputs = [SystemOutputs(self, system, self._pool) for system in self.systems]

    def _subscribe(self) -> None:
        assert self.stack is not None
        intake = Intake(deserialize, self.stack.clock_jump_s, self._settle)
        for system, outputs in zip(self.systems, self._outputs, strict=True):
            wait_s = self.stack.transform_wait_s
            worker = Worker(system, intake, self._pool, wait_s, outputs.wanted, outputs.publish, self._out_of_memory)
            worker.score_threshold = self.get_parameter(THRESHOLD + system.name).value
            self.workers.append(worker)
        self._inputs = Inputs(self, self.systems, intake, self._answer)
        self._diagnostics = Diagnostics(self, intake, self._inputs, self.workers)

    def _tried(self, step: Callable[[], None]) -> TransitionCallbackReturn | None:
        """FAILURE, and the reason in the log, where a step of a transition fails; rclpy itself would say nothing."""
        self.failure = self._fatal = None
        try:
            step()
        except Exception as error:
            self.failure = error
            known = isinstance(error, PerceptionError | OSError)
            self.get_logger().error(str(error) if known else traceback.format_exc())
            return TransitionCallbackReturn.FAILURE
        return None

    def _out_of_memory(self, reason: str) -> None:
        self._fatal = reason  # in a worker's thread; the next diagnosis, in the executor's, deactivates

    def _settle(self) -> bool:
        """In lock step, wait until all that comes of what was taken has been published; whether it is lock step."""
        if not self._received.get_subscription_count():
            return False
        while not all(worker.settled for worker in self.workers) and not self.stopping.is_set():
            time.sleep(0.001)
        return True

    def _answer(self, topic: str) -> None:
        """In lock step, tell the player that all that comes of a message has been published."""
        if self._settle():
            self._received.publish(String(data=topic))

    def _set_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            if not parameter.name.startswith(THRESHOLD):
                continue
            if not isinstance(parameter.value, float) or not 0 <= parameter.value <= 1:
                reason = f"{parameter.name}: {parameter.value!r} is no number from 0.0 to 1.0"
                return SetParametersResult(successful=False, reason=reason)
        for parameter in parameters:
            for worker in self.workers:
                if parameter.name == THRESHOLD + worker.system.name:
                    worker.score_threshold = parameter.value
        return SetParametersResult(successful=True)

    def _diagnose(self) -> None:
        """Publish all statuses, and log what is wrong."""
        if self._fatal is not None and self.workers:
            self.get_logger().error(f"deactivating: {self._fatal}")
            self.trigger_deactivate()
        statuses = self._diagnostics.statuses() if self._diagnostics is not None else []
        state = self._state_machine.current_state[1]
        wrong = self._fatal or (str(self.failure) if self.failure else "")
        statuses.insert(0, status("lifecycle", ERROR if wrong else OK, f"{state}: {wrong}" if wrong else state, {}))
        for one in statuses:
            self._say(one.name, one.level, one.message)
        self._status.publish(array(self, statuses))

    def _say(self, name: str, level: bytes, message: str) -> None:
        if level == OK:
            self._said.pop(name, None)
        elif name not in self._said or time.monotonic() - self._said[name] >= SAID_AGAIN_S:
            self._said[name] = time.monotonic()
            if level == ERROR:
                self.get_logger().error(f"{name}: {message}")
            else:  # a line of its own: rclpy ties a severity to the line that logs
                self.get_logger().warning(f"{name}: {message}")


def main() -> None:
    """Run the node until Ctrl-C or SIGTERM; exit code 2 where it cannot start."""
    ok = _run()
    gc.collect()  # the lifecycle's state machine holds the node in a cycle, and with it DDS' shared memory
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if ok else 2)  # all is closed; to take the interpreter down with torch in it would be seconds more


def _run() -> bool:
    """Whether the node ran."""
    # rclpy's own handlers end ROS at once, under the feet of callbacks and workers; here these stop first. Loading is
    # interrupted; once the node runs, a signal is seen between two waits, which are short for that.
    rclpy.init(args=sys.argv, signal_handler_options=SignalHandlerOptions.NO)
    _on_signals(signal.default_int_handler)
    node, executor = None, SingleThreadedExecutor()
    try:
        node = PerceptionNode()
        executor.add_node(node)
        if not node.autostart():
            return False
        stopping = node.stopping
        _on_signals(lambda *_: stopping.set())
        while not stopping.is_set():
            executor.spin_once(timeout_sec=0.1)
        return True
    except KeyboardInterrupt:
        return True
    except PerceptionError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return False
    finally:
        if node is not None:
            node.close()
        executor.shutdown(timeout_sec=0.0)
        rclpy.try_shutdown()


def _on_signals(handler: Callable[..., object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts what is in its background deaf to it
        signal.signal(number, handler)


if __name__ == "__main__":
    main()
