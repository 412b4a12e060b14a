"""The command line as a user has it: its output and its exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import builders
import pytest
import torch

from perception.cli import main
from perception.errors import PerceptionError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def nuscenes(tmp_path_factory):
    return builders.write_small_nuscenes(tmp_path_factory.mktemp("nuscenes"))


@pytest.fixture
def perception(tmp_path, monkeypatch, capsys):
    """Runs the command in this process: importing torch anew for each case would take most of the time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["perception", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
        text = capsys.readouterr()
        return SimpleNamespace(code=code, out=text.out, err=text.err)

    return run


def test_the_installed_command_lists_its_commands():
    command = Path(sys.executable).with_name("perception")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=300, check=True)
    assert all(name in done.stdout for name in ("doctor", "inspect", "eval", "bench"))


def test_doctor_reports_every_part_and_exits_by_what_it_finds(perception):
    done = perception("doctor")
    assert done.code == 0, done.out
    assert all(part in done.out for part in ("Python", "spconv", "ROS 2", "shared memory"))


def test_inspect_tells_the_layout_from_the_folder_and_draws(perception, nuscenes, tmp_path):
    done = perception("inspect", nuscenes, "--index", 1, "--out", tmp_path / "pictures")
    assert done.code == 0, done.err
    assert "NuScenes: 6 samples" in done.out
    assert "1,000 points" in done.out  # the sweep of the sample before is accumulated
    assert "boxes pedestrian" in done.out
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["bev.png", "cameras.png"]


def test_eval_prints_the_table_and_writes_the_result(perception, nuscenes, tmp_path):
    done = perception(
        "eval", CONFIGS / "nuscenes_detection.yaml", "--data", nuscenes, "--out", tmp_path / "out",
        "--set", "dataset.version=v1.0-mini", "--set", "dataset.split=mini_val", "--set", "predictor.name=truth_echo",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "NDS 1.0000, mAP 1.0000, 6 samples" in done.out
    assert (tmp_path / "out" / "nuscenes_detection.json").is_file()


def test_eval_of_a_network_wants_its_weights(perception, nuscenes):
    arguments = [
        "eval", CONFIGS / "sparsefusion_nuscenes_r50.yaml", "--data", nuscenes,
        "--set", "dataset.version=v1.0-mini", "--set", "dataset.split=mini_val",
    ]  # fmt: skip
    done = perception(*arguments)
    assert done.code == 2 and "predictor sparsefusion: no weights" in done.err and "--weights FILE" in done.err
    done = perception(*arguments, "--weights", "none.safetensors")
    assert done.code == 2 and "none.safetensors: " in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere: no such folder"),
        (["inspect", "."], "not a layout that is known here"),
        (["eval", "none.yaml"], "none.yaml: no such configuration file"),
        (["bench", "sparse", "--points", "none.bin"], "none.bin"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(perception, arguments, message):
    done = perception(*arguments)
    assert done.code == 2
    assert "error:" in done.err
    assert message in done.err
    assert "Traceback" not in done.err
    with pytest.raises(PerceptionError, match=message):
        perception(*arguments, "--debug")


def test_a_token_that_is_not_there_names_near_ones(perception, nuscenes):
    done = perception("inspect", nuscenes, "--token", "abc")
    assert done.code == 2
    assert "no sample with token 'abc' among 6" in done.err
    done = perception("inspect", nuscenes, "--index", 6)
    assert "--index 6: there are 6 samples" in done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("bench", ["sparsefusion", "city", "sparse"])
def test_a_device_that_is_not_there_is_said(bench, perception):
    done = perception("bench", bench, "--device", "cuda")
    assert done.code == 2
    assert "sees 0 CUDA devices" in done.err and "use another device" in done.err
