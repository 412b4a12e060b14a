"""Lens distortion undone: the camera models of sensor_msgs/CameraInfo, with their maps cached.

plumb_bob and rational_polynomial keep the focal lengths and principal point of K. equidistant (a fisheye) maps the
angle t from the axis to f * t where a pinhole has f * tan(t): the centre keeps its resolution at `balance` = 0 and the
rim is lost; `balance` = 1 shrinks the focal length until the middle of each edge is seen, as far as 75 degrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import cv2
import numpy as np

from perception.errors import ConfigError, DataError
from perception.types import Array

DistortionModel = Literal["plumb_bob", "rational_polynomial", "equidistant"]

_LENGTHS: dict[DistortionModel, tuple[int, ...]] = {
    "plumb_bob": (0, 4, 5),  # k1 k2 p1 p2 [k3]
    "rational_polynomial": (0, 8, 12, 14),  # k1 k2 p1 p2 k3 k4 k5 k6 [thin prism] [tilt]
    "equidistant": (0, 4),  # k1 k2 k3 k4 of t + k1 t^3 + ...
}
_WIDEST_RAD = np.deg2rad(75.0)


@dataclass(frozen=True, slots=True)
class CameraModel:
    """A lens and its image; hashable, so that equal models share their maps.

    Attributes:
        model: of the distortion, by its name in sensor_msgs/CameraInfo.
        width, height: pixels.
        focal_px, center_px: (x, y) of the distorted image.
        distortion: OpenCV's coefficients of the model.
        balance: 0 to 1, see the module; equidistant only.
    """

    model: DistortionModel
    width: int
    height: int
    focal_px: tuple[float, float]
    center_px: tuple[float, float]
    distortion: tuple[float, ...]
    balance: float = 0.0

    def __post_init__(self) -> None:
        numbers = (*self.focal_px, *self.center_px, *self.distortion)
        if not np.isfinite(numbers).all() or min(self.focal_px) <= 0 or min(self.width, self.height) <= 0:
            raise DataError(
                f"camera model {self.width}x{self.height}, focal length {self.focal_px}, centre {self.center_px}, "
                f"distortion {self.distortion}: not a calibration",
                "calibrate the camera and give its driver the result (an uncalibrated one sends K = 0)",
            )
        if self.model not in _LENGTHS:
            raise DataError(
                f"camera model: unknown distortion model {self.model!r}",
                f"known: {', '.join(get_args(DistortionModel))}",
            )
        if not 0 <= self.balance <= 1:
            raise ConfigError(f"camera model: balance {self.balance} is outside [0, 1]", "set it between 0 and 1")
        if len(self.distortion) not in _LENGTHS[self.model]:
            raise DataError(
                f"camera model: {len(self.distortion)} distortion coefficients for {self.model}",
                f"{self.model} takes {' or '.join(map(str, _LENGTHS[self.model]))}",
            )

    @property
    def intrinsic(self) -> Array:
        """(3, 3) float64 of the distorted image."""
        return np.array([[self.focal_px[0], 0, self.center_px[0]], [0, self.focal_px[1], self.center_px[1]], [0, 0, 1]])

    def rectify(self, rgb: Array) -> tuple[Array, Array]:
        """An image (H, W, 3) uint8 -> the same without distortion, and its intrinsic (3, 3).

        What the lens did not see is black. Without distortion the image is returned as it is.

        Raises:
            DataError: the image has another size than the model.
        """
        if rgb.shape[:2] != (self.height, self.width):
            raise DataError(
                f"image is {rgb.shape[1]}x{rgb.shape[0]} px, its camera model {self.width}x{self.height}",
                "give the CameraInfo of this very image: a resized image needs a scaled one",
            )
        if self.model != "equidistant" and not any(self.distortion):
            return rgb, self.intrinsic
        map_xy, map_fraction, intrinsic = _maps(self)
        return cv2.remap(rgb, map_xy, map_fraction, cv2.INTER_LINEAR), intrinsic.copy()


@lru_cache(maxsize=32)
def _maps(camera: CameraModel) -> tuple[Array, Array, Array]:
    """Fixed-point maps (1/32 px) for cv2.remap, and the rectified intrinsic (3, 3)."""
    size, k, d = (camera.width, camera.height), camera.intrinsic, np.array(camera.distortion or (0.0,) * 4)
    if camera.model == "equidistant":
        rectified = _fisheye_intrinsic(camera)
        maps: Any = cv2.fisheye.initUndistortRectifyMap(k, d, np.eye(3), rectified, size, cv2.CV_16SC2)
    else:
        rectified = k
        maps = cv2.initUndistortRectifyMap(k, d, np.eye(3), rectified, size, cv2.CV_16SC2)
    return maps[0], maps[1], rectified


def _fisheye_intrinsic(camera: CameraModel) -> Array:
    """K with its focal lengths scaled by between 1 (`balance` 0) and what shows the middle of every edge (1)."""
    (cx, cy), (fx, fy) = camera.center_px, camera.focal_px
    edges = np.array([[-0.5, cy], [camera.width - 0.5, cy], [cx, -0.5], [cx, camera.height - 0.5]])
    radius = np.linalg.norm((edges - camera.center_px) / camera.focal_px, axis=1)  # of the distorted image, f = 1
    theta = np.linspace(0, _WIDEST_RAD, 1000)
    distorted = theta * (1 + sum(c * theta ** (2 * i + 2) for i, c in enumerate(camera.distortion)))
    seen = np.interp(radius, np.maximum.accumulate(distorted), theta)
    fit = min(1.0, float((radius / np.tan(seen)).min()))
    scale = 1 + camera.balance * (fit - 1)
    return np.array([[fx * scale, 0, cx], [0, fy * scale, cy], [0, 0, 1]])
