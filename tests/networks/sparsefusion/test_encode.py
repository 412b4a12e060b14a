"""Samples become the network's tensors: frames, order, images of any size, and inputs that lack something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import EGO_FROM_LIDAR, FRONT, camera, cloud, tiny_sparsefusion
from numpy.testing import assert_allclose, assert_array_equal

from perception.datasets.mmdet3d_infos import Mmdet3dInfos, Mmdet3dInfosConfig
from perception.errors import DataError
from perception.geometry import project_to_image
from perception.networks.sparsefusion.config import Mounting, SparseFusionConfig
from perception.networks.sparsefusion.encode import (
    BLACK_LEVEL,
    DEPTH_MEAN_M,
    DEPTH_VARIANCE_M2,
    Encoder,
    absent_cameras,
    ego_from_network,
    fit_canvas,
)
from perception.sweeps import accumulate
from perception.types import CameraImage, PointCloud, Pose, Sample

TURN = Pose.from_yaw(np.pi)
BACK = Pose(TURN.rotation @ FRONT.rotation, np.array([-0.5, 0.0, 1.5]))


def encoder(**keys) -> Encoder:
    return Encoder(tiny_sparsefusion(**keys)).eval()


def sample(xyz: list[list[float]] | None = None, **cameras: CameraImage) -> Sample:
    """Points in the LiDAR's frame (x right, y forward), and a grey camera at each end unless cameras are given."""
    found = cloud(points=200)
    if xyz is not None:
        points = np.array(xyz, np.float32).reshape(-1, 3)
        found = PointCloud(points, {"intensity": np.full(len(points), 7.0, np.float32)}, EGO_FROM_LIDAR, 0)
    both = {"front": camera(), "back": replace(camera(), ego_from_camera=BACK)}
    return Sample(0, lidars={"top": found}, cameras=cameras or both)


def test_points_keep_order_frame_and_lag():
    key, past = cloud(stamp_ns=100_000_000, seed=1), cloud(stamp_ns=50_000_000, seed=2)
    both = accumulate([key, past])
    points = encoder().points(Sample(100_000_000, lidars={"top": both}))
    assert_array_equal(points[:, :3], both.xyz)
    assert_array_equal(points[:, 3], both.field("intensity"))
    assert_allclose(points[: len(key), 4], 0)
    assert_allclose(points[len(key) :, 4], 0.05, rtol=1e-6)


def test_sweeps_beyond_the_network_s_are_left_out():
    key, past, older = (cloud(stamp_ns=s, seed=s) for s in (3, 2, 1))
    three, two = (Sample(3, lidars={"top": accumulate(sweeps)}) for sweeps in ([key, past, older], [key, past]))
    assert_array_equal(encoder(sweeps=2).points(three), encoder(sweeps=3).points(two))


@pytest.mark.gpu
def test_a_gpu_encodes_the_same():
    """To the bit where it counts: cells and grey levels. Depth and means may differ by rounding."""
    config = tiny_sparsefusion()
    samples = [sample(), sample([[0.1, 0.1, 0.1]], front=camera(1600, 900))]
    here, there = Encoder(config).eval()(samples), Encoder(config).cuda().eval()(samples)
    assert_array_equal(there.coordinates.cpu(), here.coordinates)
    assert_array_equal(there.calibration.present.cpu(), here.calibration.present)
    for name in ("voxels", "height_min", "height_max", "images", "sparse_depth"):
        assert_allclose(getattr(there, name).cpu(), getattr(here, name), rtol=1e-6, atol=1e-6, err_msg=name)
    for mine, its in zip(here.calibration[:5], there.calibration[:5], strict=True):
        assert_array_equal(its.cpu(), mine)


def test_padded_voxels_are_the_encoders_and_rows_without_one_are_marked():
    made = encoder()
    points = made.points(sample([[0.1, 0.1, 0.1], [0.3, 0.3, 0.1], [10.1, -19.9, 1.1]]))
    want = made.voxels([points])
    *got, found = made.padded_voxels(torch.nn.functional.pad(points, (0, 0, 0, 9), value=torch.nan))
    kept = len(want[0])
    assert int(found) == kept == 2
    assert len(got[0]) == len(got[1]) == made.config.lidar.max_voxels
    assert_array_equal(got[0][:kept], want[0])
    assert_array_equal(got[1][:kept], want[1])
    assert not got[0][kept:].any() and (got[1][kept:] == -1).all()
    assert_array_equal(got[2], want[2])
    assert_array_equal(got[3], want[3])


