"""NuScenes and NuScenesWriter: round trip, the devkit as oracle, the real key frame, failure paths."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from perception.datasets import occ3d, openoccupancy, surroundocc
from perception.datasets.mmdet3d_infos import Mmdet3dInfos, Mmdet3dInfosConfig
from perception.datasets.nuscenes import NuScenes, NuScenesConfig, NuScenesWriter
from perception.datasets.nuscenes_layout import DETECTION_CLASSES, LIDARSEG_CLASSES, official_splits
from perception.errors import ConfigError, DataError
from perception.geometry import points_in_boxes, project_to_image, transform_boxes, wrap_angle
from perception.types import (
    Boxes3D,
    CameraImage,
    Dataset,
    OccupancyGrid3D,
    PointCloud,
    Pose,
    Sample,
    Segmentation,
    Truth,
)

CAMERAS = ("front", "front_left", "front_right", "back", "back_left", "back_right")
RADARS = ("front", "front_left", "front_right", "back_left", "back_right")
START_NS = 1_532_402_927_000_000_000
KEY_FRAMES = 4
PERIOD_NS = 500_000_000
SWEEP_NS = 50_000_000
SCENES = ("scene-0103", "scene-0916")


def drive(scene: int) -> Callable[[int], Pose]:
    """A car that turns, climbs and rolls: every part of a pose matters."""

    def map_from_ego(stamp_ns: int) -> Pose:
        t = (stamp_ns - START_NS) * 1e-9 - 1000 * scene
        rotation = Rotation.from_euler("zyx", [0.4 + scene + 0.2 * t, 0.03 * np.sin(t), 0.02 * np.cos(t)]).as_matrix()
        return Pose(rotation, np.array([600.0 + 8 * t, 1600.0 + 3 * t * t, 1.5 + 0.2 * t]))

    return map_from_ego


def mount(kind: str, role: str) -> Pose:
    """ego_from_sensor of the rig: some rotation and place for each sensor."""
    seed = sum(map(ord, kind + role))
    if kind == "lidar":
        return Pose(Rotation.from_euler("zyx", [-90, 1.2, -0.7], degrees=True).as_matrix(), np.array([0.94, 0, 1.84]))
    if kind == "radar":
        return Pose.from_yaw(seed % 6, [3.4, 0.1, 0.5])
    yaw = {"front": 0, "front_left": 55, "back_left": 110, "back": 180, "back_right": -110, "front_right": -55}[role]
    optical = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    turn = Rotation.from_euler("zyx", [yaw, 0.5, 0.3], degrees=True).as_matrix()
    return Pose(turn @ optical, np.array([1.5, 0.1, 1.5]))


class City:
    """Random but reproducible readings and objects of one scene."""

    def __init__(self, scene: int) -> None:
        self.rng = np.random.default_rng(scene)
        self.map_from_ego = drive(scene)
        self.start_ns = START_NS + scene * 1_000_000_000_000
        m = 14
        self.position = self.map_from_ego(self.start_ns).translation + self.rng.uniform(-30, 30, (m, 3)) * (1, 1, 0.05)
        self.velocity = self.rng.uniform(-6, 6, (m, 3)) * (1, 1, 0.1)
        self.heading = self.rng.uniform(-np.pi, np.pi, m)
        self.size = self.rng.uniform(0.5, 4, (m, 3))
        self.label = np.arange(m) % len(DETECTION_CLASSES)
        self.label[10:] = 0
        # Which key frames see which object: all, one alone, and one that leaves and comes back.
        self.seen = np.ones((KEY_FRAMES, m), bool)
        self.seen[1:, 0] = False
        self.seen[1:3, 10] = False
        self.seen[2, 11] = False

    def cloud(self, kind: str, role: str, stamp_ns: int, sample_ns: int) -> PointCloud:
        n = int(self.rng.integers(40, 60))
        xyz = self.rng.uniform(-30, 30, (n, 3)).astype(np.float32)
        ego_from_sensor = self.ego(sample_ns).inverse() @ self.ego(stamp_ns) @ mount(kind, role)
        if kind == "lidar":
            fields = {
                "intensity": self.rng.integers(0, 256, n).astype(np.float32),
                "ring": self.rng.integers(0, 32, n).astype(np.int32),
            }
        else:
            floats = ("rcs", "vx", "vy", "vx_comp", "vy_comp")
            fields = {name: self.rng.normal(0, 5, n).astype(np.float32) for name in floats}
            fields |= {"dyn_prop": self.rng.integers(0, 8, n).astype(np.int8)}
            fields |= {"id": np.arange(n, dtype=np.int16), "invalid_state": self.rng.integers(0, 18, n).astype(np.int8)}
        return PointCloud(xyz, fields, ego_from_sensor, stamp_ns)

    def ego(self, stamp_ns: int) -> Pose:
        return self.map_from_ego(stamp_ns)

    def image(self, role: str, stamp_ns: int, sample_ns: int) -> CameraImage:
        u, v = np.meshgrid(np.arange(64), np.arange(36))
        rgb = np.stack([4 * u, 7 * v, np.full_like(u, self.rng.integers(256))], -1).astype(np.uint8)
        intrinsic = np.array([[50.0, 0, 31.7], [0, 51, 17.9], [0, 0, 1]])
        pose = self.ego(sample_ns).inverse() @ self.ego(stamp_ns) @ mount("camera", role)
        return CameraImage(rgb, intrinsic, pose, stamp_ns)

    def sample(self, stamp_ns: int) -> Sample:
        return Sample(
            stamp_ns,
            lidars={"top": self.cloud("lidar", "top", stamp_ns, stamp_ns)},
            radars={r: self.cloud("radar", r, stamp_ns - 7_000_000 * (i + 1), stamp_ns) for i, r in enumerate(RADARS)},
            cameras={r: self.image(r, stamp_ns - 4_000_000 * i, stamp_ns) for i, r in enumerate(CAMERAS)},
        )

    def sweep(self, stamp_ns: int) -> Sample:
        radar_ns = stamp_ns - 3_000_000
        return Sample(
            stamp_ns,
            lidars={"top": self.cloud("lidar", "top", stamp_ns, stamp_ns)},
            radars={"front": self.cloud("radar", "front", radar_ns, stamp_ns)},
            cameras={"front": self.image("front", radar_ns, stamp_ns)},
        )

    def truth(self, frame: int, sample: Sample) -> Truth:
        seen = np.flatnonzero(self.seen[frame])
        ego_from_map = self.ego(sample.stamp_ns).inverse()
        t = (sample.stamp_ns - self.start_ns) * 1e-9
        n = len(seen)
        attribute = np.array(["vehicle.moving" if self.label[m] == 0 else "" for m in seen])
        boxes = Boxes3D(
            center=ego_from_map.apply(self.position[seen] + t * self.velocity[seen]),
            size=self.size[seen],
            yaw=wrap_angle(self.heading[seen] + t),
            velocity=(self.velocity[seen] @ ego_from_map.rotation.T)[:, :2],
            score=np.ones(n),
            label=self.label[seen],
            classes=DETECTION_CLASSES,
            stamp_ns=sample.stamp_ns,
            attribute=attribute,
            track_id=np.array([f"{m:032x}" for m in seen + 100 * (self.start_ns // 10**12)]),
            num_points=self.rng.integers(1, 30, n),
            num_radar_points=self.rng.integers(0, 3, n),
            visibility=1 + seen % 4,
        )
        points = len(sample.lidars["top"])
        label = Segmentation(self.rng.integers(0, 17, points).astype(np.uint8), LIDARSEG_CLASSES)
        return Truth(boxes, None, self.ego(sample.stamp_ns), {"top": label})


Written = list[tuple[Sample, Truth, list[Sample]]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    """Two scenes of four key frames, two sweeps before each; what was given to the writer, in order."""
    root = tmp_path_factory.mktemp("nuscenes")
    given: Written = []
    with NuScenesWriter(root, "v1.0-mini") as writer:
        for i, name in enumerate(SCENES):
            city = City(i)
            writer.start_scene(name, city.map_from_ego, split="my_val", location="nowhere", description="two turns")
            for frame in range(KEY_FRAMES):
                stamp_ns = city.start_ns + frame * PERIOD_NS
                sweeps = [city.sweep(stamp_ns - k * SWEEP_NS) for k in (2, 1)]
                for sweep in sweeps:
                    writer.add_sweep(sweep)
                sample = city.sample(stamp_ns)
                truth = city.truth(frame, sample)
                writer.add_sample(sample, truth)
                given.append((sample, truth, sweeps))
    return root, given


@pytest.fixture(scope="module")
def root(written: tuple[Path, Written]) -> Path:
    return written[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def devkit(root: Path):
    from nuscenes.nuscenes import NuScenes as Devkit

    return Devkit("v1.0-mini", str(root), verbose=False)


def config(root: Path, cache: Path, **more) -> NuScenesConfig:
    return NuScenesConfig(**({"root": root, "version": "v1.0-mini", "split": "mini_val", "cache_dir": cache} | more))


@pytest.fixture(scope="module")
def dataset(root: Path, cache: Path) -> NuScenes:
    return NuScenes(config(root, cache, sweeps=3))


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy of the written set that a test may damage."""
    return Path(shutil.copytree(root, tmp_path / "copy"))


