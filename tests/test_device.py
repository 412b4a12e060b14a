from __future__ import annotations

import pytest
import torch

from perception.device import usable_device
from perception.errors import ConfigError


def test_the_cpu_is_always_there():
    assert usable_device("cpu") == usable_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("banana", r"device 'banana': torch knows no such device\n  use cpu, cuda or cuda:1"),
        ("cuda:99", r"device 'cuda:99': torch .* sees \d+ CUDA devices\n .*`perception doctor`"),
        ("meta", r"device 'meta': neither a CPU nor a CUDA device"),
    ],
)
def test_a_device_that_is_not_there_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        usable_device(name)


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"device 'cuda': torch .* sees 0 CUDA devices"):
        usable_device("cuda")
