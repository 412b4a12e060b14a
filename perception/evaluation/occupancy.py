"""Semantic occupancy: one confusion matrix over all frames, scored by each benchmark's own rules.

Counts are summed over frames before anything is divided, as every benchmark here does. A confusion with free space
counts as the class's false positive or false negative, but free space itself is no scored class.

* SC IoU (scene completion): occupied against free, whatever the class.
* mIoU (semantic scene completion): mean of the classes' IoU, free excluded.

The benchmarks differ in which voxels count, in the free label, and in what an absent class (neither in the truth nor
predicted, 0 / 0) is worth. Only SemanticKITTI and Occ3D define the latter; OpenOccupancy, SurroundOcc and OmniHD-Scenes
divide zero by zero there, which never happens on their full splits. Leaving the class out gives the official number
wherever there is one, and a finite number on a part of the split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from perception.errors import DataError
from perception.types import IGNORE_LABEL, Array, OccupancyGrid3D, VoxelGrid


@dataclass(frozen=True, slots=True)
class OccupancyBenchmark:
    """The rules of one benchmark.

    Attributes:
        name: as in results and on the command line.
        num_classes: labels 0 to num_classes - 1, the free one included; all the others are scored.
        free_label: which label is empty space.
        observed: only voxels that this kind of sensor could see count; None: all count. Ignored voxels never do.
        absent: IoU of a class neither in the truth nor predicted: `zero`, or `skip`: NaN, and left out of the mean.
    """

    name: str
    num_classes: int
    free_label: int
    observed: Literal["lidar", "camera"] | None
    absent: Literal["zero", "skip"]

    @property
    def scored_labels(self) -> tuple[int, ...]:
        """The labels whose IoU make the mIoU."""
        return tuple(label for label in range(self.num_classes) if label != self.free_label)


# semantic-kitti-api, evaluate_completion.py: the mean is always over 19 classes. Invalid voxels are ignored ones here.
SEMANTICKITTI = OccupancyBenchmark("semantickitti", 20, free_label=0, observed=None, absent="zero")
# OpenOccupancy, the `SSC_fine` row: no visibility mask.
OPENOCCUPANCY = OccupancyBenchmark("openoccupancy", 17, free_label=0, observed=None, absent="skip")
SURROUNDOCC = OccupancyBenchmark("surroundocc", 17, free_label=0, observed=None, absent="skip")
# CVPR 2023 occupancy challenge: mean over the classes that occur, `others` (0) among them, inside the camera mask.
OCC3D = OccupancyBenchmark("occ3d", 18, free_label=17, observed="camera", absent="skip")
OCC3D_LIDAR = OccupancyBenchmark("occ3d_lidar", 18, free_label=17, observed="lidar", absent="skip")
OMNIHD = OccupancyBenchmark("omnihd", 12, free_label=0, observed=None, absent="skip")

BENCHMARKS = {b.name: b for b in (SEMANTICKITTI, OPENOCCUPANCY, SURROUNDOCC, OCC3D, OCC3D_LIDAR, OMNIHD)}


class ConfusionMatrix:
    """Voxels by true and predicted label, summed over frames.

    Attributes:
        counts: (C, C) int64 tensor on the device given: row = truth, column = prediction.
        frames: how many were added.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros((num_classes, num_classes), dtype=torch.int64, device=device)
        self.frames = 0

    def update(self, prediction: Array | Tensor, truth: Array | Tensor, counted: Array | Tensor | None = None) -> None:
        """Add one frame.

        Args:
            prediction: labels of any shape, an integer type; on any device.
            truth: labels of the same shape; IGNORE_LABEL does not count.
            counted: bool of the same shape, the voxels that count; None: all.

        Raises:
            DataError: shapes differ, or a voxel that counts has a label outside 0 to C - 1.
        """
        device, num_classes = self.counts.device, len(self.counts)
        predicted, true = torch.as_tensor(prediction, device=device), torch.as_tensor(truth, device=device)
        if predicted.shape != true.shape:
            raise DataError(
                f"prediction has {tuple(predicted.shape)} voxels, the truth {tuple(true.shape)}",
                "predict on the truth's grid; labels are resampled by the network, never by the metric",
            )
        keep = true != IGNORE_LABEL
        if counted is not None:
            keep &= torch.as_tensor(counted, device=device)
        predicted, true = predicted[keep], true[keep]  # (V,)
        _check_range("prediction", predicted, num_classes)
        _check_range("truth", true, num_classes)
        pair = true.long() * num_classes + predicted.long()
        self.counts += torch.bincount(pair, minlength=num_classes**2).view_as(self.counts)
        self.frames += 1

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """The matrix of both sets of frames (of two workers, say), on this one's device."""
        if self.counts.shape != other.counts.shape:
            raise ValueError(f"ConfusionMatrix: {len(self.counts)} and {len(other.counts)} classes cannot be added")
        total = ConfusionMatrix(len(self.counts), self.counts.device)
        total.counts = self.counts + other.counts.to(self.counts.device)
        total.frames = self.frames + other.frames
        return total