def assert_poses_equal(a: Pose, b: Pose, atol: float = 1e-8) -> None:
    np.testing.assert_allclose(a.matrix, b.matrix, atol=atol)


def test_is_a_dataset_of_the_splits_samples(dataset: NuScenes):
    assert isinstance(dataset, Dataset)
    assert len(dataset) == len(dataset.tokens) == 2 * KEY_FRAMES
    assert [dataset.scene_name(i) for i in range(len(dataset))] == [s for s in SCENES for _ in range(KEY_FRAMES)]
    assert [dataset[i].token for i in range(len(dataset))] == list(dataset.tokens)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_samples_come_back_as_written(written: tuple[Path, Written], cache: Path):
    dataset = NuScenes(config(written[0], cache, sweeps=1))
    for i, (given, _, _) in enumerate(written[1]):
        sample = dataset[i]
        assert sample.stamp_ns == given.stamp_ns
        assert sample.odom_from_ego is None
        assert set(sample.radars) == set(RADARS)
        assert set(sample.cameras) == set(CAMERAS)
        pairs = [(sample.lidars["top"], given.lidars["top"])]
        for cloud, wanted in pairs + [(sample.radars[r], given.radars[r]) for r in RADARS]:
            assert cloud.stamp_ns == wanted.stamp_ns
            assert_poses_equal(cloud.ego_from_sensor, wanted.ego_from_sensor)
            np.testing.assert_array_equal(cloud.xyz, wanted.xyz)
            for name, values in wanted.fields.items():
                np.testing.assert_array_equal(cloud.fields[name], values)
                assert cloud.fields[name].dtype == values.dtype
            assert not cloud.fields["time_lag"].any()
        for role in CAMERAS:
            image, picture = sample.cameras[role], given.cameras[role]
            assert image.stamp_ns == picture.stamp_ns
            assert_poses_equal(image.ego_from_camera, picture.ego_from_camera)
            np.testing.assert_array_equal(image.intrinsic, picture.intrinsic)
            assert np.abs(image.rgb.astype(int) - picture.rgb).mean() < 3  # JPEG


