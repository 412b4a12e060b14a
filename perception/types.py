"""Boundary types: what every sensor source gives and every predictor returns. numpy only.

Conventions, stated here once and checked by the types:

* **ego** is `base_link`: x forward, y left, z up (REP 103/105). Metres, radians, seconds; stamps are integer
  nanoseconds.
* A transform is named `<dst>_from_<src>` so that products cancel: `map_from_ego @ ego_from_lidar` is `map_from_lidar`.
* Quaternions are (x, y, z, w). Yaw is counter-clockwise from +x about +z.
* A camera frame is optical: x right, y down, z forward. Pixels follow OpenCV: the top-left pixel's centre is (0, 0).
* Grids are indexed `[x, y, z]`; cell i covers `[min + i * size, min + (i + 1) * size)`.
* A sensor is named by its role (`top`, `front`, `front_left`, ...), never by its position in a list.
* Shape letters: B batch, N points, V voxels, Q queries, K cameras, M boxes, C channels, T readings.

A box from above, front up (corner order of `geometry.box_corners`; 4 to 7 are the same, on top)::

              x, yaw = 0
                 ^
          0------+------3
          |      |      |
     y <--|------c      | length        c is the geometric centre,
          |             |               half the height above the bottom face
          1-------------2
               width

Arrays are taken as they are, not copied: treat them as read-only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

IGNORE_LABEL = 255
"""Label of a voxel, point or pixel that no benchmark scores."""


def _check(name: str, array: Array, shape: tuple[int | str, ...], dtype: type | tuple[type, ...]) -> None:
    """Raise ValueError unless `array` has `shape` (a letter fits any length), a kind of `dtype` and finite values."""
    kinds = dtype if isinstance(dtype, tuple) else (dtype,)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name}: expected a numpy array, got {type(array).__name__}")
    fits = array.ndim == len(shape) and all(
        isinstance(s, str) or s == n for s, n in zip(shape, array.shape, strict=True)
    )
    if not fits or not any(array.dtype.type is k or np.issubdtype(array.dtype, k) for k in kinds):
        want = ", ".join(str(s) for s in shape)
        raise ValueError(
            f"{name}: expected ({want}) {'/'.join(k.__name__ for k in kinds)}, got {array.shape} {array.dtype}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name}: {int((~np.isfinite(array)).sum())} of {array.size} values are not finite")


def _check_stamp(name: str, stamp_ns: int) -> None:
    if not isinstance(stamp_ns, int) or isinstance(stamp_ns, bool):
        raise ValueError(f"{name}: expected an int of nanoseconds, got {stamp_ns!r} ({type(stamp_ns).__name__})")


@dataclass(frozen=True, slots=True, eq=False)
class Pose:
    """A rigid transform `dst_from_src`: `x_dst = rotation @ x_src + translation`.

    Attributes:
        rotation: (3, 3) float64, orthonormal, determinant +1.
        translation: (3,) float64, metres.
    """

    rotation: Array
    translation: Array

    def __post_init__(self) -> None:
        _check("Pose.rotation", self.rotation, (3, 3), np.float64)
        _check("Pose.translation", self.translation, (3,), np.float64)
        # In plain floats, as in `quaternion`: a sample is made of dozens of poses, and numpy takes ten times as long.
        (a, b, c), (d, e, f), (g, h, i) = self.rotation.tolist()
        lengths = a * a + b * b + c * c - 1, d * d + e * e + f * f - 1, g * g + h * h + i * i - 1
        angles = a * d + b * e + c * f, a * g + b * h + c * i, d * g + e * h + f * i
        error = max(map(abs, (*lengths, *angles)))
        determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
        if error > 1e-5 or determinant < 0:
            raise ValueError(f"Pose.rotation: not a rotation (|R R^T - 1| = {error:.2g}, det = {determinant:.3g})")

    @staticmethod
    def identity() -> Pose:
        return Pose(np.eye(3), np.zeros(3))

    @staticmethod
    def from_matrix(matrix: Array) -> Pose:
        """From a (4, 4) or (3, 4) homogeneous matrix."""
        matrix = np.asarray(matrix, np.float64)
        return Pose(np.ascontiguousarray(matrix[:3, :3]), np.ascontiguousarray(matrix[:3, 3]))

    @staticmethod
    def from_quaternion(xyzw: Sequence[float] | Array, translation: Sequence[float] | Array = (0.0, 0.0, 0.0)) -> Pose:
        """From a quaternion (x, y, z, w), normalised here, and a translation in metres."""
        q = np.asarray(xyzw, np.float64)
        norm = float(np.linalg.norm(q))
        if q.shape != (4,) or not np.isfinite(norm) or norm < 1e-6:
            raise ValueError(
                f"Pose.from_quaternion: expected four numbers (x, y, z, w) of non-zero norm, got {q.tolist()}"
            )
        x, y, z, w = q / norm
        rotation = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
        return Pose(rotation, np.asarray(translation, np.float64))

    @staticmethod
    def from_yaw(yaw_rad: float, translation: Sequence[float] | Array = (0.0, 0.0, 0.0)) -> Pose:
        """A turn about +z, then a translation in metres."""
        c, s = np.cos(yaw_rad), np.sin(yaw_rad)
        return Pose(np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]), np.asarray(translation, np.float64))

    @property
    def matrix(self) -> Array:
        """(4, 4) float64."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.rotation
        matrix[:3, 3] = self.translation
        return matrix

    @property
    def quaternion(self) -> Array:
        """(x, y, z, w) float64, unit, w >= 0."""
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = self.rotation.tolist()
        # The largest of the four squared components keeps the division well conditioned (Shepperd 1978).
        squares = 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz, 1 + xx + yy + zz
        largest = max(squares)
        if largest == squares[3]:
            q = zy - yz, xz - zx, yx - xy, largest
        elif largest == squares[0]:
            q = largest, yx + xy, xz + zx, zy - yz
        elif largest == squares[1]:
            q = yx + xy, largest, zy + yz, xz - zx
        else:
            q = xz + zx, zy + yz, largest, yx - xy
        norm = math.copysign(math.hypot(*q), q[3])
        return np.array([part / norm for part in q])

    @property
    def yaw(self) -> float:
        """Heading of the source's x axis in the destination's xy plane, radians in (-pi, pi]."""
        return float(np.arctan2(self.rotation[1, 0], self.rotation[0, 0]))

    def inverse(self) -> Pose:
        rotation = np.ascontiguousarray(self.rotation.T)
        return Pose(rotation, -rotation @ self.translation)

    def __matmul__(self, other: Pose) -> Pose:
        """`a_from_b @ b_from_c` is `a_from_c`."""
        return Pose(self.rotation @ other.rotation, self.rotation @ other.translation + self.translation)

    def apply(self, points: Array) -> Array:
        """Points (..., 3), source frame to destination frame; computed in float64, given in the input's float type."""
        moved = points.astype(np.float64) @ self.rotation.T
        moved += self.translation
        return moved.astype(points.dtype) if np.issubdtype(points.dtype, np.floating) else moved


