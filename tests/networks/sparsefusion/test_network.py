"""The whole network in a small size: boxes in ego, bad input, ablations, and what training asks of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import builders
import numpy as np
import pytest
import torch
from builders import EGO_FROM_LIDAR, tiny_sparsefusion
from numpy.testing import assert_allclose, assert_array_equal

from perception.decode import decode_cloud
from perception.errors import DataError
from perception.geometry import transform_boxes
from perception.networks.sparsefusion import SparseFusion
from perception.networks.sparsefusion.config import Mounting
from perception.types import Boxes3D, CameraImage, PointCloud, Pose, Sample, Truth

MODALITIES = ("fusion", "lidar", "camera")


def network(**keys) -> SparseFusion:
    torch.manual_seed(0)
    return SparseFusion(tiny_sparsefusion(**keys)).eval()


def noise_image(seed: int, width: int = 160, height: int = 90) -> CameraImage:
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return replace(builders.camera(width, height), rgb=rgb)


def sample(seed: int = 0, **keys) -> Sample:
    """A cloud within range and two cameras, ahead and behind."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform((-25, -25, -2), (25, 25, 2), (400, 3)).astype(np.float32)
    cloud = PointCloud(xyz, {"intensity": rng.uniform(0, 255, 400).astype(np.float32)}, EGO_FROM_LIDAR, 0)
    turn = Pose.from_yaw(np.pi)
    back = noise_image(seed + 1)
    back = replace(back, ego_from_camera=Pose(turn.rotation @ back.ego_from_camera.rotation, np.array([-0.5, 0, 1.5])))
    return replace(Sample(0, {"top": cloud}, {}, {"front": noise_image(seed), "back": back}), **keys)


def assert_same(a: Boxes3D, b: Boxes3D, tolerance: float) -> None:
    assert_array_equal(a.label, b.label)
    for name in ("center", "size", "velocity", "score"):
        assert_allclose(getattr(a, name), getattr(b, name), atol=tolerance, err_msg=name)
    assert_allclose(np.cos(a.yaw - b.yaw), 1, atol=tolerance)


@pytest.mark.parametrize("modality", MODALITIES)
def test_boxes_of_every_modality(modality: str):
    boxes = network(modality=modality).predict(replace(sample(), stamp_ns=42))
    assert boxes.stamp_ns == 42 and boxes.classes == builders.CLASSES
    assert 0 < len(boxes) <= (20 if modality == "fusion" else 10)
    assert boxes.score.max() > 0


def test_boxes_lie_where_ego_says():
    """Ego moved and turned, sensors with it: the same boxes, moved and turned."""
    moved = Pose.from_yaw(0.7, (3.0, -2.0, 0.5))
    here = sample()
    there = replace(
        here,
        lidars={"top": replace(here.lidars["top"], ego_from_sensor=moved @ EGO_FROM_LIDAR)},
        cameras={r: replace(c, ego_from_camera=moved @ c.ego_from_camera) for r, c in here.cameras.items()},
    )
    net = network()
    assert_same(net.predict(there), transform_boxes(moved, net.predict(here)), 2e-3)


def test_a_mounted_rig_gives_the_same_boxes():
    """A LiDAR that looks along x, brought into the network's frame, sees what nuScenes' sees."""
    here = sample()
    cloud = here.lidars["top"]
    mount = Pose.from_yaw(0.0, (0.94, 0.0, 1.84))
    quarter = np.stack([cloud.xyz[:, 1], -cloud.xyz[:, 0], cloud.xyz[:, 2]], 1)  # exact, so no point changes voxels
    there = replace(here, lidars={"top": replace(cloud, xyz=quarter, ego_from_sensor=mount)})
    assert_same(network(mounting=Mounting()).predict(there), network().predict(here), 2e-3)


def test_a_batch_is_its_samples():
    net, two = network(), [sample(0), sample(5)]
    with torch.inference_mode():
        together = net.decode(net(net.encode(two)), two)
    for one, boxes in zip(two, together, strict=True):
        assert_same(boxes, net.predict(one), 1e-4)


@pytest.mark.parametrize("modality", ["fusion", "lidar"])
@pytest.mark.parametrize("xyz", [np.zeros((0, 3)), np.array([[90.0, 0, 0], [0, 0, 40]])], ids=["empty", "out of range"])
def test_no_point_in_range_predicts_nothing(modality: str, xyz: np.ndarray):
    cloud = PointCloud(xyz.astype(np.float32), {"intensity": np.zeros(len(xyz))}, EGO_FROM_LIDAR, 0)
    net, blind = network(modality=modality), sample(lidars={"top": cloud}, stamp_ns=3)
    boxes = net.predict(blind)
    assert len(boxes) == 0 and boxes.stamp_ns == 3 and boxes.classes == builders.CLASSES
    assert net.degraded(blind) == "no point of LiDAR top in range"
    net.predict(sample())
    assert net.degraded(sample()) == ""


