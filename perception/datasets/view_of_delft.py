"""View-of-Delft (Palffy et al., RA-L 2022): camera, 64-beam LiDAR and a front 4D radar, in KITTI's folders.

    lidar/training/   velodyne/NNNNN.bin  (N, 4) float32: x, y, z, reflectance (0 to 255)
                      image_2/NNNNN.jpg   rectified, 1936 x 1216
                      calib/NNNNN.txt     P2 (3, 4) pinhole, Tr_velo_to_cam (3, 4): camera from LiDAR
                      label_2/NNNNN.txt   boxes; pose/NNNNN.json: three lines, odomToCamera, mapToCamera, UTMToCamera
    lidar/ImageSets/  train.txt, val.txt, test.txt: frame numbers
    radar/training/   velodyne/NNNNN.bin  (N, 7) float32: x, y, z, RCS, v_r, v_r_compensated, time
                      calib/NNNNN.txt     Tr_velo_to_cam: camera from radar
    radar_3frames, radar_5frames          the same with 3 and 5 accumulated scans (the manual calls them radar_3_scans,
                                          radar_5_scans: both names are found)

**ego is the LiDAR's frame**: the data set gives no base_link. The poses show that the LiDAR's z axis is vertical to a
tenth of a degree and 1.65 m above the plane they live in, so ego is level, but z = 0 is not the ground.

`odomToCamera` and its like are, against their names, `odom_from_camera`: their fourth column is where the camera is.
Every cloud and the pose is compensated to the camera's instant by the authors: a frame has one instant. The folders
hold no time: the stamp is the frame number at the LiDAR's nominal 10 Hz, true within a sequence only.

Labels follow KITTI (class, truncated, occluded, alpha, 2D box, height, width, length, bottom centre in the camera's
frame, rotation, score) with two differences (docs/ANNOTATION.md of the development kit): the second column is not
truncation, and rotation is about the LiDAR's -z axis: `yaw = -(rotation + pi/2)` in the LiDAR's frame, in which a box
stands upright. The labels with tracking numbers, a release of their own, carry these in the second column.
`occluded` 0, 1, 2 (fully visible, partly, largely occluded) is told as visibility 4, 2, 1, and 3 (not known) as 0.

The radar's `time` is 0 for the newest scan, -1 for the one before: it is given as `sweep` 0, 1, ... and, at the radar's
nominal 13 Hz, as `time_lag`. Written by `ViewOfDelftWriter`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from perception.config import Config
from perception.datasets.sensor_files import (
    check_single_sweep,
    read_floats,
    read_image,
    read_text,
    select_roles,
    write_floats,
    write_image,
)
from perception.errors import DataError
from perception.geometry import box_corners, project, transform_boxes, wrap_angle
from perception.sweeps import accumulate
from perception.types import Array, Boxes3D, CameraImage, PointCloud, Pose, Sample, Truth

CLASSES = (
    "Car",
    "Pedestrian",
    "Cyclist",
    "rider",
    "bicycle",
    "bicycle_rack",
    "human_depiction",
    "moped_scooter",
    "motor",
    "ride_other",
    "ride_uncertain",
    "truck",
    "vehicle_other",
)
"""The names in the label files, in the order of the official evaluation; it scores the first three."""

_PERIOD_NS = 100_000_000
_RADAR_PERIOD_S = 1 / 13
_VISIBILITY_OF_OCCLUDED = {"0": 4, "1": 2, "2": 1, "3": 0}
_OCCLUDED_OF_VISIBILITY = {4: "0", 3: "1", 2: "1", 1: "2", 0: "3"}
_POSES = ("odomToCamera", "mapToCamera", "UTMToCamera")
_SOURCE = "View-of-Delft"


class ViewOfDelftConfig(Config):
    """What to read of View-of-Delft.

    Attributes:
        root: the folder that holds `lidar` and `radar`.
        split: a list in `lidar/ImageSets` (train, val, test), or None for every frame that has a radar scan.
        radar_scans: scans accumulated by the authors: 1, 3 or 5.
        lidars, cameras, radars: roles to read, None for all (`top`, `front`, `front`).
        track_ids: the label files are those with tracking numbers in the second column.
    """

    name: Literal["view_of_delft"] = "view_of_delft"
    root: Path
    split: str | None = None
    radar_scans: Literal[1, 3, 5] = 1
    lidars: tuple[str, ...] | None = None
    cameras: tuple[str, ...] | None = None
    radars: tuple[str, ...] | None = None
    track_ids: bool = False


class ViewOfDelft:
    """Frames of View-of-Delft as samples; a token is a frame number.

    LiDAR `top`: `intensity`. Radar `front`: `rcs`, `radial_velocity`, `radial_velocity_comp`. Both carry `time_lag` and
    `sweep`. Camera `front`. Boxes have no velocity.

    Raises:
        ConfigError: a role that the data set does not have.
        DataError: a folder, a split or no frame at all is missing; on reading, a file is missing or damaged.
    """

    def __init__(self, config: ViewOfDelftConfig) -> None:
        self.config = config
        self._lidars = select_roles(config.lidars, ("top",), "dataset.lidars")
        self._cameras = select_roles(config.cameras, ("front",), "dataset.cameras")
        self._radars = select_roles(config.radars, ("front",), "dataset.radars")
        self._lidar = config.root / "lidar" / "training"
        self._radar = _radar_folder(config.root, config.radar_scans) / "training"
        self._tokens = _frames_of_split(config.root, config.split) if config.split else _frames_found(self._radar)

    @property
    def tokens(self) -> tuple[str, ...]:
        return self._tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, i: int) -> Sample:
        token = self._tokens[i]
        stamp_ns = int(token) * _PERIOD_NS
        intrinsic, camera_from_lidar = _read_calib(self._lidar / "calib" / f"{token}.txt")
        ego_from_camera = camera_from_lidar.inverse()
        lidars, radars, cameras = {}, {}, {}
        if self._lidars:
            lidars["top"] = _read_lidar(self._lidar / "velodyne" / f"{token}.bin", stamp_ns)
        if self._radars:
            # The folders of 3 and 5 scans link to the calibration of the single scans.
            camera_from_radar = _read_calib(self.config.root / "radar" / "training" / "calib" / f"{token}.txt")[1]
            path = self._radar / "velodyne" / f"{token}.bin"
            radars["front"] = _read_radar(path, ego_from_camera @ camera_from_radar, stamp_ns)
        if self._cameras:
            rgb = read_image(self._lidar / "image_2" / f"{token}.jpg", _SOURCE)
            cameras["front"] = CameraImage(rgb, intrinsic, ego_from_camera, stamp_ns)
        odom_from_camera = _read_poses(self._lidar / "pose" / f"{token}.json")["odomToCamera"]
        return Sample(stamp_ns, lidars, radars, cameras, odom_from_camera @ camera_from_lidar, token=token)

    def map_from_ego(self, i: int) -> Pose:
        """The LiDAR's pose in the data set's map frame."""
        token = self._tokens[i]
        camera_from_lidar = _read_calib(self._lidar / "calib" / f"{token}.txt")[1]
        return _read_poses(self._lidar / "pose" / f"{token}.json")["mapToCamera"] @ camera_from_lidar

    def scene_name(self, i: int) -> str:
        """Empty: the data set does not say where one drive ends."""
        return ""

    def truth(self, i: int) -> Truth:
        """Boxes and pose of a frame; boxes is None where no labels are given (the test split)."""
        token = self._tokens[i]
        path = self._lidar / "label_2" / f"{token}.txt"
        boxes = None
        if self.config.split in ("train", "val") or path.is_file():
            camera_from_lidar = _read_calib(self._lidar / "calib" / f"{token}.txt")[1]
            boxes = _read_boxes(path, camera_from_lidar.inverse(), int(token) * _PERIOD_NS, self.config.track_ids)
        return Truth(boxes, map_from_ego=self.map_from_ego(i))


def _radar_folder(root: Path, scans: int) -> Path:
    names = ("radar",) if scans == 1 else (f"radar_{scans}frames", f"radar_{scans}_scans")
    for name in names:
        if (root / name / "training").is_dir():
            return root / name
    there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) if root.is_dir() else ""
    raise DataError(
        f"{root}: has no {' or '.join(names)} with a folder training in it; it holds {there or 'nothing'}",
        "set dataset.root to the folder that holds lidar and radar, or dataset.radar_scans to what is there",
    )


def _frames_of_split(root: Path, split: str) -> tuple[str, ...]:
    path = root / "lidar" / "ImageSets" / f"{split}.txt"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
        raise DataError(f"{path}: no such split; there are: {there}", "leave dataset.split out to read every frame")
    tokens = tuple(read_text(path, _SOURCE).split())
    wrong = [t for t in tokens if not t.isascii() or not t.isdigit()]
    if wrong or not tokens:
        raise DataError(
            f"{path}: expected frame numbers, got {wrong[0] if wrong else 'none'!r}", f"is it of {_SOURCE}?"
        )
    return tokens


def _frames_found(folder: Path) -> tuple[str, ...]:
    tokens = tuple(sorted(p.stem for p in (folder / "velodyne").glob("*.bin") if p.stem.isdigit()))
    if not tokens:
        raise DataError(f"{folder / 'velodyne'}: holds no NNNNN.bin", "set dataset.root to the root of View-of-Delft")
    return tokens


def _numbers(text: str, count: int, where: str) -> Array:
    """`count` finite numbers separated by blanks; DataError names what is there instead."""
    try:
        values = np.array(text.split(), np.float64)
    except ValueError:
        values = np.zeros(0)
    if len(values) != count or not np.isfinite(values).all():
        raise DataError(f"{where}: expected {count} numbers, got {text.strip()!r}", f"is it a file of {_SOURCE}?")
    return values


def _pose(matrix: Array, where: str) -> Pose:
    try:
        return Pose.from_matrix(matrix)
    except ValueError as error:
        raise DataError(f"{where}: {error}", f"is it a file of {_SOURCE}?") from error


def _read_calib(path: Path) -> tuple[Array, Pose]:
    """A calibration file -> intrinsic (3, 3) of P2 and camera_from_<sensor>, the sensor being the folder's."""
    lines = dict(line.partition(":")[::2] for line in read_text(path, _SOURCE).splitlines())
    absent = [key for key in ("P2", "Tr_velo_to_cam") if key not in lines]
    if absent:
        raise DataError(
            f"{path}: has no line {' and '.join(absent)}; it has {', '.join(k for k in lines if k) or 'none'}",
            f"is it a calibration of {_SOURCE}?",
        )
    projection = _numbers(lines["P2"], 12, f"{path}: P2").reshape(3, 4)
    if projection[:, 3].any():
        raise DataError(f"{path}: P2 has the stereo offset {projection[:, 3].tolist()}", f"{_SOURCE} has one camera")
    sensor = _numbers(lines["Tr_velo_to_cam"], 12, f"{path}: Tr_velo_to_cam").reshape(3, 4)
    return np.ascontiguousarray(projection[:, :3]), _pose(sensor, f"{path}: Tr_velo_to_cam")