@dataclass(frozen=True, slots=True, eq=False)
class PointCloud:
    """Points of one LiDAR or radar, named fields as in PointCloud2. Several sweeps may be accumulated into one cloud.

    Attributes:
        xyz: (N, 3) float32, metres, in the sensor's frame at `stamp_ns`.
        fields: name -> (N,) numeric array. Names with one meaning everywhere:
            `intensity` (range declared by the sensor), `ring` (beam index), `time_offset` (s, point time
            minus `stamp_ns`);
            radar: `rcs` (dBsm), `power` (dB), `snr` (dB), `radial_velocity` (m/s relative to the moving sensor,
            negative when closing), `radial_velocity_comp` (ego motion removed), `vx_comp`, `vy_comp` (m/s, its
            components in the sensor's frame);
            accumulated: `time_lag` (s, >= 0, 0 for the key frame), `sweep` (0 for the key frame, growing with age).
            A data set may add fields under its own names.
        ego_from_sensor: maps `xyz` into ego at the sample's stamp, ego motion between the two stamps folded in.
        stamp_ns: time of the (key) sweep.
    """

    xyz: Array
    fields: Mapping[str, Array]
    ego_from_sensor: Pose
    stamp_ns: int

    def __post_init__(self) -> None:
        _check("PointCloud.xyz", self.xyz, ("N", 3), np.float32)
        for name, values in self.fields.items():
            _check(f"PointCloud.fields[{name!r}]", values, (len(self.xyz),), (np.floating, np.integer, np.bool_))
        if "time_lag" in self.fields and len(self.xyz) and float(self.fields["time_lag"].min()) < 0:
            raise ValueError(
                f"PointCloud.fields['time_lag']: expected seconds >= 0, got {float(self.fields['time_lag'].min())}"
            )
        _check_stamp("PointCloud.stamp_ns", self.stamp_ns)

    def __len__(self) -> int:
        return len(self.xyz)

    def field(self, name: str) -> Array:
        """(N,) values of a field; ValueError names the fields there are."""
        if name not in self.fields:
            raise ValueError(f"point cloud has fields ({', '.join(['x', 'y', 'z', *self.fields])}); {name!r} is needed")
        return self.fields[name]

    def select(self, index: Array) -> PointCloud:
        """The points of a boolean mask or an index array, with all their fields."""
        return PointCloud(
            self.xyz[index], {n: v[index] for n, v in self.fields.items()}, self.ego_from_sensor, self.stamp_ns
        )

    def xyz_ego(self) -> Array:
        """(N, 3) float32 points in ego at the sample's stamp."""
        return self.ego_from_sensor.apply(self.xyz)


