"""`perception predict`: a vehicle's systems on a bag, a predictor on a data set, the files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import builders
import cv2
import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags (extra: bag) is not installed")
from perception.cli import main
from perception.datasets.rosbag import Rosbag, RosbagConfig
from perception.errors import ConfigError
from perception.predict import load_jobs, predict, used_stamps, write
from perception.prediction_files import read_predictions
from perception.predictor import PREDICTORS
from perception.systems import is_due
from perception.types import Sample


@pytest.fixture(autouse=True)
def _fingerprint(monkeypatch):
    monkeypatch.setitem(PREDICTORS, "fingerprint", "builders:Fingerprint")


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    return builders.write_small_bag(tmp_path_factory.mktemp("bag") / "drive")


@pytest.fixture
def vehicle(tmp_path) -> Path:
    path = tmp_path / "vehicle.yaml"
    path.write_text(builders.BAG_VEHICLE)
    return path


@pytest.fixture
def nuscenes(tmp_path) -> Path:
    return builders.write_small_nuscenes(tmp_path / "nuscenes")


def test_a_bag_gives_what_its_samples_give(bag, vehicle):
    (job,) = load_jobs(vehicle, bag)
    found = list(predict(job))
    assert [frame.token for _, frame in found] == [str(s.stamp_ns) for s, _ in found] and len(found) == 6
    for i, (_, frame) in enumerate(found):
        again = job.predictor.predict(job.dataset[i])  # random access, where predict plays
        np.testing.assert_array_equal(frame.prediction.center, again.center)
        np.testing.assert_array_equal(frame.prediction.yaw, again.yaw)


def test_each_system_reads_only_what_its_predictor_needs(bag, vehicle):
    (job,) = load_jobs(vehicle, bag)
    assert isinstance(job.dataset, Rosbag)
    assert job.dataset.config.sweeps == 3
    (sample, frame) = list(predict(job))[-1]
    assert set(frame.used) == {"lidar_top", "radar_front", "cam_front"}  # the other camera is in every second frame
    assert frame.used["lidar_top"] == tuple(sample.stamp_ns - k * builders.BAG_PERIOD_NS for k in range(3))
    assert frame.used["cam_front"] == (sample.stamp_ns - 15_000_000,)


def test_used_stamps_of_any_sample():
    sample = Sample(5, {"top": builders.cloud(5)}, {"front": builders.cloud(4)}, {"front": builders.camera(stamp_ns=3)})
    assert used_stamps(sample) == {"lidar_top": (5,), "radar_front": (4,), "cam_front": (3,)}


def test_threshold_and_rate_are_those_of_the_system(bag, vehicle):
    sure = load_jobs(vehicle, bag, overrides=["systems.fingerprint.score_threshold=0.5"])[0]
    assert {len(frame.prediction) for _, frame in predict(sure)} <= {3, 4}
    slow = load_jobs(vehicle, bag, overrides=["systems.fingerprint.max_rate_hz=10"])[0]
    assert [int(frame.token) - builders.BAG_START_NS for _, frame in predict(slow)] == [0, 10**8, 2 * 10**8]
    assert is_due(10, 0, 90_000_000) and not is_due(10, 0, 89_000_000) and is_due(None, 0, 1)


def test_a_data_set_and_one_predictor(tmp_path, nuscenes):
    config = tmp_path / "echo.yaml"
    config.write_text("predictor: {name: truth_echo}\nbenchmark: nuscenes_detection\n")
    (job,) = load_jobs(config, nuscenes)
    found = list(predict(job, limit=2))
    assert job.name == "truth_echo" and len(found) == 2
    np.testing.assert_allclose(found[0][1].prediction.center, builders.boxes().center, atol=1e-6)


def test_one_predictor_has_the_sweeps_it_needs_of_a_bag(tmp_path, bag):
    config = tmp_path / "config.yaml"
    config.write_text("predictor: {name: fingerprint}\n")
    (job,) = load_jobs(config, bag)
    (sample, frame) = list(predict(job))[-1]
    assert frame.used["lidar_top"] == tuple(sample.stamp_ns - k * builders.BAG_PERIOD_NS for k in range(3))
    config.write_text("predictor: {name: fingerprint}\ndataset: {name: rosbag, root: elsewhere, sweeps: 2}\n")
    (asked,) = load_jobs(config, bag)
    assert len(list(predict(asked))[-1][1].used["lidar_top"]) == 2


def test_the_past_is_forgotten_where_a_scene_begins(tmp_path, nuscenes, monkeypatch):
    resets = []
    monkeypatch.setattr(builders.Fingerprint, "reset", lambda self: resets.append(len(seen)))
    config = tmp_path / "config.yaml"
    config.write_text("predictor: {name: fingerprint}\n")
    (job,) = load_jobs(config, nuscenes)
    seen: list[str] = []
    for _, frame in predict(job):
        seen.append(frame.token)
    assert len(seen) == 6 and resets == [0, 3]


def test_files(tmp_path, bag, vehicle):
    (job,) = load_jobs(vehicle, bag)
    done = write(job, tmp_path / "out", str(bag), png=True, limit=2)
    assert done.predictions == 2 and done.paths == [tmp_path / "out/fingerprint.json", tmp_path / "out/fingerprint"]
    found = read_predictions(done.paths[0])
    assert found.system == "fingerprint" and found.source == str(bag)
    pictures = sorted(p.relative_to(done.paths[1]).as_posix() for p in done.paths[1].rglob("*.png"))
    assert pictures == [f"{frame.token}/{name}.png" for frame in found.frames for name in ("bev", "cameras")]
    assert cv2.imread(str(done.paths[1] / pictures[0])).any()


def test_the_command(tmp_path, bag, vehicle, monkeypatch, capsys):
    words = ["predict", str(bag), "--config", str(vehicle), "--out", str(tmp_path / "out"), "--limit", "3"]
    monkeypatch.setattr("sys.argv", ["perception", *words])
    monkeypatch.setattr(builders.Fingerprint, "degraded", "camera left missing")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "fingerprint: 3 predictions" in printed and "3 of them without: camera left missing" in printed
    frames = read_predictions(tmp_path / "out" / "fingerprint.json").frames
    assert [frame.degraded for frame in frames] == ["camera left missing"] * 3


def test_a_vehicle_without_a_recording_drives_through_the_demo(bag, vehicle, monkeypatch):
    monkeypatch.setattr("perception.predict.demo_bag", lambda: bag)
    (job,) = load_jobs(vehicle, None)
    assert len(list(predict(job, limit=2))) == 2


def test_rosbag_says_which_messages_a_sample_has(bag):
    dataset = Rosbag(RosbagConfig(root=bag, sweeps=2))
    used = dataset.used(3)
    assert used["lidar_top"] == (int(dataset.tokens[3]), int(dataset.tokens[2]))
    assert used["cam_front"] == (dataset[3].cameras["front"].stamp_ns,)


@pytest.mark.parametrize(
    ("text", "keys", "message"),
    [
        ("benchmark: occ3d\n", {}, r"has neither `systems` nor a `predictor`"),
        ("predictor: {name: truth_echo}\n", {"source": None}, r"has no dataset"),
        ("predictor: {name: truth_echo}\n", {"systems": ["a"]}, r"has no systems, so none named 'a'"),
        (builders.BAG_VEHICLE, {"systems": ["a"]}, r"no system 'a'\n.*there are: fingerprint"),
        (
            builders.BAG_VEHICLE + "  other: {predictor: {name: fingerprint}}\n",
            {"weights": Path("w.safetensors")},
            r"--weights w.safetensors: for which of fingerprint, other\?\n.*--system",
        ),
        (builders.BAG_VEHICLE, {"weights": Path("w")}, r"unknown key 'predictor.weights'"),
    ],
)
def test_what_is_refused(tmp_path, bag, text, keys, message):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_jobs(config, keys.pop("source", bag), **keys)
