"""Result files hold what made the numbers, come back as written, and refuse numbers of random weights."""

import json
import math
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import torch

import perception
from perception.config import Config
from perception.errors import DataError, PerceptionError
from perception.evaluation.result import (
    device_name,
    library_versions,
    make_result,
    read_result,
    source,
    write_result,
)
from perception.weights import WeightsProvenance


class Inner(Config):
    root: Path = Path("/data/nuscenes")
    sweeps: int = 10


class Settings(Config):
    dataset: Inner = Inner()
    threshold: float = 0.1


ECHO = WeightsProvenance.not_needed("truth_echo repeats the truth")


def result(**changes):
    arguments = {
        "samples": 81,
        "samples_of_split": 81,
        "config": Settings(threshold=0.3),
        "weights": ECHO,
        "device": "cpu",
    } | changes
    return make_result(
        "nuscenes_detection", {"mAP": 0.5376, "AP/barrier": math.nan, "NDS": np.float32(0.25)}, **arguments
    )


def test_a_result_comes_back_as_written(tmp_path):
    written = result(image_resize="torch bilinear, antialias")
    write_result(tmp_path / "out" / "metrics.json", written)
    assert read_result(tmp_path / "out" / "metrics.json") == written
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["metrics.json"]


def test_the_file_is_plain_json_and_holds_everything(tmp_path):
    write_result(tmp_path / "metrics.json", result())
    text = (tmp_path / "metrics.json").read_text()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["metrics"] == {"mAP": 0.5376, "AP/barrier": None, "NDS": 0.25}
    assert data["config"] == {"dataset": {"root": "/data/nuscenes", "sweeps": 10}, "threshold": 0.3}
    assert data["weights"] == {"kind": "none", "sha256": None, "note": "truth_echo repeats the truth"}
    assert data["versions"]["numpy"] == np.__version__
    assert data["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert data["versions"].keys() >= {"python", "spconv", "nuscenes-devkit", "cuda"}
    assert data["source"]["version"] == perception.__version__
    assert data["device"].startswith("cpu: ")
    assert abs(datetime.fromisoformat(data["date"]) - datetime.now(timezone.utc)) < timedelta(minutes=5)
    assert data["subset"] is False


def test_a_subset_says_so():
    part = result(samples=3)
    assert (part.subset, part.samples, part.samples_of_split) == (True, 3, 81)
    assert result(samples_of_split=None).subset is False


def test_numbers_of_random_weights_are_refused(tmp_path):
    with pytest.raises(
        PerceptionError, match=r"metrics.json: not written: the nuscenes_detection numbers are of random"
    ):
        write_result(tmp_path / "metrics.json", result(weights=WeightsProvenance.random()))
    assert not (tmp_path / "metrics.json").exists()


def git(root, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_source_of_a_checkout_knows_its_commit_and_changes(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "first")
    clean = source(tmp_path)
    assert clean.commit == git(tmp_path, "rev-parse", "HEAD")
    assert clean.modified is False
    (tmp_path / "notes.txt").write_text("an output, not code\n")
    assert source(tmp_path).modified is False
    (tmp_path / "code.py").write_text("a = 2\n")
    assert source(tmp_path).modified is True


def test_a_package_inside_another_repository_has_no_commit(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "first")
    installed = tmp_path / "venv" / "site-packages"
    installed.mkdir(parents=True)
    assert source(installed).model_dump() == {"version": perception.__version__, "commit": None, "modified": None}


def test_without_git_there_is_only_the_version(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source().model_dump() == {"version": perception.__version__, "commit": None, "modified": None}


def test_versions_and_devices():
    assert library_versions()["python"].startswith("3.")
    assert "cores" in device_name(torch.device("cpu"))


@pytest.mark.gpu
def test_a_gpu_is_named():
    assert device_name("cuda") == f"cuda: {torch.cuda.get_device_name()}"


def test_another_file_is_no_result(tmp_path):
    with pytest.raises(DataError, match=r"absent.json: No such file"):
        read_result(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text('{"benchmark": "x"}')
    with pytest.raises(DataError, match=r"other.json: not a result file(?s:.)*that an evaluation wrote"):
        read_result(tmp_path / "other.json")
