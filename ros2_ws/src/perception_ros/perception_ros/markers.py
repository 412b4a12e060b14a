"""Boxes as visualization_msgs/MarkerArray for RViz: edges, headings, velocity arrows, labels with scores.

The first marker deletes all earlier ones of the topic, so that no box outlives its frame; where the next frame fails to
come, the lifetime removes them. All edges are one LINE_LIST: a marker a box would cost as much as the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from perception.datasets.rosbag_file import Header
from perception.types import Array, Boxes3D
from perception.visualize import draw_boxes, draw_velocities, label_colors
from perception_ros.cdr import CdrWriter, block_of, put_header, put_time

LIFETIME_S = 1.0
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
    _put(out, _Look(_start(header, ""), _Type.ARROW, (0.0, 0.0, 0.0), 0), 0, _DELETE_ALL)
    if not len(boxes):
        return out.finish()
    edges = draw_boxes(boxes)
    color = np.repeat(_rgba(edges.color), 2, 0)  # a colour a vertex
    look = _Look(_start(header, "boxes"), _Type.LINE_LIST, (0.08, 0.0, 0.0), lifetime_ns)
    _put(out, look, 0, points=edges.ends.reshape(-1, 3), colors=color)
    # Of an arrow between two points: the shaft's diameter, the head's diameter and length.
    look = _Look(_start(header, "velocities"), _Type.ARROW, (0.12, 0.35, 0.5), lifetime_ns)
    for i, arrow in enumerate(arrows):
        _put(out, look, i, points=arrow)
    look = _Look(_start(header, "labels"), _Type.TEXT_VIEW_FACING, (0.0, 0.0, 0.7), lifetime_ns)
    tops = boxes.center + [0.0, 0.0, 1.0] * (boxes.size[:, 2:] / 2 + 0.5)
    rgba = _rgba(label_colors(boxes.classes, boxes.label))
    for i, (top, label, score) in enumerate(zip(tops.tolist(), boxes.label, boxes.score, strict=True)):
        _put(out, look, i, position=top, color=rgba[i].tolist(), text=f"{boxes.classes[label]} {score:.2f}")
    return out.finish()


class _Look(NamedTuple):
    """What the markers of one namespace share."""

    start: bytes
    kind: _Type
    scale: tuple[float, float, float]
    lifetime_ns: int


def _start(header: Header, namespace: str) -> bytes:
    """A marker's first fields."""

    def fill(out: CdrWriter) -> None:
        put_header(out, header)
        out.string(namespace)

    return block_of(fill)


def _put(
    out: CdrWriter,
    look: _Look,
    number: int,
    action: int = _ADD,
    *,
    position: Sequence[float] = (0.0, 0.0, 0.0),
    color: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    points: Array = _NO_POINTS,
    colors: Array = _NO_POINTS,
    text: str = "",
) -> None:
    """One visualization_msgs/Marker; the fields in the order of its definition."""
    out.block(look.start)
    out.numbers("i", number, look.kind, action)
    out.numbers("d", *position, *_NO_TURN, *look.scale)
    out.numbers("f", *color)
    put_time(out, look.lifetime_ns)
    out.numbers("?", False)  # frame_locked
    out.sequence(points)
    out.sequence(colors)
    out.block(_NO_TEXTURE)
    out.string(text)
    out.block(_NO_MESH)


def _fill_no_texture(out: CdrWriter) -> None:
    """texture_resource, texture (a CompressedImage), uv_coordinates."""
    out.string("")
    put_header(out, Header(0, ""))
    out.string("")
    out.numbers("I", 0, 0)


def _fill_no_mesh(out: CdrWriter) -> None:
    """mesh_resource, mesh_file (its name and data), mesh_use_embedded_materials."""
    out.string("")
    out.string("")
    out.numbers("I", 0)
    out.numbers("?", False)


_NO_TEXTURE, _NO_MESH = block_of(_fill_no_texture), block_of(_fill_no_mesh)


def _rgba(color: Array) -> Array:
    """(S, 3) uint8 -> (S, 4) float32 in [0, 1], opaque."""
    return np.concatenate([color / np.float32(255), np.ones((len(color), 1), np.float32)], 1).astype(np.float32)
