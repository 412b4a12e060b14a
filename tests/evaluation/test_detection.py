"""nuScenes detection scores: the devkit's own numbers on real detections, and a small data set in the v1.0 layout."""

import gzip
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perception.datasets.nuscenes import NuScenes, NuScenesConfig, NuScenesWriter
from perception.datasets.nuscenes_layout import DETECTION_CLASSES
from perception.errors import DataError, PerceptionError
from perception.evaluation.detection import (
    evaluate_detection,
    filter_boxes,
    load_boxes,
    load_protocol,
    score_boxes,
)
from perception.evaluation.detection_results import Modalities, write_results
from perception.types import Boxes3D, PointCloud, Pose, Sample, Truth

pytest.importorskip("nuscenes", reason="the extra `nuscenes` is not installed")

LIDAR = Modalities(camera=False, lidar=True, radar=False)
ERRORS = {
    "trans_err": "translation_m",
    "scale_err": "scale",
    "orient_err": "orientation_rad",
    "vel_err": "velocity_mps",
    "attr_err": "attribute",
}


def read_gz(path: Path):
    with gzip.open(path) as stream:
        return json.load(stream)


@pytest.fixture(scope="module")
def mini_val(shared_data):
    """(folder, truths, ego positions, what the devkit computed) of the 81 samples of mini_val."""
    folder = shared_data / "nuscenes_mini_val"
    infos = read_gz(folder / "infos_mini_val.json.gz")
    ego = {info["token"]: info["ego2global_translation"] for info in infos}
    expected = json.loads((folder / "expected_metrics_devkit.json").read_text())
    return folder, read_gz(folder / "gt_mini_val_global.json.gz")["results"], ego, expected


@pytest.mark.parametrize("detector", ["centerpoint", "megvii"])
def test_real_detections_score_what_the_devkit_says(mini_val, detector):
    folder, truth_records, ego, expected = mini_val
    records = read_gz(folder / f"{detector}_mini_val_results_nusc.json.gz")["results"]
    config = load_protocol()
    truths = filter_boxes(load_boxes(truth_records, ego), config)
    predictions = filter_boxes(load_boxes(records, ego), config)
    score = score_boxes(truths, predictions, config, range_edges_m=())
    expected = expected[detector]
    assert (len(truths.all), len(predictions.all)) == (expected["gt"], expected["pred"])
    assert score.mean_ap == pytest.approx(expected["mAP"], abs=1e-6)
    assert {c.name for c in score.classes} == expected["ap"].keys()
    for part in score.classes:
        assert part.ap == pytest.approx(expected["ap"][part.name], abs=1e-6)
        for theirs, ours in ERRORS.items():
            value = expected["tp_class"][f"{part.name}/{theirs}"]
            # The file's velocities are rounded to 1e-4 m/s, those of the expected numbers were not.
            within = 2e-5 if theirs == "vel_err" else 1e-6
            assert getattr(part.errors, ours) == pytest.approx(value, abs=within, nan_ok=True), f"{part.name} {ours}"
    for theirs, ours in ERRORS.items():
        within = 2e-5 if theirs == "vel_err" else 1e-6
        assert getattr(score.errors, ours) == pytest.approx(expected["tp_errors"][theirs], abs=within)
    assert score.nds == pytest.approx(expected["NDS_with_attr_err_1"], abs=1e-6)
    assert (score.samples, score.subset) == (81, False)


# A small data set in the v1.0 layout: two scenes of mini_val and one of mini_train, ten tracks each.

STEP_NS = 500_000_000
SCENES = ("scene-0103", "scene-0916", "scene-0061")
ATTRIBUTE = {"barrier": "", "traffic_cone": "", "pedestrian": "pedestrian.moving"} | dict.fromkeys(
    ("bicycle", "motorcycle"), "cycle.with_rider"
)


