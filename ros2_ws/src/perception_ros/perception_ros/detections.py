"""Boxes as messages: our Detections3D, vision_msgs/Detection3DArray, autoware_perception_msgs/DetectedObjects.

| | Detections3D | Detection3DArray | DetectedObjects |
|---|---|---|---|
| velocity | along the header's axes | none | along the box's axes |
| orientation | heading | heading | heading |
| label | index and names | name | Autoware's numbers, UNKNOWN for what they do not have |

Where the boxes say nothing of a covariance, ours is empty and the others' are zero, which is ROS' word for unknown.
"""

from __future__ import annotations

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

_NO_COVARIANCE = np.zeros((6, 6))
_ORIENTATION_AVAILABLE, _BOUNDING_BOX = 2, 0  # of DetectedObjectKinematics and Shape


def detections(boxes: Boxes3D, header: Header) -> bytes:
    """perception_msgs/Detections3D of boxes in the header's frame."""
    out = begin(header)
    put_strings(out, boxes.classes)
    out.numbers("I", len(boxes))
    tracks = boxes.track_id if boxes.track_id is not None else np.full(len(boxes), "")
    velocity = np.concatenate([boxes.velocity, np.where(np.isnan(boxes.velocity[:, :1]), np.nan, 0.0)], 1)
    numbers = np.concatenate([_poses(boxes), boxes.size, velocity], 1)  # (M, 13)
    for track, label, score, row in zip(tracks, boxes.label, boxes.score, numbers, strict=True):
        out.string(str(track))
        out.numbers("B", label)
        out.numbers("f", score)
        out.numbers("I", 0)  # class_scores
        out.numbers("d", *row)
        out.numbers("I", 0, 0)  # pose_covariance, velocity_covariance
    return out.finish()


def vision_detections(boxes: Boxes3D, header: Header) -> bytes:
    """vision_msgs/Detection3DArray (Humble and later): one hypothesis a box, its pose that of the box."""
    out = begin(header)
    same_header = block_of(lambda part: put_header(part, header))
    out.numbers("I", len(boxes))
    tracks = boxes.track_id if boxes.track_id is not None else np.full(len(boxes), "")
    for track, label, score, pose, size in zip(
        tracks, boxes.label, boxes.score, _poses(boxes), boxes.size, strict=True
    ):
        out.block(same_header)
        out.numbers("I", 1)  # results
        out.string(boxes.classes[label])
        out.numbers("d", score, *pose)
        out.array(_NO_COVARIANCE)
        out.numbers("d", *pose, *size)  # bbox
        out.string(str(track))
    return out.finish()


def autoware_objects(boxes: Boxes3D, header: Header) -> bytes:
    """autoware_perception_msgs/DetectedObjects: the twist is in the object's frame, x along its heading."""
    out = begin(header)
    out.numbers("I", len(boxes))
    c, s = np.cos(boxes.yaw), np.sin(boxes.yaw)
    vx, vy = boxes.velocity.T
    twist = np.stack([c * vx + s * vy, c * vy - s * vx], 1)  # (M, 2)
    has_twist = np.isfinite(twist).all(1)
    for i, pose in enumerate(_poses(boxes)):
        out.numbers("f", boxes.score[i])
        out.numbers("I", 1)  # classification
        out.numbers("B", AUTOWARE_LABELS.get(boxes.classes[boxes.label[i]], 0))
        out.numbers("f", boxes.score[i])
        out.numbers("d", *pose)
        out.array(_NO_COVARIANCE)
        out.numbers("?", False)  # has_position_covariance
        out.numbers("B", _ORIENTATION_AVAILABLE)
        out.numbers("d", *(twist[i] if has_twist[i] else (0.0, 0.0)), 0.0, 0.0, 0.0, 0.0)
        out.array(_NO_COVARIANCE)
        out.numbers("?", has_twist[i], False)  # has_twist, has_twist_covariance
        out.numbers("B", _BOUNDING_BOX)
        out.numbers("I", 0)  # footprint
        out.numbers("d", *boxes.size[i])
    return out.finish()


def put_strings(out: CdrWriter, names: tuple[str, ...]) -> None:
    """A sequence of strings."""
    out.numbers("I", len(names))
    for name in names:
        out.string(name)


def _poses(boxes: Boxes3D) -> Array:
    """(M, 7) centres and quaternions (x, y, z, w)."""
    zero = np.zeros(len(boxes))
    turn = np.stack([zero, zero, np.sin(boxes.yaw / 2), np.cos(boxes.yaw / 2)], 1)
    return np.concatenate([boxes.center, turn], 1)