def test_truth_comes_back_as_written(written: tuple[Path, Written], dataset: NuScenes):
    for i, (_, given, _) in enumerate(written[1]):
        truth = dataset.truth(i)
        assert truth is not None
        boxes, wanted = truth.boxes, given.boxes
        in_order = np.argsort(boxes.track_id)
        boxes = boxes.select(in_order)
        np.testing.assert_array_equal(boxes.track_id, wanted.track_id)
        np.testing.assert_allclose(boxes.center, wanted.center, atol=1e-8)
        np.testing.assert_array_equal(boxes.size, wanted.size)
        np.testing.assert_allclose(wrap_angle(boxes.yaw - wanted.yaw), 0, atol=1e-9)
        for name in ("label", "attribute", "num_points", "num_radar_points", "visibility"):
            np.testing.assert_array_equal(getattr(boxes, name), getattr(wanted, name))
        assert boxes.stamp_ns == wanted.stamp_ns
        assert_poses_equal(truth.map_from_ego, given.map_from_ego)
        assert_poses_equal(dataset.map_from_ego(i), given.map_from_ego)
        np.testing.assert_array_equal(truth.point_label["top"].label, given.point_label["top"].label)
        # Objects move at constant velocity: differences of positions give it back, where there are two positions.
        known = ~np.isnan(boxes.velocity[:, 0])
        np.testing.assert_allclose(boxes.velocity[known], wanted.velocity[known], atol=1e-6)
        frame = i % KEY_FRAMES
        numbers = [int(t, 16) % 100 for t in boxes.track_id]
        # 0 is seen once; 10 is back after 1.5 s, the longest gap that gives a velocity.
        assert [n for n, k in zip(numbers, known, strict=True) if not k] == ([0] if frame == 0 else [])


def test_sweeps_lie_in_the_key_frame(written: tuple[Path, Written], dataset: NuScenes):
    """Against the definition: what the car drove between two stamps, undone with its true poses."""
    i = 2
    sample, _, (older, newer) = written[1][i]
    cloud = dataset[i].lidars["top"]
    map_from_ego = drive(0)
    parts = [sample.lidars["top"]]
    for sweep in (newer, older):
        key_from_sweep = (
            (map_from_ego(sample.stamp_ns) @ mount("lidar", "top")).inverse()
            @ map_from_ego(sweep.stamp_ns)
            @ mount("lidar", "top")
        )
        parts.append(replace_xyz(sweep.lidars["top"], key_from_sweep))
    np.testing.assert_allclose(cloud.xyz, np.concatenate([p.xyz for p in parts]), atol=1e-4)
    lag = np.repeat([0, 0.05, 0.1], [len(p) for p in parts])
    np.testing.assert_allclose(cloud.fields["time_lag"], lag, atol=1e-6)
    np.testing.assert_array_equal(cloud.fields["sweep"], np.round(lag / 0.05))
    first = dataset[0].lidars["top"]
    assert first.fields["sweep"].max() == 2  # two sweeps lie before the first key frame
    assert NuScenes(dataset.config.model_copy(update={"sweeps": 10}))[0].lidars["top"].fields["sweep"].max() == 2


def replace_xyz(cloud: PointCloud, dst_from_src: Pose) -> PointCloud:
    return replace(cloud, xyz=dst_from_src.apply(cloud.xyz))


# --- the devkit as oracle -----------------------------------------------------------------------------------------


def test_devkit_loads_what_is_written(devkit, dataset: NuScenes):
    assert [scene["name"] for scene in devkit.scene] == list(SCENES)
    assert {sample["token"] for sample in devkit.sample} == set(dataset.tokens)
    for scene in devkit.scene:
        assert scene["nbr_samples"] == KEY_FRAMES
        tokens, token = [], scene["first_sample_token"]
        while token:
            tokens.append(token)
            token = devkit.get("sample", token)["next"]
        assert tokens[-1] == scene["last_sample_token"]
        assert len(tokens) == KEY_FRAMES
    for instance in devkit.instance:
        token, count = instance["first_annotation_token"], 0
        while token:
            last, count = token, count + 1
            token = devkit.get("sample_annotation", token)["next"]
        assert (last, count) == (instance["last_annotation_token"], instance["nbr_annotations"])
    for channel in ("LIDAR_TOP", "RADAR_FRONT", "CAM_FRONT"):
        stamps = [d["timestamp"] for d in devkit.sample_data if d["channel"] == channel]
        assert len(stamps) == 2 * KEY_FRAMES * 3
        assert stamps == sorted(stamps)


