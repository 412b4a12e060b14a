"""A training step of the head equals the official one: predictions, losses, gradients, running statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from parity.kit import Kit
from parity.sparsefusion_inputs import head_inputs
from parity.sparsefusion_outputs import config_of, kit_matches, kit_targets
from torch import Tensor

from perception.networks.sparsefusion.head import Head
from perception.networks.sparsefusion.losses import losses
from perception.networks.sparsefusion.official import convert
from perception.networks.sparsefusion.tensors import Outputs

pytestmark = pytest.mark.slow  # the whole head forward and backward in float64

BOX = ("center", "height", "dim", "rot", "vel", "heatmap")
IMAGE = ("center_2d", "depth_2d", "dim_2d", "rot_2d", "vel_2d", "cls", "loc_cam_3d")


@pytest.mark.parametrize("step", ["eval", "trainp0"])
def test_gradients_of_the_parameters(kit: Kit, step: str):
    """Of the sum of all losses, in evaluation mode and in training mode without dropout."""
    config = config_of(kit, "small").model_copy(update={"dropout": 0.0})
    conversion = convert(kit.state_dict("r50"), config)
    head = Head(config).double()
    head.load_state_dict({k.removeprefix("head."): v for k, v in conversion.state.items() if k.startswith("head.")})
    head.train(step == "trainp0")
    inputs = head_inputs(kit, "small", config, torch.float64)
    outputs = head(*inputs)
    terms = losses(outputs, kit_targets(kit, config), inputs.calibration, config, kit_matches(kit, f"loss_{step}"))
    total = sum(terms.values())
    total.backward()

    golden = kit.json("losses.json")[step]
    assert float(total.detach()) == pytest.approx(golden["total"]["value"], rel=1e-6)
    if step == "trainp0":
        compare_predictions(kit, outputs)
        compare_statistics(kit, head, conversion.mapped)
    compare_gradients(kit, f"loss_{step}", head, conversion.mapped)


def compare_predictions(kit: Kit, outputs: Outputs) -> None:
    def close(name: str, value: Tensor) -> None:
        kit.assert_close("loss_trainp0", f"pred_{name}", value)

    for name, point, fusion, view in zip(BOX, outputs.point, outputs.fusion, outputs.view, strict=True):
        close(name, torch.cat([point, fusion], 2))
        close(f"{name}_view", view)
    for name, value in zip(IMAGE, outputs.image, strict=False):
        close(name, value)
    close("view", outputs.image.view.int())
    close("dense_heatmap", outputs.lidar_heatmap)
    close("img_dense_heatmap", outputs.image_heatmap)
    close("query_heatmap_score", outputs.lidar_candidates.score)
    close("img_query_heatmap_score", outputs.image_candidates.score)


def compare_statistics(kit: Kit, head: Head, mapped: dict[str, str]) -> None:
    """The cells' places are embedded once for all samples: the unbiased variance counts them once."""
    buffers, of_cells = dict(head.named_buffers()), "bn_point_transformer.decoder.0.cross_posembed."
    names = [name for name in kit.names("loss_trainp0") if name.startswith("bn_")]
    compared, wrong = 0, []
    for name in names:
        own = mapped.get("pts_bbox_head." + name.removeprefix("bn_"))
        if own is not None:  # the dropped heatmap of the LiDAR alone has statistics too
            value = buffers[own.removeprefix("head.")]
            rounding = 1e-5 * float(value.max()) * name.startswith(of_cells)
            try:
                kit.assert_close("loss_trainp0", name, value, rounding=rounding)
            except AssertionError as error:
                wrong.append(str(error))
            compared += 1
    assert not wrong, "\n".join(wrong)
    assert compared >= 0.8 * len(names)


def compare_gradients(kit: Kit, file: str, head: Head, mapped: dict[str, str]) -> None:
    """A row of the kit is L2 norm, sum and sixteen samples; equal to 1e-6 of the norm."""
    parameters = dict(head.named_parameters())
    entry: dict[str, Any] = kit.entry(file, "grad_param")
    keys, rows = kit.entry(file, "grad_param_keys"), kit.array(file, "grad_param")
    zero = set(entry["zero_gradient_keys"])
    wrong, seen = [], set()
    for key, row in zip(keys, rows, strict=True):
        if key not in mapped:
            continue
        own = mapped[key].removeprefix("head.")
        seen.add(own)
        gradient = parameters[own].grad
        assert gradient is not None, f"{own} ({key}) has no gradient"
        flat = gradient.flatten()
        samples = flat[:: max(1, flat.numel() // 16)][:16].numpy()
        got = np.zeros_like(row)
        got[:2] = float(flat.norm()), float(flat.sum())
        got[2 : 2 + len(samples)] = samples
        allowed = 1e-6 * max(row[0], 1e-3 if key in zero else 1e-12)
        allowed_sum = allowed * max(1.0, flat.numel() ** 0.5)
        difference = np.abs(got - row)
        if (difference[[0, *range(2, 18)]] > allowed).any() or difference[1] > allowed_sum:
            wrong.append(f"{key}: norm {got[0]:.9g}, should be {row[0]:.9g}; differs by up to {difference.max():.2g}")
    assert not wrong, f"{len(wrong)} of {len(keys)} gradients differ:\n" + "\n".join(wrong)
    without = {mapped[key].removeprefix("head.") for key in kit.entry(file, "no_grad_param_keys") if key in mapped}
    assert {name for name, p in parameters.items() if p.grad is None} <= without
    assert seen | without == set(parameters)
