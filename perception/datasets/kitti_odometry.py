"""The files of one KITTI odometry sequence (Geiger et al., CVPR 2012), which SemanticKITTI extends.

* `velodyne/NNNNNN.bin`: float32 rows x, y, z, reflectance (0 to 1), in the LiDAR's frame (x forward, y left, z up).
* `image_2/NNNNNN.png`: the left colour camera, rectified.
* `calib.txt`: `P2`, the 3 x 4 projection of rectified cam0 coordinates to pixels of image_2; `Tr`, the 3 x 4 transform
  cam0_from_lidar. P2 = K [1 | t] with cam2_from_cam0 a pure translation t, as the pair is rectified.
* `times.txt`: seconds, one line a scan. `poses.txt`: map_cam0_from_cam0, twelve numbers of a 3 x 4 matrix a scan; the
  map frame is an optical one too (x right, y down, z forward).

Decimal text is read exactly: 0.103736 s is 103,736,000 ns.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import cv2
import numpy as np

from perception.errors import DataError
from perception.types import Array, Pose

_SOURCE = "the KITTI odometry download"
_PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What calib.txt says.

    Attributes:
        cam0_from_lidar: `Tr`.
        projection: (3, 4) float64 `P2`, or None where the sequence has no camera.
    """

    cam0_from_lidar: Pose
    projection: Array | None

    @property
    def intrinsic(self) -> Array | None:
        """(3, 3) float64 of image_2, pixels."""
        return None if self.projection is None else np.ascontiguousarray(self.projection[:, :3])

    @property
    def lidar_from_camera(self) -> Pose | None:
        """From image_2's optical frame to the LiDAR's."""
        if self.projection is None:
            return None
        offset = np.linalg.solve(self.projection[:, :3], self.projection[:, 3])
        return self.cam0_from_lidar.inverse() @ Pose(np.eye(3), offset).inverse()


def read_values(path: Path, dtype: str, source: str, multiple: int = 1, count: int | None = None) -> Array:
    """All values of a raw little-endian file, 1-D.

    Args:
        path: the file.
        dtype: of one value, `<f4` and the like.
        source: where such files come from, for the message.
        multiple: the values come in groups of so many.
        count: how many values there must be; None for any number but none.

    Raises:
        DataError: the file is missing or its size does not fit.
    """
    try:
        size = path.stat().st_size
        unit = np.dtype(dtype).itemsize * multiple
        if count is not None and size != count * unit // multiple:
            raise DataError(
                f"{path}: {size:,} bytes; expected {count * unit // multiple:,}",
                f"the file is truncated or of another layout; copy it again from {source}",
            )
        if size == 0 or size % unit:
            raise DataError(
                f"{path}: {size:,} bytes, which is no whole number of {unit}-byte records (or none)",
                f"the file is truncated or of another layout; copy it again from {source}",
            )
        return np.fromfile(path, dtype)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", f"it is part of {source}") from error


def read_scan(path: Path) -> tuple[Array, Array]:
    """A velodyne scan: (N, 3) float32 metres in the LiDAR's frame, (N,) float32 reflectance in [0, 1]."""
    values = read_values(path, "<f4", _SOURCE, multiple=4).reshape(-1, 4)
    if not np.isfinite(values).all():
        raise DataError(
            f"{path}: {int((~np.isfinite(values).all(1)).sum())} of {len(values)} points are not finite",
            f"the file is damaged; copy it again from {_SOURCE}",
        )
    return np.ascontiguousarray(values[:, :3]), np.ascontiguousarray(values[:, 3])


def write_scan(path: Path, xyz: Array, reflectance: Array) -> None:
    """Write points (N, 3) and reflectances (N,), in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.concatenate([xyz, reflectance[:, None]], 1).astype("<f4").tofile(path)


def read_image(path: Path) -> Array:
    """(H, W, 3) uint8 RGB of a PNG. Raises DataError for a missing, truncated or foreign file."""
    data = read_values(path, "u1", _SOURCE)
    # Some releases of OpenCV decode a truncated PNG without a word and leave the rest grey.
    whole = data[-len(_PNG_END) :].tobytes() == _PNG_END
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if whole else None
    if image is None:
        raise DataError(f"{path}: not a whole PNG ({len(data):,} bytes)", f"copy it again from {_SOURCE}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def write_image(path: Path, rgb: Array) -> None:
    """Write (H, W, 3) uint8 RGB as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    data.tofile(path)


