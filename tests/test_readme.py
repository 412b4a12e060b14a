"""What the README says works: its commands are commands, its files exist, its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer

from perception.cli import app
from perception.types import Sample

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
COMMANDS = [
    shlex.split(line, comments=True)
    for part in BASH.splitlines()
    for line in part.split("&&")
    if re.match(r"\s*(\.venv/bin/)?perception ", line)
]


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("words", COMMANDS, ids=lambda w: " ".join(w))
def test_every_command_is_one_with_the_options_it_has(words):
    command = typer.main.get_command(app)
    arguments = words[1:]
    while hasattr(command, "commands"):
        assert arguments[0] in command.commands
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(command.name, list(arguments))  # parses, runs nothing; a wrong option raises


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|perception|docs|\.ci)/[\w./]+\w", README))))
def test_every_file_it_names_exists(path):
    assert (ROOT / path).exists()


def test_its_python_builds_a_sample():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {
        "xyz": np.zeros((5, 3), np.float32),
        "intensity": np.zeros(5, np.float32),
        "rgb": np.zeros((90, 160, 3), np.uint8),
        "intrinsic": np.array([[80.0, 0, 80], [0, 80, 45], [0, 0, 1]]),
    }
    exec(block, names)
    assert isinstance(names["sample"], Sample)


def test_the_two_marked_blocks_are_there_for_ci():
    assert re.search(r"<!-- demo -->\n```bash\n", README)
    assert re.search(r"<!-- test -->\n```bash\n", README)