def _check_range(name: str, label: Tensor, num_classes: int) -> None:
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) < num_classes:
        outside = label[(label < 0) | (label >= num_classes)]
        raise DataError(
            f"{name}: label {int(outside[0])} in {len(outside)} voxels that count, for {num_classes} classes",
            "is it of another benchmark? A prediction has no ignored voxels: every voxel gets a class or is free",
        )


@dataclass(frozen=True, slots=True)
class OccupancyScore:
    """What a benchmark says of all frames. Fractions, not per cent.

    Attributes:
        benchmark: its name.
        classes: names of the scored classes.
        iou: of each scored class; NaN where absent and the benchmark skips it.
        miou: their mean by the benchmark's rule.
        sc_iou, sc_precision, sc_recall: occupied against free.
        frames: how many were scored.
        voxels: how many counted, over all frames.
    """

    benchmark: str
    classes: tuple[str, ...]
    iou: tuple[float, ...]
    miou: float
    sc_iou: float
    sc_precision: float
    sc_recall: float
    frames: int
    voxels: int

    def metrics(self) -> dict[str, float]:
        """Flat, for a result file."""
        summary = {
            "SC_IoU": self.sc_iou,
            "SC_precision": self.sc_precision,
            "SC_recall": self.sc_recall,
            "mIoU": self.miou,
        }
        return summary | {f"IoU/{name}": iou for name, iou in zip(self.classes, self.iou, strict=True)}

    def rows(self) -> list[tuple[str, float]]:
        """Name and value of every line of a table, the summary first."""
        return list(self.metrics().items())


def score_confusion(matrix: ConfusionMatrix, benchmark: OccupancyBenchmark, classes: tuple[str, ...]) -> OccupancyScore:
    """The benchmark's numbers for a matrix.

    Args:
        matrix: of `benchmark.num_classes` classes.
        benchmark: the rules.
        classes: every class name, the free one included.
    """
    counts = matrix.counts.cpu().numpy()
    if not len(counts) == len(classes) == benchmark.num_classes:
        raise ValueError(
            f"{benchmark.name}: {benchmark.num_classes} classes, got a matrix of {len(counts)} and {len(classes)} names"
        )
    scored = list(benchmark.scored_labels)
    worth = 0.0 if benchmark.absent == "zero" else math.nan

    def ratio(part: int, whole: int) -> float:
        return int(part) / int(whole) if whole else worth

    hits, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    iou = tuple(ratio(hits[c], true[c] + predicted[c] - hits[c]) for c in scored)
    present = [value for value in iou if not math.isnan(value)]

    both = counts[np.ix_(scored, scored)].sum()
    occupied, claimed = counts[scored].sum(), counts[:, scored].sum()
    return OccupancyScore(
        benchmark.name,
        tuple(classes[c] for c in scored),
        iou,
        sum(present) / len(present) if present else math.nan,
        ratio(both, occupied + claimed - both),
        ratio(both, claimed),
        ratio(both, occupied),
        matrix.frames,
        int(counts.sum()),
    )


