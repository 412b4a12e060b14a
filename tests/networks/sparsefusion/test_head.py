from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from networks.sparsefusion.rig import VIEWS, head_inputs, on_cuda, small_config
from torch import Tensor

from perception.networks.sparsefusion.head import Head
from perception.networks.sparsefusion.tensors import Outputs


def tensors(outputs: Outputs) -> dict[str, Tensor]:
    """All tensors of the outputs by name."""
    found = {}
    for name, value in outputs._asdict().items():
        if isinstance(value, Tensor):
            found[name] = value
        elif value is not None:
            found |= {f"{name}.{field}": x for field, x in value._asdict().items() if x is not None}
    return found


def assert_equal(a: Outputs, b: Outputs, skip: tuple[str, ...] = ()) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name not in skip:
            torch.testing.assert_close(value, theirs[name], msg=lambda m, name=name: f"{name}: {m}")


def make(modality: Any = "fusion", batch: int = 2, **overrides: object) -> tuple[Head, dict[str, Any]]:
    config = small_config(modality, **overrides)
    return Head(config).double().eval(), head_inputs(config, batch, torch.float64)


@pytest.mark.parametrize(
    ("modality", "groups"),
    [
        ("lidar", {"lidar_heatmap", "lidar_candidates", "point"}),
        ("camera", {"image_heatmap", "image_candidates", "image", "view"}),
        ("fusion", set(Outputs._fields)),
    ],
)
def test_modalities(modality: str, groups: set[str]):
    """Each gives its groups, in the documented shapes, and every parameter gets a gradient."""
    head, inputs = make(modality)
    if modality == "lidar":
        inputs |= {"image_levels": None, "sparse_depth": None, "calibration": None}
    if modality == "camera":
        inputs |= {"lidar_features": None, "height_min": None, "height_max": None, "sparse_depth": None}
    outputs = head.train()(**inputs)
    assert {name for name, value in outputs._asdict().items() if value is not None} == groups
    last = {"lidar": outputs.point, "camera": outputs.view, "fusion": outputs.fusion}[modality]
    queries = 24 if modality == "fusion" else 12
    assert {name: tuple(x.shape) for name, x in last._asdict().items()} == {
        "center": (2, 2, queries), "height": (2, 1, queries), "dim": (2, 3, queries), "rot": (2, 2, queries),
        "vel": (2, 2, queries), "logit": (2, 10, queries),
    }  # fmt: skip
    differentiable = [x for x in tensors(outputs).values() if x.requires_grad]
    torch.stack([(x * torch.randn_like(x)).sum() for x in differentiable]).sum().backward()
    without = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_missing_inputs_are_named():
    head, inputs = make()
    for name, what in (("lidar_features", "LiDAR's features"), ("image_levels", "images' features"),
                       ("height_min", "heights"), ("sparse_depth", "sparse depth")):  # fmt: skip
        with pytest.raises(AssertionError, match=what):
            head(**(inputs | {name: None}))


def test_samples_of_a_batch_do_not_meet():
    head, inputs = make()
    both = tensors(head(**inputs))

    def part(value: Any, index: int) -> Any:
        if isinstance(value, list):
            return [x[index * VIEWS : (index + 1) * VIEWS] for x in value]
        return (
            value[index : index + 1]
            if isinstance(value, Tensor)
            else type(value)(*(x[index : index + 1] for x in value))
        )

    for index in range(2):
        alone = tensors(head(**{name: part(value, index) for name, value in inputs.items()}))
        for name, value in alone.items():
            torch.testing.assert_close(value, both[name][index : index + 1])


@pytest.mark.parametrize("missing", [[2], [0, 3], list(range(VIEWS))])
def test_nothing_is_taken_from_a_missing_camera(missing: list[int]):
    """Whatever its image is, all outputs stay; it has no candidate while others have enough, and no score ever."""
    head, inputs = make()
    calibration = inputs["calibration"]
    present = calibration.present.clone()
    present[:, missing] = False
    inputs["calibration"] = calibration._replace(present=present)
    outputs = head(**inputs)
    gone = [b * VIEWS + view for b in range(2) for view in missing]
    for level in inputs["image_levels"]:
        level[gone] = 50 * torch.randn_like(level[gone])
    inputs["sparse_depth"][:, missing] = 7
    changed = head(**inputs)
    of_cameras = tuple(name for name in tensors(outputs) if name.startswith(("image", "view")))
    if len(missing) < VIEWS:
        assert not (outputs.image_candidates.view[..., None] == torch.tensor(missing)).any()
        assert_equal(outputs, changed, skip=("image_heatmap",))
    else:
        assert outputs.image_candidates.score.abs().max() == 0
        queries = head.config.queries
        for name in ("center", "logit"):
            a, b = (getattr(x.fusion, name)[..., :queries] for x in (outputs, changed))
            torch.testing.assert_close(a, b)
        assert_equal(outputs, changed, skip=(*of_cameras, *(f"fusion.{name}" for name in outputs.fusion._fields)))
    assert all(value.isfinite().all() for value in tensors(changed).values())