def read_calibration(path: Path) -> Calibration:
    """`Tr` and `P2` of calib.txt. Raises DataError where the file or `Tr` is missing, or a matrix is none."""
    entries = dict(line.partition(":")[::2] for line in _lines(path))
    matrices = {key: _matrix(entries[key].split(), f"{path}: {key}") for key in ("Tr", "P2") if key in entries}
    if "Tr" not in matrices:
        raise DataError(
            f"{path}: no line 'Tr:'; it has {', '.join(entries) or 'none'}",
            "KITTI's image downloads leave Tr out: take calib.txt of data_odometry_calib.zip or of SemanticKITTI",
        )
    projection = matrices.get("P2")
    if projection is not None and (min(projection[0, 0], projection[1, 1]) <= 0 or projection[2, 2] != 1):
        raise DataError(f"{path}: P2 is no projection: {projection.tolist()}", f"copy it again from {_SOURCE}")
    return Calibration(_pose(matrices["Tr"], f"{path}: Tr"), projection)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write calib.txt; P0 to P3 are all the one camera."""
    lines = [f"Tr: {_text(calibration.cam0_from_lidar.matrix[:3])}"]
    if calibration.projection is not None:
        lines = [f"P{k}: {_text(calibration.projection)}" for k in range(4)] + lines
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


def read_times(path: Path) -> list[int]:
    """Nanoseconds of each line of times.txt, exactly. Raises DataError unless they grow."""
    stamps: list[int] = []
    for number, line in enumerate(_lines(path), 1):
        try:
            stamps.append(round(Decimal(line) * 10**9))
        except (InvalidOperation, ValueError, OverflowError) as error:
            raise DataError(f"{path}:{number}: {line!r} is no number of seconds", "one number a line") from error
        if number > 1 and stamps[-1] <= stamps[-2]:
            raise DataError(f"{path}:{number}: {line} s is not after the line before", f"copy it from {_SOURCE}")
    return stamps


def write_times(path: Path, stamps_ns: list[int]) -> None:
    """Write times.txt with all nine decimals."""
    path.write_text("".join(f"{Decimal(stamp).scaleb(-9):.9f}\n" for stamp in stamps_ns), encoding="ascii")


def read_poses(path: Path) -> Array:
    """(P, 3, 4) float64, row i the pose of scan i: map_cam0_from_cam0."""
    rows = [_matrix(line.split(), f"{path}:{number}") for number, line in enumerate(_lines(path), 1)]
    return np.array(rows).reshape(-1, 3, 4)


def write_poses(path: Path, map_cam0_from_cam0: list[Pose]) -> None:
    """Write poses.txt, thirteen digits a number."""
    path.write_text("".join(f"{_text(pose.matrix[:3])}\n" for pose in map_cam0_from_cam0), encoding="ascii")


def map_from_lidar(pose: Array, calibration: Calibration, where: str) -> Pose:
    """A row (3, 4) of poses.txt as a pose of the LiDAR in the map frame turned upright.

    That frame is where a LiDAR would be if cam0 stood at the pose file's origin: x forward, y left, z up.
    """
    cam0_from_lidar = calibration.cam0_from_lidar
    return cam0_from_lidar.inverse() @ _pose(pose, where) @ cam0_from_lidar


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="ascii")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", f"it comes with {_SOURCE}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file", f"copy it again from {_SOURCE}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path}: empty", f"copy it again from {_SOURCE}")
    return lines


def _matrix(words: list[str], where: str) -> Array:
    """Twelve words -> (3, 4) float64."""
    try:
        matrix = np.array(words, np.float64).reshape(3, 4)
    except ValueError:
        matrix = np.full((3, 4), np.nan)
    if not np.isfinite(matrix).all():
        raise DataError(f"{where}: expected 12 numbers, got {' '.join(words)!r:.80}", f"copy it again from {_SOURCE}")
    return matrix


def _pose(matrix: Array, where: str) -> Pose:
    """The pose nearest to a (3, 4) matrix: six printed digits leave a rotation off by 1e-6."""
    u, _, vt = np.linalg.svd(matrix[:, :3])
    rotation = u @ vt
    if np.abs(rotation - matrix[:, :3]).max() > 1e-4 or np.linalg.det(rotation) < 0:
        raise DataError(f"{where}: not a rigid transform: {matrix.tolist()}", f"copy it again from {_SOURCE}")
    return Pose(rotation, np.ascontiguousarray(matrix[:, 3]))


def _text(matrix: Array) -> str:
    return " ".join(f"{value:.12e}" for value in matrix.reshape(-1))
