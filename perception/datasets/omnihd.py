"""OmniHD-Scenes (Zheng et al., arXiv 2412.10734; "NewScenes" in its code): 6 cameras, a LiDAR and six 4D radars.

    {clip}/lidar/lidar_top_compensation/{stamp}.bin   (N, 6) float32: x, y, z, intensity, two undocumented columns
    {clip}/radars/radar_{left_front}/{stamp}.bin      (N, 8) float32: x, y, z, radial velocity (relative), power, motion
                                                      state, SNR, valid flag; in the radar's frame, x forward
    {clip}/cameras/camera_{left_front}/{stamp}.jpg    as the lens saw it; 1920 x 1080, front and back 3840 x 2160
    {clip}/occ_gt/{stamp}.npz                         see `omnihd_occupancy`
    v1.0-trainval/*.json                              the tables

A clip is named by its first stamp; stamps and tokens are microseconds in decimal. The tables, each a list of rows:
`sample_data`: every synchronised frame (10 Hz) of 13 sensors: token, prev, next, timestamp, is_key_frame, and of each
of `lidar`, `cameras`, `radars` and `ego_pose` a mapping from the sensor's key to its file or to its pose's token;
`sample`: the key frames (2 Hz): token, prev, next, timestamp, frame_idx, scene_token, scene_name;
`ego_pose`: scene_token, token, pose (4 x 4, row by row, map_from_ego); `imu_data`: scene_token, token, gyro_xyz,
acc_xyz, velocity_enu, velocity_ego, a row for each pose's token; `sensor_calibration`: token (the clip), calib:
sensor's key -> intrinsic (3 x 3), distortion, camera2ego or radar2ego (4 x 4); `annotations`: token (the key frame),
scene_token, annotations: center, size (x is the length), rotation.z (yaw), category, id, visibility (1: a camera sees
it), all in ego; `meta`; and `scene_split`, a mapping from split to clips.

These names are the development kit's (TJRadarLab/OmniHD-Scenes) and those of the tool that made the tables
(TJRadarLab/Doracamom). What the public text leaves open, and what is taken here:

* The kit opens `imu_data.json`, its manual lists `imu.json`: either is read.
* The kit takes every camera for simultaneous with the LiDAR. So does this reader, unless a frame's `ego_pose` names a
  pose for the camera, which `OmniHDWriter` writes. A camera's or radar's stamp is the name of its file.
* gyro_xyz and acc_xyz are copied from the receiver's GPCHC sentence: deg/s and g along the axes of the picture of the
  vehicle, x right, y forward, z up.
* The LiDAR files are in ego already, compensated to the frame's stamp (ego_from_lidar is the identity; the true mount
  is about (1.26, 0, 1.855) m). Its columns 4 and 5 are described nowhere: not read, written as 0.
* `scene_split.json` may hold train and test alone. The kit's suggestion of 120, 20 and 60 clips is a file of its own:
  `split_file`.

Otherwise than the kit: Doppler is compensated with the lever arm (`sweeps.compensate_radial_velocity`), halving an
image moves its principal point by a quarter of a pixel, and points stay in their sensor's frame. As the kit: velocities
of boxes are differences of positions over neighbouring key frames, samples are in the order of their stamps, and at the
start of a clip, where there are too few earlier frames, a radar's oldest one is repeated (the LiDAR's is not).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

import cv2
import numpy as np
from pydantic import Field

from perception.config import Config
from perception.datasets import omnihd_occupancy
from perception.datasets.omnihd_index import Annotations, clips_of_split, read_index
from perception.datasets.omnihd_layout import (
    CAMERAS,
    CLASSES,
    DOUBLED_CAMERAS,
    LIDAR,
    LIDAR_COLUMNS,
    RADAR_FIELDS,
    RADARS,
    SENSORS,
    SOURCE,
    Sensor,
    halved_intrinsic,
)
from perception.datasets.omnihd_writer import OmniHDWriter as OmniHDWriter
from perception.datasets.sensor_files import read_floats, read_image, select_roles
from perception.errors import DataError
from perception.rectify import CameraModel
from perception.sweeps import accumulate, compensate_radial_velocity
from perception.types import (
    Array,
    Boxes3D,
    CameraImage,
    Imu,
    OccupancyGrid3D,
    Odometry,
    PointCloud,
    Pose,
    Sample,
    Truth,
)

_COLUMN = {sensor: k for k, sensor in enumerate(SENSORS)}
_MAX_VELOCITY_GAP_S = 1.5
"""Key frames further apart tell no velocity; twice that between the two neighbours of a key frame."""


class OmniHDConfig(Config):
    """What of OmniHD-Scenes is read.

    Attributes:
        root: the folder of the clips and of the version's folder.
        version: the folder of the tables.
        split: a split of `scene_split.json`, or of `split_file` where that is given.
        split_file: another table of splits, such as the development kit's `scene_split_trainvaltest_suggested.json`.
        sweeps: frames accumulated into each cloud, the key frame included; the benchmark's radars use 3.
        lidars, cameras, radars: roles to read; None is all of them, () none.
        occupancy: read the occupancy truth, which is a download of its own.
        occupancy_root: the folder that holds it, clip by clip; None is `root`.
    """

    name: Literal["omnihd"] = "omnihd"
    root: Path
    version: str = "v1.0-trainval"
    split: str = "train"
    split_file: Path | None = None
    sweeps: int = Field(1, ge=1)
    lidars: tuple[str, ...] | None = None
    cameras: tuple[str, ...] | None = None
    radars: tuple[str, ...] | None = None
    occupancy: bool = False
    occupancy_root: Path | None = None


class OmniHD:
    """The key frames of a split, in the order of their stamps; ego and stamp are the LiDAR's.

    LiDAR `top`: `intensity`. Radars: `radial_velocity`, `power`, `motion_state`, `snr`, `valid` (the last two states as
    stored) and `radial_velocity_comp`, `vx_comp`, `vy_comp`. Clouds carry `time_lag` and `sweep`, even of one sweep.
    `odom_from_ego` starts at the clip's first frame; `imu` and `odometry` are the readings since the previous sample.

    Raises:
        ConfigError: a role that the data set does not have.
        DataError: a table, a split or a file is missing, damaged or foreign.
    """

    def __init__(self, config: OmniHDConfig) -> None:
        self.config = config
        self._lidars = select_roles(config.lidars, (LIDAR.role,), "dataset.lidars")
        self._cameras = select_roles(config.cameras, tuple(s.role for s in CAMERAS), "dataset.cameras")
        self._radars = select_roles(config.radars, tuple(s.role for s in RADARS), "dataset.radars")
        tables = config.root / config.version
        clips = clips_of_split(config.split_file or tables / "scene_split.json", config.split)
        self._index = read_index(tables, clips)
        if not len(self._index.sample_frame):
            raise DataError(
                f"{tables / 'sample.json'}: no key frame belongs to the {len(clips)} clips of split {config.split!r}",
                "the tables and the split must be of one release",
            )
        self.tokens = tuple(str(stamp) for stamp in self._index.frames.stamp_us[self._index.sample_frame].tolist())

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Sample:
        frame = int(self._index.sample_frame[i])
        map_from_ego = self._map_from_ego(frame, LIDAR)
        ego_from_map = map_from_ego.inverse()
        files = self._index.frames.file[frame]
        lidars = [s for s in (LIDAR,) if s.role in self._lidars and files[_COLUMN[s]]]
        radars = [s for s in RADARS if s.role in self._radars and files[_COLUMN[s]]]
        cameras = [s for s in CAMERAS if s.role in self._cameras and files[_COLUMN[s]]]
        first = int(np.searchsorted(self._index.frames.clip, self._index.frames.clip[frame]))
        imu, odometry = self._motion_since_previous(i)
        return Sample(
            int(self._index.frames.stamp_us[frame]) * 1000,
            {s.role: accumulate([self._lidar(f, ego_from_map) for f in self._frames_back(frame, s)]) for s in lidars},
            {s.role: self._radar_sweeps(frame, s, ego_from_map) for s in radars},
            {s.role: self._camera(frame, s, ego_from_map) for s in cameras},
            odom_from_ego=self._map_from_ego(first, LIDAR).inverse() @ map_from_ego,
            imu=imu,
            odometry=odometry,
            token=self.tokens[i],
        )

    def truth(self, i: int) -> Truth:
        """Boxes of the four detection classes (None where not annotated), the configured occupancy, and the pose.

        Boxes: `visibility` is 4 where a camera sees the box, else 1; the benchmark scores the former alone.
        """
        boxes = self._boxes(i) if self._index.annotations.known[i] else None
        return Truth(boxes, self.occupancy(i), self.map_from_ego(i))

    def occupancy(self, i: int) -> OccupancyGrid3D | None:
        """The occupancy alone; None where it is not configured."""
        if not self.config.occupancy:
            return None
        return omnihd_occupancy.read(
            self._occupancy_file(self.config.occupancy_root or self.config.root, i), self._stamp(i)
        )

    def read_prediction(self, root: Path, i: int) -> OccupancyGrid3D | None:
        """An occupancy that lies under `root` in the layout of the truth; None where there is no file of sample i."""
        path = self._occupancy_file(root, i)
        return omnihd_occupancy.read(path, self._stamp(i)) if path.is_file() else None

    def _occupancy_file(self, root: Path, i: int) -> Path:
        lidar_file = self._index.frames.file[self._index.sample_frame[i], _COLUMN[LIDAR]].decode()
        return omnihd_occupancy.file_path(root, lidar_file)

    def _stamp(self, i: int) -> int:
        return int(self._index.frames.stamp_us[self._index.sample_frame[i]]) * 1000

    def map_from_ego(self, i: int) -> Pose:
        """Ego in the clip's map at the sample's stamp."""
        return self._map_from_ego(int(self._index.sample_frame[i]), LIDAR)

    def scene_name(self, i: int) -> str:
        """The clip, named by its first stamp in microseconds."""
        first = np.searchsorted(self._index.frames.clip, self._index.frames.clip[self._index.sample_frame[i]])
        return str(int(self._index.frames.stamp_us[first]))

    def _pose_row(self, frame: int, sensor: Sensor) -> int:
        """The pose at a sensor's stamp; of a camera that has none, the LiDAR's, as in the development kit."""
        row = int(self._index.frames.pose[frame, _COLUMN[sensor]])
        if row < 0 and sensor in CAMERAS:
            row = int(self._index.frames.pose[frame, _COLUMN[LIDAR]])
        if row < 0:
            raise DataError(
                f"{self.config.root / self.config.version}/ego_pose.json: has no pose of {sensor.key} for frame "
                f"{self._index.frames.stamp_us[frame]}",
                f"the tables must be of one release of {SOURCE}",
            )
        return row

    def _map_from_ego(self, frame: int, sensor: Sensor) -> Pose:
        return Pose.from_matrix(self._index.map_from_ego[self._pose_row(frame, sensor)])

    def _file(self, frame: int, sensor: Sensor) -> Path:
        return self.config.root / self._index.frames.file[frame, _COLUMN[sensor]].decode()

    def _frames_back(self, frame: int, sensor: Sensor) -> list[int]:
        """The frame and those before it that have the sensor, `sweeps` of them or as many as the clip has."""
        frames: list[int] = []
        while frame >= 0 and len(frames) < self.config.sweeps:
            if self._index.frames.file[frame, _COLUMN[sensor]]:
                frames.append(frame)
            frame = int(self._index.frames.previous[frame])
        return frames

    def _lidar(self, frame: int, ego_from_map: Pose) -> PointCloud:
        rows = read_floats(self._file(frame, LIDAR), LIDAR_COLUMNS, SOURCE)
        ego_from_then = ego_from_map @ self._map_from_ego(frame, LIDAR)
        stamp_ns = int(self._index.frames.stamp_us[frame]) * 1000
        return PointCloud(rows[:, :3].copy(), {"intensity": rows[:, 3].copy()}, ego_from_then, stamp_ns)

    def _radar_sweeps(self, frame: int, sensor: Sensor, ego_from_map: Pose) -> PointCloud:
        sweeps = [self._radar(f, sensor, ego_from_map) for f in self._frames_back(frame, sensor)]
        return accumulate(sweeps + sweeps[-1:] * (self.config.sweeps - len(sweeps)))

    def _radar(self, frame: int, sensor: Sensor, ego_from_map: Pose) -> PointCloud:
        """One sweep of one radar, its Doppler compensated with ego's motion at its own stamp."""
        path = self._file(frame, sensor)
        rows = read_floats(path, 3 + len(RADAR_FIELDS), SOURCE)
        row = self._pose_row(frame, sensor)
        reading = self._index.motion_of_pose[row]
        if reading < 0:
            raise DataError(
                f"{self.config.root / self.config.version}/imu_data.json: has no row at the stamp of {path}",
                f"its velocity compensates the radar's; the tables must be of one release of {SOURCE}",
            )
        mounts = self._index.calibrations[self._index.frames.clip[frame]].ego_from_radar
        ego_from_radar = _calibrated(mounts, sensor, path)
        fields = {name: rows[:, 3 + k].copy() for k, name in enumerate(RADAR_FIELDS)}
        ego_from_then = ego_from_map @ Pose.from_matrix(self._index.map_from_ego[row])
        cloud = PointCloud(rows[:, :3].copy(), fields, ego_from_then @ ego_from_radar, _stamp_ns(path))
        motion = self._index.motion
        return compensate_radial_velocity(
            cloud, ego_from_radar, motion.linear_velocity[reading], motion.angular_velocity[reading]
        )

    def _camera(self, frame: int, sensor: Sensor, ego_from_map: Pose) -> CameraImage:
        """One image, halved where it is stored twice as large, then rectified."""
        path = self._file(frame, sensor)
        calibration = _calibrated(self._index.calibrations[self._index.frames.clip[frame]].cameras, sensor, path)
        rgb, intrinsic = read_image(path, SOURCE), calibration.intrinsic
        if sensor.role in DOUBLED_CAMERAS:
            rgb = cv2.resize(rgb, (rgb.shape[1] // 2, rgb.shape[0] // 2), interpolation=cv2.INTER_AREA)
            intrinsic = halved_intrinsic(intrinsic)
        try:
            rgb, intrinsic = _lens(rgb, intrinsic, calibration.distortion).rectify(rgb)
        except DataError as error:
            raise DataError(
                f"{path}, {sensor.key} of its clip in sensor_calibration.json: {error.what}", error.do
            ) from None
        ego_from_camera = ego_from_map @ self._map_from_ego(frame, sensor) @ calibration.ego_from_camera
        return CameraImage(rgb, intrinsic, ego_from_camera, _stamp_ns(path))

    def _motion_since_previous(self, i: int) -> tuple[Imu, Odometry]:
        index = self._index
        frame, before = index.sample_frame[i], index.sample_previous[i]
        until_us = index.frames.stamp_us[frame]
        since_us = index.frames.stamp_us[index.sample_frame[before]] if before >= 0 else np.iinfo(np.int64).min
        rows = slice(*np.searchsorted(index.motion_clip, index.frames.clip[frame] + np.array([0, 1])))
        stamp_us = index.motion_stamp_us[rows]
        within = slice(*(rows.start + np.searchsorted(stamp_us, [since_us, until_us], "right")))
        stamp_ns, motion = index.motion_stamp_us[within] * 1000, index.motion
        return (
            Imu(stamp_ns, motion.angular_velocity[within], motion.linear_acceleration[within]),
            Odometry(stamp_ns, motion.linear_velocity[within], motion.angular_velocity[within]),
        )

    def _boxes(self, i: int) -> Boxes3D:
        table = self._index.annotations
        rows = slice(*table.start[i : i + 2])
        count = rows.stop - rows.start
        return Boxes3D(
            table.center[rows],
            table.size[rows],
            table.yaw[rows],
            self._velocities(i),
            np.ones(count),
            table.label[rows],
            CLASSES,
            int(self._index.frames.stamp_us[self._index.sample_frame[i]]) * 1000,
            track_id=table.track_id[rows],
            visibility=np.where(table.visible[rows], 4, 1).astype(np.int64),
        )

    def _velocities(self, i: int) -> Array:
        """(M, 2) m/s along ego's axes: by where the tracks were and will be a key frame away, NaN where that is far."""
        here = self._tracks(i)
        before, after = (
            dict(self._tracks(int(k))) if k >= 0 else {}
            for k in (self._index.sample_previous[i], self._index.sample_next[i])
        )
        velocity = np.full((len(here), 3), np.nan)
        for m, (track, now) in enumerate(here):
            (t0, p0), (t1, p1) = before.get(track, now), after.get(track, now)
            longest_s = _MAX_VELOCITY_GAP_S * (2 if track in before and track in after else 1)
            if 0 < t1 - t0 <= longest_s * 1e6:
                velocity[m] = (p1 - p0) / ((t1 - t0) * 1e-6)
        return (velocity @ self.map_from_ego(i).rotation)[:, :2]  # map to ego: the inverse rotation, from the right

    def _tracks(self, i: int) -> list[tuple[str, tuple[int, Array]]]:
        """Each box' track, with its stamp in microseconds and place (3,) in the map, of one key frame."""
        table: Annotations = self._index.annotations
        rows = slice(*table.start[i : i + 2])
        place = self.map_from_ego(i).apply(table.center[rows])
        stamp_us = int(self._index.frames.stamp_us[self._index.sample_frame[i]])
        return [(str(track), (stamp_us, p)) for track, p in zip(table.track_id[rows], place, strict=True)]


T = TypeVar("T")


def _calibrated(of_role: dict[str, T], sensor: Sensor, path: Path) -> T:
    if sensor.role not in of_role:
        raise DataError(
            f"{path}: sensor_calibration.json has no {sensor.key} for its clip",
            f"copy the tables again from {SOURCE}, or leave {sensor.role} out of dataset.{sensor.kind}",
        )
    return of_role[sensor.role]


def _stamp_ns(path: Path) -> int:
    if not path.stem.isdecimal():
        raise DataError(f"{path}: is not named by a stamp in microseconds", f"is it a file of {SOURCE}?")
    return int(path.stem) * 1000


def _lens(rgb: Array, intrinsic: Array, distortion: tuple[float, ...]) -> CameraModel:
    """OpenCV's model, told by the number of its coefficients, of an image as large as `rgb`."""
    return CameraModel(
        "plumb_bob" if len(distortion) <= 5 else "rational_polynomial",
        rgb.shape[1],
        rgb.shape[0],
        (float(intrinsic[0, 0]), float(intrinsic[1, 1])),
        (float(intrinsic[0, 2]), float(intrinsic[1, 2])),
        distortion,
    )
