"""The kit's rule gives the weights that it lists, and its comparison sees a difference."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from parity.kit import Kit


def test_weights_have_the_listed_first_values(kit: Kit):
    """weights.md of a kit prints the first values of a few tensors."""
    state = kit.state_dict("r50")
    listed = re.findall(r"`([\w.]+)`\[:3\] = ([-\d., e]+)", kit.said(r"Check values.*")[0])
    assert listed
    for key, values in listed:
        want = np.array([float(v) for v in values.rstrip(" ,.").split(",")])
        np.testing.assert_allclose(state[key].reshape(-1)[: len(want)], want, rtol=1e-6)


@pytest.mark.parametrize("variant", ["r50", "swint"])
def test_state_dict_is_complete(kit: Kit, variant: str):
    state = kit.state_dict(variant)
    assert len(state) == {"r50": 1033, "swint": 904}[variant]
    for alias, source in kit.rule["alias_key_takes_value_of"]:
        assert torch.equal(state[alias], state[source])


def test_comparison_sees_a_difference_of_either_level(kit: Kit):
    scores = kit.tensor("head_small_b2", "dec0_score400", torch.float64)
    entry = kit.entry("head_small_b2", "dec0_score400")
    allowed = max(5 * entry["f32_noise_max"], 3e-6 * entry["absmax"])
    kit.assert_close("head_small_b2", "dec0_score400", scores)
    kit.assert_close("head_small_b2", "dec0_score400", scores + 0.9 * allowed, "float32")
    with pytest.raises(AssertionError, match="400 of 400 values differ"):
        kit.assert_close("head_small_b2", "dec0_score400", scores + 1.1 * allowed, "float32")
    with pytest.raises(AssertionError, match="values differ"):
        kit.assert_close("head_small_b2", "dec0_score400", scores + 2e-6)
    labels = kit.tensor("head_small_b2", "dec0_label400")
    labels[3] += 1
    with pytest.raises(AssertionError, match="1 of 400 values differ"):
        kit.assert_close("head_small_b2", "dec0_label400", labels)


def test_channel_statistics_are_those_of_the_full_array(kit: Kit):
    """The statistics of a whole stored array equal what the manifest says of it."""
    boxes = kit.tensor("head_small_b2", "dec0_boxes400", torch.float64)
    entry = kit.entry("head_small_b2", "dec0_boxes400")
    assert float(boxes.abs().max()) == pytest.approx(entry["absmax"], rel=1e-6)
    assert float(boxes.std(correction=0)) == pytest.approx(entry["std"], rel=1e-6)
