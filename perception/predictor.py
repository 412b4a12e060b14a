"""Predictors: one synchronised Sample in, one Prediction out.

The command line, the ROS node and Python users call only this; networks and localization are reached through
PREDICTORS.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from perception.config import Config, schema_of, validate
from perception.device import usable_device
from perception.errors import ConfigError, DataError
from perception.networks.layers.resize import IMAGE_RESIZE
from perception.types import IGNORE_LABEL, Boxes3D, Dataset, Localization, Needs, Prediction, Sample
from perception.weights import WeightsProvenance, load_weights

PREDICTORS = {
    "truth_echo": "perception.predictor:TruthEcho",
    "sparsefusion": "perception.networks.sparsefusion:SparseFusion",
}
"""Name in a configuration -> module:Class; the configuration of `Class` is `ClassConfig` beside it."""


Output = Literal["boxes", "occupancy", "pose"]
"""Boxes3D, OccupancyGrid3D or Localization."""


class Predictor(Protocol):
    """What every system offers.

    Attributes:
        needs: what it reads of a sample.
        output: which kind of prediction it makes.
        weights: where its numbers come from; a result file records it.
        image_resize: how it resizes images, which moves camera metrics; None where it reads none.
        degraded: what the last prediction had to do without ("camera back missing"), "" if nothing.
    """

    needs: Needs
    output: Output
    weights: WeightsProvenance
    image_resize: str | None
    degraded: str

    def predict(self, sample: Sample) -> Prediction:
        """The prediction for one sample, in ego at the sample's stamp. An empty cloud gives an empty prediction."""
        ...

    def reset(self) -> None:
        """Forget the past; called when the clock jumps."""
        ...


def predictor_config(data: Mapping[str, Any], where: str) -> Config:
    """The configuration in the `predictor` keys of a file (`where`), of the class that its `name` asks for."""
    return validate(schema_of(PREDICTORS, "predictor", data, where), data, where, "predictor.")


def load_predictor(config: Config, device: torch.device | str = "cpu", truths: Dataset | None = None) -> Predictor:
    """The predictor of a configuration, ready to predict on `device`.

    Args:
        config: as `predictor_config` gives it.
        device: where a network runs.
        truths: the data set whose truth `truth_echo` repeats; nothing else sees it.
    """
    if isinstance(config, TruthEchoConfig):
        return TruthEcho(config, truths)
    module, _, cls = PREDICTORS[config.name].partition(":")  # type: ignore[attr-defined]
    kind = getattr(import_module(module), cls)
    if issubclass(kind, nn.Module):
        return load_network(kind, config, usable_device(device))
    predictor: Predictor = kind(config, usable_device(device))
    return predictor


class Network(Protocol):
    """What an nn.Module offers beside training to be a predictor."""

    needs: Needs
    output: Output

    def accelerate(self) -> None:
        """Make ready to predict as fast as the device allows; weights do not change any more."""
        ...

    def predict(self, sample: Sample) -> Prediction:
        """As in Predictor, without gradients."""
        ...

    def degraded(self, sample: Sample) -> str:
        """As in Predictor, of the prediction for this sample, which was the last."""
        ...


class NetworkPredictor:
    """A network in evaluation mode; it sees one sample at a time and remembers nothing."""

    def __init__(self, network: Network, weights: WeightsProvenance, device: torch.device) -> None:
        self.needs = network.needs
        self.output = network.output
        self.weights = weights
        self.image_resize = IMAGE_RESIZE if network.needs.cameras else None
        self.degraded = ""
        self._network = network
        self._device = device
        with _current(device):
            network.accelerate()

    def predict(self, sample: Sample) -> Prediction:
        """The network's; DataError where the sample lacks what it cannot do without."""
        with _current(self._device):
            prediction = self._network.predict(sample)
        self.degraded = self._network.degraded(sample)
        return prediction

    def reset(self) -> None:
        """It remembers nothing."""
        self.degraded = ""


def load_network(network: type[nn.Module], config: Config, device: torch.device) -> NetworkPredictor:
    """A network with the weights that its configuration names, on a device.

    Raises:
        ConfigError: it names none.
        DataError: a file that is not there, or whose weights do not fit the configuration.
    """
    path: Path | None = config.weights  # type: ignore[attr-defined]
    name: str = config.name  # type: ignore[attr-defined]
    if path is None:
        raise ConfigError(
            f"predictor {name}: no weights: an untrained network predicts noise",
            "--weights FILE, or set predictor.weights; `perception weights convert` makes it of a released checkpoint, "
            "`perception train` trains it",
        )
    module = network(config)
    weights = load_weights(module, path)
    return NetworkPredictor(module.to(device).eval(), weights, device)  # type: ignore[arg-type]


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Where streams, graphs and Triton's kernels belong to the current GPU, as they do: be that one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class TruthEchoConfig(Config):
    """`truth_echo`: repeats the truth of a data set, to prove that reading, frames and scoring fit together."""

    name: Literal["truth_echo"] = "truth_echo"
    output: Output = "boxes"


class TruthEcho:
    """Predicts what is true. Scored against itself, every benchmark gives its best number."""

    needs = Needs()
    image_resize: str | None = None
    degraded = ""

    def __init__(self, config: TruthEchoConfig, truths: Dataset | None) -> None:
        if truths is None:
            raise ConfigError("predictor truth_echo has no data set to repeat", "run it on a data set that has truth")
        self.weights = WeightsProvenance.not_needed("truth_echo repeats the truth")
        self.output = config.output
        self._truths = truths
        self._index = {token: i for i, token in enumerate(truths.tokens)}

    def predict(self, sample: Sample) -> Prediction:
        """The truth of the sample with this token; DataError where there is none.

        Boxes without a LiDAR or radar point are left out, since nuScenes does not score them; ignored voxels are free.
        """
        truth = self._truths.truth(self._index[sample.token]) if sample.token in self._index else None
        if truth is not None and self.output == "boxes" and truth.boxes is not None:
            return _seen(truth.boxes)
        if truth is not None and self.output == "occupancy" and truth.occupancy is not None:
            label = truth.occupancy.label
            return replace(
                truth.occupancy, label=np.where(label == IGNORE_LABEL, np.uint8(truth.occupancy.free_label), label)
            )
        if truth is not None and self.output == "pose" and truth.map_from_ego is not None:
            return Localization(truth.map_from_ego, np.diag([1e-4] * 6), 0, "ok", sample.stamp_ns)
        raise DataError(
            f"sample {sample.token!r} has no true {self.output}", "choose a split, or an output, that has truth"
        )

    def reset(self) -> None:
        """It remembers nothing."""


def _seen(boxes: Boxes3D) -> Boxes3D:
    """The boxes with a point inside; all of them where points were not counted."""
    counts = [c for c in (boxes.num_points, boxes.num_radar_points) if c is not None]
    return boxes.select(np.sum(counts, 0) > 0) if counts else boxes