def truth_boxes(i: int, map_from_ego: Pose, stamp_ns: int) -> Boxes3D:
    """One box of each class around the car, moving in the map; in sample 1 also a car that is seen but once and a truck
    without points."""
    names = [*DETECTION_CLASSES, *(("car", "truck") if i == 1 else ())]
    m = len(names)
    angle = 2 * np.pi * np.arange(m) / m
    in_map = np.stack([20 * np.cos(angle), 20 * np.sin(angle), np.full(m, 1.0)], 1)
    in_map[:10, 0] += 1.5 * i  # 3 m/s along the map's x
    return Boxes3D(
        map_from_ego.inverse().apply(in_map),
        np.tile([4.0, 2.0, 1.5], (m, 1)),
        angle - map_from_ego.yaw,
        np.full((m, 2), np.nan),
        np.ones(m),
        np.array([DETECTION_CLASSES.index(name) for name in names], np.int64),
        DETECTION_CLASSES,
        stamp_ns,
        attribute=np.array([ATTRIBUTE.get(name, "vehicle.moving") for name in names], np.str_),
        track_id=np.array([f"track{t}" for t in range(m)], np.str_),
        num_points=np.array([0 if t == 11 else 7 for t in range(m)], np.int64),
        num_radar_points=np.zeros(m, np.int64),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("nuscenes")
    with NuScenesWriter(root, "v1.0-mini") as writer:
        for s, scene in enumerate(SCENES):

            def map_from_ego(stamp_ns: int) -> Pose:
                return Pose.from_yaw(0.1 * stamp_ns / 1e9, (stamp_ns / 1e9, 0.0, 0.0))

            writer.start_scene(scene, map_from_ego, split="first" if s == 0 else None)
            for i in range(4):
                stamp_ns = i * STEP_NS
                fields = {"intensity": np.zeros(3, np.float32), "ring": np.zeros(3, np.int32)}
                mount = Pose.from_yaw(-np.pi / 2, (0.9, 0.0, 1.84))
                cloud = PointCloud(np.ones((3, 3), np.float32), fields, mount, stamp_ns)
                sample = Sample(stamp_ns, lidars={"top": cloud}, token=f"{s}{i}".rjust(32, "0"))
                writer.add_sample(sample, Truth(truth_boxes(i, map_from_ego(stamp_ns), stamp_ns)))
    return root


def read(root, split="mini_val") -> NuScenes:
    config = NuScenesConfig(root=root, version="v1.0-mini", split=split, cache_dir=root / "cache")
    return NuScenes(config)


def echo(dataset: NuScenes, keep=lambda boxes: boxes):
    """The truth of every sample as its prediction."""
    for i, token in enumerate(dataset.tokens):
        yield token, keep(dataset.truth(i).boxes), dataset.map_from_ego(i)


def with_points(boxes: Boxes3D) -> Boxes3D:
    return boxes.select(boxes.num_points > 0)


def noisy(boxes: Boxes3D) -> Boxes3D:
    """The truth, some of it lost, all of it displaced."""
    rng = np.random.default_rng(len(boxes))
    boxes = boxes.select(rng.random(len(boxes)) < 0.9)
    return replace(
        boxes,
        center=boxes.center + rng.normal(0, 0.6, boxes.center.shape),
        yaw=boxes.yaw + rng.normal(0, 0.2, len(boxes)),
        score=rng.random(len(boxes)),
        velocity=np.nan_to_num(boxes.velocity) + rng.normal(0, 0.5, (len(boxes), 2)),
        attribute=None,
    )


def evaluate(path, root, split="mini_val", **options):
    return evaluate_detection(path, root, "v1.0-mini", split, **options)


def test_truth_against_itself_is_perfect(root, tmp_path):
    write_results(tmp_path / "echo.json", echo(read(root), with_points), LIDAR)
    score = evaluate(tmp_path / "echo.json", root)
    assert score.nds == pytest.approx(1.0, abs=1e-6)
    assert score.mean_ap == pytest.approx(1.0)
    assert score.errors.velocity_mps == pytest.approx(0.0, abs=1e-6)
    assert score.errors.attribute == 0.0
    assert (score.samples, score.samples_of_split, score.subset) == (8, 8, False)
    cars = next(c for c in score.classes if c.name == "car")
    assert (cars.truths, cars.predictions) == (10, 10)  # 8, and one in each scene whose velocity nobody knows
    barrier = next(c for c in score.classes if c.name == "barrier")
    assert math.isnan(barrier.errors.velocity_mps)
    assert math.isnan(barrier.errors.attribute)


def test_a_box_without_points_is_no_truth(root, tmp_path):
    write_results(tmp_path / "echo.json", echo(read(root)), LIDAR)
    score = evaluate(tmp_path / "echo.json", root)
    trucks = next(c for c in score.classes if c.name == "truck")
    assert (trucks.truths, trucks.predictions) == (8, 10)
    assert trucks.mean_ap < 1.0
    assert all(c.mean_ap == pytest.approx(1.0) for c in score.classes if c.name != "truck")


def official(root, path, split, tmp_path):
    """The devkit run as its own command line runs it."""
    from nuscenes import NuScenes as Tables
    from nuscenes.eval.detection.evaluate import DetectionEval

    tables = Tables("v1.0-mini", dataroot=str(root), verbose=False)
    evaluation = DetectionEval(tables, load_protocol(), str(path), split, str(tmp_path / "plots"), verbose=False)
    return evaluation.evaluate()[0]


def test_a_whole_split_scores_as_the_devkit_scores_it(root, tmp_path):
    path = tmp_path / "noisy.json"
    write_results(path, echo(read(root), noisy), LIDAR)
    score, expected = evaluate(path, root), official(root, path, "mini_val", tmp_path)
    assert 0.1 < score.nds < 0.9
    assert (score.nds, score.mean_ap) == (expected.nd_score, expected.mean_ap)
    for part in score.classes:
        assert part.mean_ap == pytest.approx(expected.mean_dist_aps[part.name])
    metrics = score.metrics()
    assert metrics["AP/car/2.0m"] == expected.get_label_ap("car", 2.0)
    assert metrics["mATE_m"] == expected.tp_errors["trans_err"]
    assert metrics["velocity_mps/car"] == expected.get_label_tp("car", "vel_err")
    assert "mAP_present/0-30m" in metrics
    assert score.rows()[0][:2] == ("mean", score.mean_ap)
    assert len(score.rows()) == 11


def test_a_subset_scores_as_a_split_of_its_own(root, tmp_path):
    part, whole = read(root, "first"), read(root)
    write_results(tmp_path / "part.json", echo(part, noisy), LIDAR)
    expected = official(root, tmp_path / "part.json", "first", tmp_path)
    score = evaluate(tmp_path / "part.json", root, subset=True)
    assert (score.nds, score.mean_ap) == (expected.nd_score, expected.mean_ap)
    assert (score.samples, score.samples_of_split, score.subset) == (4, 8, True)
    own = evaluate(tmp_path / "part.json", root, "first")
    assert (own.nds, own.subset) == (expected.nd_score, False)
    by_name = evaluate(tmp_path / "part.json", root, ("scene-0103",))
    assert (by_name.nds, by_name.subset) == (expected.nd_score, False)
    assert len(whole) == 8


def test_all_samples_can_be_scored(root, tmp_path):
    write_results(tmp_path / "echo.json", echo(read(root, "all"), with_points), LIDAR)
    score = evaluate(tmp_path / "echo.json", root, "all")
    assert (score.mean_ap, score.samples) == (pytest.approx(1.0), 12)


@pytest.mark.parametrize("subset", [False, True])
def test_nothing_found_scores_zero(root, tmp_path, subset):
    write_results(tmp_path / "none.json", echo(read(root), lambda b: b.select(np.zeros(len(b), bool))), LIDAR)
    score = evaluate(tmp_path / "none.json", root, subset=subset)
    assert (score.nds, score.mean_ap, score.samples) == (0.0, 0.0, 8)


def results_of(root, tmp_path, tokens):
    write_results(
        tmp_path / "results.json", ((t, Boxes3D.empty(DETECTION_CLASSES, 0), Pose.identity()) for t in tokens), LIDAR
    )
    return tmp_path / "results.json"


def test_missing_samples_are_counted_and_the_cure_named(root, tmp_path):
    tokens = read(root).tokens
    with pytest.raises(DataError) as error:
        evaluate(results_of(root, tmp_path, tokens[:3]), root)
    assert "its 3 samples are not the 8 of split 'mini_val' of v1.0-mini: 5 missing (" in error.value.what
    assert f"{tokens[3]}: scene-0103 of mini_val, {tokens[4]}: scene-0916 of mini_val" in error.value.what
    assert tokens[6] not in error.value.what  # three examples
    assert "--subset" in error.value.do


@pytest.mark.parametrize("subset", [False, True])
def test_samples_of_another_split_are_named(root, tmp_path, subset):
    train, val = read(root, ("scene-0061",)).tokens, read(root).tokens
    with pytest.raises(DataError) as error:
        evaluate(results_of(root, tmp_path, [*val, *train]), root, subset=subset)
    assert f"4 extra ({train[0]}: scene-0061 of mini_train, " in error.value.what
    assert "missing" not in error.value.what
    assert "the extra samples are of split mini_train" in error.value.do


def test_samples_of_another_version_are_named(root, tmp_path):
    with pytest.raises(DataError) as error:
        evaluate(results_of(root, tmp_path, ["f" * 32]), root)
    assert f"8 missing ({'0' * 32}: scene-0103 of mini_val" in error.value.what
    assert f"1 extra ({'f' * 32}: not in v1.0-mini)" in error.value.what
    assert "the file is not of v1.0-mini" in error.value.do


def test_an_empty_file_is_no_subset(root, tmp_path):
    with pytest.raises(DataError, match="its 0 samples are not the 8"):
        evaluate(results_of(root, tmp_path, []), root, subset=True)


def test_version_and_split_go_together(root, tmp_path):
    path = results_of(root, tmp_path, read(root).tokens)
    with pytest.raises(
        DataError, match=r"split 'val' is one of v1.0-trainval, not of v1.0-mini(?s:.)*mini_train, mini_val"
    ):
        evaluate(path, root, "val")
    with pytest.raises(DataError, match=r"split 'mini_vl': .*not found(?s:.)*mini_val"):
        evaluate(path, root, "mini_vl")
    with pytest.raises(DataError, match=r"none of the 1 scenes of split \('scene-9999',\)"):
        evaluate(path, root, ("scene-9999",))
    with pytest.raises(DataError, match=r"v1.0-trainval: the devkit cannot load the tables(?s:.)*versions: v1.0-mini"):
        evaluate_detection(path, root, "v1.0-trainval", "val")
    with pytest.raises(DataError, match=r"protocol 'detection_cvpr_2020': (?s:.)*detection_cvpr_2019"):
        evaluate(path, root, protocol="detection_cvpr_2020")
    with pytest.raises(DataError, match="protocol 'tracking_nips_2019': its name starts with detection_"):
        evaluate(path, root, protocol="tracking_nips_2019")


def test_a_damaged_table_is_named(root, tmp_path):
    path = results_of(root, tmp_path, read(root).tokens)
    shutil.copytree(root, tmp_path / "copy")
    table = tmp_path / "copy" / "v1.0-mini" / "ego_pose.json"
    table.write_text(table.read_text()[:-40])
    with pytest.raises(DataError, match=r"copy/v1.0-mini: the devkit cannot load the tables: JSONDecodeError"):
        evaluate(path, tmp_path / "copy")


def test_without_the_devkit_the_extra_is_named(root, tmp_path, monkeypatch):
    path = results_of(root, tmp_path, read(root).tokens)
    monkeypatch.setitem(sys.modules, "nuscenes.eval.common.config", None)
    with pytest.raises(PerceptionError, match=r"need the official devkit(?s:.)*perception\[nuscenes\]"):
        evaluate(path, root)


# Boxes without tables.


def record(**changes):
    return {
        "sample_token": "a",
        "translation": [5.0, 0.0, 0.0],
        "size": [2.0, 4.0, 1.5],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "velocity": [0.0, 0.0],
        "detection_name": "car",
        "detection_score": 0.5,
        "attribute_name": "",
    } | changes


EGO = {"a": (0.0, 0.0, 0.0), "b": (100.0, 0.0, 0.0)}


def test_filters_keep_what_is_in_range_and_has_points():
    records = {
        "a": [record(num_pts=0), record(translation=[30.0, 40.1, 9.0]), record(translation=[30.0, 39.9, 90.0])],
        "b": [
            record(sample_token="b", translation=[70.5, 0.0, 0.0], detection_name="barrier"),
            record(sample_token="b"),
        ],
    }
    kept = filter_boxes(load_boxes(records, EGO), load_protocol())
    assert [box.translation for box in kept["a"]] == [(30.0, 39.9, 90.0)]
    assert [box.detection_name for box in kept["b"]] == ["barrier"]


def test_one_false_of_two_by_hand():
    # One truth, two predictions, the better score wrong: precision rises from 0 to 1/2 along recall r, so AP is the
    # mean over r = 0.11, 0.12, ... 1 of max(r / 2 - 0.1, 0) / 0.9: 16.2 / 90 / 0.9.
    truths = load_boxes({"a": [record()]}, EGO)
    predictions = load_boxes({"a": [record(), record(translation=[20.0, 0.0, 0.0], detection_score=0.9)]}, EGO)
    score = score_boxes(truths, predictions, load_protocol())
    car = score.classes[0]
    assert car.name == "car"
    assert car.mean_ap == pytest.approx(0.2)
    assert score.mean_ap == pytest.approx(car.mean_ap / 10)
    assert score.mean_ap_present == pytest.approx(car.mean_ap)
    assert [r.mean_ap_present for r in score.ranges] == [
        pytest.approx(car.mean_ap),
        pytest.approx(math.nan, nan_ok=True),
    ]


def test_range_bins_take_truths_and_predictions_of_their_distance():
    near, far = record(), record(translation=[0.0, 40.0, 0.0])
    truths = load_boxes({"a": [near, far, record(translation=[30.0, 0.0, 0.0])]}, EGO)
    score = score_boxes(truths, load_boxes({"a": [near]}, EGO), load_protocol(), (0.0, 30.0, 50.0))
    assert [(r.min_m, r.max_m) for r in score.ranges] == [(0.0, 30.0), (30.0, 50.0)]
    assert [(r.classes[0].truths, r.classes[0].predictions) for r in score.ranges] == [(1, 1), (2, 0)]
    assert [r.mean_ap_present for r in score.ranges] == pytest.approx([1.0, 0.0])
    assert score.metrics()["mAP_present/30-50m"] == 0.0


def test_boxes_that_cannot_be_scored_are_named():
    config, good = load_protocol(), load_boxes({"a": [record()]}, EGO)
    with pytest.raises(DataError, match=r"1 have no predictions \(a\), 1 no truths \(b\)"):
        score_boxes(good, load_boxes({"b": []}, EGO), config)
    with pytest.raises(DataError, match=r"sample a: prediction car with translation \(inf, 0.0, 0.0\)"):
        score_boxes(good, load_boxes({"a": [record(translation=[math.inf, 0.0, 0.0])]}, EGO), config)
    with pytest.raises(DataError, match="sample a: 501 boxes; the protocol allows 500"):
        score_boxes(good, load_boxes({"a": [record()] * 501}, EGO), config)
    with pytest.raises(DataError, match=r"sample a: box 1 \(car\): .*Size may not be NaN"):
        load_boxes({"a": [record(), record(size=[1.0, math.nan, 1.0])]}, EGO)
    with pytest.raises(DataError, match=r"sample a: box 0 \(tram\): .*Unknown detection_name"):
        load_boxes({"a": [record(detection_name="tram")]}, EGO)
    with pytest.raises(DataError, match="sample c: no ego position"):
        load_boxes({"c": []}, EGO)
