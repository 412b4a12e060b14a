"""One evaluation from configuration to result file: samples, predictions, the benchmark's own rules, provenance.

Predictions come from a predictor, or from files that any method wrote in the benchmark's own format:

* `nuscenes_detection`: the official results JSON;
* `semantickitti`: a folder in the layout of a submission, `sequences/XX/predictions/NNNNNN.label`;
* the nuScenes occupancies and OmniHD-Scenes: a folder in the layout of the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import SerializeAsAny

from perception.config import Config, apply_override, read_yaml, validate
from perception.datasets import dataset_config, open_dataset
from perception.device import usable_device
from perception.errors import ConfigError, DataError
from perception.evaluation.detection import DetectionScore, evaluate_detection
from perception.evaluation.detection_results import Modalities, write_results
from perception.evaluation.localization import LocalizationFrame, LocalizationScore, evaluate_localization
from perception.evaluation.occupancy import BENCHMARKS, OccupancyEvaluator, OccupancyScore
from perception.evaluation.result import Result, make_result
from perception.predictor import Predictor, load_predictor, predictor_config
from perception.types import Boxes3D, Dataset, Localization, OccupancyGrid3D, Pose, Prediction
from perception.weights import WeightsProvenance

Score = DetectionScore | OccupancyScore | LocalizationScore
Progress = Callable[[Iterable[int], int], Iterable[int]]
"""(indices, how many) -> the same indices, while something on screen moves."""


class RunConfig(Config):
    """What an evaluation is made of.

    Attributes:
        dataset: what is read.
        predictor: None where predictions come from files.
        benchmark: whose rules score.
    """

    dataset: SerializeAsAny[Config]
    predictor: SerializeAsAny[Config] | None = None
    benchmark: Literal[
        "nuscenes_detection",
        "semantickitti",
        "openoccupancy",
        "surroundocc",
        "occ3d",
        "occ3d_lidar",
        "omnihd",
        "localization",
    ]


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The evaluation in a YAML file: sections `dataset` and `predictor` (each with `name`), and `benchmark`.

    A section `training`, which `perception train` reads of the same file, is left alone.
    """
    data = read_yaml(path)
    data.pop("training", None)
    for override in overrides:
        apply_override(data, override)
    for section, parse in (("dataset", dataset_config), ("predictor", predictor_config)):
        if isinstance(data.get(section), dict):
            data[section] = parse(data[section], str(path))
    return validate(RunConfig, data, str(path))


def evaluate(
    config: RunConfig,
    folder: Path,
    *,
    predictions: Path | None = None,
    subset: bool = False,
    limit: int | None = None,
    device: str = "cpu",
    progress: Progress = lambda indices, _: indices,
) -> tuple[Score, Result]:
    """Score a predictor, or the files at `predictions`, by the benchmark's rules.

    Args:
        config: data set, predictor and benchmark.
        folder: where predictions are written that the official tools read from disk.
        predictions: files of another method; None: the configured predictor runs.
        subset: allow files that cover only a part of the split, and score that part.
        limit: score only the first so many samples; the result says that it is a subset.
        device: where the predictor and the counting run.
        progress: wraps the loop over samples.

    Raises:
        ConfigError: neither a predictor nor predictions, a data set that has no such benchmark, or a device that is
            not there.
        DataError: predictions that do not fit the data set.
    """
    if config.benchmark == "nuscenes_detection" and predictions is not None and limit is not None:
        raise ConfigError(
            f"limit {limit}: the predictions of {predictions} are scored as they are",
            "drop --limit; --subset scores a file of a part of the split",
        )
    usable_device(device)  # before the data set is read
    dataset = open_dataset(config.dataset)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    predictor = _predictor(config, predictions, device, dataset)
    indices = progress(range(count), count)
    score: Score
    if config.benchmark == "nuscenes_detection":
        score = _detection(config, dataset, predictor, predictions, indices, folder, subset or count < len(dataset))
        samples = score.samples
    elif config.benchmark == "localization":
        score, samples = evaluate_localization(_frames(dataset, predictor, indices)), count
    else:
        score = _occupancy(config, dataset, predictor, predictions, indices, device, subset)
        samples = score.frames
    result = make_result(
        config.benchmark,
        score.metrics(),
        samples=samples,
        samples_of_split=len(dataset),
        config=config,
        weights=predictor.weights if predictor else WeightsProvenance.not_needed(f"predictions of {predictions}"),
        device=device,
        image_resize=predictor.image_resize if predictor else None,
    )
    return score, result


