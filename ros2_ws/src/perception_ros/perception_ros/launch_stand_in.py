"""Stands in for ROS' `launch` and `launch_ros`, which are not on PyPI, so that the shipped launch files start anyway.

Only what those files use: arguments, includes, environment variables, log lines, nodes and shutdown. `install()` puts
the classes where the launch files import them from; `run()` executes a file. An action is a function of the Context:
executing it may return further actions.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from perception.errors import PerceptionError

SIGTERM_AFTER_S, SIGKILL_AFTER_S = 5.0, 5.0
"""How long a process that was interrupted, then terminated, is waited for: launch's own defaults."""


class LaunchConfiguration:
    """The value of a launch argument."""

    def __init__(self, name: str) -> None:
        self.name = name

    def perform(self, context: Context) -> str:
        if self.name not in context.arguments:
            raise PerceptionError(
                f"launch argument {self.name!r} is not declared", "add a DeclareLaunchArgument for it"
            )
        return context.arguments[self.name]


Text = str | LaunchConfiguration


@dataclass
class Context:
    """What a run has gathered; one for a file and all that it includes."""

    arguments: dict[str, str]
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    processes: list[Process] = field(default_factory=list)
    shutdown: threading.Event = field(default_factory=threading.Event)
    failed: bool = False

    def text(self, value: Any) -> str:
        return value.perform(self) if isinstance(value, LaunchConfiguration) else str(value)

    def say(self, who: str, line: str) -> None:
        sys.stdout.write(f"[{who}] {line}\n")
        sys.stdout.flush()


class LaunchDescription:
    def __init__(self, entities: Iterable[Action]) -> None:
        self.entities = list(entities)

    def get_launch_arguments(self) -> list[DeclareLaunchArgument]:
        return [entity for entity in self.entities if isinstance(entity, DeclareLaunchArgument)]


class Action:
    def execute(self, context: Context) -> Sequence[Action] | None:
        raise NotImplementedError


class DeclareLaunchArgument(Action):
    def __init__(self, name: str, *, default_value: Text, description: str = "", choices: Sequence[str] = ()) -> None:
        self.name, self.default_value, self.description, self.choices = name, default_value, description, choices

    def execute(self, context: Context) -> None:
        value = context.arguments.setdefault(self.name, context.text(self.default_value))
        if self.choices and value not in self.choices:
            raise PerceptionError(f"{self.name}:={value}", f"choose one of {', '.join(self.choices)}")


class OpaqueFunction(Action):
    def __init__(self, *, function: Callable[[Context], Sequence[Action] | None]) -> None:
        self.function = function

    def execute(self, context: Context) -> Sequence[Action] | None:
        return self.function(context)


class SetEnvironmentVariable(Action):
    def __init__(self, name: str, value: Text) -> None:
        self.name, self.value = name, value

    def execute(self, context: Context) -> None:
        context.env[self.name] = context.text(self.value)


class LogInfo(Action):
    def __init__(self, *, msg: Text) -> None:
        self.msg = msg

    def execute(self, context: Context) -> None:
        context.say("launch", context.text(self.msg))


class Shutdown(Action):
    def __init__(self, *, reason: str = "") -> None:
        self.reason = reason

    def execute(self, context: Context) -> None:
        if not context.shutdown.is_set():
            context.say("launch", f"shutting down: {self.reason}")
        context.shutdown.set()


class PythonLaunchDescriptionSource:
    def __init__(self, path: str) -> None:
        self.path = Path(path)


class IncludeLaunchDescription(Action):
    def __init__(self, source: PythonLaunchDescriptionSource, *, launch_arguments: Iterable[tuple[str, Text]] = ()):
        self.source, self.launch_arguments = source, tuple(launch_arguments)

    def execute(self, context: Context) -> Sequence[Action]:
        context.arguments |= {name: context.text(value) for name, value in self.launch_arguments}
        return load(self.source.path).entities


