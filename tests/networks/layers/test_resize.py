"""The device's resizing is OpenCV's, to the bit."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from perception.networks.layers.resize import blend_bilinear, resize_uint8

side = st.integers(1, 70)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


@settings(max_examples=60)
@given(side, side, side, side)
@example(48, 64, 24, 32)
def test_integers_blend_as_opencv(height: int, width: int, new_height: int, new_width: int):
    image = noise(height, width)
    want = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    got = blend_bilinear(torch.from_numpy(image)[None], new_width, new_height)[0]
    assert_array_equal(got, want)


@pytest.mark.parametrize("size", [(796, 448), (800, 448), (704, 396), (800, 450)])
def test_nuscenes_images(size: tuple[int, int]):
    image = noise(900, 1600)
    want = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    assert_array_equal(blend_bilinear(torch.from_numpy(image)[None], *size)[0], want)
    assert_array_equal(resize_uint8(torch.from_numpy(image)[None], *size)[0], want)


@pytest.mark.gpu
def test_the_gpu_gives_the_cpu_s_pixels():
    images = torch.from_numpy(np.stack([noise(900, 1600)] * 2))
    assert_array_equal(resize_uint8(images.cuda(), 796, 448).cpu(), resize_uint8(images, 796, 448))
