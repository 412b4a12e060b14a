"""What `accelerate` arranges on a CPU predicts what the modules do; for a GPU see test_fast."""

from __future__ import annotations

import pytest
import torch
from networks.sparsefusion.test_network import MODALITIES, assert_same, network, sample


@pytest.mark.parametrize("modality", MODALITIES)
def test_folded_norms_predict_the_same(modality: str):
    plain, quick = network(modality=modality), network(modality=modality)
    for module in (plain, quick):
        torch.manual_seed(1)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):  # norms that do something
                buffer.uniform_(0.5, 2.0)
    quick.accelerate()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in quick.modules())
    assert_same(quick.predict(sample()), plain.predict(sample()), 1e-3)