@dataclass(frozen=True, slots=True, eq=False)
class CameraImage:
    """One rectified image.

    Attributes:
        rgb: (H, W, 3) uint8.
        intrinsic: (3, 3) float64 pinhole matrix in pixels, of the rectified image.
        ego_from_camera: maps camera (optical frame) coordinates into ego at the sample's stamp.
        stamp_ns: time of exposure.
        valid_size: (width, height) of the part of `rgb`, from its top left, that the camera saw; None is all of it.
    """

    rgb: Array
    intrinsic: Array
    ego_from_camera: Pose
    stamp_ns: int
    valid_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check("CameraImage.rgb", self.rgb, ("H", "W", 3), np.uint8)
        _check("CameraImage.intrinsic", self.intrinsic, (3, 3), np.float64)
        k = self.intrinsic
        if k[0, 0] <= 0 or k[1, 1] <= 0 or not np.allclose(k[2], (0, 0, 1)):
            raise ValueError(
                f"CameraImage.intrinsic: expected positive focal lengths and last row (0, 0, 1), got {k.tolist()}"
            )
        _check_stamp("CameraImage.stamp_ns", self.stamp_ns)
        height, width = self.rgb.shape[:2]
        if self.valid_size is not None and not (0 < self.valid_size[0] <= width and 0 < self.valid_size[1] <= height):
            raise ValueError(f"CameraImage.valid_size: {self.valid_size} of an image of {(width, height)}")


@dataclass(frozen=True, slots=True, eq=False)
class Imu:
    """Inertial readings in ego.

    Attributes:
        stamp_ns: (T,) int64.
        angular_velocity: (T, 3) rad/s.
        linear_acceleration: (T, 3) m/s^2, specific force: +9.81 along z at rest.
    """

    stamp_ns: Array
    angular_velocity: Array
    linear_acceleration: Array

    def __post_init__(self) -> None:
        _check("Imu.stamp_ns", self.stamp_ns, ("T",), np.int64)
        _check("Imu.angular_velocity", self.angular_velocity, (len(self.stamp_ns), 3), np.floating)
        _check("Imu.linear_acceleration", self.linear_acceleration, (len(self.stamp_ns), 3), np.floating)


@dataclass(frozen=True, slots=True, eq=False)
class Odometry:
    """Ego's own velocity, along ego's axes.

    Attributes:
        stamp_ns: (T,) int64.
        linear_velocity: (T, 3) m/s.
        angular_velocity: (T, 3) rad/s.
    """

    stamp_ns: Array
    linear_velocity: Array
    angular_velocity: Array

    def __post_init__(self) -> None:
        _check("Odometry.stamp_ns", self.stamp_ns, ("T",), np.int64)
        _check("Odometry.linear_velocity", self.linear_velocity, (len(self.stamp_ns), 3), np.floating)
        _check("Odometry.angular_velocity", self.angular_velocity, (len(self.stamp_ns), 3), np.floating)


@dataclass(frozen=True, slots=True, eq=False)
class Gnss:
    """One satellite fix: WGS 84 degrees and metres, `covariance` (3, 3) m^2 in east, north, up."""

    latitude_deg: float
    longitude_deg: float
    altitude_m: float
    covariance: Array
    stamp_ns: int

    def __post_init__(self) -> None:
        _check("Gnss.covariance", self.covariance, (3, 3), np.floating)
        if not (abs(self.latitude_deg) <= 90 and abs(self.longitude_deg) <= 180):
            raise ValueError(
                f"Gnss: latitude {self.latitude_deg}, longitude {self.longitude_deg} are not degrees on the globe"
            )
        _check_stamp("Gnss.stamp_ns", self.stamp_ns)