class OccupancyEvaluator:
    """Occupancy predictions against truths by one benchmark's rules: `update` per frame, then `score`."""

    def __init__(self, benchmark: OccupancyBenchmark, device: torch.device | str = "cpu") -> None:
        self.benchmark = benchmark
        self.matrix = ConfusionMatrix(benchmark.num_classes, device)
        self._classes: tuple[str, ...] | None = None

    def update(self, prediction: OccupancyGrid3D, truth: OccupancyGrid3D) -> None:
        """Add one frame.

        Raises:
            DataError: another grid, class list or free label than the truth's or the benchmark's, a truth without the
                mask that the benchmark scores in, or a predicted voxel that counts and has no class.
        """
        rules = self.benchmark
        if (len(truth.classes), truth.free_label) != (rules.num_classes, rules.free_label):
            raise DataError(
                f"{rules.name}: expected a truth of {rules.num_classes} classes with free = {rules.free_label}, "
                f"got {len(truth.classes)} with free = {truth.free_label}",
                f"choose the benchmark of this truth; known: {', '.join(BENCHMARKS)}",
            )
        if (prediction.classes, prediction.free_label) != (truth.classes, truth.free_label):
            raise DataError(
                f"{rules.name}: the prediction's classes ({', '.join(prediction.classes)}; free = "
                f"{prediction.free_label}) are not the truth's ({', '.join(truth.classes)}; free = {truth.free_label})",
                "score a network on the benchmark it was trained for, or map its labels first",
            )
        _check_grid(prediction.grid, truth.grid)
        if rules.observed is not None and rules.observed not in truth.observed:
            raise DataError(
                f"{rules.name}: scores the voxels that the {rules.observed} observed, the truth has masks for "
                f"({', '.join(truth.observed) or 'none'})",
                "read the truth with its visibility masks",
            )
        self.matrix.update(
            prediction.label, truth.label, None if rules.observed is None else truth.observed[rules.observed]
        )
        self._classes = truth.classes

    def __add__(self, other: OccupancyEvaluator) -> OccupancyEvaluator:
        """The evaluator of both sets of frames: workers score apart and are merged in any order."""
        if self.benchmark != other.benchmark:
            raise ValueError(f"OccupancyEvaluator: {self.benchmark.name} and {other.benchmark.name} cannot be added")
        total = OccupancyEvaluator(self.benchmark, self.matrix.counts.device)
        total.matrix = self.matrix + other.matrix
        total._classes = self._classes or other._classes
        return total

    def score(self) -> OccupancyScore:
        """Raises DataError when no frame was added."""
        if self._classes is None:
            raise DataError(f"{self.benchmark.name}: no frame was scored", "does the data set have occupancy truths?")
        return score_confusion(self.matrix, self.benchmark, self._classes)


def _check_grid(prediction: VoxelGrid, truth: VoxelGrid) -> None:
    """Raise DataError unless two grids have the same voxels, to a tenth of a voxel at every corner, in ego."""

    def corners(grid: VoxelGrid) -> Array:
        index = np.array(list(product(*((0, n) for n in grid.shape))), np.float64)  # (8, 3)
        return grid.ego_from_grid.apply(index * grid.voxel_size + grid.min_corner)

    if prediction.shape != truth.shape:
        raise DataError(
            f"prediction has {prediction.shape} voxels of {prediction.voxel_size} m, the truth {truth.shape} of "
            f"{truth.voxel_size} m",
            "predict on the truth's grid; labels are resampled by the network, never by the metric",
        )
    offset_m = float(np.linalg.norm(corners(prediction) - corners(truth), axis=1).max())
    if offset_m > min(truth.voxel_size) / 10:
        raise DataError(
            f"the prediction's grid is {offset_m:.3g} m away from the truth's at a corner (min {prediction.min_corner} "
            f"against {truth.min_corner}, voxels {prediction.voxel_size} against {truth.voxel_size})",
            "is it in the right frame? ego_from_grid: Occ3D and OmniHD are in ego, the others in the LiDAR's frame",
        )
