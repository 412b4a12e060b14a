"""Preprocessing agrees with the official loader: sparse depth, and images resized, normalised and padded."""

from __future__ import annotations

import numpy as np
import pytest
from parity.kit import Kit, Level
from parity.sparsefusion_inputs import DTYPE, calibration, points
from parity.sparsefusion_outputs import config_of

from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.encode import Encoder, fit_canvas
from perception.networks.sparsefusion.tensors import Calibration
from perception.types import CameraImage, Pose, Sample


@pytest.mark.parametrize("level", DTYPE)
@pytest.mark.parametrize("case", ["full", "small"])
@pytest.mark.parametrize("sample", [0, 1])
def test_sparse_depth(kit: Kit, sample: int, case: str, level: Level):
    dtype = DTYPE[level]
    cameras = Calibration(*(t[0] for t in calibration(kit, case, dtype, range(sample, sample + 1))))
    encoder = Encoder(config_of(kit, case)).to(dtype).eval()
    depth = encoder.sparse_depth(points(kit, sample).to(dtype), cameras)
    want = kit.array("inputs", f"s{sample}_{case}_sparse_depth")[:, 0]
    np.testing.assert_array_equal(depth[:, 1], want[:, 1], "which cells have a depth")
    # The kit's was computed in float32: one unit of the last place of 60 m is 3e-7 standard deviations.
    np.testing.assert_allclose(depth[:, 0], want[:, 0], rtol=0, atol=2e-6)


def test_images_and_intrinsics(kit: Kit):
    """To the bit: resized in OpenCV's integers, scaled by its float32 factors, normalised, padded."""
    tile, rows = (int(n) for n in kit.said(r"pre:img.* repeated (\d+)×.* first (\d+) rows").groups())
    stride = int(kit.said(r"every (\d+)\w+ row stored", "README.md")[1])
    blue_green_red = np.floor(256 * kit.uniform("pre:img")).astype(np.uint8)
    pixels = blue_green_red.repeat(tile, 0).repeat(tile, 1)[:rows]
    height, width, _ = kit.array("units", "pre_img_shape")
    factors = np.array([[width / pixels.shape[1]], [height / pixels.shape[0]], [1.0]])
    scaled = kit.array("units", "pre_K")
    image = CameraImage(np.ascontiguousarray(pixels[..., ::-1]), scaled / factors, Pose.identity(), 0)

    rows, columns = kit.array("units", "pre_pad_shape")[:2]
    config = SparseFusionConfig()
    canvas = config.image.model_copy(update={"canvas_px": (int(columns), int(rows))})
    encoder = Encoder(config.model_copy(update={"image": canvas, "cameras": ("front",)})).eval()
    assert fit_canvas(image, canvas).size_px == (width, height)
    sample = Sample(0, cameras={"front": image})
    want = kit.array("units", "pre_out_hwc_rows")
    got = encoder.images(sample)[0].permute(1, 2, 0)[::stride]
    np.testing.assert_array_equal(got, want)

    encoder.config = encoder.config.model_copy(update={"modality": "camera"})
    got_k = encoder([sample]).calibration.intrinsic[0, 0]
    np.testing.assert_allclose(got_k, scaled, rtol=1e-7)