LocalizationStatus = Literal["ok", "degenerate", "ambiguous", "coasting", "rejected", "no_features", "lost"]
"""`ok` and `degenerate` (one axis unobserved, its variance large) are fixes; the others are not."""


@dataclass(frozen=True, slots=True, eq=False)
class Localization:
    """A localized pose.

    Attributes:
        map_from_ego: ego in the map (ENU) frame.
        covariance: (6, 6) in ROS order x, y, z, rot x, rot y, rot z, in the map frame's fixed axes; m^2, m rad, rad^2.
        inliers: correspondences that support the pose.
        status: see LocalizationStatus.
        stamp_ns: the sensor's stamp.
    """

    map_from_ego: Pose
    covariance: Array
    inliers: int
    status: LocalizationStatus
    stamp_ns: int

    def __post_init__(self) -> None:
        _check("Localization.covariance", self.covariance, (6, 6), np.floating)
        if not np.allclose(self.covariance, self.covariance.T, atol=1e-9 + 1e-6 * float(np.abs(self.covariance).max())):
            raise ValueError("Localization.covariance: not symmetric")
        if self.status not in get_args(LocalizationStatus):
            raise ValueError(
                f"Localization.status: {self.status!r} is none of {', '.join(get_args(LocalizationStatus))}"
            )
        _check_stamp("Localization.stamp_ns", self.stamp_ns)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Everything the sensors say about one instant. Truth never sits in here.

    Attributes:
        stamp_ns: the anchor sensor's stamp, to which every `ego_from_*` refers.
        lidars, radars, cameras: by role. A missing sensor is an absent key.
        odom_from_ego: ego in the drift-free-locally odometry frame at `stamp_ns`.
        prior: a rough pose from the last fix, GNSS or an operator.
        imu, odometry, gnss: readings since the previous sample.
        token: names the sample within its data set.
    """

    stamp_ns: int
    lidars: Mapping[str, PointCloud] = field(default_factory=dict)
    radars: Mapping[str, PointCloud] = field(default_factory=dict)
    cameras: Mapping[str, CameraImage] = field(default_factory=dict)
    odom_from_ego: Pose | None = None
    prior: Localization | None = None
    imu: Imu | None = None
    odometry: Odometry | None = None
    gnss: Gnss | None = None
    token: str = ""

    def __post_init__(self) -> None:
        _check_stamp("Sample.stamp_ns", self.stamp_ns)


@dataclass(frozen=True, slots=True, eq=False)
class VoxelGrid:
    """A regular grid of voxels.

    Attributes:
        min_corner: (x, y, z) metres of the grid's lower corner, in the grid's frame.
        voxel_size: (x, y, z) metres.
        shape: voxels along (x, y, z).
        ego_from_grid: OpenOccupancy, SurroundOcc and SemanticKITTI live in the LiDAR's frame, Occ3D and OmniHD in ego.
    """

    min_corner: tuple[float, float, float]
    voxel_size: tuple[float, float, float]
    shape: tuple[int, int, int]
    ego_from_grid: Pose

    def __post_init__(self) -> None:
        if len(self.min_corner) != 3 or len(self.voxel_size) != 3 or len(self.shape) != 3:
            raise ValueError(
                f"VoxelGrid: expected three values each, got {self.min_corner}, {self.voxel_size}, {self.shape}"
            )
        if min(self.voxel_size) <= 0 or min(self.shape) <= 0:
            raise ValueError(f"VoxelGrid: voxel_size {self.voxel_size} and shape {self.shape} must be positive")

    @property
    def max_corner(self) -> tuple[float, float, float]:
        x, y, z = (m + s * n for m, s, n in zip(self.min_corner, self.voxel_size, self.shape, strict=True))
        return x, y, z

    def index(self, xyz: Array) -> tuple[Array, Array]:
        """Points (N, 3) in the grid's frame -> voxel indices (N, 3) int64 and the mask (N,) of those inside."""
        # Computed in the points' own float type, as in voxelize; integers would cut the corner to whole metres.
        number = xyz.dtype if xyz.dtype.kind == "f" else np.dtype(np.float64)
        cell = np.floor((xyz - np.asarray(self.min_corner, number)) / np.asarray(self.voxel_size, number))
        index = np.clip(cell, -(2**31), 2**31).astype(np.int64)  # a cast of what int64 cannot hold is undefined
        return index, ((index >= 0) & (index < self.shape)).all(1)

    def center(self, index: Array) -> Array:
        """Voxel indices (N, 3) -> centres (N, 3) float64, metres, in the grid's frame."""
        return (np.asarray(index, np.float64) + 0.5) * self.voxel_size + self.min_corner