def test_no_points_at_all():
    """No cell is visible, semantic transfer has only padding: all finite, gradients too."""
    head, inputs = make(batch=1)
    inputs["height_min"] = torch.full_like(inputs["height_min"], 100)
    inputs["height_max"] = torch.full_like(inputs["height_max"], -200)
    outputs = head.train()(**inputs)
    assert all(value.isfinite().all() for value in tensors(outputs).values())
    (outputs.fusion.center.sum() + outputs.lidar_heatmap.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


def test_autocast_stays_close():
    """Coordinates, boxes and logits in full precision, so 16 bits inside shift no box by a cell."""
    torch.manual_seed(1)
    config = small_config()
    head, inputs = Head(config).eval(), head_inputs(config, 1)
    exact = head(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(**inputs)
    assert all(getattr(outputs.fusion, name).dtype == torch.float32 for name in outputs.fusion._fields)
    shared = [
        (a, int((exact.lidar_candidates.location[0] == cell).nonzero()[0]))
        for a, cell in enumerate(outputs.lidar_candidates.location[0].tolist())
        if (exact.lidar_candidates.location[0] == cell).any()
    ]
    assert len(shared) >= 6
    for ours, theirs in shared:
        moved = (outputs.point.center[0, :, ours] - exact.point.center[0, :, theirs]).norm()
        assert moved < 0.1, f"{moved:.3f} cells"


def test_initialisation():
    torch.manual_seed(0)
    head = Head(small_config())
    assert abs(head.level_embedding.std() - 1) < 0.2
    weight = head.semantic.reduce[0].weight
    bound = math.sqrt(6 / (9 * (weight.shape[0] + weight.shape[1])))
    assert 0.9 * bound < weight.abs().max() <= bound
    assert head.image_decoder.layer.cross_attention.sampling_offsets.weight.abs().max() == 0
    prior = Head(small_config(class_prior=0.01))
    expected = math.log(0.01 / 0.99)
    layers = (prior.lidar_heatmap, prior.image_heatmaps[3][1], prior.point_decoder.heads["logit"][3],
              prior.image_decoder.heads.logit[3], prior.fusion.heads["logit"][3])  # fmt: skip
    for layer in layers:
        torch.testing.assert_close(layer.bias, torch.full_like(layer.bias, expected))
    assert prior.point_decoder.heads["dim"][3].bias.abs().max() < 1


@pytest.mark.gpu
@pytest.mark.parametrize("modality", ["fusion", "lidar", "camera"])
def test_on_cuda_as_on_the_cpu(modality: str):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    config = small_config(modality)
    head, inputs = Head(config).eval(), head_inputs(config, 2)
    expected = tensors(head(**inputs))

    outputs = tensors(head.cuda()(**{name: on_cuda(value) for name, value in inputs.items()}))
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name].cpu(), value, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_statistics_of_the_point_heads_are_those_of_decoded_queries_unless_asked_otherwise():
    """The released models' training lets the undecoded queries into them, which spoils what predictions use."""
    moved = {}
    for raw in (True, False):
        torch.manual_seed(0)
        head, inputs = make("lidar", raw_queries=raw)
        norms = [m for m in head.point_decoder.heads.modules() if isinstance(m, torch.nn.BatchNorm1d)]
        seen: list[Tensor] = []
        norms[0].register_forward_hook(lambda _, x, y, seen=seen: seen.append(x[0].detach()))
        head.train()
        head(**inputs)
        assert len(seen) == (2 if raw else 1)
        moved[raw] = norms[0].running_mean
    torch.testing.assert_close(moved[False], 0.1 * seen[0].transpose(0, 1).flatten(1).mean(1))
    assert not torch.allclose(moved[True], moved[False])
