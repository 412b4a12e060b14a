"""Poses, boxes, projection and overlaps. numpy and float64 throughout; frames are named where a function takes them."""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.transform import Rotation

from perception.types import Array, Boxes3D, CameraImage, Pose, VoxelGrid

# Corner c of a box, in units of (length, width, height); see the picture in perception.types.
_CORNERS = (
    np.array([[1, 1, -1], [-1, 1, -1], [-1, -1, -1], [1, -1, -1], [1, 1, 1], [-1, 1, 1], [-1, -1, 1], [1, -1, 1]]) / 2.0
)

BOX_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
"""The twelve edges as pairs of corners; the front face is corners 0, 3, 7, 4."""


def wrap_angle(angle_rad: Array | float) -> Array:
    """Angles to (-pi, pi]."""
    return -((-np.asarray(angle_rad, np.float64) + np.pi) % (2 * np.pi) - np.pi)


def slerp(before: Array, after: Array, fraction: Array) -> Array:
    """Rotations (T, 3, 3) at fractions (T,) between unit quaternions (T, 4), the shorter way round (Shoemake 1985).

    scipy's Slerp would cost a millisecond a call, whatever T.
    """
    after = np.where((before * after).sum(1, keepdims=True) < 0, -after, after)
    # The angle between the two from their chords: arccos would lose half its digits near 1.
    angle = 2 * np.arctan2(np.linalg.norm(after - before, axis=1), np.linalg.norm(after + before, axis=1))
    near = angle < 1e-9  # there sin x is x
    denominator = np.where(near, 1.0, np.sin(angle))
    weight_before = np.where(near, 1 - fraction, np.sin((1 - fraction) * angle) / denominator)
    weight_after = np.where(near, fraction, np.sin(fraction * angle) / denominator)
    return Rotation.from_quat(weight_before[:, None] * before + weight_after[:, None] * after).as_matrix()


def slerp_once(before: Array, after: Array, fraction: float) -> Array:
    """`slerp` of one rotation (3, 3) between quaternions (4,), in plain floats: numpy takes ten times as long."""
    b, a = before.tolist(), after.tolist()
    if sum(p * q for p, q in zip(b, a, strict=True)) < 0:
        a = [-q for q in a]
    angle = 2 * math.atan2(math.dist(a, b), math.hypot(*(p + q for p, q in zip(b, a, strict=True))))
    weight_before, weight_after = 1 - fraction, fraction
    if angle >= 1e-9:
        weight_before = math.sin((1 - fraction) * angle) / math.sin(angle)
        weight_after = math.sin(fraction * angle) / math.sin(angle)
    mixed = [weight_before * p + weight_after * q for p, q in zip(b, a, strict=True)]
    norm = math.hypot(*mixed)
    x, y, z, w = (part / norm for part in mixed)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def interpolate_pose(before: Pose, after: Pose, fraction: float) -> Pose:
    """The pose at `fraction` in [0, 1] between two: linear in translation, spherical-linear in rotation."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"interpolate_pose: fraction {fraction} is outside [0, 1]; poses are never extrapolated")
    rotation = slerp_once(before.quaternion, after.quaternion, fraction)
    return Pose(rotation, (1 - fraction) * before.translation + fraction * after.translation)


def box_corners(boxes: Boxes3D) -> Array:
    """(M, 8, 3) corners in the boxes' frame; order as in the picture of `perception.types`."""
    local = _CORNERS[None] * boxes.size[:, None]  # (M, 8, 3)
    c, s = np.cos(boxes.yaw)[:, None], np.sin(boxes.yaw)[:, None]
    x = c * local[..., 0] - s * local[..., 1]
    y = s * local[..., 0] + c * local[..., 1]
    return np.stack([x, y, local[..., 2]], -1) + boxes.center[:, None]


def transform_boxes(dst_from_src: Pose, boxes: Boxes3D) -> Boxes3D:
    """Boxes of the source frame in the destination frame.

    Yaw is that of the turned heading projected on the destination's xy plane: a box stays upright, the roll and pitch
    between the frames are dropped.
    """
    heading = np.stack([np.cos(boxes.yaw), np.sin(boxes.yaw), np.zeros(len(boxes))], -1) @ dst_from_src.rotation.T
    velocity = np.concatenate([boxes.velocity, np.zeros((len(boxes), 1))], 1) @ dst_from_src.rotation.T
    return Boxes3D(
        dst_from_src.apply(boxes.center),
        boxes.size,
        np.arctan2(heading[:, 1], heading[:, 0]),
        velocity[:, :2],
        boxes.score,
        boxes.label,
        boxes.classes,
        boxes.stamp_ns,
        boxes.attribute,
        boxes.track_id,
        boxes.num_points,
        boxes.num_radar_points,
        boxes.visibility,
    )


