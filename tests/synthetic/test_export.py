"""The city in official layouts: what is read back is what was simulated, and the official devkit scores it."""

from __future__ import annotations

import numpy as np
import pytest

from perception.config import ConfigError
from perception.datasets import detect_layout
from perception.datasets.nuscenes import NuScenes, NuScenesConfig
from perception.datasets.nuscenes_layout import DETECTION_CLASSES
from perception.datasets.omnihd import OmniHD, OmniHDConfig
from perception.datasets.semantickitti import SemanticKITTI, SemanticKITTIConfig
from perception.evaluation.run import RunConfig, evaluate
from perception.predictor import TruthEchoConfig
from perception.synthetic.city import City
from perception.synthetic.export import ExportConfig, _city_config, export

SMALL = {"image_size": (160, 90), "key_frames": 2, "workers": 1}


@pytest.fixture(scope="module")
def nuscenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("city")
    config = ExportConfig(train=0, val=1, **SMALL)
    steps = []
    export(config, root, lambda what, done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
    city = City(_city_config(config, 100_000, 1))
    return root, city


def read(root, tmp_path_factory, **keys):
    cache = tmp_path_factory.mktemp("cache")
    return NuScenes(NuScenesConfig(root=root, version="v1.0-mini", split="mini_val", cache_dir=cache, **keys))


def test_nuscenes_gives_the_simulated_sample_back(nuscenes, tmp_path_factory):
    root, city = nuscenes
    dataset = read(root, tmp_path_factory, sweeps=1)
    assert len(dataset) == 2
    for i in range(2):
        sample, simulated = dataset[i], city[i]
        assert sample.stamp_ns == simulated.stamp_ns
        np.testing.assert_allclose(sample.lidars["top"].xyz, simulated.lidars["top"].xyz, atol=1e-5)
        np.testing.assert_array_equal(sample.lidars["top"].field("ring"), simulated.lidars["top"].field("ring"))
        for role, image in simulated.cameras.items():
            read_back = sample.cameras[role]
            assert read_back.stamp_ns == image.stamp_ns
            np.testing.assert_allclose(read_back.ego_from_camera.matrix, image.ego_from_camera.matrix, atol=1e-6)
            assert np.abs(read_back.rgb.astype(int) - image.rgb).mean() < 6  # JPEG
        truth, true = dataset.truth(i), city.truth(i)
        np.testing.assert_array_equal(truth.point_label["top"].label, true.point_label["top"].label)
        order = np.argsort(truth.boxes.center[:, 0]), np.argsort(true.boxes.center[:, 0])
        np.testing.assert_allclose(truth.boxes.center[order[0]], true.boxes.center[order[1]], atol=1e-4)


def test_sweeps_between_key_frames_are_there_once(nuscenes, tmp_path_factory):
    root, _ = nuscenes
    sample = read(root, tmp_path_factory, sweeps=10, cameras=())[1]
    lags = np.unique(sample.lidars["top"].field("time_lag"))
    np.testing.assert_allclose(lags, np.arange(10) * 0.05, atol=1e-4)
    assert all(len(np.unique(radar.field("time_lag"))) >= 6 for radar in sample.radars.values())


def test_every_class_is_in_the_split_within_its_range_and_with_points(nuscenes, tmp_path_factory):
    root, _ = nuscenes
    dataset = read(root, tmp_path_factory, cameras=(), radars=())
    reach = {"traffic_cone": 30, "barrier": 30, "motorcycle": 40, "bicycle": 40, "pedestrian": 40}
    found = set()
    for i in range(len(dataset)):
        boxes = dataset.truth(i).boxes
        for name in DETECTION_CLASSES:
            mine = (boxes.label == DETECTION_CLASSES.index(name)) & (boxes.num_points > 0)
            if (np.linalg.norm(boxes.center[mine, :2], axis=1) < reach.get(name, 50)).any():
                found.add(name)
    assert found == set(DETECTION_CLASSES)


def test_the_devkit_scores_the_truth_with_one_and_occupancy_too(nuscenes, tmp_path_factory, tmp_path):
    root, _ = nuscenes
    for layout in (None, "occ3d", "openoccupancy", "surroundocc"):
        dataset = read(root, tmp_path_factory, occupancy=layout)
        output = "occupancy" if layout else "boxes"
        config = RunConfig(
            dataset=dataset.config, predictor=TruthEchoConfig(output=output), benchmark=layout or "nuscenes_detection"
        )
        score, _ = evaluate(config, tmp_path)
        assert (score.miou if layout else score.nds) == pytest.approx(1.0)


def test_the_unmodified_devkit_loads_and_draws_it(nuscenes, tmp_path):
    devkit = pytest.importorskip("nuscenes", reason="extra nuscenes is not installed")
    root, _ = nuscenes
    tables = devkit.NuScenes("v1.0-mini", str(root), verbose=False)
    sample = tables.sample[0]
    with_map = np.lib.NumpyVersion(np.__version__) < "2.0.0"  # the devkit cannot draw it on numpy 2
    lidar = sample["data"]["LIDAR_TOP"]
    tables.render_sample_data(lidar, out_path=str(tmp_path / "lidar.png"), underlay_map=with_map, verbose=False)
    tables.render_sample_data(sample["data"]["CAM_FRONT"], out_path=str(tmp_path / "front.png"), verbose=False)
    assert (tmp_path / "lidar.png").stat().st_size > 10_000
    log = tables.get("log", tables.scene[0]["log_token"])
    mask = tables.get("map", log["map_token"])["mask"]
    pose = tables.get("ego_pose", tables.get("sample_data", sample["data"]["LIDAR_TOP"])["ego_pose_token"])
    assert mask.is_on_mask(*pose["translation"][:2])[0]  # ego drives on the drivable surface


@pytest.mark.slow
def test_semantickitti_gives_the_simulated_scan_and_volume_back(tmp_path):
    config = ExportConfig(layout="semantickitti", train=0, val=1, **SMALL)
    export(config, tmp_path)
    dataset = SemanticKITTI(SemanticKITTIConfig(root=tmp_path))
    city = City(_city_config(config, 100_000, 1))
    assert list(dataset.tokens) == ["08/000000", "08/000001"]
    np.testing.assert_array_equal(dataset[1].lidars["top"].xyz, city[1].lidars["top"].xyz)
    np.testing.assert_array_equal(dataset[1].cameras["front"].rgb, city[1].cameras["front"].rgb)
    truth, true = dataset.truth(0), city.truth(0)
    np.testing.assert_array_equal(truth.point_label["top"].label, true.point_label["top"].label)
    np.testing.assert_array_equal(truth.occupancy.label, true.occupancy.label)
    assert dataset.truth(1).occupancy is None  # every fifth scan has a volume


@pytest.mark.slow
def test_omnihd_gives_radars_of_three_sweeps_and_occupancy(tmp_path):
    config = ExportConfig(layout="omnihd", train=0, val=1, image_size=(192, 108), key_frames=2, workers=1)
    export(config, tmp_path)
    dataset = OmniHD(OmniHDConfig(root=tmp_path, split="val", sweeps=3, occupancy=True))
    city = City(_city_config(config, 100_000, 1))
    sample = dataset[1]
    assert sorted(sample.radars) == sorted(city[1].radars)
    lags = np.unique(sample.radars["front"].field("time_lag"))
    assert len(lags) == 3
    assert lags[1] == pytest.approx(0.1, abs=0.03)
    np.testing.assert_array_equal(dataset.truth(1).occupancy.label, city.truth(1).occupancy.label)


def test_more_scenes_than_there_are_names_is_an_error_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"val: 2 scenes, the official split has names for 1\n.*fewer"):
        export(ExportConfig(layout="semantickitti", val=2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_layout_is_told_from_the_folder(nuscenes):
    root, _ = nuscenes
    assert detect_layout(root)["name"] == "nuscenes"


@pytest.mark.slow
def test_a_bag_holds_every_sensor_and_what_the_vehicle_says_of_itself(tmp_path):
    pytest.importorskip("rosbags", reason="extra bag is not installed")
    from perception.datasets.rosbag import Rosbag, RosbagConfig

    config = ExportConfig(layout="rosbag", train=0, val=1, image_size=(160, 90), key_frames=1, workers=1)
    export(config, tmp_path)
    bag = Rosbag(RosbagConfig(root=tmp_path / "val_000"))
    city = City(_city_config(config, 100_000, 1))
    sample, simulated = bag[len(bag) - 1], city[0]
    assert sample.stamp_ns == simulated.stamp_ns
    np.testing.assert_allclose(sample.lidars["top"].xyz, simulated.lidars["top"].xyz, atol=1e-5)
    assert sorted(sample.radars) == sorted(simulated.radars)
    assert len(sample.cameras) == 6
    assert sample.imu is not None
    assert sample.odometry is not None
    assert sample.gnss is not None
    np.testing.assert_allclose(sample.odom_from_ego.matrix, simulated.odom_from_ego.matrix, atol=1e-6)
    np.testing.assert_allclose(
        bag.truth(len(bag) - 1).map_from_ego.matrix, city.truth(0).map_from_ego.matrix, atol=1e-6
    )
    for i in range(len(bag)):
        assert bag.truth(i).boxes.stamp_ns == bag[i].stamp_ns and len(bag.truth(i).boxes) > 5
    beside, true = bag.truth(len(bag) - 1), city.truth(0)
    np.testing.assert_array_equal(beside.occupancy.label, true.occupancy.label)
    np.testing.assert_allclose(beside.boxes.center, true.boxes.center)
