"""Checkpoints of others are read without running them, and what is no such checkpoint is named."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from perception.errors import DataError, PerceptionError
from perception.weights_conversion import convert_weights, read_checkpoint

SMALL = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def checkpoint(**changes) -> dict:
    """As mmcv writes one: the learning rate of the optimizer and the time may be numbers of numpy."""
    return {
        "meta": {
            "epoch": 6,
            "iter": np.int64(46380),
            "mmcv_version": "1.2.7",
            "CLASSES": ("car", "bus"),
            "config": "x",
        },
        "state_dict": SMALL.state_dict(),
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.zeros(4)}},
            "param_groups": [{"lr": np.float64(1e-4), "betas": (0.9, 0.999), "params": [0], "span": np.arange(3.0)}],
        },
        **changes,
    }


def test_a_checkpoint_with_numbers_of_numpy_is_read(tmp_path: Path):
    path = tmp_path / "epoch_6.pth"
    torch.save(checkpoint(), path)
    assert read_checkpoint(path).keys() == SMALL.state_dict().keys()


def test_numbers_of_either_numpy_are_read(tmp_path: Path):
    """numpy 2 renamed the module that its pickles name."""
    for other in (b"numpy.core", b"numpy._core"):
        stream = pickle.dumps(checkpoint(state_dict={}, optimizer=None), protocol=2)
        renamed = stream.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", other)
        assert other in renamed
        path = tmp_path / "checkpoint.pth"
        with path.open("wb") as out:
            torch.save({}, out)
        _replace_pickle(path, renamed)
        assert read_checkpoint(path) == {}


def _replace_pickle(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bombed",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint(meta=Bomb()), tmp_path / "epoch_6.pth")
    with pytest.raises(DataError, match=r"epoch_6.pth: it holds \w+.system, which is neither a tensor nor plain data"):
        read_checkpoint(tmp_path / "epoch_6.pth")
    assert not (tmp_path / "bombed").exists()


def test_other_files_than_checkpoints_are_refused(tmp_path: Path):
    path = tmp_path / "epoch_6.pth"
    torch.save(checkpoint(), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"epoch_6.pth: a checkpoint that is cut short or damaged\n  copy it again"):
        read_checkpoint(path)
    with pytest.raises(DataError, match=r"absent.pth: No such file"):
        read_checkpoint(tmp_path / "absent.pth")
    torch.save(SMALL.state_dict(), path)
    with pytest.raises(DataError, match=r"no checkpoint of mmcv, .* this one has keys 0.weight, 0.bias"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(DataError, match="this one has list"):
        read_checkpoint(path)


@pytest.mark.parametrize("left", [20, -100])
def test_a_checkpoint_of_an_old_torch_that_is_cut_short_is_told(tmp_path: Path, left: int):
    path = tmp_path / "epoch_6.pth"
    torch.save(checkpoint(), path, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path).keys() == SMALL.state_dict().keys()
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DataError, match=r"epoch_6.pth: a checkpoint that is cut short"):
        read_checkpoint(path)


def _archive(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("data.pkl", content)
    return stream.getvalue()


@pytest.mark.parametrize("data", [b"", b"hello\n", b"<!DOCTYPE html>", b"name: x", _archive(b"hello")])
def test_what_is_no_checkpoint_is_told_in_our_words(tmp_path: Path, data: bytes):
    """torch's text would advise to load the file unsafely."""
    path = tmp_path / "epoch_6.pth"
    path.write_bytes(data)
    with pytest.raises(DataError) as raised:
        read_checkpoint(path)
    assert raised.value.what == f"{path}: not a checkpoint that torch wrote, or damaged"
    assert raised.value.do == "give the file as its authors released it"


def test_a_weights_file_needs_no_conversion(tmp_path: Path):
    path = tmp_path / "small.safetensors"
    save_file(SMALL.state_dict(), path)
    with pytest.raises(DataError) as raised:
        convert_weights("sparsefusion", path, tmp_path / "out.safetensors")
    assert raised.value.what == f"{path}: is a weights file already"
    assert raised.value.do == "use it as it is; `perception weights convert` reads the authors' .pth"


def test_a_system_without_checkpoints_is_told(tmp_path: Path):
    with pytest.raises(PerceptionError, match=r"'msocc' has no official checkpoints to convert\n  .*sparsefusion"):
        convert_weights("msocc", tmp_path / "a.pth", tmp_path / "b.safetensors")
