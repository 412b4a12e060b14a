"""SemanticKITTI (Behley et al., ICCV 2019): scans, images, poses, point labels, completion volumes; read and written.

    root/sequences/00/velodyne/000000.bin     image_2/000000.png       calib.txt times.txt poses.txt
                      labels/000000.label     voxels/000000.{bin,label,invalid,occluded}

The LiDAR is `top`, image_2 is `front`. The data set names no base_link; ego here is the LiDAR lowered to the ground by
the mounting height that KITTI documents, 1.73 m, axes unchanged. The map frame is the ego of the pose file's origin,
that is of the first scan, z up. poses.txt is LiDAR odometry, so it serves as odometry frame and as map frame alike.

A kind of file that a sequence has must be there for every frame that should have it; images alone may be missing
frame by frame. File formats: `kitti_odometry`, label ids: `semantickitti_labels`, volumes: `semantickitti_voxels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from perception.config import Config
from perception.datasets import kitti_odometry as kitti
from perception.datasets import semantickitti_voxels as voxels
from perception.datasets.semantickitti_labels import SPLITS, read_point_labels, write_point_labels
from perception.errors import DataError
from perception.sweeps import accumulate
from perception.types import Array, CameraImage, OccupancyGrid3D, PointCloud, Pose, Sample, Truth

LIDAR_HEIGHT_M = 1.73
"""Of the LiDAR above the ground (KITTI's sensor drawing)."""

EGO_FROM_LIDAR = Pose(np.eye(3), np.array([0.0, 0.0, LIDAR_HEIGHT_M]))

_SCANNED_RANGE_M = (2.5, 70.0)
"""The official voxelizer takes points in this range."""


class SemanticKITTIConfig(Config):
    """What to read of SemanticKITTI."""

    name: Literal["semantickitti"] = "semantickitti"
    root: Path
    """The folder that holds `sequences`."""
    split: Literal["train", "val", "test"] | tuple[str, ...] = "val"
    """An official split, or sequences by name: ("00", "03")."""
    frames: Literal["all", "voxels"] = "all"
    """Every scan, or those with a completion volume (every fifth), which the completion benchmark scores."""
    voxel_version: voxels.VoxelVersion = "v1.1"
    """Release of the voxel files; it moves the grid by one voxel in z."""
    lidars: tuple[Literal["top"], ...] | None = None
    """None: all."""
    cameras: tuple[Literal["front"], ...] | None = None
    """None: where there is an image. A camera named here must have one for every frame."""
    sweeps: int = Field(1, ge=1)
    """Scans in a cloud: the key scan and the ones there are before it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sequence:
    """What is read once of a sequence."""

    name: str
    folder: Path
    scans: Array  # (N,) int64, frame numbers in order
    volumes: Array  # (V,) int64, frames with a `.bin` or `.label`
    has_labels: bool
    has_completion: bool
    calibration: kitti.Calibration
    stamps_ns: list[int]
    poses: Array | None  # (P, 3, 4)

    @staticmethod
    def open(root: Path, name: str) -> _Sequence:
        folder = root / "sequences" / name
        scans = _frames(folder / "velodyne", ".bin")
        if not len(scans):
            there = ", ".join(sorted(p.parent.name for p in root.glob("sequences/*/velodyne"))) or "no sequence"
            raise DataError(
                f"{folder / 'velodyne'}: no scans; {root / 'sequences'} holds {there}",
                "root is the folder that holds `sequences`; name the sequences you have with  split: ['00', ...]",
            )
        labelled = _frames(folder / "voxels", ".label")
        # Either file makes a volume: one that lacks the other is an error when read, not a frame that nobody scores.
        volumes = np.union1d(_frames(folder / "voxels", ".bin"), labelled)
        if len(orphans := np.setdiff1d(volumes, scans)):
            raise DataError(
                f"{folder / 'voxels'}: volume {orphans[0]:06d} has no scan ({len(orphans)} such of {len(volumes)})",
                "velodyne is incomplete; copy it again from the KITTI odometry download",
            )
        stamps_ns = kitti.read_times(folder / "times.txt")
        _check_lines(folder / "times.txt", len(stamps_ns), scans)
        poses = None
        if (folder / "poses.txt").exists():
            poses = kitti.read_poses(folder / "poses.txt")
            _check_lines(folder / "poses.txt", len(poses), scans)
        return _Sequence(
            name,
            folder,
            scans,
            volumes,
            (folder / "labels").is_dir(),
            len(labelled) > 0,
            kitti.read_calibration(folder / "calib.txt"),
            stamps_ns,
            poses,
        )

    def file(self, kind: str, frame: int, suffix: str) -> Path:
        return self.folder / kind / f"{frame:06d}{suffix}"

    def map_from_ego(self, frame: int) -> Pose | None:
        if self.poses is None:
            return None
        where = f"{self.folder / 'poses.txt'}:{frame + 1}"
        map_from_lidar = kitti.map_from_lidar(self.poses[frame], self.calibration, where)
        return EGO_FROM_LIDAR @ map_from_lidar @ EGO_FROM_LIDAR.inverse()


def _check_lines(path: Path, lines: int, scans: Array) -> None:
    if lines <= scans[-1]:
        raise DataError(
            f"{path}: {lines} lines; scan {scans[-1]:06d} needs {scans[-1] + 1}",
            "the file is truncated, or of another sequence",
        )


def _frames(folder: Path, suffix: str) -> Array:
    """(N,) int64 numbers of the files NNNNNN + suffix of a folder, sorted; none where there is no folder."""
    return np.array(sorted(int(p.stem) for p in folder.glob("[0-9]" * 6 + suffix)), np.int64)


class SemanticKITTI:
    """The samples of some sequences, in order; tokens are `08/000000`.

    Clouds are `top` with field `intensity` (reflectance, 0 to 1). `Truth` holds the point labels of `top`, the
    occupancy and `map_from_ego`, each where the sequence has it. Raises DataError naming the file for anything that is
    missing, truncated or foreign.
    """

    def __init__(self, config: SemanticKITTIConfig) -> None:
        self.config = config
        names = SPLITS[config.split] if isinstance(config.split, str) else config.split
        self._index: list[tuple[_Sequence, int]] = []
        for name in names:
            sequence = _Sequence.open(config.root, name)
            frames = sequence.scans if config.frames == "all" else sequence.volumes
            self._index += [(sequence, int(frame)) for frame in frames]
        if not self._index:
            raise DataError(
                f"{config.root}: no voxel files in sequences {', '.join(names)}",
                "unpack data_odometry_voxels there, or set  frames: all",
            )

        self._tokens = tuple(f"{sequence.name}/{frame:06d}" for sequence, frame in self._index)

    @property
    def tokens(self) -> Sequence[str]:
        return self._tokens

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Sample:
        sequence, frame = self._index[i]
        lidars = {"top": self._cloud(sequence, frame)} if self.config.lidars in (None, ("top",)) else {}
        path = sequence.file("image_2", frame, ".png")
        wanted = path.exists() if self.config.cameras is None else "front" in self.config.cameras
        return Sample(
            stamp_ns=sequence.stamps_ns[frame],
            lidars=lidars,
            cameras={"front": self._image(sequence, frame)} if wanted else {},
            odom_from_ego=sequence.map_from_ego(frame),
            token=self._tokens[i],
        )

    def truth(self, i: int) -> Truth | None:
        sequence, frame = self._index[i]
        map_from_ego = sequence.map_from_ego(frame)
        point_label, occupancy = {}, self.occupancy(i)
        if sequence.has_labels:
            count = len(kitti.read_scan(sequence.file("velodyne", frame, ".bin"))[0])
            point_label["top"] = read_point_labels(sequence.file("labels", frame, ".label"), count)
        if map_from_ego is None and not point_label and occupancy is None:
            return None
        return Truth(occupancy=occupancy, map_from_ego=map_from_ego, point_label=point_label)

    def occupancy(self, i: int) -> OccupancyGrid3D | None:
        """The completion volume alone; None where the frame has none."""
        sequence, frame = self._index[i]
        if not (sequence.has_completion and frame in sequence.volumes):
            return None
        path = voxels.file_path(self.config.root, sequence.name, frame)
        return voxels.read(path, EGO_FROM_LIDAR, sequence.stamps_ns[frame], self.config.voxel_version)

    def read_prediction(self, root: Path, i: int) -> OccupancyGrid3D | None:
        """The volume of a submission's folder (`root/sequences/..`); None where there is no file of sample i."""
        sequence, frame = self._index[i]
        path = voxels.prediction_path(root, sequence.name, frame)
        if not path.is_file():
            return None
        grid = voxels.grid(EGO_FROM_LIDAR, self.config.voxel_version)
        label, stamp_ns = voxels.read_label_voxels(path), sequence.stamps_ns[frame]
        return OccupancyGrid3D(grid, label, voxels.CLASSES, voxels.FREE_LABEL, stamp_ns)

    def scene_name(self, i: int) -> str:
        """The sequence, such as "08"."""
        return self._index[i][0].name

    def input_voxels(self, i: int) -> Array:
        """(256, 256, 32) bool: the official input volume of sample i, in the grid of its occupancy."""
        sequence, frame = self._index[i]
        return voxels.read_voxels(sequence.file("voxels", frame, ".bin"))

    def _cloud(self, sequence: _Sequence, frame: int) -> PointCloud:
        """The scan, with the scans before it accumulated where `sweeps` asks for them."""
        if self.config.sweeps == 1:
            return accumulate([_scan(sequence, frame, EGO_FROM_LIDAR)])
        key = int(np.searchsorted(sequence.scans, frame))
        earlier = sequence.scans[max(0, key + 1 - self.config.sweeps) : key][::-1]
        now_from_map = self._pose(sequence, frame).inverse()
        clouds = [_scan(sequence, frame, EGO_FROM_LIDAR)]
        for scan in earlier.tolist():
            clouds.append(_scan(sequence, scan, now_from_map @ self._pose(sequence, scan) @ EGO_FROM_LIDAR))
        return accumulate(clouds)

    def _pose(self, sequence: _Sequence, frame: int) -> Pose:
        pose = sequence.map_from_ego(frame)
        if pose is None:
            raise DataError(
                f"{sequence.folder / 'poses.txt'}: missing; accumulating {self.config.sweeps} sweeps needs poses",
                "put the poses there, or set  sweeps: 1",
            )
        return pose

    def _image(self, sequence: _Sequence, frame: int) -> CameraImage:
        intrinsic, lidar_from_camera = sequence.calibration.intrinsic, sequence.calibration.lidar_from_camera
        if intrinsic is None or lidar_from_camera is None:
            raise DataError(f"{sequence.folder / 'calib.txt'}: no line 'P2:', which image_2 needs", "copy it again")
        rgb = kitti.read_image(sequence.file("image_2", frame, ".png"))
        return CameraImage(rgb, intrinsic, EGO_FROM_LIDAR @ lidar_from_camera, sequence.stamps_ns[frame])


def _scan(sequence: _Sequence, frame: int, ego_from_lidar: Pose) -> PointCloud:
    xyz, reflectance = kitti.read_scan(sequence.file("velodyne", frame, ".bin"))
    return PointCloud(xyz, {"intensity": reflectance}, ego_from_lidar, sequence.stamps_ns[frame])


class SemanticKITTIWriter:
    """Writes samples in SemanticKITTI's layout: `with SemanticKITTIWriter(root) as w: w.start_sequence(...)`.

    The layout holds one LiDAR (`top`, at EGO_FROM_LIDAR) with intensity, one camera (`front`), one stamp a frame and
    one calibration a sequence. A sample that has more raises ValueError, for what is not written would not come back;
    only further fields of the points, and truth of kinds the layout does not know, are left out. calib.txt, times.txt
    and poses.txt are written when the sequence ends, so that an interrupted one does not pass for whole.
    """

    def __init__(self, root: Path, voxel_version: voxels.VoxelVersion = "v1.1") -> None:
        self._root = root
        self._voxel_version = voxel_version
        self._sequence: _SequenceInProgress | None = None

    def __enter__(self) -> SemanticKITTIWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._sequence is not None:
            self._sequence.finish()

    def start_sequence(self, name: str, map_from_ego: Callable[[int], Pose]) -> None:
        """Begin a sequence and end the one before.

        Args:
            name: its folder, `00` by convention.
            map_from_ego: the true pose of ego at a stamp in ns.

        Raises:
            DataError: the sequence is there already.
        """
        if self._sequence is not None:
            self._sequence.finish()
        folder = self._root / "sequences" / name
        if folder.exists():
            raise DataError(f"{folder}: is there already", "choose another root or sequence; nothing is overwritten")
        self._sequence = _SequenceInProgress(self._root, name, map_from_ego, self._voxel_version)

    def add_sample(self, sample: Sample, truth: Truth | None = None) -> None:
        """Write the next frame: the single-sweep cloud, the image and the truth where there are such."""
        if self._sequence is None:
            raise ValueError("SemanticKITTIWriter: call start_sequence before add_sample")
        self._sequence.add(sample, truth)


class _SequenceInProgress:
    def __init__(
        self, root: Path, name: str, map_from_ego: Callable[[int], Pose], voxel_version: voxels.VoxelVersion
    ) -> None:
        self.root, self.name = root, name
        self.folder = root / "sequences" / name
        self.map_from_ego = map_from_ego
        self.voxel_version = voxel_version
        self.stamps_ns: list[int] = []
        self.camera: CameraImage | None = None
        self.has_labels = False

    def add(self, sample: Sample, truth: Truth | None) -> None:
        self._check_sample(sample)
        self._check_truth(truth)
        frame, cloud = len(self.stamps_ns), sample.lidars["top"]
        kitti.write_scan(self._file("velodyne", frame, ".bin"), cloud.xyz, cloud.field("intensity"))
        if "front" in sample.cameras:
            self.camera = self.camera or sample.cameras["front"]
            kitti.write_image(self._file("image_2", frame, ".png"), sample.cameras["front"].rgb)
        if truth is not None and "top" in truth.point_label:
            write_point_labels(self._file("labels", frame, ".label"), truth.point_label["top"])
        if truth is not None and truth.occupancy is not None:
            path = voxels.file_path(self.root, self.name, frame)
            voxels.write(path, truth.occupancy, _scanned(cloud, self.voxel_version), self.voxel_version)
        self.stamps_ns.append(sample.stamp_ns)

    def _check_sample(self, sample: Sample) -> None:
        """Raise ValueError for what the layout cannot hold."""
        if set(sample.lidars) != {"top"} or set(sample.cameras) - {"front"} or sample.radars:
            given = [*sample.lidars, *sample.cameras, *sample.radars]
            raise ValueError(f"SemanticKITTI holds LiDAR `top` and camera `front`; sample {sample.token!r} has {given}")
        cloud, image = sample.lidars["top"], sample.cameras.get("front")
        intensity = cloud.field("intensity")
        if not len(cloud) or intensity.min() < 0 or intensity.max() > 1:
            raise ValueError(f"SemanticKITTI: {len(cloud)} points; expected some, with intensity in [0, 1]")
        if not _same(cloud.ego_from_sensor, EGO_FROM_LIDAR):
            raise ValueError(
                f"SemanticKITTI knows a LiDAR {LIDAR_HEIGHT_M} m above ego, axes unchanged, and no other; got\n"
                f"{cloud.ego_from_sensor.matrix}"
            )
        stamps = {sample.stamp_ns, cloud.stamp_ns} | ({image.stamp_ns} if image else set())
        if len(stamps) > 1:
            raise ValueError(f"SemanticKITTI holds one stamp a frame; sample {sample.token!r} has {sorted(stamps)}")
        if self.stamps_ns and sample.stamp_ns <= self.stamps_ns[-1]:
            raise ValueError(f"SemanticKITTI: stamp {sample.stamp_ns} is not after {self.stamps_ns[-1]}")
        if image and self.camera and not _same_camera(image, self.camera):
            raise ValueError(f"SemanticKITTI holds one calibration a sequence; sample {sample.token!r} differs")

    def _check_truth(self, truth: Truth | None) -> None:
        has_labels = truth is not None and "top" in truth.point_label
        if self.stamps_ns and has_labels != self.has_labels:
            raise ValueError("SemanticKITTI: a sequence has point labels for every scan or for none")
        self.has_labels = has_labels
        if truth and truth.occupancy and not _same(truth.occupancy.grid.ego_from_grid, EGO_FROM_LIDAR):
            raise ValueError("SemanticKITTI: the occupancy's grid must be in the LiDAR's frame, EGO_FROM_LIDAR")

    def finish(self) -> None:
        if not self.stamps_ns:
            return
        calibration = _calibration(self.camera)
        kitti.write_calibration(self.folder / "calib.txt", calibration)
        kitti.write_times(self.folder / "times.txt", self.stamps_ns)
        cam0_from_ego = calibration.cam0_from_lidar @ EGO_FROM_LIDAR.inverse()
        poses = [cam0_from_ego @ self.map_from_ego(stamp) @ cam0_from_ego.inverse() for stamp in self.stamps_ns]
        kitti.write_poses(self.folder / "poses.txt", poses)

    def _file(self, kind: str, frame: int, suffix: str) -> Path:
        return self.folder / kind / f"{frame:06d}{suffix}"


def _same(a: Pose, b: Pose) -> bool:
    return np.allclose(a.matrix, b.matrix, atol=1e-6)


def _same_camera(a: CameraImage, b: CameraImage) -> bool:
    return _same(a.ego_from_camera, b.ego_from_camera) and np.allclose(a.intrinsic, b.intrinsic)


def _calibration(camera: CameraImage | None) -> kitti.Calibration:
    """cam0 stands where the camera stands, or in the LiDAR where there is none."""
    if camera is None:
        optical_from_lidar = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
        return kitti.Calibration(Pose(optical_from_lidar, np.zeros(3)), None)
    projection = np.concatenate([camera.intrinsic, np.zeros((3, 1))], 1)
    return kitti.Calibration(camera.ego_from_camera.inverse() @ EGO_FROM_LIDAR, projection)


def _scanned(cloud: PointCloud, version: voxels.VoxelVersion) -> Array:
    """(256, 256, 32) bool: voxels with a point in the voxelizer's range.

    The official tool also drops voxels of mostly unlabeled points, which needs the truth to make the input: not done.
    """
    grid = voxels.grid(EGO_FROM_LIDAR, version)
    distance = np.linalg.norm(cloud.xyz, axis=1)
    index, inside = grid.index(cloud.xyz)
    index = index[inside & (distance >= _SCANNED_RANGE_M[0]) & (distance <= _SCANNED_RANGE_M[1])]
    scanned = np.zeros(grid.shape, bool)
    scanned[tuple(index.T)] = True
    return scanned
