"""Configuration of a training; the defaults are SparseFusion's fusion stage with a ResNet-50."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny

from perception.augment import AugmentConfig
from perception.config import Config, read_yaml, schema_of, validate
from perception.datasets import DATASETS
from perception.errors import ConfigError
from perception.predictor import predictor_config

SOURCES = {**DATASETS, "city": "perception.synthetic.city:City"}
"""What is trained on: name in `training.data` -> module:Class; the city is simulated while it is trained on."""


class OptimiserConfig(Config):
    """AdamW and its cyclic schedule: up from `lr` by `peak` in the first `rise` of the steps, then down to `final`.

    Attributes:
        lr: learning rate at the first step, of a whole batch (all processes).
        weight_decay: of every parameter.
        factors: prefix of parameters' names -> factor of `lr`; the longest prefix that fits counts.
        decay_factors: the same of `weight_decay`.
        peak, final: factors of `lr`; half cosines lead from one to the next.
        rise: share of the steps until the peak.
        beta1, beta1_least: the first moment's decay at the ends, and at the peak.
        clip_norm: greatest L2 norm of all gradients.
    """

    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    factors: dict[str, float] = Field(default_factory=dict)
    decay_factors: dict[str, float] = Field(default_factory=dict)
    peak: float = Field(8.0, gt=0)
    final: float = Field(1e-4, ge=0)
    rise: float = Field(0.4, gt=0, lt=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta1_least: float = Field(0.805, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    clip_norm: float = Field(0.1, gt=0)


class StreamConfig(Config):
    """How samples of the city are simulated and used again; see `data.CityStream`.

    Attributes:
        pool: samples kept by all workers of a process together.
        reuse: samples drawn from the pool for each one simulated.
        per_scene: key frames of each street.
        together: of these, simulated at once: a GPU is faster with 4 to 8.
        refresh: go on simulating when the pool is full; else only draw.
        folder: keep the pool there, one for all trainings that run beside each other and name it; it is filled once
            and not refreshed. A RAM disk: a sample is some 8 MB. What is drawn then depends on who is faster.
    """

    pool: int = Field(2000, ge=1)
    reuse: int = Field(2, ge=1)
    per_scene: int = Field(8, ge=1)
    together: int = Field(4, ge=1)
    refresh: bool = True
    folder: Path | None = None


class TrainingConfig(Config):
    """How a network is trained.

    Attributes:
        data: a data set with truth, or `city`.
        class_balanced: draw every class equally often (CBGS, arXiv 1908.09492); of a data set, not of the city.
        stream: of the city.
        augment: None changes nothing.
        steps: optimiser steps; `batch_size` samples a step in each process.
        minutes: length of the schedule where the steps take longer: rates fall with the time that is left, and a
            training is at its end when it has run out. A command's --minutes is another thing: it breaks a training off
            with the schedule wherever it is, to go on later.
        workers: processes of each training process that read, simulate and augment; 0 is a thread of itself.
        weights: files that parameters are taken from before the first step, those that are there and fit; the rest
            stays as it was initialised, and a report says how much. Later files win.
        freeze: prefixes of parameters' names that do not learn. Their batch norms go on using the batch's statistics,
            without remembering them, as in the official second stage.
        fixed_statistics: prefixes of batch norms that use the stored statistics, and keep them.
        precision: of the forward pass, by autocast.
        average: decay of the moving average of the weights, which is what is saved; 0 saves the last ones.
        seed: of initialisation, order, augmentation and dropout.
        log_every, checkpoint_every: steps.
        tensorboard: also write TensorBoard's files (extra: train).
    """

    data: SerializeAsAny[Config]
    class_balanced: bool = False
    stream: StreamConfig = StreamConfig()
    augment: AugmentConfig | None = AugmentConfig()
    steps: int = Field(gt=0)
    minutes: float | None = Field(None, gt=0)
    batch_size: int = Field(4, ge=1)
    workers: int = Field(4, ge=0)
    optimiser: OptimiserConfig = OptimiserConfig()
    weights: tuple[Path, ...] = ()
    freeze: tuple[str, ...] = ()
    fixed_statistics: tuple[str, ...] = ()
    precision: Literal["float32", "bfloat16"] = "float32"
    average: float = Field(0.0, ge=0, lt=1)
    seed: int = Field(0, ge=0)
    log_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    tensorboard: bool = True


class TrainConfig(Config):
    """A configuration file as training reads it: the network under `predictor`, and `training`."""

    predictor: SerializeAsAny[Config]
    training: TrainingConfig


def load_train_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The training of a YAML file; its other sections (`dataset`, `benchmark`) are those of the evaluation."""
    data = read_yaml(path, overrides)
    where = str(path)
    sections: dict[str, Any] = {name: data.get(name) for name in ("predictor", "training")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{where}: no section {name!r} to train by", "configs/sparsefusion_city.yaml has both")
    source = sections["training"].get("data")
    if not isinstance(source, dict):
        raise ConfigError(f"{where}: training.data is missing", f"name one of: {', '.join(SOURCES)}")
    schema = schema_of(SOURCES, "training.data", source, where)
    training = {**sections["training"], "data": validate(schema, source, where, "training.data.")}
    return TrainConfig(
        predictor=predictor_config(sections["predictor"], where),
        training=validate(TrainingConfig, training, where, "training."),
    )