def points_in_boxes(xyz: Array, boxes: Boxes3D) -> Array:
    """(M, N) bool: which of the points (N, 3), in the boxes' frame, lie in which box, faces included."""
    inside = np.zeros((len(boxes), len(xyz)), bool)
    for m in range(len(boxes)):  # a box at a time keeps memory at N, not M * N
        offset = xyz - boxes.center[m]
        c, s = np.cos(boxes.yaw[m]), np.sin(boxes.yaw[m])
        local = np.stack([c * offset[:, 0] + s * offset[:, 1], c * offset[:, 1] - s * offset[:, 0], offset[:, 2]], -1)
        inside[m] = (np.abs(local) <= boxes.size[m] / 2).all(1)
    return inside


def project(xyz_camera: Array, intrinsic: Array) -> tuple[Array, Array]:
    """Points (..., 3) in the camera's optical frame -> pixels (..., 2) and depth (...).

    Pixels of points at or behind the image plane (depth <= 0) are NaN.
    """
    depth = xyz_camera[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        uvw = xyz_camera @ intrinsic.T
        pixel = uvw[..., :2] / np.where(depth > 0, depth, np.nan)[..., None]
    return pixel, depth


def project_to_image(xyz_ego: Array, image: CameraImage) -> tuple[Array, Array, Array]:
    """Ego points (N, 3) -> pixels (N, 2), depth (N,) and the mask (N,) of points in front of and inside the image."""
    pixel, depth = project(image.ego_from_camera.inverse().apply(np.asarray(xyz_ego, np.float64)), image.intrinsic)
    height, width = image.rgb.shape[:2]
    with np.errstate(invalid="ignore"):
        visible = (
            (depth > 0)
            & (pixel[:, 0] >= -0.5)
            & (pixel[:, 0] < width - 0.5)
            & (pixel[:, 1] >= -0.5)
            & (pixel[:, 1] < height - 0.5)
        )
    return pixel, depth, visible


def _clip(polygon: Array, a: Array, b: Array) -> Array:
    """The part of a convex polygon (P, 2) on the left of the line a -> b (Sutherland and Hodgman 1974)."""
    side = (b[0] - a[0]) * (polygon[:, 1] - a[1]) - (b[1] - a[1]) * (polygon[:, 0] - a[0])
    following, side_following = np.roll(polygon, -1, 0), np.roll(side, -1)
    kept = []
    for p, q, s, t in zip(polygon, following, side, side_following, strict=True):
        if s >= 0:
            kept.append(p)
        if s * t < 0:
            kept.append(p + (q - p) * (s / (s - t)))
    return np.array(kept).reshape(-1, 2)


def bev_intersection(a: Boxes3D, b: Boxes3D) -> Array:
    """(Ma, Mb) areas in m^2 shared by two sets of boxes seen from above. Only pairs whose circles touch are clipped."""
    area = np.zeros((len(a), len(b)))
    if not len(a) or not len(b):
        return area
    # Counter-clockwise seen from above: front-left, rear-left, rear-right, front-right.
    corners_a, corners_b = box_corners(a)[:, :4, :2], box_corners(b)[:, :4, :2]
    reach = np.hypot(a.size[:, 0], a.size[:, 1])[:, None] / 2 + np.hypot(b.size[:, 0], b.size[:, 1])[None] / 2
    distance = np.linalg.norm(a.center[:, None, :2] - b.center[None, :, :2], axis=-1)
    for i, j in np.argwhere(distance <= reach):
        polygon = corners_a[i]
        for k in range(4):
            polygon = _clip(polygon, corners_b[j, k], corners_b[j, (k + 1) % 4])
            if len(polygon) < 3:
                break
        else:
            x, y = (polygon - polygon[0]).T
            area[i, j] = 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
    return area


def bev_iou(a: Boxes3D, b: Boxes3D) -> Array:
    """(Ma, Mb) intersection over union of the rotated rectangles seen from above."""
    shared = bev_intersection(a, b)
    return shared / (a.size[:, :2].prod(1)[:, None] + b.size[:, :2].prod(1)[None] - shared)


def iou_3d(a: Boxes3D, b: Boxes3D) -> Array:
    """(Ma, Mb) intersection over union of the upright rotated boxes."""
    top = np.minimum((a.center[:, 2] + a.size[:, 2] / 2)[:, None], (b.center[:, 2] + b.size[:, 2] / 2)[None])
    bottom = np.maximum((a.center[:, 2] - a.size[:, 2] / 2)[:, None], (b.center[:, 2] - b.size[:, 2] / 2)[None])
    shared = bev_intersection(a, b) * np.maximum(top - bottom, 0)
    return shared / (a.size.prod(1)[:, None] + b.size.prod(1)[None] - shared)


def rotated_nms(boxes: Boxes3D, iou_threshold: float) -> Array:
    """Indices of the boxes that greedy suppression over bird's-eye IoU keeps, best score first (ties: lower index)."""
    order = np.argsort(-boxes.score, kind="stable")
    overlaps = bev_iou(boxes.select(order), boxes.select(order)) > iou_threshold
    kept: list[int] = []
    for i in range(len(order)):
        if not overlaps[i, kept].any():
            kept.append(i)
    return order[np.array(kept, np.int64)]


def grid_points(grid: VoxelGrid, index: Array) -> Array:
    """Voxel indices (V, 3) -> voxel centres (V, 3) float64 in ego."""
    return grid.ego_from_grid.apply(grid.center(index))
