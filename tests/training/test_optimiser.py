from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from perception.errors import ConfigError
from perception.training.config import OptimiserConfig
from perception.training.optimiser import freeze, make_optimiser, schedule, training_mode


def network() -> nn.Module:
    return nn.ModuleDict(
        {
            "image": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
            "lidar": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        }
    )


def test_the_longest_prefix_decides_the_rates():
    config = OptimiserConfig(
        lr=1.0, weight_decay=0.1, factors={"image": 0.1, "image.1": 0.5}, decay_factors={"lidar": 0}
    )
    net = network()
    found = {}
    for group in make_optimiser(net, config).param_groups:
        for parameter in group["params"]:
            name = next(n for n, p in net.named_parameters() if p is parameter)
            found[name] = (round(group["lr"], 6), round(group["weight_decay"], 6))
    assert found == {
        "image.0.weight": (0.1, 0.1), "image.0.bias": (0.1, 0.1), "image.1.weight": (0.5, 0.1),
        "image.1.bias": (0.5, 0.1), "lidar.0.weight": (1.0, 0.0), "lidar.0.bias": (1.0, 0.0),
        "lidar.1.weight": (1.0, 0.0), "lidar.1.bias": (1.0, 0.0),
    }  # fmt: skip


def test_the_cycle_begins_peaks_and_ends_where_it_says():
    config = OptimiserConfig(lr=2.0, factors={"image": 0.1})
    optimiser = make_optimiser(network(), config)
    for progress, factor, beta1 in (
        (0, 1, 0.9),
        (0.2, 4.5, 0.8525),
        (0.4, 8, 0.805),
        (0.7, 4.00005, 0.8525),
        (1, 1e-4, 0.9),
    ):
        assert schedule(optimiser, config, progress) == pytest.approx(factor)
        for group in optimiser.param_groups:
            assert group["lr"] == pytest.approx(factor * group["base_lr"])
            assert group["betas"] == pytest.approx((beta1, 0.999))
    assert sorted({round(g["base_lr"], 6) for g in optimiser.param_groups}) == [0.2, 2.0]
    rates = [schedule(optimiser, config, p) for p in np.linspace(0, 1, 101)]
    assert np.all(np.diff(rates[:41]) > 0) and np.all(np.diff(rates[40:]) < 0)


def test_a_frozen_part_uses_batch_statistics_and_remembers_none():
    net = network()
    freeze(net, ["lidar"])
    training_mode(net, ["image"])
    frozen, fixed = net["lidar"][1], net["image"][1]
    x = torch.randn(64, 4) * 5 + 3
    out = frozen(x)
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-4, rtol=0)  # the batch's own statistics
    torch.testing.assert_close(frozen.running_mean, torch.zeros(4), rtol=0, atol=0)
    torch.testing.assert_close(fixed(x), x, rtol=1e-4, atol=1e-4)  # the stored ones: mean 0, variance 1
    learns = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learns == {"image.0.weight", "image.0.bias", "image.1.weight", "image.1.bias"}
    assert sum(len(g["params"]) for g in make_optimiser(net, OptimiserConfig()).param_groups) == 4


def test_a_prefix_that_names_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"training.freeze: no part of the network is called 'lidr'"):
        freeze(network(), ["lidr"])
    with pytest.raises(ConfigError, match=r"fixed_statistics: no part .* 'image.0'"):
        training_mode(network(), ["image.0"])  # a layer without statistics
    with pytest.raises(ConfigError, match="names begin with: image, lidar"):
        make_optimiser(network(), OptimiserConfig(factors={"head": 2.0}))
    net = network()
    freeze(net, ["image", "lidar"])
    with pytest.raises(ConfigError, match="no parameter is left to learn"):
        make_optimiser(net, OptimiserConfig())
