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
from perception.visualize import draw_boxes, draw_velocities, label_colors
from perception_ros.cdr import CdrWriter, block_of, put_header

LIFETIME_S = 1.0
_NO_TURN = (0.0, 0.0, 0.0, 1.0)
_WHITE = (1.0, 1.0, 1.0, 1.0)
_NOWHERE = (0.0, 0.0, 0.0)
_NO_POINTS = np.zeros((0, 3))
_BODY = "3i10d4fiI?"
"""Of a Marker what follows its namespace: id, type, action; pose, scale; colour; lifetime, frame_locked."""


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
    arrows = draw_velocities(boxes).ends.astype(np.float64)  # (A, 2, 3)
    out = CdrWriter()
    out.numbers("I", 2 + len(arrows) + len(boxes) if len(boxes) else 1)
    lifetime = divmod(round(lifetime_s * 1e9), 1_000_000_000)
    _put(out, _start(header, ""), _body(0, _Type.ARROW, _NOWHERE, (0, 0), action=_DELETE_ALL))
    if not len(boxes):
        return out.finish()
    edges = draw_boxes(boxes)
    color = np.repeat(_rgba(edges.color), 2, 0)  # a colour a vertex
    body = _body(0, _Type.LINE_LIST, (0.08, 0.0, 0.0), lifetime)
    _put(out, _start(header, "boxes"), body, edges.ends.reshape(-1, 3), color)
    _put_arrows(out, _start(header, "velocities"), arrows, lifetime)
    _put_labels(out, _start(header, "labels"), boxes, lifetime)
    return out.finish()


def _start(header: Header, namespace: str) -> bytes:
    """A marker's first fields."""

    def fill(out: CdrWriter) -> None:
        put_header(out, header)
        out.string(namespace)

    return block_of(fill)


def _body(
    number: int,
    kind: _Type,
    scale: Sequence[float],
    lifetime: Sequence[int],
    *,
    position: Sequence[float] = _NOWHERE,
    color: Sequence[float] = _WHITE,
    action: int = _ADD,
) -> tuple[float, ...]:
    """Values of `_BODY`; `lifetime` in seconds and nanoseconds."""
    return number, kind, action, *position, *_NO_TURN, *scale, *color, *lifetime, False


def _put(
    out: CdrWriter, start: bytes, body: Sequence[float], points: Array = _NO_POINTS, colors: Array = _NO_POINTS
) -> None:
    """One visualization_msgs/Marker; the fields in the order of its definition."""
    out.block(start)
    out.record(_BODY, *body)
    out.sequence(points)
    out.sequence(colors)
    out.block(_NO_TEXTURE_TEXT_MESH)


def _put_arrows(out: CdrWriter, start: bytes, arrows: Array, lifetime: Sequence[int]) -> None:
    """A marker for each of (A, 2, 3) lines: there are many, and each is one record."""
    kinds = f"{len(start)}s{_BODY}I6dI{len(_NO_TEXTURE_TEXT_MESH)}s"
    # Of an arrow between two points: the shaft's diameter, the head's diameter and length.
    scale = (0.12, 0.35, 0.5)
    for i, ends in enumerate(arrows.reshape(-1, 6).tolist()):
        body = _body(i, _Type.ARROW, scale, lifetime)
        out.record(kinds, start, *body, 2, *ends, 0, _NO_TEXTURE_TEXT_MESH)


def _put_labels(out: CdrWriter, start: bytes, boxes: Boxes3D, lifetime: Sequence[int]) -> None:
    """A marker above each box, with the name of its class and its score."""
    kinds = f"{len(start)}s{_BODY}2I{len(_NO_TEXTURE)}s"
    tops = boxes.center + [0.0, 0.0, 1.0] * (boxes.size[:, 2:] / 2 + 0.5)
    colors = _rgba(label_colors(boxes.classes, boxes.label))
    rows = zip(tops.tolist(), colors.tolist(), boxes.label.tolist(), boxes.score.tolist(), strict=True)
    for i, (top, color, label, score) in enumerate(rows):
        body = _body(i, _Type.TEXT_VIEW_FACING, (0.0, 0.0, 0.7), lifetime, position=top, color=color)
        out.record(kinds, start, *body, 0, 0, _NO_TEXTURE)
        out.string(f"{boxes.classes[label]} {score:.2f}")
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


def _fill_none(out: CdrWriter) -> None:
    """All that follows a marker's points and colours, where there is no text either."""
    _fill_no_texture(out)
    out.string("")
    _fill_no_mesh(out)


_NO_TEXTURE, _NO_MESH, _NO_TEXTURE_TEXT_MESH = map(block_of, (_fill_no_texture, _fill_no_mesh, _fill_none))


def _rgba(color: Array) -> Array:
    """(S, 3) uint8 -> (S, 4) float32 in [0, 1], opaque."""
    return np.concatenate([color / np.float32(255), np.ones((len(color), 1), np.float32)], 1).astype(np.float32)
