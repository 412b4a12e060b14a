"""Where a training stands, in one file: written whole or not at all, read without unpickling code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perception.errors import DataError


class Checkpoint(NamedTuple):
    """What is needed to go on.

    Attributes:
        step: steps made.
        config: JSON of the settings that must be the same to go on, of predictor and training.
        network, average, optimiser: their states; `average` is empty without a moving average.
        generators: states of torch's random generators, by process: of the CPU, and of the GPU where there is one.
    """

    step: int
    config: str
    network: dict[str, Tensor]
    average: dict[str, Tensor]
    optimiser: dict[str, Any]
    generators: list[list[Tensor]]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save(checkpoint._asdict(), part)
    part.replace(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises DataError where the file is missing or no checkpoint of a training."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        return Checkpoint(**data)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}",
            "start without --resume, or name with --out the folder of the training to go on with",
        ) from error
    # torch raises what its parts raise: zip, pickle, struct. Its text can advise to load the file unsafely.
    except Exception as error:
        raise DataError(
            f"{path}: no checkpoint of a training, or cut short", "start anew: without --resume, with another --out"
        ) from error


def generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_generator_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
