"""A training from its configuration to a weights file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from perception.config import Config
from perception.datasets import open_dataset
from perception.errors import ConfigError, DataError
from perception.predictor import PREDICTORS
from perception.synthetic.city import CityConfig
from perception.training.config import TrainConfig, TrainingConfig
from perception.training.data import batches
from perception.training.distributed import Place, joined
from perception.training.log import Progress
from perception.training.loop import Training
from perception.types import Dataset, Needs
from perception.weights import read_fitting, write_weights

Report = Callable[[str | Progress], None]


def train(
    config: TrainConfig,
    folder: Path,
    device: str = "cpu",
    *,
    resume: bool = False,
    minutes: float | None = None,
    report: Report = lambda line: None,
) -> bool:
    """Train, and write `weights.safetensors` (float16), `checkpoint.pt` and the log into `folder`.

    Args:
        config: network and training.
        folder: for all files.
        device: `cuda` is this process's own GPU under torchrun.
        resume: go on from the folder's checkpoint.
        minutes: break off after so long, with a checkpoint; not the schedule's `training.minutes`.
        report: called in the leading process with what happens.

    Returns:
        Whether the last step was made.

    Raises:
        ConfigError: the folder holds a checkpoint that is not to be resumed, or one of another configuration.
        DataError: a file of `training.weights` is missing or does not fit.
    """
    _check_weights(config.training.weights)
    with joined(device) as place:
        tell = report if place.leads else lambda line: None
        torch.manual_seed(config.training.seed)  # the same network in every process
        if config.training.precision == "bfloat16":
            _allow_tf32()
        sys.setswitchinterval(2e-4)  # s; the thread that encodes must not hold up the one that launches kernels
        network = _network(config.predictor).to(place.device)
        for path in config.training.weights:
            tell(f"{path}: {read_fitting(network, path)}")
        training = Training(
            network, config.training, place, folder, predictor=config.predictor, resume=resume, report=tell
        )
        tell(f"{sum(p.numel() for p in network.parameters()):,} parameters, from step {training.step}")
        tell(step_size(config.training, place.count))
        source = _source(config.training.data, place)
        needs: Needs = network.needs  # type: ignore[assignment]  # Trainable
        classes = getattr(config.predictor, "classes", None)
        stream = batches(config.training, source, needs, place, training.step, classes)
        done = training.run(stream, minutes)
        if place.leads:
            path = folder / "weights.safetensors"
            write_weights(path, training.weights, config.predictor, torch.float16)
            tell(f"wrote {path}" if done else f"stopped early; wrote {path}")
        return done


def step_size(config: TrainingConfig, processes: int) -> str:
    """The batch of all processes, which the learning rate is of, and the schedule's length, in words."""
    count = "1 process" if processes == 1 else f"{processes} processes"
    length = f"{config.steps:,} steps" + (f" or {config.minutes:g} minutes" if config.minutes is not None else "")
    return f"batch of {config.batch_size} x {count} = {config.batch_size * processes} samples a step, {length}"


def _check_weights(paths: Sequence[Path]) -> None:
    """Before the network is made, which takes longer."""
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"training.weights: {path} is not there",
                "train what it comes of first (for the released configurations stage one: `perception train "
                "configs/sparsefusion_nuscenes_lidar.yaml --out out/lidar`), or set training.weights",
            )


def _network(config: Config) -> nn.Module:
    """The network of a configuration, its parameters random; ConfigError where the system has nothing to train."""
    name: str = config.name  # type: ignore[attr-defined]
    module, _, cls = PREDICTORS[name].partition(":")
    network = getattr(import_module(module), cls)
    if not issubclass(network, nn.Module):
        raise ConfigError(f"predictor.name: {name} has nothing to learn", "train a network, such as sparsefusion")
    made: nn.Module = network(config)
    for parameter in made.parameters():
        if parameter.ndim == 4:  # a GPU's convolutions and batch norms are faster with the channels last
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return made


def _source(config: Config, place: Place) -> Dataset | CityConfig:
    """The data set, or the city, simulated on this process's own GPU where it asks for one."""
    if not isinstance(config, CityConfig):
        return open_dataset(config)
    return config.model_copy(update={"device": str(place.device)}) if config.device == "cuda" else config


def _allow_tf32() -> None:
    """Products of what stays float32 beside bfloat16 are rounded to TF32's ten bits, eight being bfloat16's."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if find_spec("spconv") is not None:
        from spconv import constants

        constants.SPCONV_ALLOW_TF32 = True