def test_voxels_are_means_with_batch_first():
    first = sample([[0.1, 0.1, 0.1], [0.3, 0.3, 0.1], [10.1, -19.9, 1.1]])
    second = sample([[-25.5, 25.5, 2.9]])
    inputs = encoder()([first, second])
    assert inputs.batch_size == 2
    assert inputs.coordinates.tolist() == [[0, 25, 64, 64], [0, 30, 14, 89], [1, 39, 127, 0]]
    assert inputs.coordinates.dtype == torch.int32
    assert_allclose(inputs.voxels[0], [0.2, 0.2, 0.1, 7.0, 0.0], rtol=1e-6)
    assert inputs.height_max.shape == (2, 16, 16)
    assert inputs.height_max[1, 15, 0] == pytest.approx(2.9)


def test_training_keeps_fewer_voxels_and_sees_the_valid_part_alone():
    small = encoder()
    small.config = small.config.model_copy(
        update={"lidar": small.config.lidar.model_copy(update={"max_voxels": 6, "max_voxels_training": 4})}
    )
    assert len(small([sample()]).voxels) == 6
    assert len(small.train()([sample()]).voxels) == 4
    shape = [tuple(small.train(mode)([sample()]).calibration.visible_px[0, 0].tolist()) for mode in (False, True)]
    assert shape == [(160, 96), (160, 90)]


def test_valid_size_is_scaled_with_the_image():
    image = replace(camera(320, 180), valid_size=(200, 90))
    assert encoder()([sample(front=image)]).calibration.valid_px[0, 0].tolist() == [100, 45]


@pytest.mark.parametrize(("width", "height"), [(160, 90), (1600, 900), (640, 480), (96, 200)])
def test_a_point_keeps_its_place_in_images_of_any_size(width: int, height: int):
    """Ego -> pixel of the original image, scaled as the image was, is LiDAR -> pixel of the canvas."""
    image = camera(width, height)
    view = sample(front=image)
    calibration = encoder()([view]).calibration
    ego = np.array([[12.0, 3.0, 1.0]])
    pixel, _, visible = project_to_image(ego, image)
    point = torch.from_numpy(EGO_FROM_LIDAR.inverse().apply(ego)[0]).float()
    seen = calibration.intrinsic[0, 0] @ (calibration.rotation[0, 0] @ point + calibration.translation[0, 0])
    size, factors = fit_canvas(image, encoder().config.image)
    assert_allclose(seen[:2] / seen[2], pixel[0] * factors, rtol=1e-5)
    assert size[0] <= 160 and size[1] <= 96 and (size[0] == 160 or size[1] == 96)
    assert visible.all() or width < height


def test_images_are_normalised_and_padded():
    white = replace(camera(320, 180), rgb=np.full((180, 320, 3), 255, np.uint8))
    images = encoder()([sample(front=white)]).images
    assert images.shape == (1, 2, 3, 96, 160)
    assert_allclose(images[0, 0, :, :90], np.broadcast_to([[[2.2489083]], [[2.4285715]], [[2.64]]], (3, 90, 160)), 1e-6)
    assert not images[0, 0, :, 90:].any(), "beyond the image"
    assert not images[0, 1].any(), "no such camera"


def test_sparse_depth_is_the_nearest_point_of_the_key_sweep():
    """Two key points along one ray, 10 and 20 m ahead of the camera, and a nearer one of an earlier sweep."""
    forward = (FRONT.translation - EGO_FROM_LIDAR.translation)[[1, 0, 2]] * [-1, 1, 1]  # of the camera, LiDAR's axes
    key = sample([forward + [0, 20, 0], forward + [0, 10, 0]]).lidars["top"]
    past = replace(key, xyz=np.array([forward + [0, 5, 0]], np.float32), fields={"intensity": np.ones(1)}, stamp_ns=-1)
    view = Sample(0, lidars={"top": accumulate([key, past])}, cameras={"front": camera()})
    depth = encoder()([view]).sparse_depth
    assert depth.shape == (1, 2, 2, 24, 40)
    assert depth[0, :, 1].sum() == 1
    # The principal point is (79.5, 44.5).
    assert depth[0, 0, 0, 11, 19] == pytest.approx((10 - DEPTH_MEAN_M) / DEPTH_VARIANCE_M2**0.5, rel=1e-5)


