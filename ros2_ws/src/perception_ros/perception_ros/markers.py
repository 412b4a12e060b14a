"""Boxes as visualization_msgs/MarkerArray for RViz: edges, headings, velocity arrows, labels with scores.

The first marker deletes all earlier ones of the topic, so that no box outlives its frame; where the next frame fails to
come, the lifetime removes them. All edges are one LINE_LIST: a marker a box would cost as much as the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from perception.datasets.rosbag_file import Header
from perception.types import Array, Boxes3D
from perception.visualize import color_of, draw_boxes, draw_velocities
from perception_ros.cdr import CdrWriter, put_header, put_time

LIFETIME_S = 1.0
_WHITE = (1.0, 1.0, 1.0, 1.0)
_NO_TURN = (0.0, 0.0, 0.0, 1.0)
_NO_POINTS = np.zeros((0, 3))


class _Type(IntEnum):
    """visualization_msgs/Marker's constants."""

    ARROW = 0
    LINE_LIST = 5
    TEXT_VIEW_FACING = 9


_ADD, _DELETE_ALL = 0, 3


def markers(boxes: Boxes3D, header: Header, lifetime_s: float = LIFETIME_S) -> bytes:
    """MarkerArray of boxes in the header's frame: namespaces `boxes`, `velocities` and `labels`.

    Args:
        boxes: in the header's frame at its stamp.
        header: of every marker.
        lifetime_s: how long RViz shows them when nothing follows.
    """
    arrows = draw_velocities(boxes).ends  # (A, 2, 3)
    out = CdrWriter()
    out.numbers("I", 2 + len(arrows) + len(boxes) if len(boxes) else 1)
    lifetime_ns = round(lifetime_s * 1e9)
    _put(out, header, "", 0, 0, _DELETE_ALL)
    if not len(boxes):
        return out.finish()
    edges = draw_boxes(boxes)
    color = np.repeat(_rgba(edges.color), 2, 0)  # a colour a vertex
    ends = edges.ends.reshape(-1, 3)
    _put(out, header, "boxes", 0, _Type.LINE_LIST, scale=(0.08, 0, 0), points=ends, colors=color, life_ns=lifetime_ns)
    for i, arrow in enumerate(arrows):
        # Of an arrow between two points: the shaft's diameter, the head's diameter and length.
        _put(out, header, "velocities", i, _Type.ARROW, scale=(0.12, 0.35, 0.5), points=arrow, life_ns=lifetime_ns)
    tops = boxes.center + [0.0, 0.0, 1.0] * (boxes.size[:, 2:] / 2 + 0.5)
    for i, (top, label, score) in enumerate(zip(tops, boxes.label, boxes.score, strict=True)):
        name = boxes.classes[label]
        look = {"position": top, "scale": (0, 0, 0.7), "color": _rgba(np.array([color_of(name)]))[0]}
        _put(out, header, "labels", i, _Type.TEXT_VIEW_FACING, text=f"{name} {score:.2f}", life_ns=lifetime_ns, **look)
    return out.finish()


def _put(
    out: CdrWriter,
    header: Header,
    namespace: str,
    number: int,
    kind: int,
    action: int = _ADD,
    *,
    position: Sequence[float] | Array = (0.0, 0.0, 0.0),
    scale: tuple[float, float, float] = (0.0, 0.0, 0.0),
    color: Sequence[float] | Array = _WHITE,
    life_ns: int = 0,
    points: Array = _NO_POINTS,
    colors: Array = _NO_POINTS,
    text: str = "",
) -> None:
    """One visualization_msgs/Marker; the fields in the order of its definition."""
    put_header(out, header)
    out.string(namespace)
    out.numbers("i", number, kind, action)
    out.numbers("d", *position, *_NO_TURN, *scale)
    out.numbers("f", *color)
    put_time(out, life_ns)
    out.numbers("?", False)  # frame_locked
    out.sequence(points)
    out.sequence(colors)
    out.string("")  # texture_resource
    put_header(out, Header(0, ""))  # texture: an empty CompressedImage
    out.string("")
    out.numbers("I", 0)
    out.numbers("I", 0)  # uv_coordinates
    out.string(text)
    out.string("")  # mesh_resource
    out.string("")  # mesh_file
    out.numbers("I", 0)
    out.numbers("?", False)  # mesh_use_embedded_materials


def _rgba(color: Array) -> Array:
    """(S, 3) uint8 -> (S, 4) float32 in [0, 1], opaque."""
    return np.concatenate([color / np.float32(255), np.ones((len(color), 1), np.float32)], 1).astype(np.float32)
