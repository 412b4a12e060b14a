"""Augmentation of a sample with its truth, whose geometry stays exact: points keep their boxes and their pixels.

The world is turned, scaled, shifted and mirrored about the key LiDAR, as in the training of SparseFusion (and of
TransFusion and BEVFusion before it):

    ego'_from_ego:  x' = scale * (rotation @ flips) x + shift

A camera must stay a rigid, right-handed frame. After an even number of flips the world is turned only, and the camera
turns with it: every pixel stays. After an odd number the world is a mirror image, and so the image is mirrored too
(u' = W - 1 - u, pixel centres being integers); the camera's frame is the turned one with x reversed, which is right
handed again. Scaling leaves pixels where they are and scales depths.

Then each image is zoomed about its top left corner, and cropped where it grew. `CameraImage.valid_size` says which part
the camera saw; the rest is filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import cv2
import numpy as np
from pydantic import Field

from perception.config import Config
from perception.types import Array, Boxes3D, CameraImage, PointCloud, Pose, Sample, Truth

_MIRROR = np.diag([-1.0, 1.0, 1.0])


class AugmentConfig(Config):
    """How far a sample is changed; the defaults are SparseFusion's. A range of equal ends changes nothing.

    Attributes:
        rotation_rad: least and greatest turn about the LiDAR's z axis.
        scale: least and greatest scale of the world.
        shift_m: standard deviation of the shift along each axis.
        flip_x, flip_y: probability of reversing the ego frame's x, y.
        zoom: least and greatest scale of each image.
        fill: RGB beyond a shrunk image.
    """

    rotation_rad: tuple[float, float] = (-0.785, 0.785)
    scale: tuple[float, float] = (0.9, 1.1)
    shift_m: float = Field(0.5, ge=0)
    flip_x: float = Field(0.5, ge=0, le=1)
    flip_y: float = Field(0.5, ge=0, le=1)
    zoom: tuple[float, float] = (0.9, 1.1)
    fill: tuple[int, int, int] = (124, 116, 104)


@dataclass(frozen=True, slots=True, eq=False)
class Similarity:
    """A map of space that keeps shapes: `x' = scale * matrix @ x + shift`.

    Attributes:
        matrix: (3, 3) float64, orthonormal; a turn about z, a mirror image of one, or a product with a tilt.
        scale: > 0.
        shift: (3,) float64, metres.
    """

    matrix: Array
    scale: float
    shift: Array

    @staticmethod
    def about(pivot: Pose, yaw_rad: float, flip_x: bool, flip_y: bool, scale: float, shift: Array) -> Similarity:
        """In the frame `pivot` maps to: flips of its x and y, then a turn about z, about the pivot's origin."""
        flips = np.diag([-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0, 1.0])
        matrix = Pose.from_yaw(yaw_rad).rotation @ flips
        origin = pivot.translation
        return Similarity(matrix, scale, origin - scale * matrix @ origin + shift)

    @property
    def mirrors(self) -> bool:
        return bool(np.linalg.det(self.matrix) < 0)

    def apply(self, points: Array) -> Array:
        """Points (..., 3), computed in float64, given in the input's float type."""
        moved = self.scale * points.astype(np.float64) @ self.matrix.T + self.shift
        return moved.astype(points.dtype)

    def inside(self, frame: Pose) -> Similarity:
        """The same map, of coordinates in a frame that `frame` maps to where this one is defined."""
        matrix = frame.rotation.T @ self.matrix @ frame.rotation
        return Similarity(matrix, self.scale, frame.inverse().apply(self.apply(frame.translation)))


def augment(sample: Sample, truth: Truth, config: AugmentConfig, rng: np.random.Generator) -> tuple[Sample, Truth]:
    """One random change of the world and of each image; the same for the same state of `rng`.

    The sample keeps its point clouds (in their sensors' frames, as if the world had moved) and cameras; motion
    (odometry, IMU, GNSS, prior) is left out, for a mirrored world has none. The truth keeps boxes and point labels;
    what is not moved here (occupancy, pixels, pose) is left out, which says that it is not known.
    """
    pivot = next((cloud.ego_from_sensor for cloud in sample.lidars.values()), Pose.identity())
    world = Similarity.about(
        pivot,
        rng.uniform(*config.rotation_rad),
        bool(rng.random() < config.flip_x),
        bool(rng.random() < config.flip_y),
        rng.uniform(*config.scale),
        rng.normal(0.0, 1.0, 3) * config.shift_m,
    )
    cameras = {}
    for role, image in sample.cameras.items():
        zoom, crop = rng.uniform(*config.zoom), (rng.random(), rng.random())
        cameras[role] = zoom_image(move_image(image, world), zoom, crop, config.fill)
    moved = Sample(
        sample.stamp_ns, _move_clouds(sample.lidars, world), _move_clouds(sample.radars, world), cameras,
        token=sample.token,
    )  # fmt: skip
    boxes = None if truth.boxes is None else move_boxes(truth.boxes, world)
    return moved, Truth(boxes, point_label=truth.point_label)


