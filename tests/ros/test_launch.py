"""The shipped launch files, and the stand-in that starts them where ROS' launch is absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from perception.errors import PerceptionError

stand_in = pytest.importorskip("perception_ros.launch_stand_in")
up = pytest.importorskip("perception_ros.up")

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
FILES = sorted(LAUNCH.glob("*.launch.py"))


@pytest.fixture(autouse=True)
def _installed():
    stand_in.install()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("launch", "launch_ros")]:
        del sys.modules[name]


def nodes(name: str, **arguments: str):
    """What a shipped file would start: name -> (command after the program, environment)."""
    context = stand_in.Context({key: str(value) for key, value in arguments.items()}, env={})
    found = {}

    def walk(actions):
        for action in actions:
            if isinstance(action, stand_in.Node):
                command = action.command(context)
                found[action.name] = command[command.index("--ros-args") - len(action.arguments) :], dict(context.env)
            else:
                walk(action.execute(context) or ())

    walk(stand_in.load(LAUNCH / f"{name}.launch.py").entities)
    return found


def parameters(command: list[str]) -> set[str]:
    return {after for before, after in pairwise(command) if before == "-p"}


def test_there_are_the_three_files():
    assert [path.name.partition(".")[0] for path in FILES] == ["perception", "playback", "rviz"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_argument_says_what_it_is(path):
    arguments = stand_in.load(path).get_launch_arguments()
    assert arguments and all(argument.description for argument in arguments)


def test_nothing_given_is_the_demo_in_simulated_time():
    started = nodes("perception", rviz="false")
    assert list(started) == ["perception", "perception_play"]
    command, env = started["perception"]
    assert parameters(command) == {f"config:={ROOT / 'configs' / 'vehicle.yaml'}", "use_sim_time:=true"}
    assert env == {"FASTDDS_DEFAULT_PROFILES_FILE": str(ROOT / "configs" / "fastdds_shm.xml")}
    play, play_env = started["perception_play"]
    assert play[:3] == ["--rate", "1.0", "--loop"] and play_env == env  # the segment is the writer's


@pytest.mark.parametrize(("distro", "variable"), [("humble", "FASTRTPS"), ("jazzy", "FASTRTPS"), ("kilted", "FASTDDS")])
def test_the_profile_goes_to_the_variable_that_the_distributions_fast_dds_reads(monkeypatch, distro, variable):
    monkeypatch.setenv("ROS_DISTRO", distro)
    _, env = nodes("perception", config="car.yaml", rviz="false")["perception"]
    assert list(env) == [f"{variable}_DEFAULT_PROFILES_FILE"]


def test_a_bag_is_played_once():
    play, _ = nodes("perception", bag="drive.mcap", rviz="false", rate="0.5")["perception_play"]
    assert play[: play.index("--ros-args")] == ["drive.mcap", "--rate", "0.5"]


def test_a_vehicle_has_its_own_time_and_no_player():
    started = nodes("perception", config="car.yaml", rviz="false")
    assert list(started) == ["perception"]
    assert parameters(started["perception"][0]) == {"config:=car.yaml", "use_sim_time:=false"}


def test_systems_share_a_process_or_have_their_own():
    together = nodes("perception", config="car.yaml", rviz="false", systems="boxes, pose")
    assert "systems:=[boxes, pose]" in parameters(together["perception"][0])
    apart = nodes("perception", config="car.yaml", rviz="false", systems="boxes,pose", separate="true")
    assert list(apart) == ["perception_boxes", "perception_pose"]
    assert "systems:=[pose]" in parameters(apart["perception_pose"][0])
    with pytest.raises(PerceptionError, match=r"separate:=true needs the systems' names"):
        nodes("perception", config="car.yaml", rviz="false", separate="true")


def test_too_little_shared_memory_is_said_before_anything_starts(capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 2**20, "total": 2**26}))
    nodes("perception", config="car.yaml", rviz="false")
    assert "1 of 64 MiB free in /dev/shm, 3 segments of 8 MiB (fastdds_shm.xml) need 24" in capsys.readouterr().out


def test_rviz_gets_the_shipped_view(monkeypatch, tmp_path):
    (tmp_path / "rviz2").write_text("#!/bin/sh\n")
    (tmp_path / "rviz2").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command, _ = nodes("perception")["rviz2"]  # auto: it is installed
    assert command[:2] == ["-d", str(LAUNCH / "perception.rviz")] and Path(command[1]).is_file()
    assert parameters(command) == {"use_sim_time:=true"}


@pytest.mark.parametrize("executable", ["perception_node", "perception_play"])
def test_every_executable_is_an_entry_point_that_can_be_imported(executable):
    python, dash_m, module = stand_in.program("perception_ros", executable)
    assert (python, dash_m) == (sys.executable, "-m") and find_spec(module) is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], r"no launch file 'nothing'\n  give the path of one, or: perception, playback, rviz"),
        (["bagg:=x"], r"perception.launch.py has no argument bagg\n  it has: bag, config"),
        (["rviz", "playback"], r"more than one launch file: rviz, playback"),
    ],
)
def test_wrong_words_are_told_with_the_right_ones(words, message):
    with pytest.raises(PerceptionError, match=message):
        up.parse(words)


def test_a_value_that_is_no_choice_is_told():
    with pytest.raises(PerceptionError, match=r"demo:=maybe\n  choose one of auto, true, false"):
        nodes("perception", demo="maybe")


def test_an_executable_that_is_not_there_is_told():
    with pytest.raises(PerceptionError, match="no_package has no executable 'no_program' here"):
        stand_in.program("no_package", "no_program")


CHILD = """#!{python}
import signal, sys, time
def stop(*_):
    print("asked to stop"); sys.exit(0)
