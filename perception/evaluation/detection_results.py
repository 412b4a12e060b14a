"""The results file of the nuScenes detection task: written from predictions, read back, checked before it is scored.

One JSON object (nuscenes.org/object-detection, "Results format"): `meta` says which modalities were used, `results`
maps every sample token of the split to its boxes, [] where there are none. A box stands in the **global** frame:
`translation` (x, y, z), `size` (width, length, height), `rotation` (w, x, y, z), `velocity` (vx, vy), with
`detection_name`, `detection_score`, `attribute_name` and its `sample_token`. At most 500 boxes a sample.

The format knows no unknown velocity and every class but barrier and traffic cone has an attribute, so both are filled:

* a velocity that is not known is written as (0, 0), and scored as such;
* an attribute that was not predicted follows from class and speed, see `likely_attribute`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from perception.datasets.nuscenes_layout import ATTRIBUTES, DETECTION_CLASSES
from perception.errors import DataError
from perception.geometry import transform_boxes
from perception.types import Boxes3D, Needs, Pose

MAX_BOXES = 500
"""Boxes a sample; the official evaluation refuses more."""

MOVING_MPS = 0.2
"""From this speed on an object counts as moving."""

# Class: attribute when moving, when still, when the speed is not known (the most frequent one in the data set).
_LIKELY = {
    "car": ("vehicle.moving", "vehicle.parked", "vehicle.parked"),
    "truck": ("vehicle.moving", "vehicle.parked", "vehicle.parked"),
    "construction_vehicle": ("vehicle.moving", "vehicle.parked", "vehicle.parked"),
    "bus": ("vehicle.moving", "vehicle.stopped", "vehicle.moving"),
    "trailer": ("vehicle.moving", "vehicle.parked", "vehicle.parked"),
    "motorcycle": ("cycle.with_rider", "cycle.without_rider", "cycle.without_rider"),
    "bicycle": ("cycle.with_rider", "cycle.without_rider", "cycle.without_rider"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing", "pedestrian.moving"),
    "barrier": ("", "", ""),
    "traffic_cone": ("", "", ""),
}


def likely_attribute(label: str, speed_mps: float) -> str:
    """The attribute of a nuScenes class at a speed (NaN: not known) when none was predicted; "" for classes without."""
    moving, still, unknown = _LIKELY[label]
    if math.isnan(speed_mps):
        return unknown
    return moving if speed_mps >= MOVING_MPS else still


@dataclass(frozen=True, slots=True)
class Modalities:
    """What a method used, as the benchmark asks."""

    camera: bool
    lidar: bool
    radar: bool
    map: bool = False
    external: bool = False

    @staticmethod
    def of(needs: Needs) -> Modalities:
        """From what a predictor reads of a sample."""
        return Modalities(bool(needs.cameras), needs.lidar is not None, needs.radar is not None)


def write_results(path: Path, predictions: Iterable[tuple[str, Boxes3D, Pose]], modalities: Modalities) -> int:
    """Write a results file, sample by sample as they come, whole or not at all.

    Args:
        path: the JSON file.
        predictions: (sample token, boxes in ego, map_from_ego at the sample's stamp) for EVERY sample of the split, no
            box included. Of more than MAX_BOXES boxes those of the best scores are kept, the first of equals.
        modalities: what the method used.

    Returns:
        How many boxes were dropped for MAX_BOXES, over all samples.

    Raises:
        DataError: a token twice, a box whose class the benchmark does not have, or an unknown attribute.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    written: set[str] = set()
    dropped = 0
    try:
        with part.open("w", encoding="utf-8") as stream:
            meta = {f"use_{name}": used for name, used in asdict(modalities).items()}
            stream.write(f'{{"meta": {json.dumps(meta)},\n"results": {{')
            for token, boxes, map_from_ego in predictions:
                if token in written:
                    raise DataError(f"{path}: sample {token} was predicted twice", "give every sample once")
                best = np.sort(np.argsort(-boxes.score, kind="stable")[:MAX_BOXES])
                dropped += len(boxes) - len(best)
                records = _records(token, boxes.select(best), map_from_ego)
                stream.write(f"{',' if written else ''}\n{json.dumps(token)}: {json.dumps(records, allow_nan=False)}")
                written.add(token)
            stream.write("\n}}\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return dropped


def _records(token: str, boxes: Boxes3D, map_from_ego: Pose) -> list[dict[str, Any]]:
    """The boxes of one sample as the format has them, in the global frame."""
    if not len(boxes):
        return []
    labels = [boxes.classes[label] for label in boxes.label]
    for m, label in enumerate(labels):
        if label not in DETECTION_CLASSES:
            raise DataError(
                f"sample {token}: box {m} is a {label!r}, which the nuScenes detection task does not have",
                f"map the classes first; known: {', '.join(DETECTION_CLASSES)}",
            )
    yaw = Rotation.from_rotvec(boxes.yaw[:, None] * [0.0, 0.0, 1.0])
    xyzw = (Rotation.from_matrix(map_from_ego.rotation) * yaw).as_quat()  # (M, 4)
    velocity = np.concatenate([boxes.velocity, np.zeros((len(boxes), 1))], 1) @ map_from_ego.rotation.T  # (M, 3)
    columns = zip(
        map_from_ego.apply(boxes.center).tolist(),
        boxes.size[:, [1, 0, 2]].tolist(),
        np.roll(xyzw, 1, axis=1).tolist(),
        np.nan_to_num(velocity[:, :2]).tolist(),
        labels,
        boxes.score.tolist(),
        _attributes(token, labels, boxes),
        strict=True,
    )
    return [
        {
            "sample_token": token,
            "translation": translation,
            "size": size,
            "rotation": rotation,
            "velocity": speed,
            "detection_name": label,
            "detection_score": score,
            "attribute_name": attribute,
        }
        for translation, size, rotation, speed, label, score, attribute in columns
    ]


def _attributes(token: str, labels: list[str], boxes: Boxes3D) -> list[str]:
    if boxes.attribute is None:
        speed_mps = np.hypot(boxes.velocity[:, 0], boxes.velocity[:, 1])
        return [likely_attribute(label, speed) for label, speed in zip(labels, speed_mps, strict=True)]
    for m, attribute in enumerate(boxes.attribute):
        if attribute and attribute not in ATTRIBUTES:
            raise DataError(
                f"sample {token}: box {m} ({labels[m]}) has the attribute {str(attribute)!r}",
                f"known: {', '.join(ATTRIBUTES)}; or leave Boxes3D.attribute None",
            )
    return [str(attribute) for attribute in boxes.attribute]


@dataclass(frozen=True, slots=True, eq=False)
class DetectionResults:
    """A results file that has passed every check.

    Attributes:
        path: where it was read.
        modalities: what the method used.
        records: sample token -> its boxes, as the format has them (global frame).
    """

    path: Path
    modalities: Modalities
    records: Mapping[str, list[dict[str, Any]]]

    def boxes(self, token: str, map_from_ego: Pose, stamp_ns: int) -> Boxes3D:
        """The boxes of a sample in ego. What the format does not have (track, points, visibility) is None."""
        records = self.records[token]
        if not records:
            return Boxes3D.empty(DETECTION_CLASSES, stamp_ns)
        wxyz = np.array([r["rotation"] for r in records], np.float64)  # (M, 4)
        heading = Rotation.from_quat(np.roll(wxyz, -1, 1)).as_matrix()[:, :, 0]  # (M, 3)
        in_map = Boxes3D(
            np.array([r["translation"] for r in records], np.float64),
            np.array([r["size"] for r in records], np.float64)[:, [1, 0, 2]],
            np.arctan2(heading[:, 1], heading[:, 0]),
            np.array([r["velocity"] for r in records], np.float64),
            np.array([r["detection_score"] for r in records], np.float64),
            np.array([DETECTION_CLASSES.index(r["detection_name"]) for r in records], np.int64),
            DETECTION_CLASSES,
            stamp_ns,
            np.array([r["attribute_name"] for r in records], np.str_),
        )
        return transform_boxes(map_from_ego.inverse(), in_map)


_RULES = (
    f"the format: nuscenes.org/object-detection, 'Results format'; classes: {', '.join(DETECTION_CLASSES)}; "
    f"attributes: {', '.join(ATTRIBUTES)} or none"
)


def read_results(path: Path) -> DetectionResults:
    """Read a results file of any method.

    A velocity may be NaN (not known): the official evaluation leaves such a box out of the velocity error.

    Raises:
        DataError: the file is missing or no JSON; `meta` or `results` lacks; a sample has more than MAX_BOXES boxes; or
            a box lacks a key, has a value of the wrong length, NaN or infinite, or names no class or attribute.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "give the results file of a detector") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}", "is it truncated, or still compressed?") from error
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("results"), dict)
        or not isinstance(data.get("meta"), dict)
    ):
        found = ", ".join(data) if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{path}: expected the keys meta and results, each an object; found {found[:200]}", _RULES)
    for token, records in data["results"].items():
        _check_records(f"{path}: sample {token}", token, records)
    used = {name: bool(data["meta"].get(f"use_{name}", False)) for name in Modalities.__dataclass_fields__}
    return DetectionResults(path, Modalities(**used), data["results"])


def _check_records(where: str, token: str, records: Any) -> None:
    """Raise DataError unless the boxes of one sample can be scored; the first bad one is named."""
    if not isinstance(records, list):
        raise DataError(f"{where}: expected a list of boxes, got {type(records).__name__}", _RULES)
    if len(records) > MAX_BOXES:
        raise DataError(
            f"{where}: {len(records)} boxes; the benchmark allows {MAX_BOXES}",
            "keep the boxes of the best scores (write_results does)",
        )
    for m, record in enumerate(records):
        if problem := _problem(token, record):
            name = record.get("detection_name", "") if isinstance(record, dict) else ""
            raise DataError(f"{where}: box {m} ({name or 'no class'}): {problem}", _RULES)


_LENGTHS = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}


def _problem(token: str, record: Any) -> str | None:
    """What keeps a box from being scored, or None."""
    if not isinstance(record, dict):
        return f"expected an object, got {type(record).__name__}"
    needed = ("sample_token", *_LENGTHS, "detection_name", "detection_score", "attribute_name")
    if absent := [key for key in needed if key not in record]:
        return f"lacks {', '.join(absent)}"
    if record["sample_token"] != token:
        return f"its sample_token is {record['sample_token']!r}"
    for key, length in _LENGTHS.items():
        values = record[key]
        if not isinstance(values, list) or len(values) != length or not all(map(_is_number, values)):
            return f"{key}: expected {length} numbers, got {values!r}"
        if not all(map(math.isfinite, values)) and not (key == "velocity" and all(map(math.isnan, values))):
            return f"{key}: {values} is not finite"
    score = record["detection_score"]
    if not _is_number(score) or not math.isfinite(score):
        return f"detection_score: expected a finite number, got {score!r}"
    if not 0 <= score <= 1:
        return f"detection_score: {score} is outside 0 to 1"
    if min(record["size"]) <= 0:
        return f"size: {record['size']} is not positive"
    if math.hypot(*record["rotation"]) < 1e-6:
        return f"rotation: {record['rotation']} is no rotation"
    if record["detection_name"] not in DETECTION_CLASSES:
        return f"detection_name: {record['detection_name']!r}"
    if record["attribute_name"] not in ("", *ATTRIBUTES):
        return f"attribute_name: {record['attribute_name']!r}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
