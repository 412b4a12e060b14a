"""The kit's rule gives the weights that it lists, and its comparison sees a difference."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.kit import Kit
from parity.sparsefusion_inputs import head_inputs
from parity.sparsefusion_outputs import config_of


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


@pytest.fixture
def other(kit: Kit, tmp_path: Path) -> Kit:
    """The kit with another rule and without one of its files."""
    for path in kit.root.iterdir():
        if path.name not in ("weights.json", "weights.md", "units.npz"):
            (tmp_path / path.name).symlink_to(path)
    rule = kit.json("weights.json")
    rule["exceptions"] = [e for e in rule["exceptions"] if "pts_bbox_head.shared_conv.bias" not in e["keys"]]
    rule["exceptions"].append({"keys": ["pts_bbox_head.shared_conv.bias"], "mul": 3, "add": 0.5})
    (tmp_path / "weights.json").write_text(json.dumps(rule | {"salt": "salt/", "input_prefix": "in:other:"}))
    query = re.compile(r'X\("lone:query", *\([^)]*\), *[\d.]+\)')
    text = query.sub('X("lone:query", (1, 128, 70), 2.5)', kit.said("(?s).*")[0])
    text = re.sub(r"gain float32 \[[^]]*\]", "gain float32 [2, 1, 1, 1, 1, 0.5]", text)
    (tmp_path / "weights.md").write_text(text)
    return Kit(tmp_path)


def rule_values(name: str, count: int) -> np.ndarray:
    """The first of 2 U(name) - 1."""
    return 2 * np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).random(count) - 1


def test_weights_of_another_kit_follow_its_rule(other: Kit):
    state = other.state_dict("r50")
    bias = 3 * np.float32(0.1 * rule_values("salt/pts_bbox_head.shared_conv.bias", 128)) + 0.5
    np.testing.assert_allclose(state["pts_bbox_head.shared_conv.bias"], bias, rtol=1e-6)


def test_inputs_of_another_kit_follow_its_rule(kit: Kit, other: Kit):
    query = other.input("lone:query")
    assert query.shape == (1, 128, 70)
    np.testing.assert_allclose(query.flatten()[:9], 2.5 * rule_values("in:other:lone:query", 9), rtol=1e-6)
    level = head_inputs(other, "small", config_of(other, "small"), torch.float64).levels[3]
    plain = other.input("case:fpn{l}", tuple(level.shape), "small", 3).double()
    assert torch.equal(level[6], 2 * plain[6]) and torch.equal(level[11], plain[11] / 2)
    assert not torch.equal(plain, kit.input("case:fpn{l}", tuple(level.shape), "small", 3))


def test_what_a_kit_lacks_is_skipped(other: Kit):
    with pytest.raises(pytest.skip.Exception, match=r"has no units\.npz"):
        other.array("units", "iou_a")
    with pytest.raises(pytest.skip.Exception, match=r"has no absent\.json"):
        other.json("absent.json")
    with pytest.raises(pytest.skip.Exception, match="says nothing like"):
        other.input("unheard:of")