def test_points_behind_a_camera_are_not_in_its_image():
    depth = encoder()([sample([[0.0, -10.0, 0.0], [3.0, -15.0, 0.2]])]).sparse_depth
    assert not depth[0, 0, 1].any()
    assert depth[0, 1, 1].sum() == 2


def test_a_mounting_brings_another_rig_into_the_network_frame():
    """A LiDAR that looks along x sees what nuScenes' would see, once its mounting says so."""
    nuscenes = sample()
    cloud_ego = nuscenes.lidars["top"]
    other_mount = Pose.from_yaw(0.0, (0.2, 0.0, 1.1))
    moved = PointCloud(
        other_mount.inverse().apply(cloud_ego.xyz_ego()), dict(cloud_ego.fields), other_mount, cloud_ego.stamp_ns
    )
    other = replace(nuscenes, lidars={"top": moved})
    config = {"mounting": Mounting()}
    assert ego_from_network(other, tiny_sparsefusion(**config)).translation.tolist() == [0.94, 0.0, 1.84]
    want, got = encoder()([nuscenes]), encoder(**config)([other])
    assert_allclose(encoder(**config).points(other), encoder().points(nuscenes), atol=2e-5)
    for name in ("rotation", "translation", "intrinsic"):
        assert_allclose(getattr(got.calibration, name), getattr(want.calibration, name), atol=1e-6)


def test_ablations_encode_their_own_sensors_alone():
    lidar, camera_alone = encoder(modality="lidar")([sample()]), encoder(modality="camera")([Sample(0)])
    assert lidar.images is lidar.sparse_depth is lidar.calibration is None
    assert lidar.voxels is not None
    assert camera_alone.voxels is camera_alone.height_min is camera_alone.sparse_depth is None
    assert not camera_alone.calibration.present.any()


@pytest.mark.parametrize("xyz", [[], [[100.0, 0.0, 0.0], [0.0, 0.0, 50.0]]])
def test_no_point_in_range_makes_no_voxels(xyz: list):
    inputs = encoder()([sample(xyz)])
    assert inputs.voxels.shape == (0, 5) and inputs.coordinates.shape == (0, 4)
    assert (inputs.height_min == 100).all() and (inputs.height_max == -200).all()


def test_missing_and_black_cameras_are_absent():
    dark = np.full((90, 160, 3), BLACK_LEVEL, np.uint8)
    view = sample(back=replace(camera(), rgb=dark))
    assert absent_cameras(view, ("front", "back")) == {"front": "missing", "back": "black"}
    inputs = encoder()([view])
    assert inputs.calibration.present.tolist() == [[False, False]]
    assert not inputs.sparse_depth.any() and not inputs.images.any()
    for values in inputs.calibration[:5]:
        assert torch.isfinite(values).all()
    dark[44, 80] = 200  # a street lamp
    dark[40, 80] = 200
    assert absent_cameras(sample(front=replace(camera(), rgb=dark)), ("front",)) == {}


def test_a_cloud_without_intensity_is_refused():
    bare = replace(sample().lidars["top"], fields={"ring": np.zeros(200)})
    with pytest.raises(
        DataError, match=r"LiDAR 'top' has fields \(x, y, z, ring\); the network needs intensity\n.*map"
    ):
        encoder()([Sample(0, lidars={"top": bare})])


def test_a_sample_without_the_lidar_is_refused():
    with pytest.raises(DataError, match=r"sample 7 has no LiDAR 'top'; it has: left\n  name one"):
        encoder()([Sample(7, lidars={"left": cloud()})])


def test_real_calibration(shared_data: Path):
    """The infos' own lidar2cam and cam2img, which mmdetection3d computed from the tables."""
    import json

    root = shared_data / "nuscenes_keyframe"
    view = Mmdet3dInfos(Mmdet3dInfosConfig(root=root))[0]
    config = SparseFusionConfig()
    calibration = Encoder(config).eval()([view]).calibration
    images = json.loads((root / "infos.json").read_text())["data_list"][0]["images"]
    for k, role in enumerate(config.cameras):
        image = images[f"CAM_{role.upper()}"]
        matrix = np.array(image["lidar2cam"])
        assert_allclose(calibration.rotation[0, k], matrix[:3, :3], atol=1e-6)
        assert_allclose(calibration.translation[0, k], matrix[:3, 3], atol=1e-5)
        scaled = np.array(image["cam2img"])[:3, :3] * [[0.4975], [448 / 900], [1]]
        assert_allclose(calibration.intrinsic[0, k], scaled, rtol=1e-6)
        assert calibration.valid_px[0, k].tolist() == [796, 448]
