"""The calibration overlay: LiDAR points by depth and boxes drawn into a camera's image, to see whether they fit."""

from __future__ import annotations

import cv2
import numpy as np

from perception.datasets.rosbag_file import Header
from perception.errors import DataError
from perception.types import Array, Boxes3D, Sample
from perception.visualize import draw_boxes, draw_points, key_sweep, render_camera
from perception_ros.cdr import begin

JPEG_QUALITY = 85


def overlay(sample: Sample, role: str, boxes: Boxes3D | None = None) -> Array:
    """(H, W, 3) uint8 RGB: a camera's rectified image with the newest sweep of every LiDAR, and boxes, drawn in.

    Raises:
        DataError: the sample has no image of that camera.
    """
    if role not in sample.cameras:
        raise DataError(
            f"sample at {sample.stamp_ns} ns has no image of camera {role!r}",
            f"there are: {', '.join(sample.cameras) or 'none'}",
        )
    points = [draw_points(key_sweep(cloud)) for cloud in sample.lidars.values()]
    return render_camera(sample.cameras[role], points, [draw_boxes(boxes)] if boxes is not None else [])


def compressed_image(rgb: Array, header: Header, quality: int = JPEG_QUALITY) -> bytes:
    """sensor_msgs/CompressedImage, JPEG, of (H, W, 3) uint8 RGB; the header's frame is the camera's."""
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    out = begin(header)
    out.string("jpeg")
    out.sequence(jpeg.reshape(-1))
    return out.finish()


def image(rgb: Array, header: Header) -> bytes:
    """sensor_msgs/Image, rgb8, of (H, W, 3) uint8 RGB."""
    height, width = rgb.shape[:2]
    out = begin(header)
    out.numbers("I", height, width)
    out.string("rgb8")
    out.numbers("B", 0)  # is_bigendian
    out.numbers("I", 3 * width)
    out.sequence(np.ascontiguousarray(rgb).reshape(-1))
    return out.finish()
