"""The SparseFusion parity kit: weights and inputs by its rule, and comparison with its stored arrays.

A kit is a folder of arrays that the official model gave for deterministic weights and inputs; its README.md and
weights.md say how. All that may differ between kits is read from the kit's files: salt, exceptions, aliases, input
prefix and sizes from weights.json, strides from manifest.json, shapes, amplitudes and gains of inputs from weights.md.
A float array counts as equal at one of two levels:

* `float64`: the implementation ran in float64; |difference| <= 1e-6 * max(1, |value|).
* `float32`: it ran in float32; |difference| <= max(5 * the official model's own float32 noise, 3e-6 * largest value).
"""

from __future__ import annotations

import json
import math
import re
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

Level = Literal["float64", "float32"]


class Kit:
    """A kit in `root`. A test that asks for a file which the kit lacks is skipped."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rule: dict[str, Any] = self.json("weights.json")
        self.manifest: dict[str, Any] = self.json("manifest.json")
        self._state_dict = lru_cache(2)(self._make_state_dict)
        self._arrays = lru_cache(4)(lambda file: np.load(self._file(f"{file}.npz"), allow_pickle=False))

    def _file(self, name: str) -> Path:
        path = self.root / name
        if not path.is_file():
            pytest.skip(f"the parity kit {self.root} has no {name}")
        return path

    def json(self, name: str) -> dict[str, Any]:
        """What a file of JSON holds."""
        found: dict[str, Any] = json.loads(self._file(name).read_text())
        return found

    def said(self, pattern: str, name: str = "weights.md") -> re.Match[str]:
        """Where a text of the kit says what a pattern looks for; a test that asks for what is not said is skipped."""
        found = re.search(pattern, self._file(name).read_text())
        if found is None:
            pytest.skip(f"{name} of the parity kit {self.root} says nothing like {pattern}")
        return found

    def size(self, case: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Content and canvas of the images of `full` or `small`, both (width, height) in pixels."""
        wh = self.rule["image_wh"][case]
        return tuple(wh["content"]), tuple(wh["canvas"])

    # weights and inputs by the rule

    def state_dict(self, variant: str) -> dict[str, Tensor]:
        """Official key -> float32 tensor of `r50` or `swint` (int64 for counters and indices)."""
        return dict(self._state_dict(variant))

    def _make_state_dict(self, variant: str) -> dict[str, Tensor]:
        shapes = self.json(f"state_dict_{variant}.json")
        source = dict(self.rule["alias_key_takes_value_of"])
        adjust = {k: (np.float32(e["mul"]), np.float32(e["add"])) for e in self.rule["exceptions"] for k in e["keys"]}
        state = {}
        for key, shape in shapes.items():
            name = source.get(key, key)
            value = self._weight(name, tuple(shape))
            if name in adjust:
                value = value * adjust[name][0] + adjust[name][1]
            state[key] = torch.from_numpy(np.array(value))
        return state

    def _weight(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        last = key.rpartition(".")[2]
        if last == "num_batches_tracked":
            return np.zeros(shape, np.int64)
        if last == "relative_position_index":
            return _window_index(math.isqrt(shape[0]))
        u = _uniform(self.rule["salt"] + key, shape)
        v = 2 * u - 1
        if last == "running_mean":
            value = 0.1 * v
        elif last == "running_var":
            value = 1 + 0.5 * u
        elif len(shape) >= 2:
            value = v * math.sqrt(3 / math.prod(shape[1:]))
        elif last.endswith("bias"):
            value = 0.1 * v
        elif last == "weight":
            value = 1 + 0.1 * v
        else:
            raise AssertionError(f"no rule for weight {key} {shape}")
        return value.astype(np.float32)

    def input(self, name: str, shape: tuple[int, ...] | None = None, case: str = "case", level: int = 0) -> Tensor:
        """Float32 input X(name, shape, amplitude) of the rule.

        Args:
            name: as weights.md writes it, "case:fpn{l}" say; the kit's prefix comes before.
            shape: where weights.md tells it by letters.
            case, level: what stands for `case` and `{l}` in the name.
        """
        rule = self.said(rf'X\("{re.escape(name)}", *\(([^()]*)\), *([\d.]+)\)')
        shape = shape or tuple(int(n) for n in rule[1].split(","))
        own = name.replace("case:", f"{case}:").replace("{l}", str(level))
        u = _uniform(self.rule["input_prefix"] + own, shape)
        return torch.from_numpy((float(rule[2]) * (2 * u - 1)).astype(np.float32))

    def uniform(self, name: str) -> np.ndarray:
        """Float64 input U(prefix + name, shape) of the rule, in [0, 1)."""
        rule = self.said(rf'U\("[^"]*{re.escape(name)}", *\(([\d, ]+)\)\)')
        return _uniform(self.rule["input_prefix"] + name, tuple(int(n) for n in rule[1].split(",")))

    # stored arrays

    def array(self, file: str, name: str) -> np.ndarray:
        """A stored array, `name` as in the file ("head_small_b2", "img_top_class")."""
        arrays = self._arrays(file)
        if name not in arrays:
            pytest.skip(f"the parity kit's {file}.npz has no {name}")
        return arrays[name]

    def tensor(self, file: str, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.from_numpy(self.array(file, name)).to(dtype)

    def names(self, file: str) -> list[str]:
        """The arrays stored in a file."""
        return list(self._arrays(file).files)

    def entry(self, file: str, name: str) -> dict[str, Any]:
        """What the manifest says of an array: full_shape, absmax, f32_noise_max, sample_stride, ..."""
        return self.manifest[file][name]

    def assert_close(
        self, file: str, name: str, value: Tensor, level: Level = "float64", rounding: float = 0.0
    ) -> None:
        """`value` is the full array `name`: compared with whichever of NAME, NAME__sample, NAME__chstats is stored.

        Integers and booleans must be identical. `rounding` is added to what a value may differ by: the trace of inputs
        that come rounded to float32 from the kit's files.
        """
        stored = [n for n in (name, f"{name}__sample", f"{name}__chstats") if n in self._arrays(file)]
        assert stored, f"{file}.npz has no {name}"
        entry = self.manifest[file].get(name, {})
        full = value.detach().cpu()
        shape = tuple(entry.get("full_shape", self.array(file, stored[0]).shape))
        assert tuple(full.shape) == shape, f"{file}: {name}: shape {tuple(full.shape)}, the kit's is {shape}"
        for part in stored:
            want = self.array(file, part)
            if part.endswith("__sample"):
                got = full.reshape(-1)[:: entry["sample_stride"]].numpy()
            elif part.endswith("__chstats"):
                got = _channel_statistics(full, int(entry["chstats"].rpartition(" ")[2]))
            else:
                got = full.numpy()
            self._compare(f"{file}: {part}", got, want, entry, level, name.startswith("sem_"), rounding)

    def assert_sites_close(
        self, file: str, name: str, features: Tensor, indices: Tensor, level: Level = "float64"
    ) -> None:
        """A sparse stage: all sites identical (by checksum), every `row_stride`-th feature row and the statistics."""
        entry = self.manifest[file][name]
        at = indices.cpu().numpy()
        order = np.lexsort(at.T[::-1])  # by (batch, z, y, x)
        at, rows = at[order], features.detach().cpu()[torch.from_numpy(order)]
        assert len(at) == entry["active_sites"], f"{file}: {name}: {len(at)} sites, not {entry['active_sites']}"
        assert zlib.crc32(at.astype("<i2").tobytes()) == entry["coords_crc32"], f"{file}: {name}: other sites"
        stride = entry["row_stride"]
        np.testing.assert_array_equal(at[::stride], self.array(file, f"{name}_rows_bzyx"))
        for part, got in (("rows_feat", rows[::stride].numpy()), ("chstats", _channel_statistics(rows, 1))):
            self._compare(f"{file}: {name}_{part}", got, self.array(file, f"{name}_{part}"), entry, level)

    @staticmethod
    def _compare(
        what: str,
        got: np.ndarray,
        want: np.ndarray,
        entry: dict,
        level: Level,
        noisy: bool = False,
        rounding: float = 0,
    ) -> None:
        if not np.issubdtype(want.dtype, np.floating):
            differing = int((got != want).sum())
            assert not differing, f"{what}: {differing} of {want.size} values differ"
            return
        assert np.isfinite(got).all(), f"{what}: {int((~np.isfinite(got)).sum())} values are not finite"
        difference = np.abs(got.astype(np.float64) - want)
        if level == "float64":
            allowed = 1e-6 * np.maximum(1, np.abs(want)) + rounding
            outside = difference > allowed
        else:
            least = 3e-6 * entry["absmax"]
            allowed = np.full(want.shape, max(5 * entry["f32_noise_max"], least) + rounding)
            outside = difference > allowed
            if noisy and not what.endswith("__chstats"):  # cells near a camera's plane have no bound
                allowed[:] = max(5 * entry["f32_noise_p999"], least)
                outside = difference > allowed
                outside &= outside.mean() > 1e-3
        if outside.any():
            worst = np.unravel_index(int((difference / allowed).argmax()), want.shape)
            raise AssertionError(
                f"{what} ({level}): {int(outside.sum())} of {want.size} values differ; the worst, at {worst}, is "
                f"{got[worst]:.9g} and should be {want[worst]:.9g} within {allowed[worst]:.2g}"
            )


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return generator.random(math.prod(shape)).reshape(shape)


def _window_index(window: int) -> np.ndarray:
    """(window^2, window^2) int64: Swin's index of the relative position of two tokens in its table of biases."""
    y, x = np.divmod(np.arange(window * window), window)
    dy, dx = y[:, None] - y[None] + window - 1, x[:, None] - x[None] + window - 1
    return dy * (2 * window - 1) + dx


def _channel_statistics(full: Tensor, axis: int) -> np.ndarray:
    """(3, C) mean, population standard deviation and largest magnitude of each channel."""
    channels = full.double().movedim(axis, 0).flatten(1)
    return torch.stack([channels.mean(1), channels.std(1, correction=0), channels.abs().amax(1)]).numpy()