def test_points_that_are_not_numbers_are_dropped_and_counted():
    """As messages bring them, in coordinates and in intensity: the boxes are those of the other points."""
    net, clean = network(), sample()
    cloud = clean.lidars["top"]
    points = np.column_stack([cloud.xyz, cloud.field("intensity")])
    bad = np.full((3, 4), 1.0, np.float32)
    bad[0, 0], bad[1, 2], bad[2, 3] = np.nan, np.inf, np.nan
    points = np.insert(points, [0, 100, 400], bad, axis=0).astype("<f4")
    fields = [
        SimpleNamespace(name=n, offset=4 * i, datatype=7, count=1) for i, n in enumerate(("x", "y", "z", "intensity"))
    ]
    message = SimpleNamespace(
        header=SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=0), frame_id="lidar_top"), height=1,
        width=len(points), point_step=16, row_step=16 * len(points), fields=fields, data=points.tobytes(),
        is_bigendian=False,
    )  # fmt: skip
    decoded = decode_cloud(message, EGO_FROM_LIDAR)
    assert decoded.dropped_nonfinite == 3 and len(decoded.cloud) == 400
    assert_same(net.predict(replace(clean, lidars={"top": decoded.cloud})), net.predict(clean), 0)
    with pytest.raises(ValueError, match=r"PointCloud.xyz: 1 of 1203 values are not finite"):
        replace(cloud, xyz=np.concatenate([cloud.xyz, bad[:1, :3]]), fields={})


def test_voxels_beyond_the_cap_are_told():
    both, net = sample(), network()
    net.predict(both)
    assert net.degraded(both) == ""
    few = SparseFusion(net.config.model_copy(update={"lidar": net.config.lidar.model_copy(update={"max_voxels": 9})}))
    few.eval().predict(both)
    dropped = few.encoder.voxels_dropped
    assert 0 < dropped <= 400 - 9
    assert few.degraded(both) == f"{dropped} voxels beyond the 9 that lidar.max_voxels allows"
    assert few.degraded(replace(both, cameras={})).startswith("camera front missing, back missing; ")


def test_nothing_is_taken_from_a_missing_camera():
    """Boxes are then the LiDAR's: whatever the absent camera showed, a black image and no image are the same."""
    net, both = network(), sample()
    missing = replace(both, cameras={"front": both.cameras["front"]})
    black = replace(both.cameras["back"], rgb=np.zeros((90, 160, 3), np.uint8))
    covered = replace(both, cameras={**missing.cameras, "back": black})
    assert net.degraded(both) == ""
    assert net.degraded(missing) == "camera back missing"
    assert net.degraded(covered) == "camera back black"
    assert_same(net.predict(missing), net.predict(covered), 1e-6)
    blind = replace(both, cameras={})
    assert net.degraded(blind) == "camera front missing, back missing"
    boxes = net.predict(blind)
    assert np.isfinite(boxes.center).all()
    assert 0 < (boxes.score > 0).sum() <= net.config.queries, "the LiDAR's candidates alone have a score"


def test_the_camera_ablation_without_any_camera_predicts_nothing():
    net = network(modality="camera")
    assert len(net.predict(sample(cameras={}))) == 0
    assert network(modality="lidar").degraded(sample(cameras={})) == ""


def test_cameras_of_another_size():
    net = network()
    big = {role: noise_image(7, 640, 480) for role in ("front", "back")}
    assert len(net.predict(sample(cameras=big)))
    mixed = {"front": noise_image(7, 1600, 900), "back": noise_image(8, 90, 160)}
    assert len(net.predict(sample(cameras=mixed)))


def test_a_cloud_without_intensity_is_refused():
    bare = replace(sample().lidars["top"], fields={})
    with pytest.raises(DataError, match=r"LiDAR 'top' has fields \(x, y, z\); the network needs intensity\n.*e.g. "):
        network().predict(sample(lidars={"top": bare}))


def test_needs_name_what_each_modality_reads():
    fusion, lidar, camera = (network(modality=m, sweeps=3).needs for m in MODALITIES)
    assert fusion.lidar == lidar.lidar == ("intensity",) and camera.lidar is None
    assert fusion.cameras == camera.cameras == ("front", "back") and lidar.cameras == ()
    assert (fusion.sweeps, fusion.anchor, camera.anchor) == (3, "lidar", "camera")


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_step_of_training_lowers_the_loss_and_reaches_every_parameter(modality: str):
    net = network(modality=modality, dropout=0.0, class_prior=0.05).train()
    samples, truths = [sample(0), sample(1)], [Truth(boxes=builders.boxes())] * 2
    inputs, supervision = net.encode(samples), net.encode_targets(samples, truths)
    optimiser = torch.optim.SGD(net.parameters(), 1e-3)

    def total() -> torch.Tensor:
        return torch.stack(list(net.loss(net(inputs), supervision).values())).sum()

    before = total()
    before.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    optimiser.step()
    assert total() < before


def test_a_truth_without_boxes_is_refused():
    with pytest.raises(DataError, match="truth has no boxes"):
        network().encode_targets([sample()], [Truth()])
