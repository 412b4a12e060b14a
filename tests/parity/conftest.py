"""The kit of golden tensors that the parity tests compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity.kit import Kit


@pytest.fixture(scope="session")
def kit(parity_dir: Path) -> Kit:
    """SparseFusion's kit: $PARITY_DIR/sparsefusion."""
    return Kit(parity_dir / "sparsefusion")
