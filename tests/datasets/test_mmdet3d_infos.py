"""mmdetection3d's info files as JSON: the real key frame, pickles refused, damage."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from perception.datasets.mmdet3d_infos import Mmdet3dInfos, Mmdet3dInfosConfig
from perception.errors import ConfigError, DataError
from perception.geometry import points_in_boxes, project, project_to_image, transform_boxes
from perception.types import Dataset


@pytest.fixture
def folder(shared_data: Path) -> Path:
    return shared_data / "nuscenes_keyframe"


@pytest.fixture
def infos(folder: Path) -> Mmdet3dInfos:
    return Mmdet3dInfos(Mmdet3dInfosConfig(root=folder))


def test_real_key_frame(infos: Mmdet3dInfos):
    assert isinstance(infos, Dataset)
    assert list(infos.tokens) == ["ca9a282c9e77460f8360f564131a8af5"]
    sample = infos[0]
    assert sample.stamp_ns == 1_532_402_927_647_951_000
    assert len(sample.lidars["top"]) == 34_688
    assert len(sample.cameras) == 6
    assert sample.cameras["front"].stamp_ns == 1_532_402_927_612_460_000
    pixel, depth, _ = project_to_image(sample.lidars["top"].xyz_ego(), sample.cameras["front"])
    assert int(((depth > 0) & (pixel >= 0).all(1) & (pixel < (1600, 900)).all(1)).sum()) == 3_067


def test_real_boxes(infos: Mmdet3dInfos, folder: Path):
    sample, truth = infos[0], infos.truth(0)
    assert truth is not None
    boxes, cloud = truth.boxes, sample.lidars["top"]
    assert len(boxes) == 68  # of 69, one has label -1
    assert boxes.classes[:3] == ("car", "truck", "trailer")
    in_lidar = transform_boxes(cloud.ego_from_sensor.inverse(), boxes)
    difference = np.abs(points_in_boxes(cloud.xyz, in_lidar).sum(1) - boxes.num_points)
    assert (difference == 0).sum() == 60  # 61 of 69 with the one that has no label
    assert difference.max() == 16
    map_from_ego = truth.map_from_ego
    in_map = transform_boxes(map_from_ego, boxes)
    points = map_from_ego.apply(cloud.xyz_ego().astype(np.float64))
    np.testing.assert_array_equal(points_in_boxes(points, in_map).sum(1), boxes.num_points)
    # The file says where each box stands in each camera, in pixels and metres.
    info = json.loads((folder / "infos.json").read_text())["data_list"][0]
    for channel, instances in info["cam_instances"].items():
        camera = sample.cameras[channel.removeprefix("CAM_").lower()]
        pixel, depth = project(camera.ego_from_camera.inverse().apply(boxes.center), camera.intrinsic)
        for instance in instances:
            if instance["bbox_label_3d"] < 0:
                continue
            near = np.linalg.norm(pixel - instance["center_2d"], axis=1) + np.abs(depth - instance["depth"])
            assert np.nanmin(near) < 1.0
            assert boxes.label[np.nanargmin(near)] == instance["bbox_label_3d"]


def test_velocity_turns_with_the_frame(infos: Mmdet3dInfos, folder: Path):
    info = json.loads((folder / "infos.json").read_text())["data_list"][0]
    raw = np.array([box["velocity"] for box in info["instances"] if box["bbox_label_3d"] >= 0])
    velocity = infos.truth(0).boxes.velocity
    np.testing.assert_array_equal(np.isnan(velocity), np.isnan(raw))
    known = ~np.isnan(raw[:, 0])
    # LIDAR_TOP looks right: its y is ego's x.
    np.testing.assert_allclose(velocity[known], np.c_[raw[known, 1], -raw[known, 0]], atol=0.05)


def test_roles_are_chosen(folder: Path):
    infos = Mmdet3dInfos(Mmdet3dInfosConfig(root=folder, cameras=("back",)))
    assert list(infos[0].cameras) == ["back"]
    with pytest.raises(ConfigError, match="no sensor rear"):
        Mmdet3dInfos(Mmdet3dInfosConfig(root=folder, cameras=("rear",)))[0]


def test_files_may_lie_as_in_nuscenes(folder: Path, tmp_path: Path):
    shutil.copy(folder / "infos.json", tmp_path)
    for channel in ("LIDAR_TOP", "CAM_FRONT"):
        (file,) = folder.glob(f"*__{channel}__*")
        (tmp_path / "samples" / channel).mkdir(parents=True)
        shutil.copy(file, tmp_path / "samples" / channel)
    infos = Mmdet3dInfos(Mmdet3dInfosConfig(root=tmp_path, cameras=("front",)))
    assert len(infos[0].lidars["top"]) == 34_688
    next((tmp_path / "samples" / "CAM_FRONT").iterdir()).unlink()
    with pytest.raises(DataError, match=r"CAM_FRONT__1532402927612460.jpg: no such file"):
        infos[0]


def test_a_pickle_is_refused_with_a_way_to_convert_it(tmp_path: Path):
    infos = {"metainfo": {"categories": {"car": 0}}, "data_list": [{"token": "a", "x": np.arange(2)}]}
    (tmp_path / "nuscenes_infos_val.pkl").write_bytes(pickle.dumps(infos))
    with pytest.raises(DataError, match="runs whatever it holds") as error:
        Mmdet3dInfos(Mmdet3dInfosConfig(root=tmp_path))
    with pytest.raises(DataError, match=r"infos_val.pkl: a pickle"):
        Mmdet3dInfos(Mmdet3dInfosConfig(root=tmp_path, file="nuscenes_infos_val.pkl"))
    command = error.value.do.split(":  ")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert Mmdet3dInfos(Mmdet3dInfosConfig(root=tmp_path)).tokens == ("a",)


def test_without_instances_there_is_no_truth(folder: Path, tmp_path: Path):
    infos = json.loads((folder / "infos.json").read_text())
    del infos["data_list"][0]["instances"]
    (tmp_path / "infos.json").write_text(json.dumps(infos))
    assert Mmdet3dInfos(Mmdet3dInfosConfig(root=tmp_path)).truth(0) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no info file of version 1.1"),
        ('{"infos": []}', "is no info file of version 1.1.*metainfo"),
        ("{", "infos.json: not JSON"),
    ],
)
def test_a_foreign_file_is_named(tmp_path: Path, text: str, message: str):
    (tmp_path / "infos.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Mmdet3dInfos(Mmdet3dInfosConfig(root=tmp_path))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"infos.json: no such file"):
        Mmdet3dInfos(Mmdet3dInfosConfig(root=tmp_path))
