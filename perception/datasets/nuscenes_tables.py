"""The JSON tables of nuScenes v1.0, read a record at a time into columns.

A table is a list of flat records, up to a gigabyte of them (`sample_data` of v1.0-trainval has 2.6 million). Decoding
it in pieces keeps the memory at a block of records beside the columns that are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from perception.errors import DataError
from perception.types import Array

Convert = Callable[[list[Any]], Array]


def _texts(values: list[Any]) -> Array:
    return np.array([value.encode() for value in values], "S")


def integers(values: list[Any]) -> Array:
    """Converter of whole numbers to (N,) int64."""
    return np.array(values, np.int64)


def _flags(values: list[Any]) -> Array:
    return np.array(values, np.bool_)


def _numbers(*shape: int) -> Convert:
    """Converter of lists of numbers to (N, *shape) float64; an empty list is zeros (a LiDAR has no intrinsic)."""
    zeros = np.zeros(shape).tolist()

    def convert(values: list[Any]) -> Array:
        array = np.array([value or zeros for value in values], np.float64).reshape(len(values), *shape)
        if not np.isfinite(array).all():
            raise ValueError("a number is not finite")
        return array

    return convert


def _rotations(values: list[Any]) -> Array:
    """(N, 4) quaternions w x y z, of any length but none."""
    array = _numbers(4)(values)
    if len(array) and np.linalg.norm(array, axis=1).min() < 1e-6:
        raise ValueError("a quaternion of zeros is no rotation")
    return array


def _sizes(values: list[Any]) -> Array:
    array = _numbers(3)(values)
    if len(array) and array.min() <= 0:
        raise ValueError(f"a box of size {array[array.min(1).argmin()].tolist()}: each must be more than 0")
    return array


def _pixels(values: list[Any]) -> Array:
    """(N,) int64; what is no image has 0, or null."""
    return integers([value or 0 for value in values])


def _first_texts(values: list[Any]) -> Array:
    """Lists of one text at most -> that text, or an empty one."""
    if any(len(value) > 1 for value in values):
        raise ValueError("more than one attribute on a box; the detection benchmark allows one")
    return _texts([value[0] if value else "" for value in values])


COLUMNS: dict[str, dict[str, Convert]] = {
    "scene": {"token": _texts, "name": _texts},
    "sample": {"token": _texts, "timestamp": integers, "scene_token": _texts},
    "sensor": {"token": _texts, "channel": _texts, "modality": _texts},
    "calibrated_sensor": {
        "token": _texts,
        "sensor_token": _texts,
        "translation": _numbers(3),
        "rotation": _rotations,
        "camera_intrinsic": _numbers(3, 3),
    },
    "ego_pose": {"token": _texts, "translation": _numbers(3), "rotation": _rotations},
    "sample_data": {
        "token": _texts,
        "sample_token": _texts,
        "ego_pose_token": _texts,
        "calibrated_sensor_token": _texts,
        "timestamp": integers,
        "filename": _texts,
        "width": _pixels,
        "height": _pixels,
        "is_key_frame": _flags,
        "prev": _texts,
    },
    "category": {"token": _texts, "name": _texts},
    "attribute": {"token": _texts, "name": _texts},
    "visibility": {"token": _texts, "level": _texts},
    "instance": {"token": _texts, "category_token": _texts},
    "sample_annotation": {
        "token": _texts,
        "sample_token": _texts,
        "instance_token": _texts,
        "attribute_tokens": _first_texts,
        "visibility_token": _texts,
        "translation": _numbers(3),
        "size": _sizes,
        "rotation": _rotations,
        "num_lidar_pts": integers,
        "num_radar_pts": integers,
        "prev": _texts,
        "next": _texts,
    },
    "lidarseg": {"sample_data_token": _texts, "filename": _texts},
}
"""Tables and keys that are read, with the converter of their values; `lidarseg` may be absent, `log` and `map` serve
nothing here."""

_CHUNK = 1 << 22
_LONGEST_RECORD = 1 << 20
_BLOCK = 1 << 15
_BETWEEN = re.compile(r"[\s,]*")
_MEND = "download and unpack the tables again; all of them must be of one version"


class Tables:
    """The tables of one version.

    Args:
        paths: table -> its file.
        advance: told how many bytes were read, for a progress bar.
    """

    def __init__(self, paths: Mapping[str, Path], advance: Callable[[int], None]) -> None:
        self.paths = paths
        self._advance = advance

    def read(self, table: str, **more: Convert) -> dict[str, Array]:
        """Columns (rows, ...) of the keys in `COLUMNS` and in `more`.

        Raises:
            DataError: no JSON list of records, a key is missing, or a value is of another kind.
        """
        columns = COLUMNS[table] | more
        parts = {key: [convert([])] for key, convert in columns.items()}
        records = self._records(self.paths[table])
        while block := list(islice(records, _BLOCK)):
            for key, convert in columns.items():
                parts[key].append(self._column(table, key, block, convert))
        return {key: np.concatenate(parts.pop(key)) for key in columns}

    def _column(self, table: str, key: str, block: list[dict[str, Any]], convert: Convert) -> Array:
        try:
            return convert([record[key] for record in block])
        except KeyError:
            record = next(record for record in block if key not in record)
            raise DataError(f"{self.paths[table]}: no key {key!r} in the record {str(record)[:200]}", _MEND) from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"{self.paths[table]}: {key!r}: {error}", _MEND) from error

    def _records(self, path: Path) -> Iterator[dict[str, Any]]:
        """The records of a table one after the other; the file is never held whole."""
        decode, count = json.JSONDecoder().raw_decode, 0
        with path.open(encoding="utf-8") as file:
            text = self._chunk(path, file).lstrip()
            if not text.startswith("["):
                raise DataError(f"{path}: is no JSON list: it begins with {text[:40]!r}", _MEND)
            at = 1
            while True:
                at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty text too
                if text.startswith("]", at):
                    return
                try:
                    record, at = decode(text, at)
                except json.JSONDecodeError as error:
                    more = self._chunk(path, file) if len(text) - at < _LONGEST_RECORD else ""
                    if not more:  # neither does the record go on, nor does the list end
                        raise DataError(f"{path}: broken after {count} records: {error.msg}", _MEND) from error
                    text, at = text[at:] + more, 0
                    continue
                if not isinstance(record, dict):
                    raise DataError(f"{path}: record {count} is {type(record).__name__}, not an object", _MEND)
                count += 1
                yield record

    def _chunk(self, path: Path, file: TextIO) -> str:
        try:
            text = file.read(_CHUNK)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is no UTF-8 text: {error}", _MEND) from error
        self._advance(len(text))
        return text


class Rows:
    """Token -> row of one table.

    Args:
        path: the table's file, for messages.
        tokens: (rows,) its token column.

    Raises:
        DataError: a token occurs twice.
    """

    def __init__(self, path: Path, tokens: Array) -> None:
        self._path = path
        self._order = np.argsort(tokens, kind="stable")
        self._sorted = tokens[self._order]
        twice = self._sorted[1:] == self._sorted[:-1]
        if twice.any():
            raise DataError(f"{path}: token {self._sorted[1:][twice][0].decode()!r} occurs twice", _MEND)

    def of(self, tokens: Array, source: str, optional: bool = False) -> Array:
        """(n,) int64 rows of tokens (n,); an empty token is -1 where `optional`.

        Raises:
            DataError: a token that is not in the table; `source` names the column that refers to it.
        """
        place = np.searchsorted(self._sorted, tokens)
        known = np.zeros(len(tokens), bool)
        if len(self._sorted):
            place = np.minimum(place, len(self._sorted) - 1)
            known = self._sorted[place] == tokens
        absent = ~known & (tokens != b"") if optional else ~known
        if absent.any():
            raise DataError(
                f"{source}: {tokens[absent][0].decode()!r} is no record of {self._path} "
                f"({int(absent.sum())} of {len(tokens)} references lead nowhere)",
                _MEND,
            )
        rows = np.full(len(tokens), -1, np.int64)
        rows[known] = self._order[place[known]]
        return rows
