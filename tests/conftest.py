"""Fixtures shared by all tests: where real sensor data and golden tensors are, and clean numerics."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("tests", deadline=None)  # how long an example takes tells of the machine's load
settings.load_profile("tests")


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / default))
    if not folder.is_dir():
        message = f"{folder} is absent: set {variable} to a copy of it"
        if os.environ.get("REQUIRE_SHARED") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real sensor data (never in the repository): $SHARED_DATA_DIR, default ../shared/data."""
    return _folder("SHARED_DATA_DIR", "../shared/data")


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Golden tensors of the official models: $PARITY_DIR, default ../shared/parity."""
    return _folder("PARITY_DIR", "../shared/parity")


@pytest.fixture(autouse=True)
def _clean_numerics():
    """Every test starts from one seed and leaves torch's defaults as they were."""
    torch.manual_seed(0)
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # to set it takes seconds the first time
        torch.use_deterministic_algorithms(deterministic)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
