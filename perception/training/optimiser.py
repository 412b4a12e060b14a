"""AdamW with parameter groups, the cyclic schedule, and what of a network does not learn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from perception.errors import ConfigError
from perception.training.config import OptimiserConfig


def make_optimiser(network: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """One group for each pair of learning rate and weight decay among the parameters that learn."""
    names = [name for name, _ in network.named_parameters()]
    for key, table in (("factors", config.factors), ("decay_factors", config.decay_factors)):
        _must_match(names, list(table), f"training.optimiser.{key}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            rates = (
                config.lr * _of_prefix(name, config.factors),
                config.weight_decay * _of_prefix(name, config.decay_factors),
            )
            groups.setdefault(rates, []).append(parameter)
    if not groups:
        raise ConfigError("training.freeze: no parameter is left to learn", "freeze less")
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        betas=(config.beta1, config.beta2),
        fused=all(p.is_cuda for group in groups.values() for p in group),
    )


def schedule(optimiser: torch.optim.Optimizer, config: OptimiserConfig, progress: float) -> float:
    """Set learning rates and first moments for a share of the training in [0, 1]; the factor of the rate is returned.

    The factor goes 1 -> peak -> final in two half cosines, beta1 the other way and back (cyclic policy of SECOND,
    mmcv's `cyclic` with its cosine annealing).
    """
    if progress < config.rise:
        up = 0.5 - 0.5 * math.cos(math.pi * progress / config.rise)
        factor = 1 + (config.peak - 1) * up
    else:
        up = 0.5 + 0.5 * math.cos(math.pi * (progress - config.rise) / (1 - config.rise))
        factor = config.final + (config.peak - config.final) * up
    beta1 = config.beta1 + (config.beta1_least - config.beta1) * up
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor
        group["betas"] = (beta1, config.beta2)
    return factor


def freeze(network: nn.Module, prefixes: Sequence[str]) -> None:
    """Parameters below the prefixes stop learning; batch norms there keep their statistics while they use a batch's."""
    _must_match([name for name, _ in network.named_parameters()], prefixes, "training.freeze")
    for name, parameter in network.named_parameters():
        if _below(name, prefixes):
            parameter.requires_grad_(False)
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and _below(name, prefixes):
            module.momentum = 0.0


def training_mode(network: nn.Module, fixed_statistics: Sequence[str]) -> None:
    """`network.train()`, but for the batch norms below the prefixes."""
    network.train()
    norms = [(name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    _must_match([name for name, _ in norms], fixed_statistics, "training.fixed_statistics")
    for name, module in norms:
        if _below(name, fixed_statistics):
            module.eval()


def _below(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _of_prefix(name: str, factors: Mapping[str, float]) -> float:
    fitting = [prefix for prefix in factors if _below(name, [prefix])]
    return factors[max(fitting, key=len)] if fitting else 1.0


def _must_match(names: Sequence[str], prefixes: Sequence[str], where: str) -> None:
    for prefix in prefixes:
        if not any(_below(name, [prefix]) for name in names):
            heads = ", ".join(sorted({name.split(".")[0] for name in names}))
            raise ConfigError(f"{where}: no part of the network is called {prefix!r}", f"names begin with: {heads}")
