"""Result files: the numbers of one evaluation together with everything that made them.

A number without its configuration, code, weights and library versions cannot be compared with another one. So they are
written together, as one JSON file, and numbers of random weights are not written at all.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

import perception
from perception.config import Config
from perception.errors import DataError, PerceptionError
from perception.weights import WeightsProvenance

_LIBRARIES = ("numpy", "scipy", "torch", "opencv-python-headless", "safetensors", "nuscenes-devkit")
_SPCONV = ("spconv", "spconv-cu118", "spconv-cu120", "spconv-cu121", "spconv-cu124", "spconv-cu126")


class Source(Config):
    """The code that ran: `commit` and `modified` (tracked files differ from it) in a checkout, else only `version`."""

    version: str
    commit: str | None
    modified: bool | None


class Result(Config):
    """One evaluation, as it is written.

    Attributes:
        benchmark: name of the rules, `nuscenes_detection`, `occ3d`, ...
        metrics: name -> value; null where it is not defined.
        samples: how many were scored; `samples_of_split`: how many there are, None where there is no split.
        subset: only a part of the split was scored, so the numbers are not the benchmark's.
        config: the resolved configuration, defaults included.
        weights, source, versions, device: what computed it; a version is null where the library is not installed.
        image_resize: how images were resized, which moves camera metrics; null where there are none.
        date: UTC, ISO 8601.
    """

    benchmark: str
    metrics: dict[str, float | None]
    samples: int
    samples_of_split: int | None
    subset: bool
    config: dict[str, Any]
    weights: WeightsProvenance
    source: Source
    versions: dict[str, str | None]
    device: str
    image_resize: str | None
    date: str


def make_result(
    benchmark: str,
    metrics: Mapping[str, float],
    *,
    samples: int,
    samples_of_split: int | None,
    config: BaseModel,
    weights: WeightsProvenance,
    device: torch.device | str,
    image_resize: str | None = None,
) -> Result:
    """The result of an evaluation on this machine, now. Metrics that are not finite become null."""
    return Result(
        benchmark=benchmark,
        metrics={name: float(value) if math.isfinite(value) else None for name, value in metrics.items()},
        samples=samples,
        samples_of_split=samples_of_split,
        subset=samples_of_split is not None and samples < samples_of_split,
        config=config.model_dump(mode="json"),
        weights=weights,
        source=source(),
        versions=library_versions(),
        device=device_name(device),
        image_resize=image_resize,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def write_result(path: Path, result: Result) -> None:
    """Write JSON, whole or not at all.

    Raises:
        PerceptionError: the weights are random: such numbers mean nothing.
    """
    if result.weights.kind == "random":
        raise PerceptionError(
            f"{path}: not written: the {result.benchmark} numbers are of random weights",
            "load trained weights, whose sha256 is recorded; numbers of an untrained network mean nothing",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def read_result(path: Path) -> Result:
    """Raises DataError where the file is missing or no result."""
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "give a file that an evaluation wrote") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a result file: {error}", "give a file that an evaluation wrote") from error


def source(root: Path | None = None) -> Source:
    """Version and, where `root` is the top of a git checkout, commit of the code; `root` is this package's by default.

    A package installed into an environment that happens to lie inside some other repository has no commit.
    """
    root = root or Path(perception.__file__).resolve().parents[1]
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD") if top is not None and Path(top).resolve() == root.resolve() else None
    if commit is None:
        return Source(version=perception.__version__, commit=None, modified=None)
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return Source(version=perception.__version__, commit=commit, modified=bool(changes))


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints, or None without git or outside a repository."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() if done.returncode == 0 else None


def library_versions() -> dict[str, str | None]:
    """Installed versions of what moves numbers. Nothing is imported for it."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in _LIBRARIES}
    versions["cuda"] = torch.version.cuda
    spconv = next((name for name in _SPCONV if _version(name)), None)
    versions["spconv"] = f"{spconv} {_version(spconv)}" if spconv else None
    return versions


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device | str) -> str:
    """`cuda: NVIDIA H200` or `cpu: AMD EPYC 7B13, 2 cores`."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{device.type}: {model}, {os.cpu_count()} cores"