def _read_lidar(path: Path, stamp_ns: int) -> PointCloud:
    rows = read_floats(path, 4, _SOURCE)
    return accumulate([PointCloud(rows[:, :3].copy(), {"intensity": rows[:, 3].copy()}, Pose.identity(), stamp_ns)])


def _read_radar(path: Path, ego_from_radar: Pose, stamp_ns: int) -> PointCloud:
    """A scan, or several: the newest first, in the order of the file within a scan."""
    rows = read_floats(path, 7, _SOURCE)
    sweep = np.rint(-rows[:, 6]).astype(np.int64)
    if len(rows) and (sweep.min() < 0 or sweep.max() > 4):
        raise DataError(
            f"{path}: column time is {rows[:, 6].min():g} to {rows[:, 6].max():g}, expected -4 to 0",
            f"is it a radar file of {_SOURCE}?",
        )
    order = np.argsort(sweep, kind="stable")
    rows, sweep = rows[order], sweep[order]
    fields = {name: rows[:, 3 + k].copy() for k, name in enumerate(("rcs", "radial_velocity", "radial_velocity_comp"))}
    fields |= {"time_lag": (sweep * _RADAR_PERIOD_S).astype(np.float32), "sweep": sweep}
    return PointCloud(rows[:, :3].copy(), fields, ego_from_radar, stamp_ns)


