from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from perception.cli import app
from perception.errors import ConfigError, DataError
from perception.networks.sparsefusion import SparseFusion
from perception.synthetic.city import City
from perception.training.config import load_train_config
from perception.training.run import step_size
from perception.weights import load_weights, read_manifest

ROOT = Path(__file__).resolve().parents[2]
CITY = ROOT / "configs" / "sparsefusion_city.yaml"
SHIPPED = ROOT / "models" / "sparsefusion_city" / "sparsefusion_city.safetensors"

SMALL = (
    "training.data.device=cpu", "training.data.cameras=[front]", "training.data.image_size=[128,72]",
    "training.stream.together=1", "training.workers=0", "training.steps=1", "training.batch_size=1",
    "training.log_every=1", "training.tensorboard=false", "training.precision=float32",
    "predictor.modality=lidar", "predictor.lidar.voxel_size_m=[0.8,0.8,0.4]", "training.data.sweeps=1",
)  # fmt: skip


def test_the_command_trains_and_its_weights_load(tmp_path):
    """A real network on the real city, one step: the whole way but a GPU."""
    changes = [part for key in SMALL for part in ("--set", key)]
    done = CliRunner().invoke(app, ["train", str(CITY), "--out", str(tmp_path), *changes], catch_exceptions=False)
    assert "batch of 1 x 1 process = 1 samples a step, 1 steps\n" in done.output
    assert done.exit_code == 0 and "step 1  loss" in done.output and "point_box" in done.output
    config = load_train_config(CITY, SMALL).predictor
    network = SparseFusion(config)
    assert load_weights(network, tmp_path / "weights.safetensors").kind == "file"
    manifest = read_manifest(tmp_path / "weights.safetensors")
    assert manifest.system == "sparsefusion" and manifest.config["modality"] == "lidar"
    assert (tmp_path / "checkpoint.pt").exists() and (tmp_path / "log.jsonl").exists()


def test_a_configuration_says_what_it_lacks(tmp_path):
    path = tmp_path / "a.yaml"
    whole = yaml.safe_load(CITY.read_text())
    for section in ("predictor", "training"):
        path.write_text(yaml.safe_dump({k: v for k, v in whole.items() if k != section}))
        with pytest.raises(ConfigError, match=f"a.yaml: no section '{section}' to train by"):
            load_train_config(path)
    with pytest.raises(ConfigError, match=r"training.data.name: 'cty' is not known\n.*city"):
        load_train_config(CITY, ["training.data.name=cty"])
    with pytest.raises(ConfigError, match=r"unknown key 'training.stepps'\n  did you mean 'steps'"):
        load_train_config(CITY, ["training.stepps=3"])
    with pytest.raises(ConfigError, match=r"unknown key 'training.data.sweps'"):
        load_train_config(CITY, ["training.data.sweps=3"])


def test_a_predictor_without_parameters_is_not_trained(tmp_path):
    done = CliRunner().invoke(
        app, ["train", str(CITY), "--set", "predictor={name: truth_echo}", "--out", str(tmp_path)]
    )
    assert isinstance(done.exception, ConfigError) and "truth_echo has nothing to learn" in str(done.exception)


def test_a_step_is_told_by_its_samples():
    training = load_train_config(ROOT / "configs" / "sparsefusion_nuscenes_r50.yaml").training
    assert step_size(training, 4) == "batch of 4 x 4 processes = 16 samples a step, 46,344 steps"
    timed = training.model_copy(update={"minutes": 90.0})
    assert step_size(timed, 1) == "batch of 4 x 1 process = 4 samples a step, 46,344 steps or 90 minutes"


def test_a_missing_weights_file_is_told_before_the_others_are_read(tmp_path):
    (tmp_path / "there.safetensors").touch()
    files = [str(tmp_path / name) for name in ("there.safetensors", "absent.safetensors")]
    done = CliRunner().invoke(
        app, ["train", str(CITY), "--set", f"training.weights={files}", "--out", str(tmp_path / "run")]
    )
    assert isinstance(done.exception, DataError)
    assert done.exception.what == f"training.weights: {files[1]} is not there"


def test_the_shipped_weights_are_those_of_the_configuration():
    network = SparseFusion(load_train_config(CITY).predictor)
    assert load_weights(network, SHIPPED).kind == "file"
    assert sum(path.stat().st_size for path in SHIPPED.parent.iterdir()) < 8_000_000
    assert sum(p.numel() for p in network.parameters()) < 4_000_000


@pytest.mark.slow
def test_the_shipped_weights_find_the_cars_of_an_unseen_street():
    config = load_train_config(CITY)
    network = SparseFusion(config.predictor)
    load_weights(network, SHIPPED)
    update = {"seed": 100_000, "scenes": 1, "key_frames": 2, "device": "cpu"}
    city = City(config.training.data.model_copy(update=update))
    ((sample, truth),) = city.key_frames([1])
    found, boxes = network.eval().predict(sample), truth.boxes
    near = (boxes.label == boxes.classes.index("car")) & (boxes.num_points > 20)
    near &= torch.from_numpy(boxes.center[:, :2]).norm(dim=1).numpy() < 30
    cars = found.select((found.label == found.classes.index("car")) & (found.score > 0.2))
    distance = torch.cdist(torch.from_numpy(boxes.center[near]), torch.from_numpy(cars.center)).amin(1)
    assert near.sum() >= 3 and float((distance < 1.0).float().mean()) >= 0.8