def test_boxes_and_velocities_are_the_devkits(devkit, dataset: NuScenes):
    for i in range(len(dataset)):
        record = devkit.get("sample", dataset.tokens[i])
        _, wanted, _ = devkit.get_sample_data(record["data"]["LIDAR_TOP"])
        truth, sample = dataset.truth(i), dataset[i]
        lidar_from_ego = sample.lidars["top"].ego_from_sensor.inverse()
        boxes = truth.boxes
        np.testing.assert_allclose(
            lidar_from_ego.apply(boxes.center), np.array([b.center for b in wanted]).reshape(-1, 3), atol=1e-6
        )
        np.testing.assert_allclose(boxes.size[:, [1, 0, 2]], [b.wlh for b in wanted])
        assert [DETECTION_CLASSES[k].split("_")[0] for k in boxes.label] == [
            {"human": "pedestrian", "movable_object": b.name.split(".")[-1].replace("trafficcone", "traffic")}.get(
                b.name.split(".")[0], b.name.split(".")[1]
            )
            for b in wanted
        ]
        heading = sample.lidars["top"].ego_from_sensor.rotation @ np.array([b.rotation_matrix[:, 0] for b in wanted]).T
        np.testing.assert_allclose(wrap_angle(boxes.yaw - np.arctan2(heading[1], heading[0])), 0, atol=1e-6)
        velocity = np.array([devkit.box_velocity(b.token) for b in wanted])
        np.testing.assert_allclose(
            boxes.velocity, (velocity @ dataset.map_from_ego(i).rotation)[:, :2], atol=1e-6, equal_nan=True
        )


def test_accumulated_points_are_the_devkits(devkit, dataset: NuScenes):
    from nuscenes.utils.data_classes import LidarPointCloud

    for i in (0, 3, 5):
        record = devkit.get("sample", dataset.tokens[i])
        # The devkit drops points near the sensor by default; distance 0 keeps them all.
        cloud, times = LidarPointCloud.from_file_multisweep(
            devkit, record, "LIDAR_TOP", "LIDAR_TOP", nsweeps=3, min_distance=0
        )
        ours = dataset[i].lidars["top"]
        np.testing.assert_allclose(ours.xyz, cloud.points[:3].T, atol=1e-4)
        np.testing.assert_array_equal(ours.fields["intensity"], cloud.points[3])
        np.testing.assert_allclose(ours.fields["time_lag"], times[0], atol=1e-6)


def test_radar_points_are_the_devkits(devkit, dataset: NuScenes):
    from nuscenes.utils.data_classes import RadarPointCloud

    RadarPointCloud.disable_filters()
    try:
        for role in ("front", "back_right"):
            record, channel = devkit.get("sample", dataset.tokens[3]), f"RADAR_{role.upper()}"
            cloud, times = RadarPointCloud.from_file_multisweep(
                devkit, record, channel, channel, nsweeps=3, min_distance=0
            )
            ours = dataset[3].radars[role]
            np.testing.assert_allclose(ours.xyz, cloud.points[:3].T, atol=1e-4)
            np.testing.assert_allclose(ours.fields["time_lag"], times[0], atol=1e-6)
            names = ("dyn_prop", "id", "rcs", "vx", "vy", "vx_comp", "vy_comp", "is_quality_valid", "ambig_state")
            for row, name in enumerate(names, 3):
                key = ours.fields["sweep"] == 0  # the devkit leaves velocities of older sweeps in their own frame
                np.testing.assert_array_equal(ours.fields[name][key], cloud.points[row][key].astype(np.float32))
            np.testing.assert_array_equal(ours.fields["invalid_state"], cloud.points[14])
    finally:
        RadarPointCloud.default_filters()


def test_projection_is_the_devkits(devkit, dataset: NuScenes):
    i, found = 5, 0
    record = devkit.get("sample", dataset.tokens[i])
    for role in CAMERAS:
        pixels, depth, _ = devkit.explorer.map_pointcloud_to_image(
            record["data"]["LIDAR_TOP"], record["data"][f"CAM_{role.upper()}"], min_dist=1.0
        )
        sample = NuScenes(dataset.config.model_copy(update={"sweeps": 1}))[i]
        image = sample.cameras[role]
        uv, ours, _ = project_to_image(sample.lidars["top"].xyz_ego(), image)
        kept = (ours > 1) & (uv[:, 0] > 1) & (uv[:, 0] < 63) & (uv[:, 1] > 1) & (uv[:, 1] < 35)
        np.testing.assert_allclose(uv[kept], pixels[:2].T, atol=2e-2)
        np.testing.assert_allclose(ours[kept], depth, atol=1e-3)
        found += int(kept.sum())
    assert found > 0


