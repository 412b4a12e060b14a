"""mmdetection3d's info files (version 1.1) of nuScenes, as JSON: key frames with LiDAR, cameras and boxes.

`{"metainfo": {"categories": {name: label}}, "data_list": [info, ...]}`. An info holds `lidar_points` (file,
`lidar2ego`), `images` (channel -> file, `cam2img`, `lidar2cam`), `instances` and `ego2global`; timestamps are seconds.
A matrix `a2b` is b_from_a, and `lidar2cam` holds the car's motion between the two stamps. A box is its geometric
centre, (length, width, height) and yaw in the LiDAR's frame; label -1 is a category of none of the classes.

Files lie beside the info file, or where nuScenes has them (`samples/{channel}/`). Sweeps are not read: `nuscenes` reads
them, and everything else, from the official tables. Info files come as pickles; those are never opened, since opening
one runs whatever it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from perception.config import Config
from perception.datasets.nuscenes_files import read_lidar
from perception.datasets.nuscenes_layout import ANCHOR_CHANNEL, role_of
from perception.datasets.sensor_files import read_image, read_json, select_roles
from perception.errors import DataError
from perception.geometry import transform_boxes
from perception.types import Boxes3D, CameraImage, PointCloud, Pose, Sample, Truth

_SOURCE = "mmdetection3d's create_data.py, or nuScenes"
_PKL_TO_JSON = (
    'python -c "import json, pickle; json.dump(pickle.load(open({pkl!r}, {mode!r})), open({json!r}, {out!r}), '
    'default=lambda array: array.tolist())"'
)


class Mmdet3dInfosConfig(Config):
    """What is read.

    Attributes:
        root: folder of the info file.
        file: the info file's name.
        cameras: roles to read; None is all of them.
    """

    name: Literal["mmdet3d_infos"] = "mmdet3d_infos"
    root: Path
    file: str = "infos.json"
    cameras: tuple[str, ...] | None = None


class Mmdet3dInfos:
    """The key frames of an info file, in its order. The classes of its boxes are those of its metainfo.

    Raises:
        DataError: a pickle, a file that is missing or damaged, or an info without a key of version 1.1.
    """

    def __init__(self, config: Mmdet3dInfosConfig) -> None:
        self.config = config
        self._path = config.root / config.file
        infos = _read_infos(self._path)
        try:
            labels = infos["metainfo"]["categories"]
            self._classes = tuple(sorted(labels, key=labels.__getitem__))
            self._infos: list[dict[str, Any]] = infos["data_list"]
            self.tokens = tuple(str(info["token"]) for info in self._infos)
        except (KeyError, TypeError, AttributeError) as error:
            raise _foreign(self._path, error) from error

    def __len__(self) -> int:
        return len(self._infos)

    def __getitem__(self, i: int) -> Sample:
        info = self._infos[i]
        try:
            stamp_ns, lidar = _stamp_ns(info["timestamp"]), info["lidar_points"]
            ego_from_lidar = _pose(lidar["lidar2ego"])
            xyz, fields = read_lidar(self._file(lidar["lidar_path"], ANCHOR_CHANNEL))
            channels = {role_of(channel): channel for channel in info["images"]}
            cameras = {
                role: self._image(channels[role], info["images"][channels[role]], ego_from_lidar)
                for role in select_roles(self.config.cameras, tuple(channels), "cameras")
            }
        except (KeyError, TypeError) as error:
            raise _foreign(self._path, error) from error
        cloud = PointCloud(xyz, fields, ego_from_lidar, stamp_ns)
        return Sample(stamp_ns, lidars={role_of(ANCHOR_CHANNEL): cloud}, cameras=cameras, token=self.tokens[i])

    def scene_name(self, i: int) -> str:
        """Empty: the file does not name scenes."""
        return ""

    def truth(self, i: int) -> Truth | None:
        """Boxes and pose; None where the infos have no `instances` (the test split)."""
        info = self._infos[i]
        if "instances" not in info:
            return None
        try:
            found = [box for box in info["instances"] if box["bbox_label_3d"] >= 0]
            boxes = Boxes3D(
                center=np.array([box["bbox_3d"][:3] for box in found], np.float64).reshape(-1, 3),
                size=np.array([box["bbox_3d"][3:6] for box in found], np.float64).reshape(-1, 3),
                yaw=np.array([box["bbox_3d"][6] for box in found], np.float64),
                velocity=np.array([box["velocity"] for box in found], np.float64).reshape(-1, 2),
                score=np.ones(len(found)),
                label=np.array([box["bbox_label_3d"] for box in found], np.int64),
                classes=self._classes,
                stamp_ns=_stamp_ns(info["timestamp"]),
                num_points=np.array([box["num_lidar_pts"] for box in found], np.int64),
                num_radar_points=np.array([box["num_radar_pts"] for box in found], np.int64),
            )
            ego_from_lidar = _pose(info["lidar_points"]["lidar2ego"])
            return Truth(transform_boxes(ego_from_lidar, boxes), map_from_ego=_pose(info["ego2global"]))
        except (KeyError, TypeError) as error:
            raise _foreign(self._path, error) from error

    def _image(self, channel: str, image: dict[str, Any], ego_from_lidar: Pose) -> CameraImage:
        rgb = read_image(self._file(image["img_path"], channel), _SOURCE)
        intrinsic = np.array(image["cam2img"], np.float64)[:3, :3]
        ego_from_camera = ego_from_lidar @ _pose(image["lidar2cam"]).inverse()
        return CameraImage(rgb, intrinsic, ego_from_camera, _stamp_ns(image["timestamp"]))

    def _file(self, name: str, channel: str) -> Path:
        beside, official = self.config.root / name, self.config.root / "samples" / channel / name
        return official if official.exists() else beside


def _read_infos(path: Path) -> dict[str, Any]:
    pickles = sorted(path.parent.glob("*.pkl")) if not path.exists() and path.parent.is_dir() else []
    if path.suffix == ".pkl":
        pickles = [path]
    if pickles:
        convert = _PKL_TO_JSON.format(
            pkl=str(pickles[0]), mode="rb", json=str(pickles[0].with_name("infos.json")), out="w"
        )
        raise DataError(
            f"{pickles[0]}: a pickle runs whatever it holds when it is opened, so it is not opened here",
            f"if you trust it, turn it into JSON:  {convert}",
        )
    return read_json(path, _SOURCE)


def _foreign(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: is no info file of version 1.1 ({type(error).__name__}: {error})",
        "mmdetection3d's tools/dataset_converters/update_infos_to_v2.py makes one of an older version",
    )


def _stamp_ns(timestamp_s: float) -> int:
    """Seconds to nanoseconds; nuScenes' stamps are whole microseconds, which a double of seconds still tells apart."""
    return round(timestamp_s * 1e6) * 1000


def _pose(matrix: Any) -> Pose:
    return Pose.from_matrix(np.array(matrix, np.float64))
