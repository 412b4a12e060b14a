"""SemanticKITTI's label ids (Behley et al., ICCV 2019; semantic-kitti.yaml of the official API).

Files hold **raw** ids (0 to 259, moving things apart from standing ones). Benchmarks score 20 **learning** labels: 19
classes and 0, which is `unlabeled` for a point and `free` for a voxel. Ids 1 (outlier), 52 (other-structure) and 99
(other-object) are scored by nobody: unlabeled for a point, IGNORE_LABEL for a voxel.

`labels/NNNNNN.label`: uint32 a point, the raw id in the low 16 bits, the instance in the high 16.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perception.datasets.kitti_odometry import read_values
from perception.errors import DataError
from perception.types import IGNORE_LABEL, Array, Segmentation

SPLITS = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "val": ("08",),
    "test": ("11", "12", "13", "14", "15", "16", "17", "18", "19", "20", "21"),
}
"""The sequences of each official split."""

SCORED_CLASSES = (
    "car",
    "bicycle",
    "motorcycle",
    "truck",
    "other-vehicle",
    "person",
    "bicyclist",
    "motorcyclist",
    "road",
    "parking",
    "sidewalk",
    "other-ground",
    "building",
    "fence",
    "vegetation",
    "trunk",
    "terrain",
    "pole",
    "traffic-sign",
)
"""Learning labels 1 to 19 under their official names, which result files repeat."""

POINT_CLASSES = ("unlabeled", *SCORED_CLASSES)

_RAW_IDS = (
    (0, 1, 52, 99),
    (10, 252),
    (11,),
    (15,),
    (18, 258),
    (20, 13, 16, 256, 257, 259),
    (30, 254),
    (31, 253),
    (32, 255),
    (40, 60),
    (44,),
    (48,),
    (49,),
    (50,),
    (51,),
    (70,),
    (71,),
    (72,),
    (80,),
    (81,),
)

LEARNING_FROM_RAW = {raw: label for label, ids in enumerate(_RAW_IDS) for raw in ids}
"""`learning_map` of semantic-kitti.yaml."""

RAW_FROM_LEARNING = tuple(ids[0] for ids in _RAW_IDS)
"""`learning_map_inv` of semantic-kitti.yaml: what a submission holds for each learning label."""

_UNKNOWN = -1
_LUT = np.full(1 << 16, _UNKNOWN, np.int16)
_LUT[list(LEARNING_FROM_RAW)] = list(LEARNING_FROM_RAW.values())
_SOURCE = "the SemanticKITTI download"


def point_labels(raw: Array, where: str) -> Array:
    """Raw ids (uint16, any shape) -> learning labels uint8, 0 unlabeled. Raises DataError for an id never defined."""
    label = _LUT[raw]
    if (label == _UNKNOWN).any():
        unknown = np.unique(raw[label == _UNKNOWN])
        raise DataError(
            f"{where}: label ids {unknown[:5].tolist()} are none of SemanticKITTI's raw ids",
            "files hold raw ids (car is 10), not learning labels (car is 1); is it another data set's?",
        )
    return label.astype(np.uint8)


def voxel_labels(raw: Array, where: str) -> Array:
    """Raw ids (uint16, any shape) -> learning labels uint8: raw 0 is free, ids nobody scores are IGNORE_LABEL."""
    label = point_labels(raw, where)
    label[(label == 0) & (raw != 0)] = IGNORE_LABEL
    return label


def raw_labels(label: Array) -> Array:
    """Learning labels uint8 (any shape) -> raw ids uint16. Raises ValueError for IGNORE_LABEL and other strangers."""
    if label.size and label.max() >= len(RAW_FROM_LEARNING):
        raise ValueError(f"SemanticKITTI: label {int(label.max())} has no raw id; learning labels are 0 to 19")
    return np.array(RAW_FROM_LEARNING, np.uint16)[label]


def read_point_labels(path: Path, count: int) -> Segmentation:
    """The labels and instances of a scan of `count` points. Raises DataError where they are not as many."""
    values = read_values(path, "<u4", _SOURCE)
    if len(values) != count:
        raise DataError(
            f"{path}: {len(values)} labels for a scan of {count} points",
            f"scan and labels are of different frames or damaged; copy both again from {_SOURCE}",
        )
    label = point_labels((values & 0xFFFF).astype(np.uint16), str(path))
    return Segmentation(label, POINT_CLASSES, (values >> 16).astype(np.uint16))


def write_point_labels(path: Path, labels: Segmentation) -> None:
    """Write the labels of a scan; no instance is instance 0."""
    if labels.classes != POINT_CLASSES:
        raise ValueError(f"SemanticKITTI: expected the classes {POINT_CLASSES}, got {labels.classes}")
    values = raw_labels(labels.label).astype("<u4")
    if labels.instance is not None:
        values |= labels.instance.astype("<u4") << 16
    path.parent.mkdir(parents=True, exist_ok=True)
    values.tofile(path)