def test_point_labels_are_the_devkits(devkit, dataset: NuScenes, root: Path):
    from nuscenes.eval.lidarseg.utils import LidarsegClassMapper

    mapper = LidarsegClassMapper(devkit)
    assert tuple(mapper.coarse_name_2_coarse_idx_mapping)[1:] == LIDARSEG_CLASSES[1:]
    for i in range(len(dataset)):
        lidar = devkit.get("sample", dataset.tokens[i])["data"]["LIDAR_TOP"]
        values = np.fromfile(root / devkit.get("lidarseg", lidar)["filename"], np.uint8)
        np.testing.assert_array_equal(mapper.convert_label(values), dataset.truth(i).point_label["top"].label)


def test_devkit_scores_truth_as_perfect(devkit, dataset: NuScenes, tmp_path: Path):
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    results: dict[str, list] = {}
    for i, token in enumerate(dataset.tokens):
        boxes = transform_boxes(dataset.map_from_ego(i), dataset.truth(i).boxes)
        results[token] = [
            {
                "sample_token": token,
                "translation": boxes.center[m].tolist(),
                "size": boxes.size[m, [1, 0, 2]].tolist(),
                "rotation": Pose.from_yaw(boxes.yaw[m]).quaternion[[3, 0, 1, 2]].tolist(),
                "velocity": np.nan_to_num(boxes.velocity[m]).tolist(),
                "detection_name": boxes.classes[boxes.label[m]],
                "detection_score": 0.9,
                "attribute_name": str(boxes.attribute[m]),
            }
            for m in range(len(boxes))
        ]
    meta = {f"use_{k}": False for k in ("camera", "lidar", "radar", "map", "external")}
    (tmp_path / "results.json").write_text(json.dumps({"meta": meta, "results": results}))
    for split in ("mini_val", "my_val"):  # an official split by its scenes' names, and one of splits.json
        evaluation = DetectionEval(
            devkit,
            config_factory("detection_cvpr_2019"),
            str(tmp_path / "results.json"),
            split,
            str(tmp_path / split),
            verbose=False,
        )
        metrics, _ = evaluation.evaluate()
        truth_classes = {box.detection_name for box in evaluation.gt_boxes.all}
        assert len(truth_classes) > 5
        for name in truth_classes:
            assert metrics.get_label_ap(name, 0.5) == pytest.approx(1.0), name
            assert metrics.get_label_tp(name, "trans_err") < 1e-6
            assert metrics.get_label_tp(name, "scale_err") < 1e-6
        assert metrics.get_label_tp("car", "orient_err") < 0.05  # boxes are upright in ego, which rolls
        assert metrics.get_label_tp("car", "vel_err") < 0.05
        assert metrics.get_label_tp("car", "attr_err") < 1e-6


def test_official_splits_are_the_devkits():
    from nuscenes.utils.splits import create_splits_scenes

    ours, wanted = official_splits(), create_splits_scenes()
    assert set(ours) == set(wanted)
    assert {name: len(set(scenes)) for name, scenes in ours.items()}["train"] == 700
    for name, scenes in wanted.items():
        assert set(ours[name]) == set(scenes), name
        assert len(ours[name]) == len(scenes)


# --- splits, roles, processes -------------------------------------------------------------------------------------


def test_splits_of_the_version_and_lists_of_scenes(root: Path, cache: Path):
    everything = NuScenes(config(root, cache, split="all")).tokens
    assert NuScenes(config(root, cache, split="my_val")).tokens == everything
    one = NuScenes(config(root, cache, split=(SCENES[1],)))
    assert one.tokens == everything[KEY_FRAMES:]
    assert {one.scene_name(i) for i in range(len(one))} == {SCENES[1]}


def test_split_errors_say_what_there_is(root: Path, cache: Path):
    with pytest.raises(DataError, match=r"split 'vla' is not known; known are all, train, .*my_val"):
        NuScenes(config(root, cache, split="vla"))
    with pytest.raises(DataError, match=r"holds 0 of the 150 scenes of split 'val'|holds 2 of the 150") as error:
        NuScenes(config(root, cache, split="val"))
    assert "v1.0-mini holds the splits: all, mini_val, my_val" in str(error.value)
    with pytest.raises(DataError, match=r"holds 1 of the 2 scenes.*scene-0001 is not among its 2"):
        NuScenes(config(root, cache, split=("scene-0103", "scene-0001")))
    with pytest.raises(
        DataError, match=r"split 'scene-0103' is not known.*\n  scenes are given as a list: \[scene-0103\]"
    ):
        NuScenes(config(root, cache, split="scene-0103"))
    with pytest.raises(DataError, match=r"split \(\) names no scene"):
        NuScenes(config(root, cache, split=()))
    with pytest.raises(DataError, match=r"no folder 'v1.0-trainval'\n  set version to one of: v1.0-mini"):
        NuScenes(NuScenesConfig(root=root, cache_dir=cache))
    with pytest.raises(DataError, match="no such folder"):
        NuScenes(config(root / "nothing", cache))


def test_only_the_roles_asked_for_are_read(copy: Path, cache: Path):
    shutil.rmtree(copy / "samples" / "CAM_BACK")
    shutil.rmtree(copy / "samples" / "RADAR_FRONT")
    chosen = {"lidars": (), "cameras": ("front", "back_left"), "radars": ()}
    sample = NuScenes(config(copy, cache, **chosen))[0]
    assert list(sample.cameras) == ["front", "back_left"]
    assert not sample.lidars
    assert not sample.radars
    assert sample.stamp_ns == START_NS  # the anchor is the data set's, whatever is read
    with pytest.raises(ConfigError, match=r"cameras: no sensor rear.*\n.*front_right"):
        NuScenes(config(copy, cache, cameras=("rear",)))


