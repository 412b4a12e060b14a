"""SemanticKITTI: written and read back, real sequences, failures that say which file and what to do."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.spatial import cKDTree
from torch.utils.data import DataLoader

from perception.datasets import detect_layout
from perception.datasets import semantickitti_voxels as voxels
from perception.datasets.semantickitti import EGO_FROM_LIDAR, SemanticKITTI, SemanticKITTIConfig, SemanticKITTIWriter
from perception.datasets.semantickitti_labels import POINT_CLASSES
from perception.errors import DataError
from perception.geometry import grid_points, project_to_image
from perception.types import (
    CameraImage,
    Dataset,
    OccupancyGrid3D,
    PointCloud,
    Pose,
    Sample,
    Segmentation,
    Truth,
)

STEP_NS = 103_735_901
INTRINSIC = np.array([[70.0, 0.0, 62.0], [0.0, 71.0, 18.5], [0.0, 0.0, 1.0]])
EGO_FROM_CAMERA = Pose(
    Pose.from_yaw(0.02).rotation @ np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
    np.array([0.27, 0.06, 1.65]),
)


def _map_from_ego(stamp_ns: int) -> Pose:
    """A drive in a curve at 10 m/s that starts somewhere in the map."""
    t = stamp_ns / 1e9
    return Pose.from_yaw(0.5 + 0.1 * t, (100 * np.sin(0.1 * t), 1000 - 100 * np.cos(0.1 * t), 0.3 * t))


def _sample(k: int, cameras: bool = True) -> Sample:
    rng = np.random.default_rng(k)
    stamp = 1_000_000_007 + k * STEP_NS
    xyz = rng.normal(0, 15, (400 + k, 3)).astype(np.float32)
    cloud = PointCloud(xyz, {"intensity": rng.random(len(xyz)).astype(np.float32)}, EGO_FROM_LIDAR, stamp)
    image = CameraImage(rng.integers(0, 256, (37, 124, 3), np.uint8), INTRINSIC, EGO_FROM_CAMERA, stamp)
    return Sample(
        stamp, {"top": cloud}, cameras={"front": image} if cameras else {}, odom_from_ego=_map_from_ego(stamp)
    )


def _truth(k: int, occupancy: bool) -> Truth:
    rng = np.random.default_rng(100 + k)
    sample = _sample(k)
    count = len(sample.lidars["top"])
    labels = Segmentation(
        rng.integers(0, 20, count).astype(np.uint8), POINT_CLASSES, rng.integers(0, 99, count).astype(np.uint16)
    )
    grid = voxels.grid(EGO_FROM_LIDAR)
    label = rng.choice([*[0] * 30, *range(1, 20), 255], grid.shape).astype(np.uint8)
    index, inside = grid.index(sample.lidars["top"].xyz)
    observed = rng.random(grid.shape) < 0.4
    observed[tuple(index[inside].T)] = True  # what the scan fell into it sees
    volume = OccupancyGrid3D(grid, label, voxels.CLASSES, 0, sample.stamp_ns, observed={"lidar": observed})
    return Truth(
        occupancy=volume if occupancy else None,
        map_from_ego=_map_from_ego(sample.stamp_ns),
        point_label={"top": labels},
    )


def _write(root: Path, name: str = "00", count: int = 3) -> None:
    """A sequence whose frame 0 has a volume."""
    with SemanticKITTIWriter(root) as writer:
        writer.start_sequence(name, _map_from_ego)
        for k in range(count):
            writer.add_sample(_sample(k), _truth(k, occupancy=k == 0))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("semantickitti")
    _write(root)
    return root


@pytest.fixture
def root(written, tmp_path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(written, tmp_path / "data")
    return tmp_path / "data"


def _open(root: Path, *sequences: str, **config) -> SemanticKITTI:
    return SemanticKITTI(SemanticKITTIConfig(root=root, split=sequences or ("00",), **config))


def test_written_and_read_back(written):
    data = _open(written)
    assert isinstance(data, Dataset)
    assert list(data.tokens) == ["00/000000", "00/000001", "00/000002"]
    for k in range(3):
        want, got = _sample(k), data[k]
        assert got.stamp_ns == want.stamp_ns == got.lidars["top"].stamp_ns == got.cameras["front"].stamp_ns
        assert got.token == data.tokens[k]
        np.testing.assert_array_equal(got.lidars["top"].xyz, want.lidars["top"].xyz)
        np.testing.assert_array_equal(got.lidars["top"].field("intensity"), want.lidars["top"].field("intensity"))
        np.testing.assert_array_equal(got.cameras["front"].rgb, want.cameras["front"].rgb)
        np.testing.assert_allclose(got.cameras["front"].intrinsic, INTRINSIC, atol=1e-9)
        np.testing.assert_allclose(got.cameras["front"].ego_from_camera.matrix, EGO_FROM_CAMERA.matrix, atol=1e-9)
        np.testing.assert_allclose(got.odom_from_ego.matrix, want.odom_from_ego.matrix, atol=1e-8)
        _check_truth(data.truth(k), _truth(k, occupancy=k == 0))


def _check_truth(got: Truth, want: Truth) -> None:
    np.testing.assert_allclose(got.map_from_ego.matrix, want.map_from_ego.matrix, atol=1e-8)
    np.testing.assert_array_equal(got.point_label["top"].label, want.point_label["top"].label)
    np.testing.assert_array_equal(got.point_label["top"].instance, want.point_label["top"].instance)
    assert (got.occupancy is None) == (want.occupancy is None)
    if got.occupancy is not None:
        np.testing.assert_array_equal(got.occupancy.label, want.occupancy.label)
        np.testing.assert_array_equal(got.occupancy.observed["lidar"], want.occupancy.observed["lidar"])
        assert got.occupancy.stamp_ns == want.occupancy.stamp_ns


def test_the_input_volume_is_the_voxels_that_the_scan_fell_into(written):
    data = _open(written, frames="voxels")
    assert list(data.tokens) == ["00/000000"]
    xyz = data[0].lidars["top"].xyz
    distance = np.linalg.norm(xyz, axis=1)
    index = np.floor((xyz - np.float32([0, -25.6, -2.0])) / np.float32(0.2)).astype(int)
    index = index[((index >= 0) & (index < voxels.SHAPE)).all(1) & (distance > 2.5) & (distance < 70)]
    assert {tuple(v) for v in np.argwhere(data.input_voxels(0))} == {tuple(v) for v in index}
    assert len(index) > 20


def test_sweeps_are_accumulated_through_the_poses(written):
    data, single = _open(written, sweeps=2), _open(written)
    cloud, key, before = data[2].lidars["top"], single[2].lidars["top"], single[1].lidars["top"]
    assert len(cloud) == len(key) + len(before)
    np.testing.assert_array_equal(cloud.xyz[: len(key)], key.xyz)
    map_from_lidar = [_map_from_ego(c.stamp_ns) @ EGO_FROM_LIDAR for c in (key, before)]
    moved = (map_from_lidar[0].inverse() @ map_from_lidar[1]).apply(before.xyz)
    np.testing.assert_allclose(cloud.xyz[len(key) :], moved, atol=1e-4)
    np.testing.assert_allclose(cloud.field("time_lag")[len(key) :], STEP_NS / 1e9, rtol=1e-6)
    assert len(data.truth(2).point_label["top"].label) == len(key)
    first = data[0].lidars["top"]  # nothing before it
    assert len(first) == len(single[0].lidars["top"])
    assert not first.field("sweep").any()


def test_a_test_sequence_has_neither_truth_nor_poses(root):
    folder = root / "sequences/00"
    shutil.rmtree(folder / "labels")
    for path in (folder / "poses.txt", folder / "voxels/000000.label", folder / "voxels/000000.invalid"):
        path.unlink()
    data = _open(root, frames="voxels")
    assert data.truth(0) is None
    assert data[0].odom_from_ego is None
    assert data.input_voxels(0).any()
    with pytest.raises(DataError, match=r"poses\.txt: missing; accumulating 3 sweeps needs poses\n.*sweeps: 1"):
        _open(root, sweeps=3)[0]


def test_only_what_is_asked_for_is_read(root):
    shutil.rmtree(root / "sequences/00/image_2")
    assert not _open(root)[0].cameras
    with pytest.raises(DataError, match=r"image_2/000000\.png: No such file"):
        _open(root, cameras=("front",))[0]
    (root / "sequences/00/velodyne/000000.bin").write_bytes(b"")
    assert not _open(root, lidars=(), cameras=())[0].lidars


def test_several_sequences_in_order(tmp_path):
    for name in ("03", "00"):
        _write(tmp_path, name, 1)
    assert list(_open(tmp_path, "00", "03").tokens) == ["00/000000", "03/000000"]


def _tokens(samples: list[Sample]) -> list[tuple[str, int]]:
    return [(sample.token, len(sample.lidars["top"])) for sample in samples]


def test_dataloader_workers(written):
    data = _open(written, sweeps=2)
    assert list(pickle.loads(pickle.dumps(data)).tokens) == list(data.tokens)
    batches = list(DataLoader(data, batch_size=2, num_workers=2, collate_fn=_tokens))
    assert batches == [_tokens([data[0], data[1]]), _tokens([data[2]])]


def test_a_workers_error_names_the_file(root):
    (root / "sequences/00/velodyne/000001.bin").write_bytes(b"\0" * 17)
    with pytest.raises(DataError, match=r"velodyne/000001\.bin: 17 bytes, which is no whole number of 16-byte records"):
        list(DataLoader(_open(root), num_workers=2, collate_fn=_tokens))


def _truncate_lines(path: Path, lines: int) -> None:
    path.write_text("\n".join(path.read_text().splitlines()[:lines]) + "\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: shutil.rmtree(f),
            r"00/velodyne: no scans; .*sequences holds no sequence\n.*name the sequences you have",
        ),
        (lambda f: (f / "calib.txt").unlink(), r"calib\.txt: No such file"),
        (lambda f: (f / "times.txt").unlink(), r"times\.txt: No such file"),
        (
            lambda f: (f / "velodyne/000000.bin").unlink(),
            r"voxels: volume 000000 has no scan \(1 such of 1\)\n.*velodyne is incomplete",
        ),
        (lambda f: _truncate_lines(f / "times.txt", 2), r"times\.txt: 2 lines; scan 000002 needs 3"),
        (lambda f: _truncate_lines(f / "poses.txt", 1), r"poses\.txt: 1 lines; scan 000002 needs 3"),
    ],
)
def test_damaged_sequences_do_not_open(root, damage, message):
    damage(root / "sequences/00")
    with pytest.raises(DataError, match=message):
        _open(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "labels/000000.label").unlink(), r"labels/000000\.label: No such file"),
        (
            lambda f: shutil.copy(f / "labels/000001.label", f / "labels/000000.label"),
            r"labels/000000\.label: 401 labels for a scan of 400 points",
        ),
        (lambda f: np.full(400, 7, "<u4").tofile(f / "labels/000000.label"), r"label ids \[7\] are none of"),
        (lambda f: (f / "voxels/000000.invalid").unlink(), r"000000\.invalid: No such file"),
        (
            lambda f: (f / "voxels/000000.occluded").write_bytes(b"\0" * 5),
            r"000000\.occluded: 5 bytes; expected 262,144",
        ),
    ],
)
def test_damaged_truth(root, damage, message):
    damage(root / "sequences/00")
    with pytest.raises(DataError, match=message):
        _open(root).truth(0)


def test_a_volume_without_label_where_others_have_one(root):
    folder = root / "sequences/00/voxels"
    shutil.copy(folder / "000000.bin", folder / "000001.bin")
    with pytest.raises(DataError, match=r"voxels/000001\.label: No such file"):
        _open(root).truth(1)


def test_a_label_without_its_input_volume_is_not_passed_over(root):
    (root / "sequences/00/voxels/000000.bin").unlink()
    data = _open(root, frames="voxels")
    assert data.tokens == ("00/000000",)
    with pytest.raises(DataError, match=r"voxels/000000\.bin: No such file"):
        data.input_voxels(0)


def test_missing_sequences_list_those_there_are(written):
    with pytest.raises(DataError, match=r"sequences/07/velodyne: no scans; .* holds 00\n"):
        _open(written, "07")
    with pytest.raises(DataError, match=r"sequences/08/velodyne: no scans"):
        SemanticKITTI(SemanticKITTIConfig(root=written))


def test_the_layout_is_known_by_the_sequences_that_have_scans(root):
    (root / "sequences/01").mkdir()
    (root / "sequences/.DS_Store").write_bytes(b"")
    assert detect_layout(root) == {"name": "semantickitti", "root": root, "split": ["00"]}


def test_no_volumes_at_all(root):
    shutil.rmtree(root / "sequences/00/voxels")
    with pytest.raises(DataError, match=r"no voxel files in sequences 00\n.*frames: all"):
        _open(root, frames="voxels")


@pytest.mark.parametrize("wrong", [{"sweeps": 0}, {"lidars": ("front",)}, {"split": "mini"}, {"voxel_version": "v2"}])
def test_wrong_configurations(tmp_path, wrong):
    with pytest.raises(ValidationError):
        SemanticKITTIConfig(root=tmp_path, **wrong)


# What the layout cannot hold


def _with_top(sample: Sample, cloud: PointCloud) -> Sample:
    return Sample(sample.stamp_ns, {"top": cloud}, cameras=sample.cameras)


def _tall(sample: Sample) -> Sample:
    top = sample.lidars["top"]
    return _with_top(sample, PointCloud(top.xyz, top.fields, Pose(np.eye(3), np.array([0.0, 0, 1.9])), top.stamp_ns))


def _bright(sample: Sample) -> Sample:
    top = sample.lidars["top"]
    return _with_top(sample, PointCloud(top.xyz, {"intensity": top.xyz[:, 0] * 0 + 200}, EGO_FROM_LIDAR, top.stamp_ns))


def _late(sample: Sample) -> Sample:
    top = sample.lidars["top"]
    return _with_top(sample, PointCloud(top.xyz, top.fields, EGO_FROM_LIDAR, top.stamp_ns + 1))


def _turned_camera(sample: Sample) -> Sample:
    front = sample.cameras["front"]
    turned = CameraImage(front.rgb, INTRINSIC, Pose.from_yaw(0.1) @ EGO_FROM_CAMERA, front.stamp_ns)
    return Sample(sample.stamp_ns, sample.lidars, cameras={"front": turned})


def _second_camera(sample: Sample) -> Sample:
    return Sample(sample.stamp_ns, sample.lidars, cameras={**sample.cameras, "back": sample.cameras["front"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_tall, "knows a LiDAR 1.73 m above ego"),
        (_bright, r"with intensity in \[0, 1\]"),
        (_late, "holds one stamp a frame"),
        (_turned_camera, "holds one calibration a sequence"),
        (_second_camera, r"holds LiDAR `top` and camera `front`; sample '' has \['top', 'front', 'back'\]"),
        (lambda s: _sample(0), "stamp 1000000007 is not after 1000000007"),
    ],
)
def test_what_would_not_come_back_is_not_written(tmp_path, change, message):
    with SemanticKITTIWriter(tmp_path) as writer:
        writer.start_sequence("00", _map_from_ego)
        writer.add_sample(_sample(0))
        with pytest.raises(ValueError, match=message):
            writer.add_sample(change(_sample(1)))
        writer.add_sample(_sample(1))
    assert len(_open(tmp_path)) == 2


def test_labels_for_every_scan_or_none(tmp_path):
    with SemanticKITTIWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="call start_sequence"):
            writer.add_sample(_sample(0))
        writer.start_sequence("00", _map_from_ego)
        writer.add_sample(_sample(0), _truth(0, occupancy=False))
        with pytest.raises(ValueError, match="point labels for every scan or for none"):
            writer.add_sample(_sample(1))


def test_a_sequence_without_camera(tmp_path):
    with SemanticKITTIWriter(tmp_path) as writer:
        writer.start_sequence("00", _map_from_ego)
        writer.add_sample(_sample(0, cameras=False))
    sample = _open(tmp_path)[0]
    np.testing.assert_allclose(sample.odom_from_ego.matrix, _map_from_ego(sample.stamp_ns).matrix, atol=1e-8)
    assert not sample.cameras


def test_nothing_is_overwritten_and_an_interrupted_sequence_is_not_whole(tmp_path):
    class Interruption(Exception):
        pass

    def write_and_stop() -> None:
        with SemanticKITTIWriter(tmp_path) as writer:
            writer.start_sequence("00", _map_from_ego)
            writer.add_sample(_sample(0))
            raise Interruption

    with pytest.raises(Interruption):
        write_and_stop()
    with pytest.raises(DataError, match=r"times\.txt: No such file"):
        _open(tmp_path)
    with SemanticKITTIWriter(tmp_path) as writer, pytest.raises(DataError, match="sequences/00: is there already"):
        writer.start_sequence("00", _map_from_ego)


# Real sequences


@pytest.fixture(scope="module")
def real(shared_data) -> SemanticKITTI:
    return _open(shared_data / "semantickitti", "00", "03", voxel_version="v1.0")


def test_real_frames(real):
    assert list(real.tokens) == ["00/000000", "00/000001", "00/000005", "03/000000"]
    assert [len(real[i].lidars["top"]) for i in range(4)] == [124_668, 124_605, 123_924, 124_929]
    assert [sorted(real[i].cameras) for i in range(4)] == [["front"], [], ["front"], []]
    intensity = real[0].lidars["top"].field("intensity")
    assert intensity.min() >= 0
    assert 0.9 < intensity.max() <= 1
    assert real[1].stamp_ns == 103_735_900


def _of_classes(data: SemanticKITTI, i: int, *names: str) -> np.ndarray:
    """(N,) bool."""
    return np.isin(data.truth(i).point_label["top"].label, [POINT_CLASSES.index(name) for name in names])


def test_real_labels_are_those_of_a_street(real):
    for i in range(4):
        share = np.bincount(real.truth(i).point_label["top"].label, minlength=20) / len(real[i].lidars["top"])
        scene = dict(zip(POINT_CLASSES, share, strict=True))
        assert scene["unlabeled"] < 0.05
        assert scene["road"] > 0.1
        assert scene["car"] > 0.03
        assert scene["building"] + scene["vegetation"] > 0.3
        z = real[i].lidars["top"].xyz_ego()[:, 2]
        # The ground near the car is at z = 0 of ego.
        near = np.linalg.norm(real[i].lidars["top"].xyz[:, :2], axis=1) < 15
        assert abs(np.median(z[near & _of_classes(real, i, "road")])) < 0.15
        assert np.median(z[_of_classes(real, i, "building", "vegetation")]) > 0.5


@pytest.mark.parametrize("later", [1, 2])
def test_real_poses_put_standing_things_on_one_another(real, later):
    standing = ("fence", "trunk", "pole", "traffic-sign", "car")
    xyz = [real[i].lidars["top"].xyz_ego()[_of_classes(real, i, *standing)] for i in (0, later)]
    first, second = (real.truth(i).map_from_ego for i in (0, later))
    np.testing.assert_allclose(first.matrix, np.eye(4), atol=1e-6)
    assert second.translation[0] > 0.6  # drives ahead: x of ego, not z of the camera
    assert np.abs(second.translation[1:]).max() < 0.1
    aligned = cKDTree(first.apply(xyz[0])).query(second.apply(xyz[1]))[0]
    as_they_are = cKDTree(xyz[0]).query(xyz[1])[0]
    assert np.median(aligned) < 0.1
    assert np.percentile(aligned, 75) < 0.5 * np.percentile(as_they_are, 75)


def test_real_points_fall_onto_what_their_labels_say(real):
    for i in (0, 2):
        sample = real[i]
        cloud, image = sample.lidars["top"], sample.cameras["front"]
        pixel, depth, visible = project_to_image(cloud.xyz_ego(), image)
        assert not (visible & (cloud.xyz[:, 0] < 0)).any()
        ahead = (cloud.xyz[:, 0] > 10) & (np.abs(cloud.xyz[:, 1]) < 0.6 * cloud.xyz[:, 0])
        assert visible[ahead].mean() > 0.9
        assert depth[visible].min() > 1
        rows = {
            name: np.median(pixel[visible & _of_classes(real, i, name), 1])
            for name in ("road", "building", "vegetation")
        }
        assert rows["road"] > image.rgb.shape[0] / 2 > rows["building"]
        columns, lines = pixel[visible].round().astype(int).T
        green = image.rgb[lines, columns].astype(float) @ [-0.5, 1.0, -0.5]
        plants = _of_classes(real, i, "vegetation", "terrain")[visible]
        assert green[plants].mean() > green[~plants].mean() + 2


def test_real_input_volumes_lie_in_the_voxelized_scan(real):
    for i in (0, 2, 3):
        cloud, volume = real[i].lidars["top"], real.input_voxels(i)
        grid = voxels.grid(EGO_FROM_LIDAR, "v1.0")
        index, inside = grid.index(cloud.xyz)
        scanned = np.zeros(grid.shape, bool)
        scanned[tuple(index[inside].T)] = True
        assert 11_000 < volume.sum() < 13_000
        assert not (volume & ~scanned).any()
        index, inside = voxels.grid(EGO_FROM_LIDAR, "v1.1").index(cloud.xyz)
        other = np.zeros(grid.shape, bool)
        other[tuple(index[inside].T)] = True
        assert (volume & ~other).sum() > 1000  # the other release's origin does not fit
        assert real.truth(i).occupancy is None  # no `.label` in this copy
        folder = real.config.root / "sequences" / real.tokens[i][:2] / "voxels"
        occluded, invalid = (voxels.read_voxels(folder / f"{real.tokens[i][3:]}{k}") for k in (".occluded", ".invalid"))
        assert occluded[volume].all()
        assert occluded[invalid].all()
        assert not invalid[volume].any()
        assert grid_points(grid, np.argwhere(volume))[:, 2].min() > -0.6


def test_real_sweeps_are_denser_where_things_stand(shared_data):
    data = _open(shared_data / "semantickitti", sweeps=3)
    cloud = data[2].lidars["top"]
    np.testing.assert_array_equal(np.unique(cloud.field("sweep")), [0, 1, 2])
    key = cloud.field("sweep") == 0
    np.testing.assert_allclose(cloud.field("time_lag")[~key].min(), 0.4146943, atol=1e-6)
    near = np.linalg.norm(cloud.xyz, axis=1) < 20
    distance = cKDTree(cloud.xyz[key & near]).query(cloud.xyz[~key & near][::50])[0]
    assert np.median(distance) < 0.1