def _read_poses(path: Path) -> dict[str, Pose]:
    """The three poses of a frame, each `<frame>_from_camera`."""
    poses: dict[str, Array] = {}
    for line in read_text(path, _SOURCE).splitlines():
        try:
            poses |= {key: np.array(values, np.float64).reshape(4, 4) for key, values in json.loads(line).items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(
                f"{path}: expected lines of JSON with 16 numbers: {error}", f"is it of {_SOURCE}?"
            ) from error
    if absent := [key for key in _POSES if key not in poses]:
        raise DataError(f"{path}: has no {', '.join(absent)}", f"the file is truncated; copy it again from {_SOURCE}")
    return {key: _pose(matrix, f"{path}: {key}") for key, matrix in poses.items()}


def _read_boxes(path: Path, ego_from_camera: Pose, stamp_ns: int, track_ids: bool) -> Boxes3D:
    """A label file -> boxes in ego, upright there. DontCare lines are regions of the image, not boxes: left out."""
    labels, second, visibility, numbers = [], [], [], []
    for n, line in enumerate(read_text(path, _SOURCE).splitlines(), 1):
        words = line.split()
        if not words or words[0] == "DontCare":
            continue
        where = f"{path}:{n}"
        if len(words) not in (15, 16):
            raise DataError(f"{where}: expected 15 or 16 columns, got {len(words)}", f"is it a label of {_SOURCE}?")
        if words[0] not in CLASSES:
            raise DataError(f"{where}: class {words[0]!r} is none of {', '.join(CLASSES)}", f"is it of {_SOURCE}?")
        if words[2] not in _VISIBILITY_OF_OCCLUDED:
            raise DataError(f"{where}: occluded is {words[2]!r}, expected 0, 1, 2 or 3", f"is it of {_SOURCE}?")
        labels.append(CLASSES.index(words[0]))
        second.append(words[1])
        visibility.append(_VISIBILITY_OF_OCCLUDED[words[2]])
        numbers.append(_numbers(" ".join(words[8:15]), 7, where))
    if not labels:
        return Boxes3D.empty(CLASSES, stamp_ns)
    height, width, length, *bottom, rotation = np.array(numbers).T
    center = ego_from_camera.apply(np.stack(bottom, -1))
    center[:, 2] += height / 2
    return Boxes3D(
        center,
        np.stack([length, width, height], -1),
        wrap_angle(-(rotation + np.pi / 2)),
        np.full((len(labels), 2), np.nan),
        np.ones(len(labels)),
        np.array(labels, np.int64),
        CLASSES,
        stamp_ns,
        track_id=np.array(second, np.str_) if track_ids else None,
        visibility=np.array(visibility, np.int64),
    )


class ViewOfDelftWriter:
    """Writes samples in View-of-Delft's folders, for `ViewOfDelft` to read.

    What is read back has the LiDAR's frame for ego, whatever ego was in the samples. Not kept, since the layout has no
    place for them: velocities and attributes of boxes, odometry and IMU, point fields beyond the layout's.

        with ViewOfDelftWriter(root) as writer:
            writer.start_sequence(map_from_ego, split="train")
            writer.add_sample(sample, truth)

    Raises:
        DataError: the folder already holds a data set.
    """

    def __init__(self, root: Path) -> None:
        if (root / "lidar").exists() or (root / "radar").exists():
            raise DataError(f"{root}: already holds lidar or radar", "write to an empty folder")
        self._lidar = root / "lidar" / "training"
        self._radar = root / "radar" / "training"
        self._split_of_token: dict[str, str] = {}
        self._split = ""
        self._map_from_ego: Callable[[int], Pose] | None = None
        self._start_from_map: Pose | None = None

    def __enter__(self) -> ViewOfDelftWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        lists = self._lidar.parent / "ImageSets"
        lists.mkdir(parents=True, exist_ok=True)
        for split in sorted(set(self._split_of_token.values())):
            tokens = sorted(token for token, s in self._split_of_token.items() if s == split)
            (lists / f"{split}.txt").write_text("\n".join(tokens) + "\n")

    def start_sequence(self, map_from_ego: Callable[[int], Pose], split: str = "train") -> None:
        """The following samples are of one drive; `map_from_ego(stamp_ns)` is its true pose."""
        self._map_from_ego, self._split, self._start_from_map = map_from_ego, split, None

    def add_sample(self, sample: Sample, truth: Truth | None = None) -> None:
        """Write one frame: LiDAR `top`, radar `front` and camera `front`; labels where the truth has boxes.

        Raises:
            ValueError: no sequence was started, a sensor or a field is missing, the LiDAR's cloud is accumulated, the
                stamp is no new multiple of 0.1 s below 10,000 s, or a class or track has no place in the layout.
        """
        if self._map_from_ego is None:
            raise ValueError("ViewOfDelftWriter: start_sequence comes before add_sample")
        missing = [
            f"{kind} {role}"
            for kind, role, there in (
                ("LiDAR", "top", sample.lidars),
                ("radar", "front", sample.radars),
                ("camera", "front", sample.cameras),
            )
            if role not in there
        ]
        if missing:
            raise ValueError(f"ViewOfDelftWriter: the sample at {sample.stamp_ns} ns has no {', '.join(missing)}")
        lidar, radar, image = sample.lidars["top"], sample.radars["front"], sample.cameras["front"]
        check_single_sweep(lidar, "ViewOfDelftWriter: LiDAR top")
        token = self._new_token(sample.stamp_ns)
        map_from_ego = self._map_from_ego(sample.stamp_ns)
        if self._start_from_map is None:
            self._start_from_map = map_from_ego.inverse()
        odom_from_ego = sample.odom_from_ego or self._start_from_map @ map_from_ego

        camera_from_ego = image.ego_from_camera.inverse()
        camera_from_lidar = camera_from_ego @ lidar.ego_from_sensor
        write_floats(self._lidar / "velodyne" / f"{token}.bin", [lidar.xyz, lidar.field("intensity")])
        _write_radar(self._radar / "velodyne" / f"{token}.bin", radar)
        write_image(self._lidar / "image_2" / f"{token}.jpg", image.rgb)
        _write_calib(self._lidar / "calib" / f"{token}.txt", image.intrinsic, camera_from_lidar)
        _write_calib(self._radar / "calib" / f"{token}.txt", image.intrinsic, camera_from_ego @ radar.ego_from_sensor)
        # The map stands in for UTM: only a place on the globe would tell them apart.
        poses = (odom_from_ego, map_from_ego, map_from_ego)
        _write_lines(
            self._lidar / "pose" / f"{token}.json",
            [
                json.dumps({key: (pose @ image.ego_from_camera).matrix.ravel().tolist()})
                for key, pose in zip(_POSES, poses, strict=True)
            ],
        )
        if truth is not None and truth.boxes is not None:
            boxes = transform_boxes(lidar.ego_from_sensor.inverse(), truth.boxes)
            _write_boxes(self._lidar / "label_2" / f"{token}.txt", boxes, camera_from_lidar, image)
        self._split_of_token[token] = self._split

    def _new_token(self, stamp_ns: int) -> str:
        number, rest = divmod(stamp_ns, _PERIOD_NS)
        token = f"{number:05d}"
        if rest or not 0 <= number < 100_000 or token in self._split_of_token:
            raise ValueError(
                f"ViewOfDelftWriter: the stamp {stamp_ns} ns is no new multiple of 0.1 s below 10,000 s; the layout "
                "numbers its frames at 10 Hz and keeps no other time"
            )
        return token


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _words(values: Array) -> str:
    return " ".join(repr(float(v)) for v in values.ravel())


def _write_calib(path: Path, intrinsic: Array, camera_from_sensor: Pose) -> None:
    projection = _words(np.concatenate([intrinsic, np.zeros((3, 1))], 1))
    lines = [f"P{k}: {projection}" for k in range(4)]
    lines += [f"R0_rect: {_words(np.eye(3))}", f"Tr_velo_to_cam: {_words(camera_from_sensor.matrix[:3])}"]
    _write_lines(path, [*lines, "Tr_imu_to_velo:"])


def _write_radar(path: Path, radar: PointCloud) -> None:
    sweep = radar.fields.get("sweep", np.zeros(len(radar), np.int64))
    names = ("rcs", "radial_velocity", "radial_velocity_comp")
    write_floats(path, [radar.xyz, *(radar.field(name) for name in names), -sweep])


def _write_boxes(path: Path, boxes: Boxes3D, camera_from_lidar: Pose, image: CameraImage) -> None:
    """Boxes in the LiDAR's frame -> a label file."""
    names = [boxes.classes[k] for k in boxes.label]
    if strange := sorted(set(names) - set(CLASSES)):
        raise ValueError(f"ViewOfDelftWriter: no class {', '.join(strange)}; the layout has {', '.join(CLASSES)}")
    tracks = ["0"] * len(boxes) if boxes.track_id is None else boxes.track_id.tolist()
    if wrong := [t for t in tracks if not t.isdecimal()]:
        raise ValueError(f"ViewOfDelftWriter: track {wrong[0]!r} is no number, which the layout asks for")
    visibility = np.full(len(boxes), 4) if boxes.visibility is None else boxes.visibility
    bottom = camera_from_lidar.apply(boxes.center - np.array([[0.0, 0.0, 0.5]]) * boxes.size[:, 2:])
    rotation = wrap_angle(-boxes.yaw - np.pi / 2)
    alpha = wrap_angle(rotation - np.arctan2(bottom[:, 0], bottom[:, 2]))
    rectangle = _rectangles(camera_from_lidar.apply(box_corners(boxes)), image)
    numbers = np.concatenate([rectangle, boxes.size[:, ::-1], bottom, rotation[:, None]], 1)  # (M, 11)
    lines = [
        f"{name} {track} {_OCCLUDED_OF_VISIBILITY[int(seen)]} {_words(angle)} {_words(row)} 1"
        for name, track, seen, angle, row in zip(names, tracks, visibility, alpha, numbers, strict=True)
    ]
    _write_lines(path, lines)


def _rectangles(corners_camera: Array, image: CameraImage) -> Array:
    """Corners (M, 8, 3) in the camera's frame -> left, top, right, bottom (M, 4) in the image; zeros where unseen."""
    height, width = image.rgb.shape[:2]
    pixel, _ = project(corners_camera, image.intrinsic)  # (M, 8, 2), NaN behind the camera
    rectangles = np.zeros((len(pixel), 4))
    for m in np.flatnonzero(np.isfinite(pixel).any((1, 2))):
        low, high = np.nanmin(pixel[m], 0), np.nanmax(pixel[m], 0)
        if (high > 0).all() and low[0] < width - 1 and low[1] < height - 1:
            rectangles[m] = np.clip(np.r_[low, high], 0, [width - 1, height - 1] * 2)
    return rectangles