@dataclass(frozen=True, slots=True, eq=False)
class Boxes3D:
    """Oriented boxes in ego at `stamp_ns`; predictions and truth alike. Row m of every array is box m.

    Attributes:
        center: (M, 3) float64, geometric centre, metres.
        size: (M, 3) float64: length (along yaw), width, height, metres.
        yaw: (M,) float64, radians.
        velocity: (M, 2) float64, m/s over ground, (vx, vy) along ego's axes; NaN where unknown.
        score: (M,) float64 in [0, 1]; 1 for truth.
        label: (M,) int64, index into `classes`.
        classes: the class names.
        attribute: (M,) str or None; "" where a box has none.
        track_id: (M,) str or None.
        num_points, num_radar_points: (M,) int64 or None: LiDAR and radar points of the key frame inside the box.
        visibility: (M,) int64 or None: nuScenes levels 1 (0-40 %) to 4 (80-100 %), 0 unknown.
    """

    center: Array
    size: Array
    yaw: Array
    velocity: Array
    score: Array
    label: Array
    classes: tuple[str, ...]
    stamp_ns: int
    attribute: Array | None = None
    track_id: Array | None = None
    num_points: Array | None = None
    num_radar_points: Array | None = None
    visibility: Array | None = None

    def __post_init__(self) -> None:
        m = len(self.center)
        _check("Boxes3D.center", self.center, ("M", 3), np.float64)
        _check("Boxes3D.size", self.size, (m, 3), np.float64)
        _check("Boxes3D.yaw", self.yaw, (m,), np.float64)
        _check("Boxes3D.velocity", np.nan_to_num(self.velocity, posinf=np.inf, neginf=-np.inf), (m, 2), np.float64)
        _check("Boxes3D.score", self.score, (m,), np.float64)
        _check("Boxes3D.label", self.label, (m,), np.int64)
        if m and (self.size.min() <= 0 or self.score.min() < 0 or self.score.max() > 1):
            raise ValueError(
                f"Boxes3D: size must be > 0 (least is {self.size.min()}), score in [0, 1] "
                f"(got {self.score.min()} to {self.score.max()})"
            )
        if m and not (0 <= self.label.min() and self.label.max() < len(self.classes)):
            raise ValueError(f"Boxes3D.label: {self.label.min()} to {self.label.max()} for {len(self.classes)} classes")
        for name, kind in (
            ("attribute", np.str_),
            ("track_id", np.str_),
            ("num_points", np.int64),
            ("num_radar_points", np.int64),
            ("visibility", np.int64),
        ):
            if (values := getattr(self, name)) is not None:
                _check(f"Boxes3D.{name}", values, (m,), kind)
        _check_stamp("Boxes3D.stamp_ns", self.stamp_ns)

    def __len__(self) -> int:
        return len(self.center)

    def select(self, index: Array) -> Boxes3D:
        """The boxes of a boolean mask or an index array, with all that belongs to them."""

        def optional(values: Array | None) -> Array | None:
            return None if values is None else values[index]

        return Boxes3D(
            self.center[index],
            self.size[index],
            self.yaw[index],
            self.velocity[index],
            self.score[index],
            self.label[index],
            self.classes,
            self.stamp_ns,
            optional(self.attribute),
            optional(self.track_id),
            optional(self.num_points),
            optional(self.num_radar_points),
            optional(self.visibility),
        )

    @staticmethod
    def empty(classes: tuple[str, ...], stamp_ns: int) -> Boxes3D:
        return Boxes3D(
            np.zeros((0, 3)),
            np.zeros((0, 3)),
            np.zeros(0),
            np.zeros((0, 2)),
            np.zeros(0),
            np.zeros(0, np.int64),
            classes,
            stamp_ns,
        )