def _move_clouds(clouds: Mapping[str, PointCloud], world: Similarity) -> dict[str, PointCloud]:
    return {role: move_cloud(cloud, world) for role, cloud in clouds.items()}


def move_cloud(cloud: PointCloud, world: Similarity) -> PointCloud:
    """The points as the sensor, where it was, would give them of the moved world (ego).

    Velocities scale with the world; `rcs`, `intensity` and times stay.
    """
    local = world.inside(cloud.ego_from_sensor)
    fields = dict(cloud.fields)
    for name in ("radial_velocity", "radial_velocity_comp"):
        if name in fields:
            fields[name] = (fields[name] * world.scale).astype(fields[name].dtype)
    if "vx_comp" in fields and "vy_comp" in fields:
        velocity = np.stack([fields["vx_comp"], fields["vy_comp"]], -1) @ (world.scale * local.matrix[:2, :2].T)
        fields["vx_comp"] = velocity[:, 0].astype(cloud.fields["vx_comp"].dtype)
        fields["vy_comp"] = velocity[:, 1].astype(cloud.fields["vy_comp"].dtype)
    return replace(cloud, xyz=local.apply(cloud.xyz), fields=fields)


def move_boxes(boxes: Boxes3D, world: Similarity) -> Boxes3D:
    """Boxes (ego) in the moved world; velocities scale with it."""
    heading = np.stack([np.cos(boxes.yaw), np.sin(boxes.yaw), np.zeros(len(boxes))], -1) @ world.matrix.T
    return replace(
        boxes,
        center=world.apply(boxes.center),
        size=boxes.size * world.scale,
        yaw=np.arctan2(heading[:, 1], heading[:, 0]),
        velocity=world.scale * boxes.velocity @ world.matrix[:2, :2].T,
    )


def move_image(image: CameraImage, world: Similarity) -> CameraImage:
    """The image that the camera, moved with the world, takes of it: itself, mirrored where the world is.

    Raises:
        ValueError: an image mirrored whose right part is not valid: valid parts lie at the top left.
    """
    rotation, center = world.matrix @ image.ego_from_camera.rotation, world.apply(image.ego_from_camera.translation)
    if not world.mirrors:
        return replace(image, ego_from_camera=Pose(rotation, center))
    if image.valid_size is not None:
        raise ValueError("move_image: an image with a valid part cannot be mirrored; move it before it is zoomed")
    width = image.rgb.shape[1]
    intrinsic = image.intrinsic.copy()
    intrinsic[0, 1] *= -1
    intrinsic[0, 2] = width - 1 - intrinsic[0, 2]
    return replace(
        image,
        rgb=np.ascontiguousarray(image.rgb[:, ::-1]),
        intrinsic=intrinsic,
        ego_from_camera=Pose(rotation @ _MIRROR, center),
    )


def zoom_image(
    image: CameraImage, scale: float, crop: tuple[float, float] = (0.0, 0.0), fill: tuple[int, int, int] = (0, 0, 0)
) -> CameraImage:
    """The image scaled about its top left corner, on a canvas of the same size.

    Args:
        image: without a valid part of its own.
        scale: below 1 the rest of the canvas is filled.
        crop: where a larger image is cut, 0 (left, top) to 1 (right, bottom).
        fill: RGB.
    """
    if image.valid_size is not None:
        raise ValueError("zoom_image: the image has a valid part already")
    height, width = image.rgb.shape[:2]
    cut = max(scale - 1.0, 0.0) * np.array([crop[0] * width, crop[1] * height])
    # Pixel centres are integers, so the corner about which the image scales lies at (-0.5, -0.5).
    canvas_from_image = np.eye(3)
    canvas_from_image[:2] = [[scale, 0, 0.5 * scale - 0.5 - cut[0]], [0, scale, 0.5 * scale - 0.5 - cut[1]]]
    # The border is repeated, and the fill painted over it: a blend of the two would be a false edge inside the image.
    rgb = cv2.warpAffine(
        image.rgb, canvas_from_image[:2], (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    valid = (max(1, int(min(scale, 1.0) * width)), max(1, int(min(scale, 1.0) * height)))
    rgb[valid[1] :] = fill
    rgb[:, valid[0] :] = fill
    return replace(
        image,
        rgb=rgb,
        intrinsic=canvas_from_image @ image.intrinsic,
        valid_size=None if valid == (width, height) else valid,
    )