def test_a_rig_without_lidar_is_anchored_at_its_first_sensor(tmp_path: Path, cache: Path):
    city = City(0)
    sample = city.sample(city.start_ns)
    boxes = city.truth(0, sample).boxes
    with NuScenesWriter(tmp_path / "cameras", "v1.0-cameras") as writer:
        writer.start_scene("scene-0001", city.map_from_ego)
        writer.add_sample(
            replace(sample, lidars={}, radars={}, cameras=dict(list(sample.cameras.items())[1:3])), Truth(boxes)
        )
    dataset = NuScenes(config(tmp_path / "cameras", cache, version="v1.0-cameras", split="all"))
    read = dataset[0]
    first = sample.cameras["front_right"].stamp_ns  # CAM_FRONT_RIGHT stands before CAM_FRONT_LEFT in the sensor table
    assert read.stamp_ns == first
    assert_poses_equal(dataset.map_from_ego(0), city.map_from_ego(first))
    assert_poses_equal(read.cameras["front_right"].ego_from_camera, mount("camera", "front_right"))
    truth = dataset.truth(0)
    np.testing.assert_allclose(
        dataset.map_from_ego(0).apply(truth.boxes.center),
        city.map_from_ego(sample.stamp_ns).apply(boxes.center),
        atol=1e-6,
    )


def test_a_version_without_annotations_has_no_truth(tmp_path: Path, cache: Path):
    city = City(0)
    with NuScenesWriter(tmp_path / "set", "v1.0-test") as writer:
        writer.start_scene("scene-0077", city.map_from_ego)
        writer.add_sample(city.sample(city.start_ns))
    dataset = NuScenes(config(tmp_path / "set", cache, version="v1.0-test", split="all"))
    assert dataset.truth(0) is None
    assert_poses_equal(dataset.map_from_ego(0), city.map_from_ego(city.start_ns))


def test_a_sample_without_boxes_has_empty_boxes(tmp_path: Path, cache: Path):
    city = City(0)
    with NuScenesWriter(tmp_path / "set", "v1.0-x") as writer:
        writer.start_scene("scene-0077", city.map_from_ego)
        sample = city.sample(city.start_ns)
        writer.add_sample(sample, Truth(Boxes3D.empty(DETECTION_CLASSES, sample.stamp_ns)))
        sample = city.sample(city.start_ns + PERIOD_NS)
        writer.add_sample(sample, city.truth(1, sample))
    dataset = NuScenes(config(tmp_path / "set", cache, version="v1.0-x", split="all"))
    assert len(dataset.truth(0).boxes) == 0
    assert len(dataset.truth(1).boxes) > 0


def test_empty_clouds_come_back_empty(tmp_path: Path, cache: Path):
    city = City(0)
    sample = city.sample(city.start_ns)
    nothing = np.zeros(0, bool)
    lidars = {"top": sample.lidars["top"].select(np.flatnonzero(nothing))}
    radars = {"front": sample.radars["front"].select(np.flatnonzero(nothing))}
    with NuScenesWriter(tmp_path / "set", "v1.0-x") as writer:
        writer.start_scene("scene-0077", city.map_from_ego)
        writer.add_sample(replace(sample, lidars=lidars, radars=radars))
    read = NuScenes(config(tmp_path / "set", cache, version="v1.0-x", split="all"))[0]
    assert len(read.lidars["top"]) == len(read.radars["front"]) == 0


def test_pickles_as_a_path_and_reads_the_same(dataset: NuScenes):
    data = pickle.dumps(dataset)
    assert len(data) < 20_000
    again = pickle.loads(data)
    assert again.tokens == dataset.tokens
    np.testing.assert_array_equal(again[1].lidars["top"].xyz, dataset[1].lidars["top"].xyz)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_reads_in_dataloader_workers(dataset: NuScenes, start: str):
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=multiprocessing.get_context(start)
    )
    samples = list(loader)
    assert [sample.token for sample in samples] == list(dataset.tokens)
    for i, sample in enumerate(samples[:2]):
        np.testing.assert_array_equal(sample.lidars["top"].xyz, dataset[i].lidars["top"].xyz)


