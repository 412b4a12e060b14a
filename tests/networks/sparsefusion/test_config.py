"""Sizes that do not fit each other are told when the configuration is read, not by a tensor deep inside."""

from __future__ import annotations

import pytest

from perception.errors import ConfigError
from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.predictor import predictor_config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lidar": {"voxel_size_m": [0.07, 0.075, 0.2]}}, "range_m -54 to 54 m along x is no whole number of .* 0.07"),
        ({"lidar": {"voxel_size_m": [0.075, 0.075, 0]}}, "must be greater than 0"),
        ({"lidar": {"range_m": [-54.6, -54, -5, 54, 54, 3]}}, "1448 x 1440 voxels; 4 .* and 2 .* multiples of 16"),
        ({"image": {"canvas_px": [800, 450]}}, r"canvas_px \(800, 450\): .* multiples of 32"),
        ({"channels": 100}, "channels 100 cannot be shared by 8 heads"),
    ],
)
def test_sizes_that_do_not_fit(keys: dict, message: str):
    with pytest.raises(ConfigError, match=rf"run.yaml: .*{message}"):
        predictor_config({"name": "sparsefusion", **keys}, "run.yaml")


def test_the_released_grid():
    lidar = SparseFusionConfig().lidar
    assert (lidar.grid, lidar.bev_shape, lidar.stride) == ((1440, 1440, 40), (180, 180), 8)
    assert lidar.cell_m == pytest.approx(0.6)
