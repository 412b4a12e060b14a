"""Boxes as messages: our Detections3D, vision_msgs/Detection3DArray, autoware_perception_msgs/DetectedObjects.

| | Detections3D | Detection3DArray | DetectedObjects |
|---|---|---|---|
| velocity | along the header's axes | none | along the box's axes |
| orientation | heading | heading | heading |
| label | index and names | name | Autoware's numbers, UNKNOWN for what they do not have |

Where the boxes say nothing of a covariance, ours is empty and the others' are zero, which is ROS' word for unknown.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from perception.datasets.rosbag_file import Header
from perception.types import Array, Boxes3D
from perception_ros.cdr import CdrWriter, begin, block_of, put_header

AUTOWARE_LABELS = {
    "car": 1,
    "truck": 2,
    "construction_vehicle": 2,
    "large_vehicle": 2,
    "bus": 3,
    "trailer": 4,
    "motorcycle": 5,
    "bicycle": 6,
    "cycle": 6,
    "rider": 6,
    "pedestrian": 7,
    "person": 7,
}
"""Class name -> autoware_perception_msgs/ObjectClassification; any other name is its UNKNOWN, 0."""

_NO_COVARIANCE = (0.0,) * 36
_ORIENTATION_AVAILABLE, _BOUNDING_BOX = 2, 0  # of DetectedObjectKinematics and Shape

_DETECTION = "BfI13d2I"
"""Of perception_msgs/Detection3D what follows track_id."""
_VISION = "d43d10d"
"""Of vision_msgs/Detection3D what follows class_id: score, pose with covariance, bbox."""
_AUTOWARE_POSE = "fIBf43d?B"
"""Of DetectedObject: probability, one classification, pose with covariance, which of it is there."""
_AUTOWARE_TWIST = "42d2?"
_AUTOWARE_SHAPE = "BI3d"
"""Type, an empty footprint, dimensions."""


def detections(boxes: Boxes3D, header: Header) -> bytes:
    """perception_msgs/Detections3D of boxes in the header's frame."""
    out = begin(header)
    put_strings(out, boxes.classes)
    out.numbers("I", len(boxes))
    velocity = np.concatenate([boxes.velocity, np.where(np.isnan(boxes.velocity[:, :1]), np.nan, 0.0)], 1)
    numbers = np.concatenate([_poses(boxes), boxes.size, velocity], 1)  # (M, 13)
    for track, label, score, row in _rows(boxes, numbers):
        out.string(track)
        # class_scores, pose_covariance and velocity_covariance are empty.
        out.record(_DETECTION, label, score, 0, *row, 0, 0)
    return out.finish()


def vision_detections(boxes: Boxes3D, header: Header) -> bytes:
    """vision_msgs/Detection3DArray (Humble and later): one hypothesis a box, its pose that of the box."""
    out = begin(header)
    same_header = block_of(lambda part: put_header(part, header))
    out.numbers("I", len(boxes))
    for track, label, score, row in _rows(boxes, np.concatenate([_poses(boxes), boxes.size], 1)):
        out.block(same_header)
        out.numbers("I", 1)  # results
        out.string(boxes.classes[label])
        out.record(_VISION, score, *row[:7], *_NO_COVARIANCE, *row)
        out.string(track)
    return out.finish()


def autoware_objects(boxes: Boxes3D, header: Header) -> bytes:
    """autoware_perception_msgs/DetectedObjects: the twist is in the object's frame, x along its heading."""
    out = begin(header)
    out.numbers("I", len(boxes))
    c, s = np.cos(boxes.yaw), np.sin(boxes.yaw)
    vx, vy = boxes.velocity.T
    twist = np.stack([c * vx + s * vy, c * vy - s * vx], 1)  # (M, 2)
    known = np.isfinite(twist).all(1)
    numbers = np.concatenate([_poses(boxes), np.where(known[:, None], twist, 0.0), boxes.size], 1)  # (M, 12)
    for has_twist, (_, label, score, row) in zip(known.tolist(), _rows(boxes, numbers), strict=True):
        classification = 1, AUTOWARE_LABELS.get(boxes.classes[label], 0), score
        out.record(_AUTOWARE_POSE, score, *classification, *row[:7], *_NO_COVARIANCE, False, _ORIENTATION_AVAILABLE)
        out.record(_AUTOWARE_TWIST, *row[7:9], 0, 0, 0, 0, *_NO_COVARIANCE, has_twist, False)
        out.record(_AUTOWARE_SHAPE, _BOUNDING_BOX, 0, *row[9:])
    return out.finish()


def put_strings(out: CdrWriter, names: tuple[str, ...]) -> None:
    """A sequence of strings."""
    out.numbers("I", len(names))
    for name in names:
        out.string(name)


def _rows(boxes: Boxes3D, numbers: Array) -> Iterator[tuple[str, int, float, list[float]]]:
    """Track, label, score and a row of numbers of each box, as Python has them: struct packs these fastest."""
    tracks = [""] * len(boxes) if boxes.track_id is None else boxes.track_id.tolist()
    return zip(tracks, boxes.label.tolist(), boxes.score.tolist(), numbers.tolist(), strict=True)


def _poses(boxes: Boxes3D) -> Array:
    """(M, 7) centres and quaternions (x, y, z, w)."""
    zero = np.zeros(len(boxes))
    turn = np.stack([zero, zero, np.sin(boxes.yaw / 2), np.cos(boxes.yaw / 2)], 1)
    return np.concatenate([boxes.center, turn], 1)
