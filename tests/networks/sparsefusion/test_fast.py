"""The arrangement for a GPU gives what the modules give, and makes the host wait only where it is known to."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import tiny_sparsefusion
from networks.sparsefusion.test_network import sample

from perception.errors import DataError
from perception.networks.sparsefusion import SparseFusion, SparseFusionConfig
from perception.networks.sparsefusion import fast as fast_module
from perception.networks.sparsefusion.boxes import last_layer
from perception.networks.sparsefusion.tensors import Outputs
from perception.types import Sample

pytestmark = pytest.mark.gpu

WAITS = {
    "fast.py": 1,  # what a frame needed room for
    "boxes.py": 1,  # the boxes come to the host, which they are ready for by then
}
"""Where the host waits for the device in a frame, and how often."""


def networks(modality: str, precision: str) -> tuple[SparseFusion, SparseFusion]:
    """The modules as they are, and accelerated, with the same weights."""
    torch.manual_seed(0)
    plain = SparseFusion(tiny_sparsefusion(modality=modality, precision=precision)).cuda().eval()
    for module in plain.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    fast = SparseFusion(plain.config).cuda().eval()
    fast.load_state_dict(plain.state_dict())
    fast.accelerate()
    return plain, fast


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def by_candidate(outputs: Outputs) -> dict[tuple[int, ...], torch.Tensor]:
    """(kind, label, view, place) of each query -> its final box: rounding may swap queries of nearly equal score."""
    last = last_layer(outputs)
    boxes = torch.cat(list(last[:5]), 1)[0].T
    keys = []
    for kind, found in enumerate((outputs.lidar_candidates, outputs.image_candidates)):
        if found is not None:
            view = torch.zeros_like(found.label) if found.view is None else found.view
            keys += [(kind, *row) for row in torch.stack([found.label, view, found.location], -1)[0].tolist()]
    return dict(zip(keys, boxes, strict=True))


@pytest.mark.parametrize("modality", ["fusion", "lidar", "camera"])
def test_float32_gives_the_modules_values(modality: str):
    plain, fast = networks(modality, "float32")
    for seed in (0, 1, 0):
        assert_same_outputs(plain, fast, sample(seed))


def assert_same_outputs(plain: SparseFusion, fast: SparseFusion, frame: Sample) -> None:
    with torch.inference_mode():
        inputs = plain.encode([frame])
        want, (got, _, voxels) = plain(inputs), fast.fast(frame)
    assert voxels == (None if inputs.voxels is None else len(inputs.voxels))
    for name in ("lidar_heatmap", "image_heatmap"):
        if (heatmap := getattr(want, name)) is not None:
            torch.testing.assert_close(getattr(got, name), heatmap, atol=1e-4, rtol=1e-4)
    boxes, expected = by_candidate(got), by_candidate(want)
    assert boxes.keys() == expected.keys()
    for key, box in expected.items():
        torch.testing.assert_close(boxes[key], box, atol=2e-3, rtol=2e-3)


def thinned(frame: Sample, number: int) -> Sample:
    return replace(frame, lidars={"top": frame.lidars["top"].select(np.arange(number))})


def test_a_frame_that_needs_more_room_gets_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fast_module, "_STEP", 16)
    plain, fast = networks("fusion", "float32")
    rooms = []
    for number in (20, 400, 30, 150, 0, 400):
        frame = thinned(sample(), number)
        if number:
            assert_same_outputs(plain, fast, frame)
        assert len(fast.predict(frame)) == len(plain.predict(frame))
        rooms.append(fast.fast._room)
    assert rooms[0].points < 400 <= rooms[1].points
    assert all(a < b for a, b in zip(rooms[0].sites, rooms[1].sites, strict=True))
    assert rooms[0].cells < rooms[1].cells
    assert len(set(rooms[1:])) == 1  # what there is room for once, there is


def test_voxels_beyond_the_cap_are_told():
    keys = tiny_sparsefusion(modality="lidar").model_dump()
    keys["lidar"]["max_voxels"] = 7
    network = SparseFusion(SparseFusionConfig.model_validate(keys)).cuda().eval()
    network.accelerate()
    network.predict(sample())
    found = network.fast(sample()).voxels
    assert found > 7
    assert network.degraded(sample()) == f"{found - 7} voxels beyond the 7 that lidar.max_voxels allows"


def test_an_error_of_the_second_thread_is_the_callers(monkeypatch: pytest.MonkeyPatch):
    _, network = networks("fusion", "float32")

    def refuse(samples: object) -> None:
        raise DataError("no image", "give one")

    monkeypatch.setattr(network.encoder, "all_images", refuse)
    with pytest.raises(DataError, match="no image"):
        network.predict(sample())


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_finds_the_same_heatmaps(precision: str):
    plain, fast = networks("fusion", precision)
    with torch.inference_mode():
        want, got = plain(plain.encode([sample()])), fast.fast(sample()).outputs
    for a, b in ((got.lidar_heatmap, want.lidar_heatmap), (got.image_heatmap, want.image_heatmap)):
        assert (a.float() - b).abs().max() < 0.1 * b.abs().max()


@pytest.mark.parametrize("modality", ["fusion", "lidar", "camera"])
def test_the_host_waits_only_where_it_is_known_to(modality: str):
    _, network = networks(modality, "float16")
    frame = sample()
    for _ in range(2):
        network.predict(frame)
    waits: Counter[str] = Counter()

    def note(*_: object, **__: object) -> None:
        ours = [f for f in traceback.extract_stack() if "/perception/" in f.filename]
        waits[Path(ours[-1].filename).name] += 1

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            network.predict(frame)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = {"boxes.py": 1} if modality == "camera" else WAITS
    assert dict(waits) == expected
    assert sum(waits.values()) <= 8
