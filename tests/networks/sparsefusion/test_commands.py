"""SparseFusion behind the commands: evaluation and prediction on a data set, a real key frame and a bag."""

from __future__ import annotations

import json
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
import yaml
from builders import tiny_sparsefusion
from parity.kit import Kit

from perception.errors import ConfigError, DataError
from perception.evaluation.result import read_result, write_result
from perception.evaluation.run import evaluate, load_run_config
from perception.networks.sparsefusion import SparseFusion, SparseFusionConfig
from perception.predict import load_jobs, predict, write
from perception.predictor import NetworkPredictor, load_network, load_predictor, predictor_config
from perception.synthetic.demo import demo_bag
from perception.types import Sample
from perception.weights import WeightsProvenance, read_weights, write_weights
from perception.weights_conversion import convert_weights

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = tiny_sparsefusion()


@pytest.fixture(scope="module")
def nuscenes(tmp_path_factory) -> Path:
    return builders.write_small_nuscenes(tmp_path_factory.mktemp("nuscenes"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Of the tiny network, as training would write them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write_weights(path, SparseFusion(TINY).state_dict(), TINY)
    return path


def write_config(path: Path, **sections) -> Path:
    """A configuration of the tiny network."""
    predictor = TINY.model_dump(mode="json", exclude={"weights"})
    path.write_text(yaml.safe_dump({"predictor": predictor, **sections}))
    return path


def mini(root: Path, cache: Path) -> list[str]:
    keys = {"root": root, "cache_dir": cache, "version": "v1.0-mini", "split": "mini_val"}
    return [f"dataset.{key}={value}" for key, value in keys.items()]


@pytest.mark.parametrize(("name", "backbone"), [("r50", "resnet50"), ("swint", "swin_tiny")])
def test_the_shipped_configurations_are_the_released_ones(name: str, backbone: str):
    config = load_run_config(CONFIGS / f"sparsefusion_nuscenes_{name}.yaml")
    released = SparseFusionConfig()
    assert config.predictor == released.model_copy(
        update={"image": released.image.model_copy(update={"backbone": backbone})}
    )
    assert config.dataset.sweeps == released.sweeps == 11


def test_evaluation_on_the_official_layout(nuscenes: Path, weights: Path, tmp_path: Path):
    """The tables' own numbers are those of noise; what counts is that they come of these weights, all samples."""
    dataset = {"name": "nuscenes", "sweeps": 2, "radars": []}
    config = write_config(tmp_path / "tiny.yaml", dataset=dataset, benchmark="nuscenes_detection")
    sets = [*mini(nuscenes, tmp_path / "cache"), f"predictor.weights={weights}"]
    score, result = evaluate(load_run_config(config, sets), tmp_path)
    assert result.samples == 6 and 0 <= score.nds < 0.5
    write_result(tmp_path / "result.json", result)
    saved = read_result(tmp_path / "result.json")
    assert saved.weights == WeightsProvenance.of_file(weights)
    assert saved.image_resize == "bilinear in OpenCV's integers"
    assert saved.config["predictor"]["queries"] == TINY.queries
    results = json.loads((tmp_path / "results_nusc.json").read_text())
    assert results["meta"]["use_camera"] and results["meta"]["use_lidar"] and not results["meta"]["use_radar"]
    assert len(results["results"]) == 6 and all(results["results"].values())


def test_no_weights_no_predictor():
    with pytest.raises(
        ConfigError, match="predictor sparsefusion: no weights: an untrained network predicts noise\n  --weights FILE"
    ):
        load_predictor(predictor_config({"name": "sparsefusion"}, "run.yaml"))


def test_weights_of_another_network_are_refused(weights: Path):
    other = tiny_sparsefusion(channels=32, weights=weights)
    with pytest.raises(DataError, match=r"tiny.safetensors .*does not fit the network: .* of another shape: "):
        load_predictor(other)


def test_a_predictor_tells_what_its_last_prediction_did_without(weights: Path):
    predictor = load_predictor(tiny_sparsefusion(weights=weights))
    assert isinstance(predictor, NetworkPredictor)
    assert (predictor.degraded, predictor.weights.kind, predictor.output) == ("", "file", "boxes")
    sample = Sample(0, lidars={"top": builders.cloud()}, cameras={"front": builders.camera()})
    predictor.predict(sample)
    assert predictor.degraded == "camera back missing"
    predictor.reset()
    assert predictor.degraded == ""


def test_a_predictor_is_made_ready_once(weights: Path):
    """Where it predicts, in evaluation mode, with its weights loaded."""
    ready = []

    class Noted(SparseFusion):
        def accelerate(self) -> None:
            ready.append(
                (self.training, read_weights(weights)[0]["head.level_embedding"].equal(self.head.level_embedding))
            )
            super().accelerate()

    load_network(Noted, tiny_sparsefusion(weights=weights), torch.device("cpu")).predict(
        Sample(0, lidars={"top": builders.cloud()}, cameras={})
    )
    assert ready == [(False, True)]


@pytest.mark.gpu
def test_commands_predict_the_fast_way_on_a_gpu(weights: Path):
    predictor = load_predictor(tiny_sparsefusion(weights=weights), "cuda")
    assert isinstance(predictor, NetworkPredictor)
    assert predictor._network.fast is not None
    sample = Sample(0, lidars={"top": builders.cloud()}, cameras={"front": builders.camera()})
    assert len(predictor.predict(sample))


def test_prediction_on_the_real_key_frame(shared_data: Path, weights: Path, tmp_path: Path):
    config = write_config(tmp_path / "tiny.yaml")
    (job,) = load_jobs(config, shared_data / "nuscenes_keyframe", weights=weights)
    ((sample, frame),) = predict(job)
    assert len(sample.lidars["top"]) == 34_688
    assert len(frame.prediction) and np.isfinite(frame.prediction.center).all()
    assert job.predictor.degraded == ""
    write(job, tmp_path, "key frame", png=True)
    assert (tmp_path / "sparsefusion.json").is_file()
    assert len(list(tmp_path.rglob("*.png"))) == 2


@pytest.mark.slow
def test_prediction_on_a_synthetic_bag(weights: Path, tmp_path: Path):
    """Through the vehicle's configuration, as the node predicts: sweeps and cameras by topic, ten sweeps a cloud."""
    vehicle = yaml.safe_load((CONFIGS / "vehicle.yaml").read_text())
    predictor = TINY.model_dump(mode="json", exclude={"weights"}) | {"weights": str(weights)}
    vehicle["systems"] = {"detector": {"predictor": predictor}}
    vehicle["sensors"]["lidars"]["top"]["sweeps_s"] = 1.0  # the bag's LiDAR turns ten times a second
    (tmp_path / "vehicle.yaml").write_text(yaml.safe_dump(vehicle))
    (job,) = load_jobs(tmp_path / "vehicle.yaml", demo_bag())
    samples, degraded = [], []
    for sample, frame in predict(job, limit=14):
        samples.append(sample)
        degraded.append(frame.degraded)
        assert len(frame.prediction) and np.isfinite(frame.prediction.center).all()
    assert degraded[0] == "camera front missing, back missing", "they begin half a second after the LiDAR"
    assert degraded[-1] == "" and set(samples[-1].cameras) == {"front", "back"}
    assert samples[-1].lidars["top"].field("sweep").max() == TINY.sweeps - 1


@pytest.mark.slow
def test_a_released_checkpoint_converts_and_evaluates(parity_dir: Path, nuscenes: Path, tmp_path: Path):
    """The README's two commands, on a file as the authors write them and a sample in the official layout."""
    kit = Kit(parity_dir / "sparsefusion")
    checkpoint, converted = tmp_path / "released.pth", tmp_path / "converted.safetensors"
    torch.save({"meta": {"epoch": 6}, "state_dict": kit.state_dict("r50"), "optimizer": {}}, checkpoint)
    report = convert_weights("sparsefusion", checkpoint, converted)
    assert report.config == SparseFusionConfig()
    sets = [*mini(nuscenes, tmp_path / "cache"), f"predictor.weights={converted}"]
    config = load_run_config(CONFIGS / "sparsefusion_nuscenes_r50.yaml", sets)
    _, result = evaluate(config, tmp_path, limit=1)
    assert (result.samples, result.subset, result.weights) == (1, True, WeightsProvenance.of_file(converted))
