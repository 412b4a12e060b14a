"""The head agrees with the official model at every stored array, with weights through the conversion of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from parity.kit import Kit, Level
from parity.sparsefusion_inputs import DTYPE, Case, calibration, head_inputs, level_shapes
from parity.sparsefusion_outputs import config_of, head_outputs
from torch import Tensor

from perception.networks.sparsefusion.candidates import image_candidates, lidar_candidates
from perception.networks.sparsefusion.head import Head
from perception.networks.sparsefusion.official import from_original
from perception.networks.sparsefusion.pyramid import Pyramid, pyramid
from perception.networks.sparsefusion.tensors import Calibration, Outputs
from perception.networks.sparsefusion.view import camera_vector, monocular_box

FILE = {"full": "head_full", "small": "head_small_b2"}
BOX = {"center": "center", "height": "height", "dim": "dim", "rot": "rot", "vel": "vel", "heatmap": "logit"}
IMAGE_BOX = {
    "center_2d": "center", "depth_2d": "depth", "dim_2d": "dim", "rot_2d": "rot", "vel_2d": "vel", "cls": "logit",
    "loc_cam_3d": "center_camera",
}  # fmt: skip

PROBED = (
    "geometric.stem", "geometric", "lidar_projection", "semantic.image_projection", "semantic.lidar_projection",
    "semantic.layer", "semantic.reduce", "point_decoder.layer.query_position", "point_decoder.layer.key_position",
    "point_decoder.layer.norm_self", "point_decoder.layer.norm_cross", "point_decoder.layer", "image_decoder",
    "view_transformation", "view_transformation.gate", "view_transformation.projection", "view_transformation.layer",
    "view_transformation.layer.query_position", "view_transformation.layer.key_position",
    "view_transformation.layer.norm_attention", "fusion.lidar_projection", "fusion.image_projection", "fusion.layer",
    "fusion.layer.query_position", "fusion.layer.norm_attention",
)  # fmt: skip


def load_head(kit: Kit, case: Case, level: Level) -> Head:
    """The head with the kit's weights: every tensor of it, and no other."""
    config = config_of(kit, case)
    state = from_original(kit.state_dict("r50"), config)
    head = Head(config)
    head.load_state_dict({k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")})
    return head.to(DTYPE[level]).eval()


class Run(NamedTuple):
    """One pass of the whole head; probes: module -> (its inputs, its output)."""

    head: Head
    calibration: Calibration
    outputs: Outputs
    probes: dict[str, tuple[Any, Any]]


def run_head(kit: Kit, case: Case, level: Level) -> Run:
    head = load_head(kit, case, level)
    inputs = head_inputs(kit, case, head.config, DTYPE[level])
    probes: dict[str, tuple[Any, Any]] = {}

    def probe(name: str) -> Any:
        return lambda module, given, output: probes.__setitem__(name, (given, output))

    for name in PROBED:
        head.get_submodule(name).register_forward_hook(probe(name))
    with torch.no_grad():
        outputs = head(*inputs)
    return Run(head, inputs.calibration, outputs, probes)


class Named(NamedTuple):
    """An array under the kit's name; `axis` counts the candidates of `of`."""

    name: str
    value: Tensor
    of: Literal["lidar", "image", "both"] | None = None
    axis: int = -1


def feature_arrays(run: Run) -> Iterator[Named]:
    """Maps and tokens."""
    out = {name: output for name, (_, output) in run.probes.items()}
    rows, columns = run.head.config.lidar.bev_shape
    yield Named("geo_stem", out["geometric.stem"])
    for index, fused in enumerate(out["geometric"]):
        yield Named(f"geo_l{index}", fused)
    images = run.probes["image_decoder"][0][3]
    padding = ~images.valid
    yield Named("img_padding_count", padding.sum(-1).int())
    yield Named("img_padding_mask_bits", torch.from_numpy(np.packbits(padding.numpy().reshape(-1))))
    yield Named("lidar_feat", out["lidar_projection"])
    tokens = out["semantic.image_projection"].split([h * w for h, w in images.shapes], dim=2)
    for index, (part, shape) in enumerate(zip(tokens, images.shapes, strict=True)):
        yield Named(f"sem_img_proj_call{index}", part.flatten(0, 1).unflatten(1, shape))
    yield Named("sem_pts_proj", out["semantic.lidar_projection"].unflatten(1, (rows, columns)))
    yield from semantic_arrays(run)
    scattered = run.probes["semantic.reduce"][0][0]
    yield Named("sem_scatter", scattered)
    yield Named("sem_flag", scattered[:, -1].to(torch.uint8))
    yield Named("sem_reduce", out["semantic.reduce"])
    yield Named("lidar_heatmap_logits", run.outputs.lidar_heatmap)
    yield Named("img_heatmap_logits", run.outputs.image_heatmap)
    for kind, found in (("lidar", run.outputs.lidar_candidates), ("img", run.outputs.image_candidates)):
        of = "lidar" if kind == "lidar" else "image"
        yield Named(f"{kind}_top_class", found.label.int(), of)
        if found.view is None:
            yield Named("lidar_top_cell", found.location.int(), of)
        else:
            yield Named("img_top_token", found.location.int(), of)
            yield Named("img_top_view", found.view.int(), of)
            yield Named("img_top_index", (found.view * images.tokens.shape[2] + found.location).int(), of)
    yield Named("pred_query_heatmap_score", run.outputs.lidar_candidates.score, "lidar")
    yield Named("pred_img_query_heatmap_score", run.outputs.image_candidates.score, "image")


def semantic_arrays(run: Run) -> Iterator[Named]:
    """The cells' queries: one call of the official layer for all views at batch 1, else one a view without padding."""
    (feature, position, reference, mask, *_), seen = run.probes["semantic.layer"]
    valid = mask[:, 0]
    counts = valid.sum(-1).tolist()
    if len(run.calibration.present) == 1:
        calls = [(slice(None), max(counts))]
        yield Named("sem_call0_qpad", ~valid[:, : max(counts)])
    else:
        calls = [(slice(index, index + 1), count) for index, count in enumerate(counts)]
    for index, (which, count) in enumerate(calls):
        yield Named(f"sem_call{index}_query", feature[which, :count].transpose(1, 2))
        yield Named(f"sem_call{index}_qpos", position[which, :count])
        yield Named(f"sem_call{index}_ref", reference[which, :count])
        yield Named(f"sem_out_call{index}", seen[which, :count].transpose(1, 2))


def query_arrays(run: Run) -> Iterator[Named]:
    """What the candidates become."""
    out = {name: output for name, (_, output) in run.probes.items()}
    inputs = {name: given for name, (given, _) in run.probes.items()}

    def features(name: str, module: str, of: Literal["lidar", "image", "both"] | None) -> Named:
        return Named(name, out[module].transpose(1, 2), of)

    x, position, *_ = inputs["point_decoder.layer"]
    yield Named("point_in_feat", x.transpose(1, 2), "lidar")
    yield Named("point_in_pos", position, "lidar", 1)
    yield features("point_self_posembed", "point_decoder.layer.query_position", "lidar")
    cells = out["point_decoder.layer.key_position"].transpose(1, 2)
    yield Named("point_cross_posembed", cells.expand(len(x), -1, -1))
    yield features("point_after_norm1", "point_decoder.layer.norm_self", "lidar")
    yield features("point_after_norm2", "point_decoder.layer.norm_cross", "lidar")
    yield features("point_feat", "point_decoder.layer", "lidar")

    x, image, logit_center = out["image_decoder"]
    yield Named("img_in_feat", inputs["image_decoder"][0].transpose(1, 2), "image")
    yield Named("img_feat", x.transpose(1, 2), "image")
    yield Named("img_logitpos", logit_center, "image", 1)
    box = monocular_box(image, run.calibration, run.head.config)
    length, height, width = image.dim.unbind(1)
    dim = torch.stack((width, length, height), -1)
    yield Named("img_bev10", torch.cat((box.center, box.height, box.rot, box.vel, dim), -1), "image", 1)
    yield Named("img_camvec", camera_vector(run.calibration, image.view).transpose(1, 2), "image")
    for name, value in {"center": box.center, "height": box.height, "rot": box.rot, "vel": box.vel, "dim": dim}.items():
        yield Named(f"view_head_{name}_mono", value.transpose(1, 2), "image")

    yield features("view_camse_out", "view_transformation.gate", "image")
    yield features("view_proj_out", "view_transformation.projection", "image")
    yield Named("view_pos9", inputs["view_transformation.layer"][1], "image", 1)
    yield features("view_self_posembed", "view_transformation.layer.query_position", "image")
    yield features("view_cross_posembed", "view_transformation.layer.key_position", "image")
    yield features("view_after_norm2", "view_transformation.layer.norm_attention", "image")
    yield features("view_feat", "view_transformation.layer", "image")
    yield features("fusion_pts_proj_out", "fusion.lidar_projection", "lidar")
    yield features("fusion_img_proj_out", "fusion.image_projection", "image")
    yield features("fusion_self_posembed", "fusion.layer.query_position", "both")
    yield features("fusion_after_norm2", "fusion.layer.norm_attention", "both")
    yield features("fusion_feat", "fusion.layer", "both")

    for name, field in BOX.items():
        yield Named(f"point_head_{name}", getattr(run.outputs.point, field), "lidar")
        yield Named(f"view_head_{name}_view", getattr(run.outputs.view, field), "image")
        yield Named(f"fusion_head_{name}", getattr(run.outputs.fusion, field), "both")
    for name, field in IMAGE_BOX.items():
        yield Named(f"img_head_{name}", getattr(run.outputs.image, field), "image")


def stored(kit: Kit, file: str) -> set[str]:
    """Names of the arrays that the head makes; boxes decoded (dec*) and kept (final*) are `boxes.decode`'s."""
    names = {name.removesuffix("__sample").removesuffix("__chstats") for name in kit.names(file)}
    return {name for name in names if not name.startswith(("dec", "final"))}


def kit_order(kit: Kit, file: str, outputs: Outputs) -> dict[str, Tensor]:
    """For each sample, where our candidate is that the kit has at each place: near ties may change their order."""

    def order(kit_keys: np.ndarray, keys: Tensor) -> Tensor:
        assert (np.sort(keys.numpy()) == np.sort(kit_keys)).all(), f"{file}: other candidates than the kit's"
        ranks = np.argsort(np.argsort(kit_keys))
        return torch.from_numpy(np.take_along_axis(np.argsort(keys.numpy()), ranks, 1))

    lidar, image = outputs.lidar_candidates, outputs.image_candidates
    big = 10**7

    def key(*names: str) -> np.ndarray:
        label, place = (kit.array(file, name).astype(np.int64) for name in names)
        return label * big + place

    views = outputs.image_heatmap.shape[-1]
    by_lidar = order(key("lidar_top_class", "lidar_top_cell"), lidar.label * big + lidar.location)
    ours = image.label * big + image.view * views + image.location
    by_image = order(key("img_top_class", "img_top_index"), ours)
    return {"lidar": by_lidar, "image": by_image, "both": torch.cat((by_lidar, by_image + by_lidar.shape[1]), 1)}


def reordered(array: Named, order: dict[str, Tensor]) -> Tensor:
    if array.of is None:
        return array.value
    moved = array.value.movedim(array.axis, 1)
    rows = torch.arange(len(moved))[:, None]
    return moved[rows, order[array.of]].movedim(1, array.axis)


@pytest.mark.parametrize(
    ("case", "level"),
    [
        ("small", "float32"),
        pytest.param("small", "float64", marks=pytest.mark.slow),
        pytest.param("full", "float64", marks=pytest.mark.slow),
        pytest.param("full", "float32", marks=pytest.mark.slow),
    ],
)
def test_whole_head(kit: Kit, case: Case, level: Level):
    """Every array of the file, from the branches' features on; integers identical in float64, the sets in float32."""
    file, run = FILE[case], run_head(kit, case, level)
    order = kit_order(kit, file, run.outputs)
    if level == "float64":
        assert all((at == torch.arange(at.shape[1])).all() for at in order.values()), "candidates in another order"
    compared, wrong = set(), []
    for array in (*feature_arrays(run), *query_arrays(run)):
        compared.add(array.name)
        try:
            kit.assert_close(file, array.name, reordered(array, order), level)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
    assert compared == stored(kit, file)


# Stages by themselves, from the kit's stored or ruled inputs


@pytest.fixture(scope="module")
def small(kit: Kit) -> Head:
    return load_head(kit, "small", "float64")


ROUNDING = 3e-5  # inputs that the kit's files hold in float32, tens of metres among them


def test_candidates_of_the_stored_heatmaps(kit: Kit, small: Head):
    """Local maxima a class at a time but for those that keep all, and the best over classes, views and levels."""
    file, cameras = FILE["small"], calibration(kit, "small", torch.float64)
    views = cameras.present.numel()
    images = pyramid([torch.empty(views, 1, *shape) for shape in level_shapes(kit, "small")], cameras)
    lidar = lidar_candidates(kit.tensor(file, "lidar_heatmap_logits", torch.float64), small.config)
    logits = kit.tensor(file, "img_heatmap_logits", torch.float64)
    image = image_candidates(logits, images, cameras.present, small.config)
    outputs = Outputs(None, logits, lidar, image, None, None, None, None)
    order = kit_order(kit, file, outputs)
    for name, score, of in (
        ("pred_query_heatmap_score", lidar.score, "lidar"),
        ("pred_img_query_heatmap_score", image.score, "image"),
    ):
        kit.assert_close(file, name, reordered(Named(name, score, of), order), rounding=1e-7)


def test_view_transformation_of_stored_queries(kit: Kit, small: Head):
    file, cameras = FILE["small"], calibration(kit, "small", torch.float64)
    image = head_outputs(kit, file).image
    x, logit_center = (kit.tensor(file, name, torch.float64) for name in ("img_feat", "img_logitpos"))
    x = x.transpose(1, 2)
    # Logits of shares near 0 or 1 enlarge the rounding of stored inputs without bound: it is sent through.
    nudged = image._replace(**{n: t * (1 + 2**-24) for n, t in image._asdict().items() if n != "view"})
    with torch.no_grad():
        other, other_boxes = small.view_transformation(x * (1 + 2**-24), nudged, logit_center * (1 + 2**-24), cameras)
        x, boxes = small.view_transformation(x, image, logit_center, cameras)

    def rounding(a: Tensor, b: Tensor) -> float:
        return max(ROUNDING, 2 * float((a - b).abs().max()))

    kit.assert_close(file, "view_feat", x.transpose(1, 2), rounding=rounding(x, other))
    for name, field in BOX.items():
        value = getattr(boxes, field)
        kit.assert_close(file, f"view_head_{name}_view", value, rounding=rounding(value, getattr(other_boxes, field)))


def test_fusion_of_stored_queries(kit: Kit, small: Head):
    file = FILE["small"]
    stored_outputs = head_outputs(kit, file)
    lidar, image = (kit.tensor(file, name, torch.float64).transpose(1, 2) for name in ("point_feat", "view_feat"))
    centers = torch.cat((stored_outputs.point.center, stored_outputs.view.center), -1).transpose(1, 2)
    with torch.no_grad():
        boxes = small.fusion(lidar, image, centers, torch.ones(centers.shape[:2], dtype=torch.bool))
    for name, field in BOX.items():
        kit.assert_close(file, f"fusion_head_{name}", getattr(boxes, field), rounding=ROUNDING)


def lone_pyramid(kit: Kit, cameras: Calibration, channels: int) -> Pyramid:
    shapes, views = level_shapes(kit, "small"), cameras.present.shape[1]
    levels = [kit.input("lone:f{l}", (views, channels, *shape), level=i) for i, shape in enumerate(shapes)]
    return pyramid([level.to(cameras.rotation.dtype) for level in levels], cameras)


@pytest.mark.parametrize("level", DTYPE)
def test_camera_decoder_with_uneven_views(kit: Kit, level: Level):
    """Views with no, one, two and many candidates; the only one of a view gets zeros."""
    dtype, head = DTYPE[level], load_head(kit, "small", level)
    cameras = calibration(kit, "small", dtype, range(1))
    view = kit.tensor("units", "lone_view", torch.int64)[None]
    x = kit.input("lone:query").to(dtype).transpose(1, 2)
    place = kit.input("lone:qpos").to(dtype).sigmoid()
    with torch.no_grad():
        images = lone_pyramid(kit, cameras, head.config.channels)
        x, image, _ = head.image_decoder(x, place, view, images, cameras)
    kit.assert_close("units", "lone_feat", x.transpose(1, 2), level)
    box = monocular_box(image, cameras, head.config)
    length, height, width = image.dim.unbind(1)
    dim = torch.stack((width, length, height), -1)
    bev = torch.cat((box.center, box.height, box.rot, box.vel, dim), -1)
    kit.assert_close("units", "lone_bev10", bev, level)
    alone = view[0].bincount()[view] == 1
    assert alone.any()
    assert alone.sum() == (x.abs().sum(-1) == 0).sum()


@pytest.mark.parametrize("level", DTYPE)
def test_deformable_attention(kit: Kit, level: Level):
    dtype, head = DTYPE[level], load_head(kit, "small", level)
    cameras = Calibration(*(value[:, :1] for value in calibration(kit, "small", dtype, range(1))))
    shapes = tuple(level_shapes(kit, "small"))
    tokens = kit.input("msda:tok", (1, sum(h * w for h, w in shapes), head.config.channels)).to(dtype)[:, None]
    query = kit.input("msda:q").to(dtype)
    shift = float(kit.said(r'"msda:ref".*?\)\+([\d.]+)')[1])
    reference = kit.input("msda:ref").to(dtype) + shift
    valid = pyramid([torch.empty(1, 1, *shape) for shape in shapes], cameras).valid
    view = torch.zeros(query.shape[:2], dtype=torch.int64)
    with torch.no_grad():
        out = head.image_decoder.layer.cross_attention(query, reference, tokens, shapes, valid, view)
    kit.assert_close("units", "msda_out", out, level)


@pytest.mark.parametrize("level", DTYPE)
def test_layer_of_the_view_transformation(kit: Kit, level: Level):
    dtype, head = DTYPE[level], load_head(kit, "small", level)
    position = kit.input("co:pos").to(dtype)
    count = position.shape[1]
    x = kit.input("lone:query").to(dtype)[..., :count].transpose(1, 2)
    with torch.no_grad():
        out = head.view_transformation.layer(x, position, torch.ones(1, 1, count, dtype=torch.bool))
    kit.assert_close("units", "crossonly_out", out.transpose(1, 2), level)
