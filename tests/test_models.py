"""What is said of the shipped weights is what was measured, and of these weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from perception.evaluation.result import read_result
from perception.weights import WeightsProvenance, read_weights

ROOT = Path(__file__).parents[1]
CITY = ROOT / "models" / "sparsefusion_city"
WEIGHTS = CITY / "sparsefusion_city.safetensors"
CARD = (CITY / "README.md").read_text(encoding="utf-8")
COLUMNS = ("NDS", "mAP", "mATE_m", "mASE", "mAOE_rad", "mAVE_mps", "mAAE", "mAP_present/0-30m", "mAP_present/30-50m")
CLASSES = (
    "car", "truck", "bus", "trailer", "construction_vehicle",
    "pedestrian", "motorcycle", "bicycle", "traffic_cone", "barrier",
)  # fmt: skip


@pytest.mark.parametrize(("network", "file"), [("fusion", ""), ("LiDAR", "_lidar"), ("camera", "_camera")])
def test_the_card_has_the_measured_figures(network, file):
    result = read_result(CITY / f"metrics{file}.json")
    assert (
        result.samples == result.samples_of_split == 120 and result.config["predictor"]["modality"] == network.lower()
    )
    rows = re.findall(rf"^\| {network}[a-z() ]* \| (0\..*) \|$", CARD, re.M)
    figures, by_class = ([float(cell) for cell in row.split(" | ")] for row in rows)
    assert figures == pytest.approx([result.metrics[key] for key in COLUMNS], abs=5.1e-4)
    assert by_class == pytest.approx([result.metrics[f"AP/{name}"] for name in CLASSES], abs=5.1e-4)


def test_the_readme_has_them_too():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    metrics = [read_result(CITY / f"metrics{file}.json").metrics for file in ("", "_lidar", "_camera")]
    for name in ("NDS", "mAP"):
        assert all(f"{found[name]:.3f}" in readme for found in metrics)


def test_the_figures_are_of_the_shipped_weights_which_are_whole_and_small():
    assert read_result(CITY / "metrics.json").weights.sha256 == WeightsProvenance.of_file(WEIGHTS).sha256
    state, manifest = read_weights(WEIGHTS)  # refuses what is not finite
    assert manifest.system == "sparsefusion" and manifest.config["modality"] == "fusion" and manifest.source is None
    statistics = {name for name in state if name.endswith(("running_mean", "running_var"))}
    assert {str(state[name].dtype) for name in statistics} == {"torch.float32"}
    rest = {str(t.dtype) for name, t in state.items() if name not in statistics and t.is_floating_point()}
    assert rest == {"torch.float16"}
    assert sum(path.stat().st_size for path in CITY.iterdir()) < 8e6
