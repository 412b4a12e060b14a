"""nuScenes v1.0 (Caesar et al., CVPR 2020), read from the official tables: no info files, no preparation.

A sample is a key frame. Its stamp and its ego frame are those of the anchor, LIDAR_TOP; where a rig has none, of the
first sensor in the order of its sensor table that the sample has. Every other sensor was read at its own instant, from
a car that had moved: `ego_from_sensor = ego(anchor)_from_map @ map_from_ego(sensor) @ mount`.

nuScenes gives one pose per sensor reading, the car localised in the map, and everybody compensates ego motion with it;
so do the sweeps here, and `Sample.odom_from_ego` stays None: there is no separate odometry.

Files: `nuscenes_layout` (names and classes), `nuscenes_files` (sensor files), `nuscenes_tables` and `nuscenes_index`
(JSON to memory-mapped columns), `nuscenes_writer`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from perception.config import Config
from perception.datasets.nuscenes_files import SOURCE, read_labels, read_lidar, read_radar
from perception.datasets.nuscenes_index import open_index
from perception.datasets.nuscenes_layout import (
    ANCHOR_CHANNEL,
    DETECTION_CLASSES,
    LIDARSEG_CLASSES,
    KeyFrameNames,
    Modality,
    OccupancyLayout,
    occupancy_path,
    official_splits,
    own_splits,
    read_occupancy,
    role_of,
)
from perception.datasets.nuscenes_writer import NuScenesWriter as NuScenesWriter
from perception.datasets.sensor_files import read_image, select_roles
from perception.errors import ConfigError, DataError
from perception.sweeps import accumulate
from perception.types import (
    IGNORE_LABEL,
    Array,
    Boxes3D,
    CameraImage,
    OccupancyGrid3D,
    PointCloud,
    Pose,
    Sample,
    Segmentation,
    Truth,
)

_LIDAR = role_of(ANCHOR_CHANNEL)


class NuScenesConfig(Config):
    """What of nuScenes is read.

    Attributes:
        root: folder with samples/, sweeps/ and the versions' folders.
        version: `v1.0-trainval`, `v1.0-mini`, `v1.0-test`, or the folder of any other set in this layout.
        split: an official split (train, val, test, mini_train, mini_val, train_detect, train_track), one of the
            version's own `splits.json`, `all`, or a list of scene names.
        sweeps: LiDAR and radar sweeps in a cloud, the key frame included and fewer at a scene's start: the devkit's
            `nsweeps`. mmdetection3d's "10 sweeps" are 10 beside the key frame, 11 here.
        lidars, cameras, radars: roles to read; None is all of them, () none.
        occupancy: whose occupancy truth to read.
        occupancy_root: the folder that holds it (`nuScenes-Occupancy`, `gts`, SurroundOcc's `samples`); None is `root`.
        cache_dir: where the index is kept; None is `$XDG_CACHE_HOME/perception`.
    """

    name: Literal["nuscenes"] = "nuscenes"
    root: Path
    version: str = "v1.0-trainval"
    split: str | tuple[str, ...] = "val"
    sweeps: int = Field(10, ge=1)
    lidars: tuple[str, ...] | None = None
    cameras: tuple[str, ...] | None = None
    radars: tuple[str, ...] | None = None
    occupancy: OccupancyLayout | None = None
    occupancy_root: Path | None = None
    cache_dir: Path | None = None


class NuScenes:
    """The key frames of a split, scene by scene in time.

    Clouds carry `time_lag` and `sweep`, even of one sweep. LiDAR fields: `intensity` (0 to 255), `ring`. Radar fields:
    those of `nuscenes_files.RADAR_POINT` under nuScenes' own names, returns of every state kept; `radial_velocity` is
    not among them, since nuScenes does not say how its `vx, vy` come from it.

    Raises:
        DataError: tables or files that are missing, damaged or foreign, a split that the version does not hold, a role
            that its rig does not have.
    """

    def __init__(self, config: NuScenesConfig) -> None:
        self.config = config
        _check_version(config.root, config.version)
        self._index = open_index(config.root, config.version, config.cache_dir)
        scenes = _scenes_of_split(config, [name.decode() for name in self._index.scene_name])
        self._samples = np.flatnonzero(np.isin(self._index.sample_scene, scenes))
        self.tokens = tuple(token.decode() for token in self._index.sample_token[self._samples])
        channels = [name.decode() for name in self._index.channel]
        modalities = [name.decode() for name in self._index.modality]
        self._lidars = _columns_of("lidar", config.lidars, channels, modalities)
        self._cameras = _columns_of("camera", config.cameras, channels, modalities)
        self._radars = _columns_of("radar", config.radars, channels, modalities)
        # A stable sort: the anchor first, the others as they stand in the sensor table.
        self._anchors = sorted(range(len(channels)), key=lambda column: channels[column] != ANCHOR_CHANNEL)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> Sample:
        sample = self._samples[i]
        anchor = self._anchor(sample)
        ego_from_map = self._pose(anchor).inverse()
        files = self._index.sample_data[sample]
        return Sample(
            stamp_ns=int(self._index.data_stamp_ns[anchor]),
            lidars={
                r: self._cloud(files[c], read_lidar, ego_from_map) for r, c in self._lidars.items() if files[c] >= 0
            },
            radars={
                r: self._cloud(files[c], read_radar, ego_from_map) for r, c in self._radars.items() if files[c] >= 0
            },
            cameras={r: self._image(files[c], ego_from_map) for r, c in self._cameras.items() if files[c] >= 0},
            token=self._index.sample_token[sample].decode(),
        )

    def truth(self, i: int) -> Truth | None:
        """Boxes of the ten detection classes, point labels where the version has lidarseg, the configured occupancy.

        None where none of these is published (the test split). Boxes: velocity is the devkit's central difference,
        `track_id` the instance's token, yaw that of the full rotation seen in ego.
        """
        sample, index = self._samples[i], self._index
        boxes = self._boxes(sample) if len(index.box_label) else None
        labels = {_LIDAR: self._point_label(sample)} if index.sample_lidarseg[sample] and _LIDAR in self._lidars else {}
        occupancy = self.occupancy(i)
        if boxes is None and not labels and occupancy is None:
            return None
        return Truth(boxes, occupancy, self.map_from_ego(i), labels)

    def occupancy(self, i: int) -> OccupancyGrid3D | None:
        """The configured occupancy alone; None where none is configured."""
        if self.config.occupancy is None:
            return None
        return self._read_occupancy(self._occupancy_file(self.config.occupancy_root or self.config.root, i), i)

    def read_prediction(self, root: Path, i: int) -> OccupancyGrid3D | None:
        """An occupancy that lies under `root` in the layout of the truth; None where there is no file of sample i."""
        path = self._occupancy_file(root, i)
        return self._read_occupancy(path, i) if path.is_file() else None

    def map_from_ego(self, i: int) -> Pose:
        """The car in the map (nuScenes: global) at the sample's stamp; published for every split."""
        return self._pose(self._anchor(self._samples[i]))

    def scene_name(self, i: int) -> str:
        """The scene that the sample belongs to."""
        return self._index.scene_name[self._index.sample_scene[self._samples[i]]].decode()

    def _anchor(self, sample: int) -> int:
        """Data row of the sensor that gives the sample its stamp and ego frame."""
        for column in self._anchors:
            if (row := self._index.sample_data[sample, column]) >= 0:
                return int(row)
        raise DataError(
            f"{self.config.root / self.config.version}/sample_data.json: no key frame belongs to sample "
            f"{self._index.sample_token[sample].decode()}",
            "unpack the tables again; all of them must be of one version",
        )

    def _pose(self, row: int) -> Pose:
        return _pose(self._index.data_map_from_ego[row])

    def _ego_from_sensor(self, row: int, ego_from_map: Pose) -> Pose:
        mount = _pose(self._index.calibration_ego_from_sensor[self._index.data_calibration[row]])
        return ego_from_map @ self._pose(row) @ mount

    def _file(self, row: int) -> Path:
        return self.config.root / self._index.data_file[row].decode()

    def _cloud(
        self, row: int, read: Callable[[Path], tuple[Array, dict[str, Array]]], ego_from_map: Pose
    ) -> PointCloud:
        """The key sweep and the earlier ones of its channel."""
        sweeps: list[PointCloud] = []
        while row >= 0 and len(sweeps) < self.config.sweeps:
            stamp_ns = int(self._index.data_stamp_ns[row])
            sweeps.append(PointCloud(*read(self._file(row)), self._ego_from_sensor(row, ego_from_map), stamp_ns))
            row = self._index.data_previous[row]
        return accumulate(sweeps)

    def _image(self, row: int, ego_from_map: Pose) -> CameraImage:
        rgb = read_image(self._file(row), SOURCE)
        width, height = self._index.data_image_size[row].tolist()
        if rgb.shape[:2] != (height, width):
            raise DataError(
                f"{self._file(row)}: {rgb.shape[1]} x {rgb.shape[0]} pixels; sample_data.json says {width} x {height}",
                "its calibration is for the latter: use the original image",
            )
        intrinsic = np.array(self._index.calibration_intrinsic[self._index.data_calibration[row]])
        return CameraImage(
            rgb, intrinsic, self._ego_from_sensor(row, ego_from_map), int(self._index.data_stamp_ns[row])
        )

    def _boxes(self, sample: int) -> Boxes3D:
        index = self._index
        rows = np.arange(*index.sample_boxes[sample : sample + 2])
        rows = rows[index.box_label[rows] >= 0]
        anchor = self._anchor(sample)
        ego_from_map = self._pose(anchor).inverse()
        headings = np.array([Pose.from_quaternion(q[[1, 2, 3, 0]]).rotation[:, 0] for q in index.box_rotation[rows]])
        heading = headings.reshape(-1, 3) @ ego_from_map.rotation.T
        attributes = np.array([name.decode() for name in index.attribute_name] + [""])  # row -1 is none
        return Boxes3D(
            center=ego_from_map.apply(index.box_center[rows]),
            size=index.box_size[rows],
            yaw=np.arctan2(heading[:, 1], heading[:, 0]),
            velocity=(index.box_velocity[rows] @ ego_from_map.rotation.T)[:, :2],
            score=np.ones(len(rows)),
            label=index.box_label[rows].astype(np.int64),
            classes=DETECTION_CLASSES,
            stamp_ns=int(index.data_stamp_ns[anchor]),
            attribute=attributes[index.box_attribute[rows]],
            track_id=index.instance_token[index.box_instance[rows]].astype(np.str_),
            num_points=index.box_lidar_points[rows].astype(np.int64),
            num_radar_points=index.box_radar_points[rows].astype(np.int64),
            visibility=index.box_visibility[rows].astype(np.int64),
        )

    def _point_label(self, sample: int) -> Segmentation:
        path = self.config.root / self._index.sample_lidarseg[sample].decode()
        value = read_labels(path, len(read_lidar(self._file(self._anchor(sample)))[0]))
        label = self._index.lidarseg_label[value]
        if (unknown := value[label == IGNORE_LABEL]).size:
            raise DataError(
                f"{path}: value {unknown[0]} is the index of no record in category.json",
                "use the category.json that comes with nuScenes-lidarseg",
            )
        return Segmentation(label, LIDARSEG_CLASSES)

    def _layout(self) -> OccupancyLayout:
        if self.config.occupancy is None:
            raise ConfigError("nuScenes is read without occupancy", "set dataset.occupancy to the benchmark's layout")
        return self.config.occupancy

    def _occupancy_file(self, root: Path, i: int) -> Path:
        index, sample = self._index, self._samples[i]
        scene, anchor = index.sample_scene[sample], self._anchor(sample)
        names = KeyFrameNames(
            scene_name=index.scene_name[scene].decode(),
            scene_token=index.scene_token[scene].decode(),
            sample_token=index.sample_token[sample].decode(),
            lidar_token=index.sample_lidar_token[sample].decode(),
            lidar_filename=index.data_file[anchor].decode(),
        )
        return occupancy_path(self._layout(), root, names)

    def _read_occupancy(self, path: Path, i: int) -> OccupancyGrid3D:
        anchor = self._anchor(self._samples[i])
        ego_from_lidar = self._ego_from_sensor(anchor, self._pose(anchor).inverse())
        return read_occupancy(self._layout(), path, ego_from_lidar, int(self._index.data_stamp_ns[anchor]))


def _pose(values: Array) -> Pose:
    """(7,) x y z and quaternion w x y z."""
    return Pose.from_quaternion(values[[4, 5, 6, 3]], np.array(values[:3]))


def _check_version(root: Path, version: str) -> None:
    if (root / version).is_dir():
        return
    if not root.is_dir():
        raise DataError(f"{root}: no such folder", "set root to the folder that holds nuScenes' samples/ and v1.0-*/")
    versions = sorted(path.parent.name for path in root.glob("*/scene.json"))
    raise DataError(
        f"{root}: has no folder {version!r}",
        f"set version to one of: {', '.join(versions)}" if versions else "unpack nuScenes' tables (Metadata) into it",
    )


def _scenes_of_split(config: NuScenesConfig, names: list[str]) -> list[int]:
    """Scene rows of the configured split; DataError for a split that is not known or not all there."""
    if config.split == "all":
        return list(range(len(names)))
    splits = official_splits() | own_splits(config.root / config.version)
    present = [split for split, scenes in splits.items() if set(scenes) <= set(names)]
    cure = f"{config.version} holds the splits: {', '.join(['all', *present])}"
    if isinstance(config.split, str) and config.split not in splits:
        if config.split in names:
            cure = f"scenes are given as a list: [{config.split}]"
        raise DataError(f"split {config.split!r} is not known; known are {', '.join(['all', *splits])}", cure)
    wanted = splits[config.split] if isinstance(config.split, str) else config.split
    rows = [names.index(name) for name in wanted if name in names]
    if not wanted:
        raise DataError(f"split {config.split!r} names no scene", cure)
    if len(rows) < len(wanted):
        absent = next(name for name in wanted if name not in names)
        raise DataError(
            f"{config.root / config.version}: holds {len(rows)} of the {len(wanted)} scenes of split {config.split!r}; "
            f"{absent} is not among its {len(names)}",
            cure,
        )
    return rows


def _columns_of(
    modality: Modality, roles: tuple[str, ...] | None, channels: list[str], modalities: list[str]
) -> dict[str, int]:
    """Role -> column of `sample_data`, of the sensors that are read."""
    columns = {role_of(name): i for i, name in enumerate(channels) if modalities[i] == modality}
    return {role: columns[role] for role in select_roles(roles, tuple(columns), f"{modality}s")}
