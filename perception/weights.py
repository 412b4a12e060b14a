"""Weights files: safetensors with a manifest, loaded strictly.

The manifest, JSON under `manifest` in the file's metadata, says of which system the weights are, with which resolved
configuration, by which version of this package they were written, and which file they were converted from. safetensors
holds plain tensors: nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import perception
from perception.config import Config
from perception.errors import DataError


class WeightsProvenance(Config):
    """Where a predictor's weights come from.

    Attributes:
        kind: `file`; `none` where there is nothing to learn; `random` where nothing was loaded.
        sha256: of the file; None for the other kinds.
        note: the file's name, or why there is none.
    """

    kind: Literal["file", "none", "random"]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    note: str = ""

    @model_validator(mode="after")
    def _hash_belongs_to_a_file(self) -> WeightsProvenance:
        if (self.sha256 is not None) != (self.kind == "file"):
            raise ValueError(f"weights of kind {self.kind!r} with sha256 {self.sha256}: a file has one, nothing else")
        return self

    @staticmethod
    def of_file(path: Path) -> WeightsProvenance:
        """Hash a weights file. Raises DataError where it cannot be read."""
        digest = hashlib.sha256()
        try:
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}", "give the path of the weights file") from error
        return WeightsProvenance(kind="file", sha256=digest.hexdigest(), note=path.name)

    @staticmethod
    def not_needed(reason: str) -> WeightsProvenance:
        """For a predictor that has nothing to load: it repeats the truth, or solves a geometric problem."""
        return WeightsProvenance(kind="none", note=reason)

    @staticmethod
    def random() -> WeightsProvenance:
        """For a network that loaded nothing. Its results are not written."""
        return WeightsProvenance(kind="random", note="initialised, never loaded")


class Manifest(Config):
    """What a weights file says of itself.

    Attributes:
        system: `sparsefusion`, ...
        version: of this package, that wrote it.
        config: the network's resolved configuration.
        source: the official checkpoint that it was converted from; None for own training.
    """

    system: str
    version: str
    config: dict[str, Any]
    source: WeightsProvenance | None = None


def write_weights(
    path: Path,
    state: Mapping[str, Tensor],
    config: Config,
    dtype: torch.dtype | None = None,
    source: WeightsProvenance | None = None,
) -> None:
    """Write a state with its manifest, whole or not at all.

    Args:
        path: of the `.safetensors` file; its folder is made.
        state: name -> tensor, on any device.
        config: the network's resolved configuration; its `name` is the system.
        dtype: floating-point tensors are stored in it, but for the statistics of batch norms: a variance can be beyond
            float16. None keeps theirs.
        source: the official checkpoint that the state comes from.

    Raises:
        PerceptionError: a value is not finite, in `dtype`.
    """
    stored = {
        name: tensor.detach().to("cpu", None if _keeps_dtype(name, tensor) else dtype).contiguous()
        for name, tensor in state.items()
    }
    _check_finite(stored, path, f"a value overflows {dtype}, or the training diverged" if dtype else "retrain")
    settings = config.model_dump(mode="json", exclude={"weights"})
    manifest = Manifest(system=settings["name"], version=perception.__version__, config=settings, source=source)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(save(stored, {"manifest": manifest.model_dump_json()}))
    part.replace(path)


def _keeps_dtype(name: str, tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or name.rpartition(".")[2] in ("running_mean", "running_var")


def read_manifest(path: Path) -> Manifest:
    """What a weights file says of itself.

    Raises:
        DataError: the file is missing, cut short, or not one of this package.
    """
    return _read(path, tensors=False)[1]


def read_weights(path: Path) -> tuple[dict[str, Tensor], Manifest]:
    """Name -> tensor on the CPU, as stored, and the manifest. Raises DataError as `read_manifest`, and for a value that
    is not finite."""
    state, manifest = _read(path, tensors=True)
    _check_finite(state, path, "the training diverged, or the file is damaged: give another")
    return state, manifest


def load_weights(module: nn.Module, path: Path) -> WeightsProvenance:
    """Load a weights file into a network, every tensor of it and no other, and say where they come from.

    Raises:
        DataError: as `read_weights`; or tensors are missing, left over or of another shape, which are named.
    """
    state, manifest = read_weights(path)
    load_state(module, state, f"{path} (written for {manifest.system})")
    return WeightsProvenance.of_file(path)


def load_state(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """`module.load_state_dict`, strict, with an error that names the file and every kind of misfit.

    Raises:
        DataError: what does not fit.
    """
    misfit = Misfit.of(module, state)
    if misfit:
        raise DataError(
            f"{where} does not fit the network: {misfit}",
            "use it with the configuration it was written with: `perception weights show FILE` prints that",
        )
    module.load_state_dict(dict(state))


def read_fitting(module: nn.Module, path: Path) -> str:
    """Take from a weights file the tensors that are there and fit, to train on from them; the rest stays as it is.

    Returns:
        what was taken and what was not, in words.

    Raises:
        DataError: as `read_weights`; or nothing fits.
    """
    state, manifest = read_weights(path)
    misfit = Misfit.of(module, state)
    fitting = {name: t for name, t in state.items() if name not in {*misfit.unexpected, *misfit.misshaped}}
    if not fitting:
        raise DataError(
            f"{path} (written for {manifest.system}): not one of {len(state)} tensors fits the network: {misfit}",
            "give weights of the same system",
        )
    module.load_state_dict(fitting, strict=False)
    return f"{len(fitting)} of {len(state)} tensors taken" + (f"; {misfit}" if misfit else "")


class Misfit(NamedTuple):
    """Names of tensors that keep a state from fitting a network; falsy where there are none.

    Attributes:
        missing: the network has them, the state does not.
        unexpected: the other way round.
        misshaped: name -> shape in the state and shape in the network.
    """

    missing: list[str]
    unexpected: list[str]
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @staticmethod
    def of(module: nn.Module, state: Mapping[str, Tensor]) -> Misfit:
        own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        return Misfit(
            [name for name in own if name not in state],
            [name for name in state if name not in own],
            {n: (tuple(state[n].shape), s) for n, s in own.items() if n in state and tuple(state[n].shape) != s},
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        shapes = [f"{name} {given} for {own}" for name, (given, own) in self.misshaped.items()]
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes))
        return "; ".join(f"{len(names)} {kind}: {some_of(names)}" for kind, names in kinds if names)


def _read(path: Path, tensors: bool) -> tuple[dict[str, Tensor], Manifest]:
    try:
        path.open("rb").close()  # safetensors' own OSError repeats the path, and calls a folder a missing device
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            state = {name: stream.get_tensor(name) for name in stream.keys()} if tensors else {}  # noqa: SIM118
        return state, Manifest.model_validate(json.loads(metadata["manifest"]))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "give the path of a weights file") from error
    except SafetensorError as error:
        raise DataError(
            f"{path}: not a whole safetensors file ({error})",
            "copy it again; an official checkpoint (.pth) goes through `perception weights convert` first",
        ) from error
    except (KeyError, ValueError, ValidationError) as error:
        raise DataError(
            f"{path}: no manifest of this package in the file's metadata",
            "give a file that `perception train` or `perception weights convert` wrote",
        ) from error


def _check_finite(state: Mapping[str, Tensor], path: Path, do: str) -> None:
    broken = [n for n, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise DataError(f"{path}: values of {len(broken)} tensors are not finite: {some_of(broken)}", do)


def some_of(names: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
