"""The arrangement for a GPU gives what the modules give, and makes the host wait only where it is known to."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import tiny_sparsefusion
from networks.sparsefusion.test_network import sample

from perception.errors import DataError
from perception.networks.sparsefusion import SparseFusion
from perception.networks.sparsefusion.boxes import last_layer
from perception.networks.sparsefusion.tensors import Outputs

pytestmark = pytest.mark.gpu

WAITS = {
    "voxelize.py": 1,  # how many voxels there are
    "sparse_triton.py": 4,  # how many sites each strided convolution reaches
    "semantic.py": 1,  # how many cells a view sees
    "boxes.py": 1,  # the boxes come to the host
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
        with torch.inference_mode():
            inputs = plain.encode([sample(seed)])
            want, got = plain(inputs), fast.fast(inputs)
        for name in ("lidar_heatmap", "image_heatmap"):
            if (heatmap := getattr(want, name)) is not None:
                torch.testing.assert_close(getattr(got, name), heatmap, atol=1e-4, rtol=1e-4)
        boxes, expected = by_candidate(got), by_candidate(want)
        assert boxes.keys() == expected.keys()
        for key, box in expected.items():
            torch.testing.assert_close(boxes[key], box, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("modality", ["fusion", "lidar", "camera"])
def test_images_taken_up_by_the_second_thread_are_the_encoders(modality: str):
    plain, network = networks(modality, "float32")
    for seed in (0, 1):
        with torch.inference_mode():
            want, got = plain.encode([sample(seed)]), network.fast.encode(network.encoder, [sample(seed)])
            torch.cuda.synchronize()
        for name in ("images", "voxels", "coordinates", "sparse_depth"):
            expected = getattr(want, name)
            assert (expected is None and getattr(got, name) is None) or torch.equal(getattr(got, name), expected), name


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
        inputs = plain.encode([sample()])
        want, got = plain(inputs), fast.fast(inputs)
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
    known = {"lidar": {"semantic.py"}, "camera": {"voxelize.py", "sparse_triton.py", "semantic.py"}}.get(
        modality, set()
    )
    assert dict(waits) == {name: number for name, number in WAITS.items() if name not in known}
    assert sum(waits.values()) <= 8