def _predictor(config: RunConfig, predictions: Path | None, device: str, dataset: Dataset) -> Predictor | None:
    if predictions is not None:
        return None
    if config.predictor is None:
        raise ConfigError(
            f"{config.benchmark}: nothing to score: no predictor is configured and no predictions are given",
            "--predictions FILE scores files; --set predictor.name=truth_echo proves the set-up with the truth itself",
        )
    return load_predictor(config.predictor, device, truths=dataset)


def _detection(
    config: RunConfig,
    dataset: Dataset,
    predictor: Predictor | None,
    predictions: Path | None,
    indices: Iterable[int],
    folder: Path,
    subset: bool,
) -> DetectionScore:
    from perception.datasets.nuscenes import NuScenes, NuScenesConfig

    if not isinstance(dataset, NuScenes) or not isinstance(config.dataset, NuScenesConfig):
        raise ConfigError(
            f"nuscenes_detection scores nuScenes, not {type(dataset).__name__}", "set dataset.name to nuscenes"
        )
    if predictor is not None:
        predictions = folder / "results_nusc.json"
        write_results(predictions, _boxes(dataset, predictor, indices), Modalities.of(predictor.needs))
    assert predictions is not None
    source = config.dataset
    return evaluate_detection(predictions, source.root, source.version, source.split, subset=subset)


def _boxes(dataset: Any, predictor: Predictor, indices: Iterable[int]) -> Iterator[tuple[str, Boxes3D, Pose]]:
    for i in indices:
        sample = dataset[i]
        boxes = _expect(Boxes3D, predictor.predict(sample), "nuscenes_detection")
        yield sample.token, boxes, dataset.map_from_ego(i)


@runtime_checkable
class OccupancyDataset(Dataset, Protocol):
    """A data set with an occupancy benchmark."""

    def occupancy(self, i: int) -> OccupancyGrid3D | None:
        """The truth of sample i, without the other truths; None where there is none."""
        ...

    def read_prediction(self, root: Path, i: int) -> OccupancyGrid3D | None:
        """What a method wrote below `root` in the benchmark's format; None where there is no file of sample i."""
        ...


def _occupancy(
    config: RunConfig,
    dataset: Dataset,
    predictor: Predictor | None,
    predictions: Path | None,
    indices: Iterable[int],
    device: str,
    subset: bool,
) -> OccupancyScore:
    if not isinstance(dataset, OccupancyDataset):
        raise ConfigError(f"{type(dataset).__name__} has no occupancy benchmark", "choose the benchmark's data set")
    evaluator = OccupancyEvaluator(BENCHMARKS[config.benchmark], device)
    for i in indices:
        truth = dataset.occupancy(i)
        if truth is None:
            raise DataError(
                f"{config.benchmark}: sample {dataset.tokens[i]} has no occupancy truth",
                "choose a split that has it; for nuScenes set dataset.occupancy and dataset.occupancy_root",
            )
        if predictor is not None:
            predicted = _expect(OccupancyGrid3D, predictor.predict(dataset[i]), config.benchmark)
        else:
            assert predictions is not None
            predicted = dataset.read_prediction(predictions, i)
        if predicted is None and subset:
            continue
        if predicted is None:
            raise DataError(
                f"{predictions}: no prediction of sample {dataset.tokens[i]}",
                "predict every sample of the split, or score the part that there is with --subset",
            )
        evaluator.update(predicted, truth)
    return evaluator.score()


def _frames(dataset: Dataset, predictor: Predictor | None, indices: Iterable[int]) -> Iterator[LocalizationFrame]:
    if predictor is None:
        raise ConfigError("localization is scored from a predictor, not from files", "configure a predictor")
    for i in indices:
        truth, sample = dataset.truth(i), dataset[i]
        if truth is None or truth.map_from_ego is None:
            raise DataError(f"localization: sample {sample.token} has no true pose", "choose a split that has it")
        prediction = _expect(Localization, predictor.predict(sample), "localization")
        yield LocalizationFrame(sample.stamp_ns, truth.map_from_ego, prediction, dataset.scene_name(i))


def _expect(kind: type[Any], prediction: Prediction, benchmark: str) -> Any:
    if not isinstance(prediction, kind):
        raise ConfigError(
            f"{benchmark} scores {kind.__name__}, the predictor gives {type(prediction).__name__}",
            "choose the benchmark of this predictor; truth_echo has predictor.output",
        )
    return prediction