@dataclass
class Node(Action):
    """A process with ROS arguments; its output is prefixed with its name."""

    package: str
    executable: str
    name: str
    parameters: Sequence[Mapping[str, Any]] = ()
    arguments: Sequence[Text] = ()
    output: str = "screen"
    on_exit: Action | None = None

    def command(self, context: Context) -> list[str]:
        ros = ["-r", f"__node:={self.name}"]
        for parameters in self.parameters:
            for key, value in parameters.items():
                plain = yaml.safe_load(context.text(value)) if isinstance(value, LaunchConfiguration) else value
                # A flow-style YAML value is what the command line takes: true, 3, [a, b], "text".
                ros += ["-p", f"{key}:={yaml.safe_dump(plain, default_flow_style=True, width=10**6).split(chr(10))[0]}"]
        return [*program(self.package, self.executable), *map(context.text, self.arguments), "--ros-args", *ros]

    def execute(self, context: Context) -> None:
        context.processes.append(Process(self, context))


class Process:
    """A started node: a thread passes its output on and runs `on_exit` at its end."""

    def __init__(self, node: Node, context: Context) -> None:
        self.name = f"{node.name}-{len(context.processes) + 1}"
        # In a session of its own: an interrupt from the keyboard reaches it once, from here.
        self.process = subprocess.Popen(  # noqa: S603
            node.command(context),
            env=context.env | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.thread = threading.Thread(target=self._follow, args=(node, context), daemon=True)
        self.thread.start()

    def _follow(self, node: Node, context: Context) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            context.say(self.name, line.rstrip("\n"))
        code = self.process.wait()
        context.say("launch", f"{self.name} has ended with exit code {code}")
        interrupted = context.shutdown.is_set() and code == -signal.SIGINT  # before it had a handler
        context.failed |= code != 0 and not interrupted
        if node.on_exit is not None:
            node.on_exit.execute(context)
        if all(other.process.poll() is not None for other in context.processes):
            context.shutdown.set()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def join(self) -> None:
        """Wait for the end, and enforce it."""
        for number, after_s in ((signal.SIGTERM, SIGTERM_AFTER_S), (signal.SIGKILL, SIGKILL_AFTER_S)):
            try:
                self.process.wait(after_s)
                break
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, number)
        self.process.wait()
        self.thread.join(SIGKILL_AFTER_S)


def program(package: str, executable: str) -> list[str]:
    """How to start a package's executable: colcon's `lib/<package>`, a pip installation's entry point, the PATH."""
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        path = Path(prefix, "lib", package, executable)
        if prefix and path.is_file():
            return [str(path)]
    for entry in metadata.entry_points(group="console_scripts", name=executable):
        if entry.dist is not None and entry.dist.name.replace("-", "_") == package:
            return [sys.executable, "-m", entry.module]
    if (found := shutil.which(executable)) is not None:
        return [found]
    raise PerceptionError(
        f"{package} has no executable {executable!r} here", f"install {package}, or source its workspace"
    )


def load(path: Path) -> LaunchDescription:
    """Run a launch file's `generate_launch_description`."""
    spec = importlib.util.spec_from_file_location(f"launch_file_{path.name.partition('.')[0]}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PerceptionError(f"{path} is no launch file", "give the path of a .launch.py file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.generate_launch_description()


def install() -> None:
    """Make `import launch` and `import launch_ros` find this stand-in. Only where the real ones are absent."""
    here = sys.modules[__name__]
    names = {
        "launch": ["LaunchDescription"],
        "launch.actions": [
            "DeclareLaunchArgument",
            "IncludeLaunchDescription",
            "LogInfo",
            "OpaqueFunction",
            "SetEnvironmentVariable",
            "Shutdown",
        ],
        "launch.launch_description_sources": ["PythonLaunchDescriptionSource"],
        "launch.substitutions": ["LaunchConfiguration"],
        "launch_ros": [],
        "launch_ros.actions": ["Node"],
    }
    for name, members in names.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, getattr(here, member))
        sys.modules[name] = module


def run(path: Path, arguments: Mapping[str, str]) -> int:
    """Execute a launch file until all its processes have ended, one asks for shutdown, or SIGINT or SIGTERM comes.

    Processes get SIGINT, five seconds later SIGTERM, and another five later SIGKILL.

    Returns:
        0 if every process ended well, else 1.
    """
    context = Context(dict(arguments))
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: context.shutdown.set()) for number in numbers]
    try:
        execute(load(path).entities, context)
        while context.processes and not context.shutdown.wait(0.2):  # a signal's handler runs between two waits
            pass
    finally:
        for process in context.processes:
            process.stop()
        for process in context.processes:
            process.join()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    return int(context.failed)


def execute(actions: Iterable[Action], context: Context) -> None:
    for action in actions:
        execute(action.execute(context) or (), context)
