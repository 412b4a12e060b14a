"""Training the network itself: the frozen second stage, shipped schedules, processes, and going on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import drive

from perception.errors import DataError
from perception.networks.sparsefusion import SparseFusion
from perception.training.config import load_train_config
from perception.training.distributed import Place
from perception.training.optimiser import freeze, make_optimiser, training_mode
from perception.training.run import train

CONFIGS = Path(__file__).parents[3] / "configs"
ALONE = Place(0, 1, torch.device("cpu"))
LIDAR_DETECTOR = ("lidar", "head.lidar_projection", "head.lidar_label", "head.point_decoder")


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{prefix}.") for prefix in prefixes)


def test_the_second_stage_leaves_the_lidar_detector_as_it_is(tmp_path: Path):
    """Weights and statistics of the frozen parts stay to the bit while all else learns."""
    started = drive.training(drive.config(steps=2, freeze=LIDAR_DETECTOR), ALONE, tmp_path)
    before = {name: value.clone() for name, value in started.network.state_dict().items()}
    drive.run(started)
    assert started.step == 2
    counters = {name for name in before if name.endswith("num_batches_tracked")}
    for name, value in started.network.state_dict().items():
        if name not in counters:
            same = torch.equal(value, before[name])
            assert same == below(name, LIDAR_DETECTOR), name


@pytest.mark.parametrize("name", ["r50", "swint"])
def test_the_shipped_second_stage_is_the_released_one(name: str):
    config = load_train_config(CONFIGS / f"sparsefusion_nuscenes_{name}.yaml")
    with torch.device("meta"):
        network = SparseFusion(config.predictor)
    freeze(network, config.training.freeze)
    training_mode(network, config.training.fixed_statistics)
    stem = tuple(f"image.backbone.{part}" for part in ("conv1", "bn1", "layer1")) if name == "r50" else ()
    learns = {n for n, p in network.named_parameters() if p.requires_grad}
    assert {n for n, _ in network.named_parameters() if below(n, (*LIDAR_DETECTOR, *stem))}.isdisjoint(learns)
    assert {n for n, _ in network.named_parameters() if not below(n, (*LIDAR_DETECTOR, *stem))} == learns
    norms = [m for m in network.image.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert bool(norms) == (name == "r50") and not any(norm.training for norm in norms)
    assert network.lidar.backbone.blocks[0][1].training, "frozen norms use the batch's statistics"

    lr = {"r50": 1e-4, "swint": 7.5e-5}[name]
    groups = make_optimiser(network, config.training.optimiser).param_groups
    rates = sorted((round(g["lr"] / lr, 6), round(g["weight_decay"], 6)) for g in groups)
    assert rates == {"r50": [(0.1, 0.01), (1, 0.01)], "swint": [(0.1, 0.01), (0.1, 0.05), (1, 0.01)]}[name]
    processes = 4
    draws = config.training.steps * config.training.batch_size * processes / 6
    assert draws == pytest.approx(123_580, rel=1e-3), "draws of an epoch of nuScenes, every class as often"
    assert config.training.class_balanced and config.training.augment is not None


def test_a_second_stage_without_its_first_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A frozen detector of random weights would never be noticed."""
    monkeypatch.chdir(tmp_path)
    config = load_train_config(CONFIGS / "sparsefusion_nuscenes_r50.yaml")
    with pytest.raises(DataError) as raised:
        train(config, tmp_path / "run")
    assert raised.value.what == "training.weights: out/lidar/weights.safetensors is not there"
    assert "`perception train configs/sparsefusion_nuscenes_lidar.yaml --out out/lidar`" in raised.value.do
    assert raised.value.do.endswith("or set training.weights")


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line)["losses"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_resumed_training_follows_the_same_curve(tmp_path: Path):
    """With dropout, augmentation and the moving average, to the bit."""
    settings = drive.config(steps=4, average=0.9, checkpoint_every=2)
    whole = drive.training(settings, ALONE, tmp_path / "whole")
    kept: list[bytes] = []

    def keep(progress) -> None:
        if progress.step == 3:  # the checkpoint of step 2
            kept.append(whole.checkpoint_path.read_bytes())

    whole._report = keep
    drive.run(whole)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "checkpoint.pt").write_bytes(kept[0])
    part = drive.training(settings, ALONE, tmp_path / "part", resume=True)
    assert part.step == 2
    drive.run(part)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")[2:]
    for name, value in whole.weights.items():
        assert torch.equal(part.weights[name], value), name


@pytest.mark.slow
def test_two_processes_hold_the_same_network(tmp_path: Path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, *command, drive.__file__, str(tmp_path)], env=environment, timeout=300)
    assert done.returncode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    parameters = dict(SparseFusion(drive.tiny_sparsefusion()).named_parameters())
    for name in parameters:  # batch norms' statistics are each process's own
        assert torch.equal(first[name], second[name]), name
    assert len(losses(tmp_path)) == 2