for number in {deaf}:
    signal.signal(number, signal.SIG_IGN)
if not {deaf}:
    signal.signal(signal.SIGINT, stop)
print("ready", *sys.argv[1:], flush=True)
{body}
"""


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Starts programs of a made-up package by a launch file of their own, in a process of its own."""
    prefix = tmp_path / "install"
    (prefix / "lib" / "made_up").mkdir(parents=True)
    started = []

    def start(on_exit: str = "None", **bodies: str) -> subprocess.Popen:
        for name, body in bodies.items():
            deaf = {"busy": "[signal.SIGINT]", "deaf": "[signal.SIGINT, signal.SIGTERM]"}.get(name, "[]")
            program = prefix / "lib" / "made_up" / name
            program.write_text(CHILD.format(python=sys.executable, deaf=deaf, body=body))
            program.chmod(0o755)
        made = [f"Node(package='made_up', executable='{n}', name='{n}', on_exit={on_exit})" for n in bodies]
        file = tmp_path / "made_up.launch.py"
        file.write_text(
            "from launch import LaunchDescription\nfrom launch.actions import Shutdown\n"
            "from launch_ros.actions import Node\n"
            f"def generate_launch_description():\n    return LaunchDescription([{', '.join(made)}])\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "perception_ros.up", str(file)],
            env=os.environ | {"AMENT_PREFIX_PATH": str(prefix)},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen, *texts: str) -> None:
    assert process.stdout is not None
    missing = set(texts)
    while missing:
        line = process.stdout.readline()
        assert line, f"ended without saying {missing}"
        missing -= {text for text in missing if text in line}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_in_order(launched, number):
    process = launched(first="time.sleep(60)", second="time.sleep(60)")
    wait_for(process, "[first-1] ready --ros-args -r __node:=first", "[second-2] ready")
    process.send_signal(number)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "[first-1] asked to stop" in out and "[second-2] asked to stop" in out


@pytest.mark.parametrize(
    ("name", "code"), [("busy", -signal.SIGTERM), pytest.param("deaf", -signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_one_that_does_not_listen_is_ended_all_the_same(launched, name, code):
    process = launched(**{name: "time.sleep(60)"})
    wait_for(process, f"[{name}-1] ready")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert f"{name}-1 has ended with exit code {code}" in out and process.returncode == 1


def test_the_end_of_one_can_end_all_and_a_failure_is_the_exit_code(launched):
    process = launched("Shutdown(reason='the first has ended')", first="sys.exit(3)", second="time.sleep(60)")
    out, _ = process.communicate(timeout=20)
    assert "[launch] shutting down: the first has ended" in out and process.returncode == 1


def test_it_ends_when_all_have_ended(launched):
    process = launched(first="", second="")
    assert process.wait(timeout=20) == 0
