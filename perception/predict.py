"""Predictions on a bag or a data set without ROS: the systems of a vehicle, or one predictor.

A bag goes through the same configuration, the same Synchronizer and the same decoding as in the node, which gives the
same predictions wherever the node used the same messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from perception.config import Config, apply_override, read_yaml
from perception.datasets import dataset_config, detect_layout, open_dataset
from perception.datasets.rosbag import Rosbag, RosbagConfig
from perception.errors import ConfigError
from perception.prediction_files import PredictedFrame, PredictionWriter
from perception.predictor import Predictor, TruthEchoConfig, load_predictor, predictor_config
from perception.recording import Recording
from perception.synthetic.demo import demo_bag
from perception.systems import StackConfig, above_threshold, is_due, load_stack, load_systems
from perception.types import Dataset, Sample
from perception.vehicle import VehicleConfig
from perception.visualize import write_pictures

Progress = Callable[[Iterable[int], int], Iterable[int]]
"""(indices, how many) -> the same indices, while something on screen moves."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One predictor and what it predicts on.

    Attributes:
        name: the system's, or the predictor's.
        config: the predictor's own.
        score_threshold, max_rate_hz: as in SystemConfig.
    """

    name: str
    config: Config
    predictor: Predictor
    dataset: Dataset
    score_threshold: float = 0.0
    max_rate_hz: float | None = None


def load_jobs(
    config: Path,
    source: Path | None,
    *,
    systems: Sequence[str] = (),
    overrides: Sequence[str] = (),
    device: str | None = None,
    weights: Path | None = None,
) -> list[Job]:
    """What a configuration asks for: a vehicle's `systems`, or one `predictor`.

    Args:
        config: a vehicle with systems (configs/vehicle.yaml), or a predictor with or without a dataset.
        source: a bag, or a data set's root; None is the configuration's own dataset, for a vehicle the demo drive.
        systems: names out of a vehicle's configuration; none is all of them.
        overrides: a.b=value.
        device: in place of the configuration's.
        weights: of the one predictor that there is.

    Raises:
        ConfigError: neither systems nor predictor, no source, weights for several, or what the parts raise.
    """
    data = read_yaml(config)
    if "systems" in data:
        named = tuple(systems or data["systems"] or ())
        if weights is not None and len(named) != 1:
            raise ConfigError(f"--weights {weights}: for which of {', '.join(named)}?", "choose with --system")
        extra = [f"systems.{name}.device={device}" for name in named] if device is not None else []
        extra += [f"systems.{name}.predictor.weights={weights}" for name in named] if weights is not None else []
        return _vehicle_jobs(load_stack(config, systems, [*overrides, *extra]), detect_layout(source or demo_bag()))
    if systems:
        raise ConfigError(f"{config}: has no systems, so none named {systems[0]!r}", "drop --systems")
    for override in [*overrides, *([f"predictor.weights={weights}"] if weights is not None else [])]:
        apply_override(data, override)
    if not isinstance(data.get("predictor"), dict):
        raise ConfigError(
            f"{config}: has neither `systems` nor a `predictor`",
            "configs/vehicle.yaml has systems; --set predictor.name=... names one",
        )
    chosen = predictor_config(data["predictor"], str(config))
    found = dataset_config(_dataset_keys(data.get("dataset"), source, config), str(source or config))
    name: str = chosen.name  # type: ignore[attr-defined]
    if isinstance(chosen, TruthEchoConfig):  # it repeats what is predicted on
        dataset = open_dataset(found)
        return [Job(name, chosen, load_predictor(chosen, truths=dataset), dataset)]
    predictor = load_predictor(chosen, device or "cpu")
    if isinstance(found, RosbagConfig) and "sweeps" not in found.model_fields_set:  # as the node assembles it
        found = found.model_copy(update={"sweeps": predictor.needs.sweeps})
    return [Job(name, chosen, predictor, open_dataset(found))]


def predict(
    job: Job, limit: int | None = None, progress: Progress = lambda indices, _: indices
) -> Iterator[tuple[Sample, PredictedFrame]]:
    """The predictions on the first `limit` samples; the predictor forgets the past where a scene begins."""
    scene, last_ns = None, None
    total = len(job.dataset) if limit is None else min(limit, len(job.dataset))
    for i, (sample, used) in zip(progress(range(total), total), _samples(job.dataset), strict=False):
        if (here := job.dataset.scene_name(i)) != scene:
            job.predictor.reset()
            scene, last_ns = here, None
        if not is_due(job.max_rate_hz, last_ns, sample.stamp_ns):
            continue
        prediction = above_threshold(job.predictor.predict(sample), job.score_threshold)
        last_ns = sample.stamp_ns
        yield sample, PredictedFrame(sample.token, used, prediction, job.predictor.degraded)


class Written(NamedTuple):
    """How many predictions a job made, what they had to do without (and how many of them), and where they are."""

    predictions: int
    degraded: Counter[str]
    paths: list[Path]


def write(
    job: Job,
    folder: Path,
    source: str,
    *,
    json: bool = True,
    png: bool = False,
    rrd: bool = False,
    limit: int | None = None,
    progress: Progress = lambda indices, _: indices,
) -> Written:
    """Run a job and write what is asked for: NAME.json, NAME/TOKEN/*.png, NAME.rrd.

    Raises:
        PerceptionError: rerun is asked for and not installed, or whatever reading and predicting raise.
    """
    json_path, png_folder, rrd_path = folder / f"{job.name}.json", folder / job.name, folder / f"{job.name}.rrd"
    made, degraded = 0, Counter[str]()
    with ExitStack() as files:
        recording = Recording(rrd_path) if rrd else None
        writer = PredictionWriter(json_path, job.name, source, job.config, job.predictor.weights) if json else None
        if writer is not None:
            files.enter_context(writer)
        for sample, frame in predict(job, limit, progress):
            made += 1
            degraded[frame.degraded] += 1
            if writer is not None:
                writer.add(frame)
            if png:
                write_pictures(png_folder / frame.token, sample, frame.prediction)
            if recording is not None:
                recording.add(sample, frame.prediction)
        if recording is not None:
            recording.flush()
    del degraded[""]
    return Written(made, degraded, [path for path, on in ((json_path, json), (png_folder, png), (rrd_path, rrd)) if on])


def used_stamps(sample: Sample) -> dict[str, tuple[int, ...]]:
    """Channel -> stamp of its key message."""
    found: dict[str, tuple[int, ...]] = {f"lidar_{role}": (cloud.stamp_ns,) for role, cloud in sample.lidars.items()}
    found |= {f"radar_{role}": (cloud.stamp_ns,) for role, cloud in sample.radars.items()}
    return found | {f"cam_{role}": (image.stamp_ns,) for role, image in sample.cameras.items()}


def _samples(dataset: Dataset) -> Iterator[tuple[Sample, Mapping[str, tuple[int, ...]]]]:
    if isinstance(dataset, Rosbag):
        for i, sample in enumerate(dataset.play()):
            yield sample, dataset.used(i)
    else:
        for i in range(len(dataset)):
            sample = dataset[i]
            yield sample, used_stamps(sample)


def _vehicle_jobs(stack: StackConfig, keys: Mapping[str, Any]) -> list[Job]:
    """The systems of a vehicle on a bag, each with the sensors that it reads, or on a data set."""
    found = dataset_config(keys, str(keys["root"]))
    echoes = any(isinstance(system.predictor, TruthEchoConfig) for system in stack.systems.values())
    if echoes:  # of what is predicted on, whatever the node repeats
        stack = stack.model_copy(update={"truths": _seen_by(stack.vehicle, found)})
    return [
        Job(
            system.name,
            system.config.predictor,
            system.predictor,
            open_dataset(_seen_by(system.vehicle, found)),
            system.config.score_threshold,
            system.config.max_rate_hz,
        )
        for system in load_systems(stack)
    ]


def _seen_by(vehicle: VehicleConfig, found: Config) -> Config:
    """A bag as a vehicle, or the part of it that a system reads, sees it; any other data set as it is."""
    if not isinstance(found, RosbagConfig):
        return found
    return RosbagConfig(root=found.root, **{name: getattr(vehicle, name) for name in VehicleConfig.model_fields})


def _dataset_keys(configured: Mapping[str, Any] | None, source: Path | None, where: Path) -> dict[str, Any]:
    """What lies at the source, with what the configuration says of the same layout."""
    if source is None and configured is None:
        raise ConfigError(f"{where}: has no dataset", "give a bag, or a data set's root")
    configured = configured or {}
    if source is None:
        return dict(configured)
    found = detect_layout(source)
    return {**configured, **found} if configured.get("name") == found["name"] else found