@pytest.mark.parametrize("layout", ["openoccupancy", "surroundocc", "occ3d"])
def test_occupancy_of_each_benchmark(tmp_path: Path, cache: Path, layout: str):
    city = City(0)
    sample = city.sample(city.start_ns)
    module = {"openoccupancy": openoccupancy, "surroundocc": surroundocc, "occ3d": occ3d}[layout]
    grid = module.grid(mount("lidar", "top"))
    label = np.full(grid.shape, module.FREE_LABEL, np.uint8)
    label[3, 5, 7] = 4
    masks = {name: label == 4 for name in ("lidar", "camera")} if layout == "occ3d" else {}
    occupancy = OccupancyGrid3D(grid, label, module.CLASSES, module.FREE_LABEL, sample.stamp_ns, observed=masks)
    with NuScenesWriter(tmp_path / "set", "v1.0-x", occupancy=layout) as writer:
        writer.start_scene("scene-0077", city.map_from_ego)
        writer.add_sample(sample, Truth(occupancy=occupancy))
    settings = {"version": "v1.0-x", "split": "all", "occupancy": layout}
    truth = NuScenes(config(tmp_path / "set", cache, **settings)).truth(0)
    np.testing.assert_array_equal(truth.occupancy.label, label)
    assert_poses_equal(truth.occupancy.grid.ego_from_grid, grid.ego_from_grid)
    assert truth.occupancy.stamp_ns == sample.stamp_ns
    with pytest.raises(DataError, match="elsewhere"):
        NuScenes(config(tmp_path / "set", cache, **settings, occupancy_root=tmp_path / "elsewhere")).truth(0)


# --- what goes wrong ----------------------------------------------------------------------------------------------


def lidar_file(root: Path) -> Path:
    return sorted((root / "samples" / "LIDAR_TOP").iterdir())[0]


def test_damaged_sensor_files_are_named(copy: Path, cache: Path):
    dataset = NuScenes(config(copy, cache, sweeps=1))
    path = lidar_file(copy)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=rf"{path.name}: [\d,]+ bytes are no whole number of rows of 5"):
        dataset[0]
    points = np.frombuffer(whole, np.float32).reshape(-1, 5).copy()
    points[3, 1] = np.nan
    path.write_bytes(points.tobytes())
    with pytest.raises(DataError, match=r"1 of .* rows hold values that are not finite"):
        dataset[0]
    kitti = np.random.default_rng(0).uniform(-30, 30, (50, 4)).astype(np.float32)
    path.write_bytes(kitti.tobytes())  # 40 rows of five, by their number of bytes
    with pytest.raises(DataError, match=r"fifth column .* is no ring number"):
        dataset[0]
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: no such file\n.*samples"):
        dataset[0]


