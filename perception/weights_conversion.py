"""Official checkpoints brought to weights files of this package.

They are pickles; they are read by torch's restricted unpickler, which makes nothing but tensors, containers and the few
harmless types of `_HARMLESS`. What their keys and layouts mean, the module `official` beside the network knows.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from perception.config import Config, read_yaml
from perception.errors import ConfigError, DataError, PerceptionError
from perception.predictor import predictor_config
from perception.weights import Misfit, WeightsProvenance, some_of, write_weights

CONVERTERS = {"sparsefusion": "perception.networks.sparsefusion:SparseFusion"}
"""System with official checkpoints -> module:Class; the module `official` beside it knows their keys and layouts."""

# What mmcv's checkpoints hold beside tensors and containers: numbers of numpy.
_HARMLESS: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(t)) for t in (np.bool_, np.int32, np.int64, np.float32, np.float64)),
    *((np.float64(0).__reduce__()[0], f"{core}.multiarray.scalar") for core in ("numpy.core", "numpy._core")),
    *((np.zeros(0).__reduce__()[0], f"{core}.multiarray._reconstruct") for core in ("numpy.core", "numpy._core")),
]


class ConversionReport(NamedTuple):
    """What became of an official checkpoint's tensors.

    Attributes:
        config: the configuration that it belongs to.
        mapped: official key -> ours.
        dropped: official key -> why.
        layout: of its sparse kernels.
        source: the checkpoint.
    """

    config: Config
    mapped: dict[str, str]
    dropped: dict[str, str]
    layout: str
    source: WeightsProvenance

    def dropped_by_reason(self) -> dict[str, list[str]]:
        """Reason -> official keys."""
        reasons: dict[str, list[str]] = {}
        for key, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(key)
        return reasons


def convert_weights(system: str, path: Path, out: Path, config: Path | None = None) -> ConversionReport:
    """Convert an official checkpoint (mmcv's .pth) to a weights file.

    Args:
        system: one of CONVERTERS.
        path: the checkpoint.
        out: the file to write.
        config: a YAML file whose `predictor` it belongs to; None takes the released one that its keys tell.

    Raises:
        DataError: it is no such checkpoint, or does not fit; the tensors are named.
    """
    network_class, official = _converter(system)
    state = read_checkpoint(path)
    try:
        settings = official.detect_config(state) if config is None else _predictor_config(config, system)
        converted = official.convert(state, settings)
    except DataError as error:
        raise DataError(f"{path}: {error.what}", error.do) from error
    misfit = Misfit.of(network_class(settings), converted.state)
    if misfit:
        raise DataError(
            f"{path} does not fit the network of its configuration: {misfit}",
            "give the released file, or with --config the configuration that it was trained with",
        )
    source = WeightsProvenance.of_file(path)
    write_weights(out, converted.state, settings, source=source)
    return ConversionReport(settings, converted.mapped, converted.dropped, converted.layout, source)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The `state_dict` of an mmcv checkpoint {meta, state_dict, optimizer}, read without unpickling code.

    Raises:
        DataError: it cannot be read, holds other than plain data, or has no state.
    """
    if path.suffix == ".safetensors" and path.is_file():  # later versions of torch.load read it too
        do = "use it as it is; `perception weights convert` reads the authors' .pth"
        raise DataError(f"{path}: is a weights file already", do)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "give the path of the checkpoint") from error
    except Exception as error:  # torch raises what its parts raise: zip, pickle, struct
        raise _unreadable(path, error) from error
    state = data.get("state_dict") if isinstance(data, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        kind = f"keys {some_of([str(key) for key in data])}" if isinstance(data, Mapping) else type(data).__name__
        raise DataError(
            f"{path}: no checkpoint of mmcv, which has meta, state_dict and optimizer: this one has {kind}",
            "give the file as its authors released it",
        )
    return dict(state)


def _unreadable(path: Path, error: Exception) -> DataError:
    """Why, without torch's own text, which advises to load the file unsafely."""
    do = "give the file as its authors released it"
    if found := re.search(r"nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", str(error)):
        return DataError(f"{path}: it holds {found[1]}, which is neither a tensor nor plain data", do)
    if _begins_as_torchs(path) and not zipfile.is_zipfile(path):
        return DataError(f"{path}: a checkpoint that is cut short or damaged", f"copy it again; {do}")
    return DataError(f"{path}: not a checkpoint that torch wrote, or damaged", do)


def _begins_as_torchs(path: Path) -> bool:
    """As a zip archive does, or as torch wrote before version 1.6: a pickle of its magic number."""
    with path.open("rb") as stream:
        head = stream.read(15)
    return head.startswith((b"PK\x03\x04", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."))


def _converter(system: str) -> tuple[type[nn.Module], ModuleType]:
    if system not in CONVERTERS:
        raise PerceptionError(
            f"{system!r} has no official checkpoints to convert", f"systems that have: {', '.join(CONVERTERS)}"
        )
    package, _, name = CONVERTERS[system].partition(":")
    network_class: type[nn.Module] = getattr(import_module(package), name)
    return network_class, import_module(f"{package}.official")


def _predictor_config(path: Path, system: str) -> Config:
    config = predictor_config(read_yaml(path).get("predictor", {}), str(path))
    if config.name != system:  # type: ignore[attr-defined]
        raise ConfigError(f"{path}: its predictor is not {system}", "give a configuration of the checkpoint's system")
    return config
