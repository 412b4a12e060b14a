"""From configuration to result file: the truth scored against itself is perfect, and what does not fit is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import builders
import numpy as np
import pytest

from perception.config import ConfigError
from perception.datasets import occ3d, semantickitti_voxels
from perception.datasets.nuscenes import NuScenes, NuScenesConfig
from perception.datasets.semantickitti import EGO_FROM_LIDAR, SemanticKITTI, SemanticKITTIConfig, SemanticKITTIWriter
from perception.errors import DataError
from perception.evaluation.result import read_result, write_result
from perception.evaluation.run import evaluate, load_run_config
from perception.evaluation.semantickitti_submission import write_prediction
from perception.systems import load_stack
from perception.types import OccupancyGrid3D, PointCloud, Pose, Sample, Truth

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def nuscenes(tmp_path_factory):
    return builders.write_small_nuscenes(tmp_path_factory.mktemp("nuscenes"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def mini(nuscenes, cache, name="nuscenes_detection", *more):
    sets = [
        f"dataset.root={nuscenes}",
        f"dataset.cache_dir={cache}",
        "dataset.version=v1.0-mini",
        "dataset.split=mini_val",
    ]
    return load_run_config(CONFIGS / f"{name}.yaml", [*sets, *more])


def test_detection_truth_against_itself_is_perfect_and_the_result_says_what_made_it(nuscenes, cache, tmp_path):
    config = mini(nuscenes, cache, "nuscenes_detection", "predictor.name=truth_echo")
    score, result = evaluate(config, tmp_path)
    assert score.mean_ap == pytest.approx(1.0) and score.nds == pytest.approx(1.0)
    assert (result.samples, result.samples_of_split, result.subset) == (6, 6, False)
    write_result(tmp_path / "result.json", result)
    saved = read_result(tmp_path / "result.json")
    assert saved.config["dataset"]["split"] == "mini_val" and saved.config["predictor"]["name"] == "truth_echo"
    assert saved.weights.kind == "none" and saved.metrics["NDS"] == pytest.approx(1.0)


def test_a_limit_scores_a_part_and_says_so(nuscenes, cache, tmp_path):
    _, result = evaluate(mini(nuscenes, cache, "nuscenes_detection", "predictor.name=truth_echo"), tmp_path, limit=2)
    assert (result.samples, result.subset) == (2, True)


def test_a_limit_does_not_cut_a_file_of_predictions(nuscenes, cache, tmp_path):
    with pytest.raises(
        ConfigError, match=r"limit 2: the predictions of .*x.json are scored as they are\n  drop --limit"
    ):
        evaluate(mini(nuscenes, cache), tmp_path, predictions=tmp_path / "x.json", limit=2)


def test_a_version_may_give_its_own_scenes_an_official_splits_name(nuscenes, cache, tmp_path):
    root = shutil.copytree(nuscenes, tmp_path / "own")
    (root / "v1.0-mini").rename(root / "v1.0-city")
    (root / "v1.0-city" / "splits.json").write_text(json.dumps({"val": ["scene-0916"]}))
    sets = ("dataset.version=v1.0-city", "dataset.split=val", "predictor.name=truth_echo")
    score, result = evaluate(mini(root, cache, "nuscenes_detection", *sets), tmp_path)
    assert score.nds == pytest.approx(1.0)
    assert (result.samples, result.samples_of_split) == (3, 3)


def test_the_same_predictions_from_a_file_give_the_same_score(nuscenes, cache, tmp_path):
    evaluate(mini(nuscenes, cache, "nuscenes_detection", "predictor.name=truth_echo"), tmp_path)
    written = tmp_path / "results_nusc.json"
    score, _ = evaluate(mini(nuscenes, cache), tmp_path, predictions=written)
    assert score.nds == pytest.approx(1.0)
    content = json.loads(written.read_text())
    dropped = next(iter(content["results"]))
    del content["results"][dropped]
    written.write_text(json.dumps(content))
    with pytest.raises(DataError, match=dropped):
        evaluate(mini(nuscenes, cache), tmp_path, predictions=written)
    score, result = evaluate(mini(nuscenes, cache), tmp_path, predictions=written, subset=True)
    assert score.samples == 5 and result.subset


def test_nothing_to_score_names_both_ways_out(nuscenes, cache, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing to score.*\n.*--predictions.*truth_echo"):
        evaluate(mini(nuscenes, cache), tmp_path)


def test_a_predictor_of_another_kind_is_refused(nuscenes, cache, tmp_path):
    config = mini(nuscenes, cache, "nuscenes_detection", "predictor.name=truth_echo", "predictor.output=pose")
    with pytest.raises(ConfigError, match="scores Boxes3D, the predictor gives Localization"):
        evaluate(config, tmp_path)


def test_poses_are_scored_scene_by_scene(nuscenes, cache, tmp_path):
    sets = ("predictor.name=truth_echo", "predictor.output=pose", "benchmark=localization")
    score, _ = evaluate(mini(nuscenes, cache, "nuscenes_detection", *sets), tmp_path)
    assert score.translation_m.max == pytest.approx(0.0) and score.availability == 1.0 and score.longest_gap_s == 0.0


def write_occ3d(root, dataset, wrong_voxels=0):
    rng = np.random.default_rng(0)
    for i in range(len(dataset)):
        sample = dataset[i]
        grid = occ3d.grid(None)
        label = rng.integers(0, 18, grid.shape).astype(np.uint8)
        label.reshape(-1)[:wrong_voxels] = (label.reshape(-1)[:wrong_voxels] + 1) % 18
        seen = {kind: np.ones(grid.shape, bool) for kind in ("lidar", "camera")}
        truth = OccupancyGrid3D(grid, label, occ3d.CLASSES, occ3d.FREE_LABEL, sample.stamp_ns, observed=seen)
        occ3d.write(occ3d.file_path(root, dataset.scene_name(i), sample.token), truth)


def test_occ3d_from_the_echo_and_from_files(nuscenes, cache, tmp_path):
    dataset = NuScenes(NuScenesConfig(root=nuscenes, version="v1.0-mini", split="mini_val", cache_dir=cache))
    write_occ3d(tmp_path / "truth", dataset)
    write_occ3d(tmp_path / "predicted", dataset, wrong_voxels=64_000)
    sets = (f"dataset.occupancy_root={tmp_path / 'truth'}", "predictor.name=truth_echo", "predictor.output=occupancy")
    config = mini(nuscenes, cache, "nuscenes_occ3d", *sets)
    assert evaluate(config, tmp_path)[0].miou == pytest.approx(1.0)
    score, _ = evaluate(config, tmp_path, predictions=tmp_path / "predicted")
    # A tenth of the voxels is wrong, evenly over 18 classes: IoU = 0.9 / 1.1.
    assert score.miou == pytest.approx(0.9 / 1.1, abs=0.01)


def test_semantickitti_from_a_submission(tmp_path):
    rng = np.random.default_rng(0)
    with SemanticKITTIWriter(tmp_path / "data") as writer:
        writer.start_sequence("08", lambda stamp_ns: Pose(np.eye(3), np.array([stamp_ns / 1e9, 0.0, 0.0])))
        for k in range(2):
            label = rng.integers(0, 20, (256, 256, 32)).astype(np.uint8)
            grid = semantickitti_voxels.grid(EGO_FROM_LIDAR)
            truth = OccupancyGrid3D(grid, label, semantickitti_voxels.CLASSES, 0, k * 10**8)
            xyz = rng.uniform(-20, 20, (50, 3)).astype(np.float32)
            scan = PointCloud(xyz, {"intensity": np.full(50, 0.5, np.float32)}, EGO_FROM_LIDAR, k * 10**8)
            writer.add_sample(Sample(k * 10**8, lidars={"top": scan}), Truth(occupancy=truth))
    config = load_run_config(CONFIGS / "semantickitti_completion.yaml", [f"dataset.root={tmp_path / 'data'}"])
    dataset = SemanticKITTI(SemanticKITTIConfig(root=tmp_path / "data", frames="voxels"))
    for i, token in enumerate(dataset.tokens):
        sequence, frame = token.split("/")
        truth = dataset.truth(i).occupancy
        write_prediction(tmp_path / "submission", sequence, int(frame), replace(truth, observed={}))
    score, result = evaluate(config, tmp_path, predictions=tmp_path / "submission")
    assert score.miou == pytest.approx(1.0) and result.samples == 2
    next((tmp_path / "submission").rglob("*.label")).unlink()
    with pytest.raises(DataError, match=r"no prediction of sample 08/00000\d\n.*--subset"):
        evaluate(config, tmp_path, predictions=tmp_path / "submission")
    score, result = evaluate(config, tmp_path, predictions=tmp_path / "submission", subset=True)
    assert score.miou == pytest.approx(1.0)
    assert (result.samples, result.subset) == (1, True)


def test_a_benchmark_of_another_data_set_is_refused(nuscenes, cache, tmp_path):
    config = mini(nuscenes, cache, "nuscenes_detection", "benchmark=occ3d", "predictor.name=truth_echo")
    with pytest.raises(DataError, match=r"occ3d: sample \w+ has no occupancy truth\n.*dataset.occupancy"):
        evaluate(config, tmp_path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path):
    if path.name == "vehicle.yaml":
        assert load_stack(path).systems
        return
    root = load_run_config(path).dataset.root
    assert root.is_relative_to("/data") or not root.is_absolute()


def test_a_wrong_key_in_a_section_is_named_with_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("dataset: {name: nuscenes, root: /data, splitt: val}\nbenchmark: nuscenes_detection\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: unknown key 'dataset.splitt'\n.*did you mean 'split'"):
        load_run_config(path)
    path.write_text("dataset: {name: nuscene, root: /data}\nbenchmark: nuscenes_detection\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: dataset.name: 'nuscene' is not known\n.*semantickitti"):
        load_run_config(path)
