"""The benchmark measures every stage of what the network really does; how fast it is, no test asks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from builders import tiny_sparsefusion
from networks.sparsefusion.test_network import sample

from perception.bench_sparsefusion import bench_network, bench_sparsefusion, city_samples
from perception.errors import ConfigError
from perception.networks.sparsefusion import SparseFusion, SparseFusionConfig

STAGES = {
    "fusion": ["encode", "image branch", "sparse encoder", "BEV backbone and pyramid", "head", "decode", "all"],
    "lidar": ["encode", "sparse encoder", "BEV backbone and pyramid", "head", "decode", "all"],
    "camera": ["encode", "image branch", "head", "decode", "all"],
}
SIZE = {
    "fusion": r"400 points, \d+ voxels, 2 images",
    "lidar": r"400 points, \d+ voxels, 0 images",
    "camera": "2 images",
}


@pytest.mark.parametrize("modality", STAGES)
def test_every_stage_is_timed(modality: str):
    network = SparseFusion(tiny_sparsefusion(modality=modality))
    rows = bench_sparsefusion(network, [sample(0), sample(1)], "cpu", runs=2, warm_up=0)
    assert [row.name.partition(":")[0] for row in rows] == STAGES[modality]
    for row in rows:
        assert row.runs == 2
        assert row.p50_ms > 0
        assert re.fullmatch(SIZE[modality], row.size)


@pytest.mark.gpu
def test_a_gpu_is_timed_as_it_predicts():
    rows = bench_sparsefusion(SparseFusion(tiny_sparsefusion(precision="float16")), [sample()], "cuda", 2, 1)
    assert "voxels, sparse encoder" in [row.name for row in rows]


@pytest.mark.slow
def test_samples_have_what_the_network_takes():
    (first,) = city_samples(SparseFusionConfig(sweeps=2), 1)
    assert set(SparseFusionConfig().cameras) <= set(first.cameras)
    assert first.cameras["front"].rgb.shape == (900, 1600, 3)
    focal, center = first.cameras["front"].intrinsic[0, [0, 2]]
    assert 700 < center < 900 < focal < 1400
    assert len(set(first.lidars["top"].fields["time_lag"])) > 1


def test_a_network_of_a_configuration_file(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("benchmark: nuscenes_detection\npredictor: {name: sparsefusion, queries: 7}\n")
    network, of_weights = bench_network(path, None, ["precision=float16", "predictor.channels=16"])
    assert of_weights.startswith("random weights")
    assert (network.config.queries, network.config.precision, network.config.channels) == (7, "float16", 16)
    with pytest.raises(ConfigError, match=r"unknown key 'predictor\.querys'"):
        bench_network(path, None, ["querys=3"])


def test_the_configuration_s_weights_are_taken_and_another_network_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    _, of_weights = bench_network(Path("configs/sparsefusion_city.yaml"), None, [])
    assert of_weights == "weights: models/sparsefusion_city/sparsefusion_city.safetensors"
    with pytest.raises(ConfigError, match=r"predictor\.name is 'truth_echo'\n  give a configuration of sparsefusion"):
        bench_network(None, None, ["name=truth_echo"])
