"""Under autocast geometry stays in float32: half products would move cells by pixels and boxes by metres."""

from __future__ import annotations

import torch
from builders import tiny_sparsefusion
from networks.sparsefusion.test_network import sample

from perception.networks.sparsefusion import SparseFusion
from perception.networks.sparsefusion.view import ViewTransformation


def test_cells_are_seen_where_they_are():
    network = SparseFusion(tiny_sparsefusion()).eval()
    with torch.inference_mode():
        inputs = network.encode([sample()])
        places = inputs.height_min, inputs.height_max, inputs.calibration
        want = network.head.look(*places)
        with torch.autocast("cpu", torch.bfloat16):
            got = network.head.look(*places)
    assert want.visible.any()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_camera_boxes_keep_their_place_in_lidar_space():
    network = SparseFusion(tiny_sparsefusion()).eval()
    seen = []

    def keep(_: ViewTransformation, inputs: tuple, out: tuple) -> None:
        seen.append((inputs[1], out[1]))

    network.head.view_transformation.register_forward_hook(keep)
    with torch.inference_mode():
        inputs = network.encode([sample()])
        network(inputs)
        (image, want) = seen.pop()
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.zeros(1, image.view.shape[1], network.config.channels)
            _, got = network.head.view_transformation(x, image, image.center.transpose(1, 2), inputs.calibration)
        _, want = network.head.view_transformation(x, image, image.center.transpose(1, 2), inputs.calibration)
    assert (got.center - want.center).abs().max() < 0.05  # cells; the learned offsets alone are in half precision
