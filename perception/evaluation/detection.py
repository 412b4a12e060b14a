"""3D detection by the nuScenes protocol (Caesar et al., CVPR 2020, section 3), computed by the official devkit.

The devkit is used as it is: `DetectionEval` loads, filters, matches and scores a whole split. For a part of a split its
loaders and filters are called for the tokens at hand, and `DetectionEval.evaluate` on what they give, so that one code
computes every number here. It is imported when first needed (extra `nuscenes`).

Boxes are matched by the distance of their centres on the ground: mAP is the mean over classes and over the thresholds
0.5, 1, 2 and 4 m; the true positive errors are those at 2 m; NDS weighs mAP by five and each of the five errors by one.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from perception.errors import DataError
from perception.evaluation.detection_results import MAX_BOXES, read_results
from perception.evaluation.devkit import Devkit, check_samples, devkit, examples, knows_split, load_tables, split_tokens

PROTOCOL = "detection_cvpr_2019"
"""The official protocol, by the name of its configuration in the devkit."""

RANGE_EDGES_M = (0.0, 30.0, 50.0)
"""Bins of ground distance, as Waymo's."""


@dataclass(frozen=True, slots=True)
class TruePositiveErrors:
    """Mean errors of matched boxes; 1 where nothing matched, NaN where a class has no such error.

    Attributes:
        translation_m: distance of the centres on the ground (ATE).
        scale: 1 - IoU of the aligned boxes (ASE).
        orientation_rad: yaw (AOE).
        velocity_mps: length of the difference (AVE).
        attribute: 1 - accuracy (AAE).
    """

    translation_m: float
    scale: float
    orientation_rad: float
    velocity_mps: float
    attribute: float

    @staticmethod
    def of(errors: Mapping[str, float]) -> TruePositiveErrors:
        return TruePositiveErrors(
            *(float(errors[key]) for key in ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err"))
        )


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class: average precision at each of `DetectionScore.thresholds_m`, errors, boxes after the filters."""

    name: str
    ap: tuple[float, ...]
    errors: TruePositiveErrors
    truths: int
    predictions: int

    @property
    def mean_ap(self) -> float:
        """Over the thresholds."""
        return sum(self.ap) / len(self.ap)


@dataclass(frozen=True, slots=True)
class DetectionScore:
    """What the devkit says of all samples.

    Attributes:
        nds, mean_ap, errors: the summary.
        classes: class by class, in the protocol's order.
        thresholds_m: of the average precisions.
        samples: how many were scored.
        samples_of_split: how many the split has; None where boxes were scored without tables.
        ranges: the same for the boxes (truths and predictions alike) in bins of ground distance from ego. Not part of
            the protocol: a class whose official range ends before a bin has no truth there.
        min_m, max_m: bounds of the ground distance, when this is such a bin.
    """

    nds: float
    mean_ap: float
    errors: TruePositiveErrors
    classes: tuple[ClassScore, ...]
    thresholds_m: tuple[float, ...]
    samples: int
    samples_of_split: int | None = None
    ranges: tuple[DetectionScore, ...] = ()
    min_m: float = 0.0
    max_m: float = math.inf

    @property
    def subset(self) -> bool:
        """Only a part of the split was scored: not the benchmark's number."""
        return self.samples_of_split is not None and self.samples < self.samples_of_split

    @property
    def mean_ap_present(self) -> float:
        """Mean over the classes that have a truth; NaN without any. For bins and parts of a split."""
        present = [score.mean_ap for score in self.classes if score.truths]
        return sum(present) / len(present) if present else math.nan

    def rows(self) -> list[tuple[str, float, TruePositiveErrors, int, int]]:
        """(class, AP, errors, truths, predictions): a line per class, the mean over classes first."""
        lines = [(score.name, score.mean_ap, score.errors, score.truths, score.predictions) for score in self.classes]
        totals = sum(score.truths for score in self.classes), sum(score.predictions for score in self.classes)
        return [("mean", self.mean_ap, self.errors, *totals), *lines]

    def metrics(self) -> dict[str, float]:
        """Flat, for a result file."""
        flat = {"NDS": self.nds, "mAP": self.mean_ap}
        flat |= {
            "mATE_m": self.errors.translation_m,
            "mASE": self.errors.scale,
            "mAOE_rad": self.errors.orientation_rad,
            "mAVE_mps": self.errors.velocity_mps,
            "mAAE": self.errors.attribute,
        }
        for score in self.classes:
            flat[f"AP/{score.name}"] = score.mean_ap
            flat |= {f"AP/{score.name}/{m}m": ap for m, ap in zip(self.thresholds_m, score.ap, strict=True)}
            flat |= {f"{e}/{score.name}": getattr(score.errors, e) for e in TruePositiveErrors.__dataclass_fields__}
        for part in self.ranges:
            flat[f"mAP_present/{part.min_m:g}-{part.max_m:g}m"] = part.mean_ap_present
        return flat


def evaluate_detection(
    results: Path,
    root: Path,
    version: str,
    split: str | Sequence[str],
    *,
    subset: bool = False,
    protocol: str = PROTOCOL,
    range_edges_m: Sequence[float] = RANGE_EDGES_M,
) -> DetectionScore:
    """Score a results file against the nuScenes tables.

    Args:
        results: as `write_results` or any other method wrote it.
        root: the folder that holds `version`, `samples` and `maps`.
        version: `v1.0-mini`, `v1.0-trainval`, ... or that of another data set in this layout.
        split: an official one, one of `{root}/{version}/splits.json`, `all`, or a list of scene names.
        subset: score the samples that the file has and no others; else they must be exactly those of the split.
        protocol: one of the devkit's detection configurations.
        range_edges_m: edges of the distance bins of `DetectionScore.ranges`; () for none.

    Raises:
        DataError: a file or table is missing or malformed, version and split do not go together, or the samples of the
            file are not those of the split (with counts, examples and the cure).
        PerceptionError: the devkit is not installed.
    """
    config = load_protocol(protocol)
    predicted = {token: len(records) for token, records in read_results(results).records.items()}
    tables = load_tables(root, version)
    tokens = split_tokens(tables, split)
    check_samples(results, tables, split, tokens, list(predicted), subset)
    if not any(tables.get("sample", token)["anns"] for token in tokens):
        raise DataError(f"{root / version}: split {split!r} has no annotations", "score on a split that has them")
    whole = len(predicted) == len(tokens) and any(predicted.values())
    if whole and isinstance(split, str) and split != "all" and knows_split(tables, split):
        truths, predictions = _load_split(tables, config, results, split)
    else:
        truths, predictions = _load_some(tables, config, results, [token for token in tokens if token in predicted])
    return replace(score_boxes(truths, predictions, config, range_edges_m), samples_of_split=len(tokens))


def load_protocol(name: str = PROTOCOL) -> Devkit:
    """A detection configuration of the devkit: class ranges, thresholds, weights. DataError for an unknown name."""
    try:
        if not name.startswith("detection_"):
            raise AssertionError("its name starts with detection_")
        return devkit("eval.common.config").config_factory(name)
    except AssertionError as error:
        raise DataError(f"protocol {name!r}: {error}", f"the official one is {PROTOCOL!r}") from error


def _load_split(tables: Devkit, config: Devkit, results: Path, split: str) -> tuple[Devkit, Devkit]:
    """Truths and predictions of a whole split, filtered: all of it done by the official evaluation itself."""
    with tempfile.TemporaryDirectory() as folder:  # it makes a folder for plots, which are not drawn here
        official = devkit("eval.detection.evaluate").DetectionEval(
            tables, config, str(results), split, folder, verbose=False
        )
    return official.gt_boxes, official.pred_boxes


def _load_some(tables: Devkit, config: Devkit, results: Path, tokens: Sequence[str]) -> tuple[Devkit, Devkit]:
    """The same for some tokens of a split, by the official loaders and filters."""
    loaders, box = devkit("eval.common.loaders"), devkit("eval.detection.data_classes").DetectionBox
    truths = loaders.load_gt_of_sample_tokens(tables, tokens, box)
    predictions, _ = loaders.load_prediction_of_sample_tokens(str(results), MAX_BOXES, box, tokens)

    def prepare(boxes: Devkit) -> Devkit:
        boxes = loaders.add_center_dist(tables, boxes)
        # The official filter takes the kind of box from the first one, and fails where there is none.
        return loaders.filter_eval_boxes(tables, boxes, config.class_range) if boxes.all else boxes

    return prepare(truths), prepare(predictions)


def load_boxes(
    records: Mapping[str, Iterable[Mapping[str, Any]]], ego_translation: Mapping[str, Sequence[float]]
) -> Devkit:
    """The devkit's `EvalBoxes` of boxes in the results format, truths (with `num_pts`) or predictions.

    Args:
        records: sample token -> boxes in the global frame, as in a results file; null or NaN velocity: unknown.
        ego_translation: sample token -> (x, y, z) of the ego vehicle in the global frame, metres.

    Raises:
        DataError: a sample without ego position, or a box that the devkit refuses, named by sample, index and class.
    """
    box_type = devkit("eval.detection.data_classes").DetectionBox
    boxes = devkit("eval.common.data_classes").EvalBoxes()
    for token, boxes_of_sample in records.items():
        if token not in ego_translation:
            raise DataError(f"sample {token}: no ego position", "give ego_translation for every sample of the boxes")
        kept = []
        for m, record in enumerate(boxes_of_sample):
            try:
                velocity = [math.nan if speed is None else speed for speed in record["velocity"]]
                box = box_type.deserialize({**record, "velocity": velocity})
            except (AssertionError, KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"sample {token}: box {m} ({record.get('detection_name', 'no class')}): {error}",
                    "boxes are in the results format of the nuScenes detection task",
                ) from error
            box.ego_translation = tuple(b - e for b, e in zip(box.translation, ego_translation[token], strict=True))
            kept.append(box)
        boxes.add_boxes(token, kept)
    return boxes


def filter_boxes(boxes: Devkit, config: Devkit) -> Devkit:
    """The boxes within their class's range of ego, truths without any LiDAR or radar point left out.

    These are the devkit's filters but one: cycles in a bicycle rack stay, for the racks stand in the tables alone.
    """
    return _select(boxes, lambda box: box.ego_dist < config.class_range[box.detection_name] and box.num_pts != 0)


def _select(boxes: Devkit, keep: Callable[[Any], bool]) -> Devkit:
    selected = type(boxes)()
    for token in boxes.sample_tokens:
        selected.add_boxes(token, [box for box in boxes[token] if keep(box)])
    return selected


def score_boxes(
    truths: Devkit, predictions: Devkit, config: Devkit, range_edges_m: Sequence[float] = RANGE_EDGES_M
) -> DetectionScore:
    """Score filtered `EvalBoxes` of the same samples; no tables are needed.

    Raises:
        DataError: the samples differ, a sample has more boxes than the protocol allows, or a box is not finite.
    """
    _check_boxes(truths, predictions, config)
    bins = []
    for low, high in pairwise(range_edges_m):

        def inside(box: Any, low: float = low, high: float = high) -> bool:
            return low <= box.ego_dist < high

        part = _evaluate(_select(truths, inside), _select(predictions, inside), config)
        bins.append(replace(part, min_m=low, max_m=high))
    return replace(_evaluate(truths, predictions, config), ranges=tuple(bins))


def _check_boxes(truths: Devkit, predictions: Devkit, config: Devkit) -> None:
    missing = set(truths.sample_tokens) - set(predictions.sample_tokens)
    extra = set(predictions.sample_tokens) - set(truths.sample_tokens)
    if missing or extra:
        raise DataError(
            f"truths and predictions are of different samples: {len(missing)} have no predictions "
            f"({examples(missing)}), {len(extra)} no truths ({examples(extra)})",
            "give both for the same samples; a sample without boxes has an empty list",
        )
    for token in predictions.sample_tokens:
        if len(predictions[token]) > config.max_boxes_per_sample:
            raise DataError(
                f"sample {token}: {len(predictions[token])} boxes; the protocol allows {config.max_boxes_per_sample}",
                "keep the boxes of the best scores",
            )
    for kind, boxes in (("truth", truths), ("prediction", predictions)):
        for box in boxes.all:
            # The devkit refuses NaN in most fields when a box is made, and infinity in none.
            numbers = (*box.translation, *box.size, *box.rotation, box.detection_score)
            if not all(map(math.isfinite, numbers)) or min(box.size) <= 0:
                raise DataError(
                    f"sample {box.sample_token}: {kind} {box.detection_name} with translation {box.translation}, size "
                    f"{box.size}, rotation {box.rotation}, score {box.detection_score}",
                    "every number must be finite and every size positive",
                )


def _evaluate(truths: Devkit, predictions: Devkit, config: Devkit) -> DetectionScore:
    """The official computation on boxes that are loaded and filtered."""
    evaluation_type = devkit("eval.detection.evaluate").DetectionEval
    evaluation = evaluation_type.__new__(evaluation_type)  # __init__ loads from tables; evaluate() reads these four
    evaluation.cfg, evaluation.verbose = config, False
    evaluation.gt_boxes, evaluation.pred_boxes = truths, predictions
    metrics, _ = evaluation.evaluate()
    truth_names = Counter(box.detection_name for box in truths.all)
    predicted_names = Counter(box.detection_name for box in predictions.all)
    return DetectionScore(
        nds=metrics.nd_score,
        mean_ap=metrics.mean_ap,
        errors=TruePositiveErrors.of(metrics.tp_errors),
        classes=tuple(
            ClassScore(
                name,
                tuple(float(metrics.get_label_ap(name, threshold)) for threshold in config.dist_ths),
                TruePositiveErrors.of({key: metrics.get_label_tp(name, key) for key in metrics.tp_errors}),
                truth_names[name],
                predicted_names[name],
            )
            for name in config.class_names
        ),
        thresholds_m=tuple(config.dist_ths),
        samples=len(truths.sample_tokens),
    )