@dataclass(frozen=True, slots=True, eq=False)
class OccupancyGrid3D:
    """Semantic occupancy; predictions and truth alike.

    Attributes:
        grid: where the voxels are.
        label: (X, Y, Z) uint8, index into `classes`, or IGNORE_LABEL where no benchmark scores.
        classes: the class names, the free one included.
        free_label: which label is empty space.
        stamp_ns: the anchor sensor's stamp.
        score: (X, Y, Z) float32 confidence of the label, or None.
        observed: kind of sensor (`lidar`, `camera`) -> (X, Y, Z) bool, what it could see; empty where not known.
    """

    grid: VoxelGrid
    label: Array
    classes: tuple[str, ...]
    free_label: int
    stamp_ns: int
    score: Array | None = None
    observed: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("OccupancyGrid3D.label", self.label, self.grid.shape, np.uint8)
        if not 0 <= self.free_label < len(self.classes):
            raise ValueError(f"OccupancyGrid3D.free_label: {self.free_label} for {len(self.classes)} classes")
        outside = (self.label >= len(self.classes)) & (self.label != IGNORE_LABEL)
        if outside.any():
            raise ValueError(f"OccupancyGrid3D.label: {int(self.label[outside].max())} for {len(self.classes)} classes")
        if self.score is not None:
            _check("OccupancyGrid3D.score", self.score, self.grid.shape, np.float32)
        for kind, mask in self.observed.items():
            _check(f"OccupancyGrid3D.observed[{kind!r}]", mask, self.grid.shape, np.bool_)
        _check_stamp("OccupancyGrid3D.stamp_ns", self.stamp_ns)

    @property
    def occupied(self) -> Array:
        """(X, Y, Z) bool: neither free nor ignored."""
        return (self.label != self.free_label) & (self.label != IGNORE_LABEL)


Prediction = Boxes3D | OccupancyGrid3D | Localization


@dataclass(frozen=True, slots=True, eq=False)
class Segmentation:
    """A label for every point (N,) or pixel (H, W).

    Attributes:
        label: uint8, index into `classes`, or IGNORE_LABEL.
        classes: the class names.
        instance: uint16 of the same shape, 0 where there is none; or None.
    """

    label: Array
    classes: tuple[str, ...]
    instance: Array | None = None

    def __post_init__(self) -> None:
        _check("Segmentation.label", self.label, tuple("N" for _ in self.label.shape), np.uint8)
        outside = (self.label >= len(self.classes)) & (self.label != IGNORE_LABEL)
        if outside.any():
            raise ValueError(f"Segmentation.label: {int(self.label[outside].max())} for {len(self.classes)} classes")
        if self.instance is not None:
            _check("Segmentation.instance", self.instance, self.label.shape, np.uint16)


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What is known to be true of a sample; None or an absent key where it is not known.

    Attributes:
        boxes: annotated objects, in ego.
        occupancy: semantic occupancy.
        map_from_ego: ego in the map frame at the sample's stamp.
        point_label: LiDAR role -> label of each point of the key frame (the first points of an accumulated cloud).
        depth: camera role -> (H, W) float32, metres along the optical axis; 0 where unknown.
        image_label: camera role -> label of each pixel.
    """

    boxes: Boxes3D | None = None
    occupancy: OccupancyGrid3D | None = None
    map_from_ego: Pose | None = None
    point_label: Mapping[str, Segmentation] = field(default_factory=dict)
    depth: Mapping[str, Array] = field(default_factory=dict)
    image_label: Mapping[str, Segmentation] = field(default_factory=dict)


Anchor = Literal["lidar", "radar", "camera"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a predictor reads of a sample; nothing else has to be loaded.

    Attributes:
        lidar: fields needed of every LiDAR cloud; None when it reads no LiDAR.
        radar: fields needed of every radar cloud; None when it reads no radar.
        cameras: roles needed.
        sweeps: sweeps to accumulate into each cloud, the key frame included.
        anchor: kind of sensor whose stamp makes a sample.
        motion: whether it reads IMU, odometry and GNSS.
    """

    lidar: tuple[str, ...] | None = None
    radar: tuple[str, ...] | None = None
    cameras: tuple[str, ...] = ()
    sweeps: int = 1
    anchor: Anchor = "lidar"
    motion: bool = False


@runtime_checkable
class Dataset(Protocol):
    """A source of samples with truth, in a fixed order. Reading is lazy and safe in DataLoader workers."""

    @property
    def tokens(self) -> Sequence[str]:
        """The name of each sample, in order."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample: ...

    def truth(self, i: int) -> Truth | None:
        """The truth of sample i, None where the data set has none (a test split)."""
        ...

    def scene_name(self, i: int) -> str:
        """The drive that sample i belongs to: samples of one scene follow each other in time."""
        ...
