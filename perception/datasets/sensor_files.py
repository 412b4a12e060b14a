"""What the layouts share: which sensors are asked for, rows of float32, images and JSON tables.

A size is checked before anything of that size is allocated; nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from perception.errors import ConfigError, DataError
from perception.types import Array, PointCloud

_MAX_ROWS = 4_000_000
"""More points than any sweep has; a larger file is not a sweep."""

_END_OF_JPEG = b"\xff\xd9"


def select_roles(asked: Sequence[str] | None, known: Sequence[str], key: str) -> tuple[str, ...]:
    """The sensor roles to read: those asked for, or all that are known.

    Args:
        asked: roles, or None for all.
        known: the roles of this layout.
        key: the configuration key, for the message.

    Raises:
        ConfigError: a role is not known.
    """
    if asked is None:
        return tuple(known)
    strange = [role for role in asked if role not in known]
    if strange:
        raise ConfigError(f"{key}: no sensor {', '.join(strange)} in this data set", f"choose of: {', '.join(known)}")
    return tuple(asked)


def read_floats(path: Path, columns: int, source: str) -> Array:
    """A file of little-endian float32 rows -> (N, columns) float32.

    Args:
        path: the file.
        columns: values of one row.
        source: where such files come from, for the message.

    Raises:
        DataError: the file is missing, is no whole number of rows, is too large to be a sweep, or holds non-finite
            values.
    """
    row_bytes = columns * 4
    size = _size(path, source)
    if size % row_bytes:
        raise DataError(
            f"{path}: {size:,} bytes are no whole number of rows of {columns} float32 ({row_bytes} bytes)",
            f"the file is truncated or of another layout; copy it again from {source}",
        )
    if size > _MAX_ROWS * row_bytes:
        raise DataError(
            f"{path}: {size // row_bytes:,} rows are more than the {_MAX_ROWS:,} of any sweep", f"is it from {source}?"
        )
    rows = np.fromfile(path, "<f4").astype(np.float32, copy=False).reshape(-1, columns)
    broken = int((~np.isfinite(rows)).any(1).sum())
    if broken:
        raise DataError(
            f"{path}: {broken} of {len(rows)} rows hold values that are not finite",
            f"the file is damaged or of another layout; copy it again from {source}",
        )
    return rows


def check_single_sweep(cloud: PointCloud, what: str) -> None:
    """Raise ValueError for an accumulated cloud: a layout's file holds what one sensor saw in one sweep."""
    if "sweep" in cloud.fields and cloud.fields["sweep"].any():
        raise ValueError(f"{what} holds {int(cloud.fields['sweep'].max()) + 1} sweeps; give single ones to a writer")


def write_floats(path: Path, columns: Sequence[Array]) -> None:
    """Write arrays of equal length, each (N,) or (N, C), side by side as rows of float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.column_stack(columns).astype("<f4").tofile(path)


def read_image(path: Path, source: str) -> Array:
    """An image file -> (H, W, 3) uint8 RGB. Raises DataError where it is missing, truncated or not an image."""
    _size(path, source)
    encoded = path.read_bytes()
    # OpenCV decodes half a JPEG and pads it with grey: the end marker is what tells.
    whole = path.suffix.lower() not in (".jpg", ".jpeg") or _END_OF_JPEG in encoded[-64:]
    bgr = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR) if whole and encoded else None
    if bgr is None:
        raise DataError(
            f"{path}: {len(encoded):,} bytes that are no whole {path.suffix} image", f"copy it again from {source}"
        )
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def write_image(path: Path, rgb: Array) -> None:
    """Write (H, W, 3) uint8 RGB in the format of the path's suffix; JPEG in quality 95."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = cv2.imencode(path.suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    path.write_bytes(encoded.tobytes())


def read_bytes(path: Path, source: str) -> bytes:
    """The bytes of a sensor file. Raises DataError where it is missing or larger than any sweep."""
    if (size := _size(path, source)) > _MAX_ROWS * 64:
        raise DataError(f"{path}: {size:,} bytes are more than any sweep has", f"is it from {source}?")
    return path.read_bytes()


def read_json(path: Path, source: str) -> Any:
    """The content of a JSON file. Raises DataError where it is missing or not JSON."""
    _size(path, source)
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}", f"the file is damaged; copy it again from {source}") from error


def read_text(path: Path, source: str) -> str:
    """The content of a small text file. Raises DataError where it is missing, larger than a megabyte or not text."""
    if (size := _size(path, source)) > 1_000_000:
        raise DataError(f"{path}: {size:,} bytes are too many for this text file", f"is it from {source}?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text: {error}", f"is it from {source}?") from error


def _size(path: Path, source: str) -> int:
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "no such file")
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", f"it is part of {source}; is it all there?") from error