def test_damaged_images_are_named(copy: Path, cache: Path):
    import cv2

    dataset = NuScenes(config(copy, cache, lidars=(), radars=(), cameras=("back",)))
    path = sorted((copy / "samples" / "CAM_BACK").iterdir())[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{path.name}.*no whole .jpg image"):
        dataset[0]
    path.write_bytes(cv2.imencode(".jpg", np.zeros((18, 32, 3), np.uint8))[1].tobytes())
    with pytest.raises(DataError, match=r"32 x 18 pixels; sample_data.json says 64 x 36"):
        dataset[0]


def test_point_labels_that_do_not_fit_are_named(copy: Path, cache: Path):
    dataset = NuScenes(config(copy, cache))
    token = dataset._index.sample_lidar_token[0].decode()
    path = copy / "lidarseg" / "v1.0-mini" / f"{token}_lidarseg.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"{len(whole) - 1} labels for a cloud of {len(whole)} points"):
        dataset.truth(0)
    path.write_bytes(b"\xc8" * len(whole))
    with pytest.raises(DataError, match=r"value 200 is the index of no record in category.json"):
        dataset.truth(0)


def test_writer_refuses_what_nuscenes_cannot_hold(tmp_path: Path):
    city = City(0)
    sample = city.sample(city.start_ns)
    boxes = city.truth(0, sample).boxes
    writer = NuScenesWriter(tmp_path / "set", "v1.0-x")
    with pytest.raises(ValueError, match="call start_scene first"):
        writer.add_sample(sample)
    writer.start_scene("scene-0001", city.map_from_ego)
    with pytest.raises(ValueError, match="is not its LiDAR's"):
        writer.add_sample(replace(sample, stamp_ns=sample.stamp_ns + 1000))
    writer.add_sample(sample)
    with pytest.raises(ValueError, match="us after one at"):
        writer.add_sample(sample)
    later = city.sample(city.start_ns + PERIOD_NS)
    with pytest.raises(ValueError, match="no track_id"):
        writer.add_sample(later, Truth(replace(boxes, track_id=None)))
    later = city.sample(city.start_ns + 2 * PERIOD_NS)
    with pytest.raises(ValueError, match="class 'tram' is none of car"):
        writer.add_sample(later, Truth(replace(boxes, classes=("tram",), label=np.zeros_like(boxes.label))))
    later = city.sample(city.start_ns + 3 * PERIOD_NS)
    with pytest.raises(ValueError, match="attribute 'flying' is none of"):
        writer.add_sample(later, Truth(replace(boxes, attribute=np.array(["flying"] * len(boxes)))))
    still = replace(
        sample.lidars["top"],
        ego_from_sensor=mount("lidar", "top") @ Pose.from_yaw(0.1),
        stamp_ns=later.stamp_ns + 10**9,
    )
    with pytest.raises(ValueError, match=r"LIDAR_TOP moved on the car by 0.0"):
        writer.add_sweep(Sample(still.stamp_ns, lidars={"top": still}))
    stacked = replace(
        sample.lidars["top"], fields=sample.lidars["top"].fields | {"sweep": np.arange(len(sample.lidars["top"]))}
    )
    with pytest.raises(ValueError, match="sweeps are written one by one"):
        writer.add_sweep(
            Sample(sample.stamp_ns + 1000, lidars={"top": replace(stacked, stamp_ns=sample.stamp_ns + 1000)})
        )
    with pytest.raises(ValueError, match="written already"):
        writer.start_scene("scene-0001", city.map_from_ego)


def test_writer_refuses_a_version_that_is_there(root: Path):
    with pytest.raises(DataError, match=r"v1.0-mini: is there already"):
        NuScenesWriter(root, "v1.0-mini")


def test_writer_refuses_one_reading_twice(tmp_path: Path):
    city = City(0)
    writer = NuScenesWriter(tmp_path / "set", "v1.0-x")
    writer.start_scene("scene-0001", city.map_from_ego)
    writer.add_sample(city.sample(city.start_ns))
    writer.add_sweep(city.sample(city.start_ns))
    with pytest.raises(ValueError, match="2 records of sample_data have the token"):
        writer.close()


def test_writer_counts_points_that_are_not_given(tmp_path: Path, cache: Path):
    city = City(0)
    sample = city.sample(city.start_ns)
    box = city.truth(0, sample).boxes.select(np.array([1, 2]))
    box = replace(box, center=sample.lidars["top"].xyz_ego()[:2].astype(float), num_points=None, num_radar_points=None)
    with NuScenesWriter(tmp_path / "set", "v1.0-x") as writer:
        writer.start_scene("scene-0077", city.map_from_ego)
        writer.add_sample(sample, Truth(box))
    read = NuScenes(config(tmp_path / "set", cache, version="v1.0-x", split="all")).truth(0).boxes
    wanted = points_in_boxes(sample.lidars["top"].xyz_ego(), box).sum(1)
    assert (wanted > 0).all()
    np.testing.assert_array_equal(read.num_points, wanted)


# --- the real key frame -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> NuScenes:
    """The real v1.0-mini key frame in the official layout: its own files, tables from its calibration and boxes."""
    infos = Mmdet3dInfos(Mmdet3dInfosConfig(root=shared_data / "nuscenes_keyframe"))
    sample, truth = infos[0], infos.truth(0)
    info = json.loads((shared_data / "nuscenes_keyframe" / "infos.json").read_text())["data_list"][0]
    poses = {sample.stamp_ns: truth.map_from_ego}
    for channel, image in info["images"].items():
        camera = sample.cameras[channel.removeprefix("CAM_").lower()]
        ego_from_camera = Pose.from_matrix(np.array(image["cam2ego"]))
        poses[camera.stamp_ns] = truth.map_from_ego @ camera.ego_from_camera @ ego_from_camera.inverse()
    root = tmp_path_factory.mktemp("real")
    tracks = np.array([f"{m:032x}" for m in range(len(truth.boxes))])
    with NuScenesWriter(root, "v1.0-mini") as writer:
        writer.start_scene("scene-0061", poses.__getitem__)
        writer.add_sample(sample, replace(truth, boxes=replace(truth.boxes, track_id=tracks)))
    for channel in [*info["images"], "LIDAR_TOP"]:
        (written,) = (root / "samples" / channel).iterdir()
        (original,) = (shared_data / "nuscenes_keyframe").glob(f"*__{channel}__*")
        assert written.name.split("__")[1:] == original.name.split("__")[1:]
        shutil.copyfile(original, written)
    return NuScenes(config(root, tmp_path_factory.mktemp("cache"), split=("scene-0061",)))


def test_real_key_frame(real: NuScenes):
    sample, truth = real[0], real.truth(0)
    assert real.tokens == ("ca9a282c9e77460f8360f564131a8af5",)
    assert sample.stamp_ns == 1_532_402_927_647_951_000
    cloud = sample.lidars["top"]
    assert len(cloud) == 34_688
    assert set(np.unique(cloud.fields["ring"])) == set(range(32))
    assert 0 <= cloud.fields["intensity"].min() < cloud.fields["intensity"].max() <= 255
    assert {image.rgb.shape for image in sample.cameras.values()} == {(900, 1600, 3)}
    pixel, depth, _ = project_to_image(cloud.xyz_ego(), sample.cameras["front"])
    assert int(((depth > 0) & (pixel >= 0).all(1) & (pixel < (1600, 900)).all(1)).sum()) == 3_067
    assert len(truth.boxes) == 68  # of 69, one is of no detection class


def test_real_points_lie_in_the_real_boxes(real: NuScenes):
    sample, boxes = real[0], real.truth(0).boxes
    cloud = sample.lidars["top"]
    lidar_boxes = transform_boxes(cloud.ego_from_sensor.inverse(), boxes)
    difference = np.abs(points_in_boxes(cloud.xyz, lidar_boxes).sum(1) - boxes.num_points)
    assert (difference == 0).sum() == 60  # 61 of 69 with the one of no detection class
    assert difference.max() == 16
    # Annotations are upright in the map, not in the LiDAR's frame: there, every count is right.
    map_from_ego = real.map_from_ego(0)
    points = map_from_ego.apply(cloud.xyz_ego().astype(np.float64))
    inside = points_in_boxes(points, transform_boxes(map_from_ego, boxes))
    np.testing.assert_array_equal(inside.sum(1), boxes.num_points)
