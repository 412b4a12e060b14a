"""Weights files say what they are, load strictly or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

import perception
from perception.config import Config
from perception.errors import DataError
from perception.weights import (
    WeightsProvenance,
    load_weights,
    read_fitting,
    read_manifest,
    read_weights,
    write_weights,
)


class SmallConfig(Config):
    name: str = "small"
    weights: Path | None = Path("/somewhere/else.safetensors")
    channels: int = 4


def small(channels: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "zoo" / "small.safetensors"
    write_weights(path, small().state_dict(), SmallConfig())
    return path


def test_a_state_comes_back_with_its_manifest(tmp_path: Path):
    network = small()
    network[1].num_batches_tracked += 7
    path = tmp_path / "small.safetensors"
    write_weights(path, network.state_dict(), SmallConfig(channels=4))
    other = small()
    provenance = load_weights(other, path)
    assert provenance.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert provenance.note == "small.safetensors"
    for name, tensor in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    manifest = read_manifest(path)
    assert manifest.system == "small" and manifest.version == perception.__version__ and manifest.source is None
    assert manifest.config == {"name": "small", "channels": 4}  # not where the file once lay
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


def test_half_precision_is_stored_and_loaded_into_full(tmp_path: Path):
    network, path = small(), tmp_path / "half.safetensors"
    network[1].running_var += 1e6  # a variance may be beyond float16
    write_weights(path, network.state_dict(), SmallConfig(), torch.float16)
    state, _ = read_weights(path)
    assert state["0.weight"].dtype == torch.float16 and state["1.num_batches_tracked"].dtype == torch.int64
    other = small()
    load_weights(other, path)
    assert other[0].weight.dtype == torch.float32
    assert torch.equal(other[1].running_var, network[1].running_var)
    torch.testing.assert_close(other[0].weight, network[0].weight, rtol=1e-3, atol=0)


def test_what_does_not_fit_half_precision_is_not_written(tmp_path: Path):
    network = small()
    network[1].weight.data += 1e6
    with pytest.raises(DataError, match=r"of 1 tensors are not finite: 1.weight\n  a value overflows torch.float16"):
        write_weights(tmp_path / "half.safetensors", network.state_dict(), SmallConfig(), torch.float16)
    assert not list(tmp_path.iterdir())


def test_every_kind_of_misfit_is_named_at_once(file: Path):
    network = small(channels=5)
    network.extra = nn.Linear(1, 1)
    del network[1].running_mean
    network[1].register_buffer("running_mean", None)
    before = network[0].weight.clone()
    with pytest.raises(DataError) as caught:
        load_weights(network, file)
    text = str(caught.value)
    assert "small.safetensors (written for small) does not fit the network: 2 missing: extra.weight, extra.bias" in text
    assert "1 unexpected: 1.running_mean" in text
    assert "5 of another shape: 0.weight (4, 3, 1, 1) for (5, 3, 1, 1), 0.bias (4,) for (5,)" in text
    assert torch.equal(network[0].weight, before)


def test_what_fits_is_taken_and_the_rest_told(file: Path):
    state, _ = read_weights(file)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5))
    told = read_fitting(network, file)
    assert told.startswith("3 of 7 tensors taken; 4 of another shape: 1.weight (4,) for (5,)")
    assert torch.equal(network[0].weight, state["0.weight"])
    with pytest.raises(DataError, match="not one of 7 tensors fits the network"):
        read_fitting(nn.Linear(9, 9), file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.write_bytes(b"\x80\x02}q\x00."), "not a whole safetensors file .*\n.*perception weights convert"),
        (lambda p: save_file({"a": torch.ones(1)}, p), "no manifest of this package"),
        (lambda p: save_file({"a": torch.ones(1)}, p, {"manifest": '{"system": 3}'}), "no manifest of this package"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, make, message: str):
    path = tmp_path / "w.safetensors"
    make(path)
    with pytest.raises(DataError, match=message):
        read_manifest(path)


def test_a_file_that_cannot_be_opened_is_named_once(tmp_path: Path):
    for path, why in ((tmp_path / "absent.safetensors", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(DataError) as raised:
            read_manifest(path)
        assert str(raised.value) == f"{path}: {why}\n  give the path of a weights file"


def test_a_truncated_or_damaged_file_is_refused(file: Path):
    data = file.read_bytes()
    file.write_bytes(data[:-3])
    with pytest.raises(DataError, match=r"small.safetensors: not a whole safetensors file"):
        load_weights(small(), file)
    file.write_bytes(data[:-4] + np.float32(np.nan).tobytes())  # the last tensor's last value
    with pytest.raises(DataError, match="values of 1 tensors are not finite"):
        load_weights(small(), file)


def test_weights_are_named_by_their_hash(tmp_path: Path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights" * 300_000)
    provenance = WeightsProvenance.of_file(weights)
    assert provenance.sha256 == hashlib.sha256(b"weights" * 300_000).hexdigest()
    assert (provenance.kind, provenance.note) == ("file", "model.safetensors")
    with pytest.raises(DataError, match=r"absent.safetensors: No such file"):
        WeightsProvenance.of_file(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "fields", [{"kind": "file"}, {"kind": "none", "sha256": "0" * 64}, {"kind": "file", "sha256": "abc"}]
)
def test_a_hash_belongs_to_a_file(fields):
    with pytest.raises(ValidationError):
        WeightsProvenance(**fields)
