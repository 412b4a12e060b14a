"""View-of-Delft: the three real frames agree with themselves; what is written is read back; faults are told."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from perception.datasets.view_of_delft import CLASSES, ViewOfDelft, ViewOfDelftConfig, ViewOfDelftWriter
from perception.errors import ConfigError, DataError
from perception.geometry import box_corners, points_in_boxes, project, transform_boxes
from perception.sweeps import accumulate
from perception.types import Boxes3D, CameraImage, Dataset, PointCloud, Pose, Sample, Truth

STAMP_NS = 700_000_000

# Optical axes (x right, y down, z forward) in a frame with x forward, y left, z up.
OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


def map_from_ego(stamp_ns: int) -> Pose:
    t = stamp_ns * 1e-9
    return Pose.from_yaw(0.3 + 0.1 * t, (500.0 + 8 * t, -200.0 + t, 1.5))


def make_boxes(stamp_ns: int) -> Boxes3D:
    return Boxes3D(
        center=np.array([[12.0, 2.0, -0.8], [6.0, -1.5, -0.7], [20.0, 0.0, -1.0]]),
        size=np.array([[4.2, 1.8, 1.5], [0.6, 0.7, 1.75], [1.9, 0.6, 1.7]]),
        yaw=np.array([0.4, -3.0, 1.2]),
        velocity=np.full((3, 2), np.nan),
        score=np.ones(3),
        label=np.array([0, 1, 2]),
        classes=CLASSES,
        stamp_ns=stamp_ns,
        track_id=np.array(["17", "4", "903"]),
        visibility=np.array([4, 2, 1]),
    )


def make_sample(stamp_ns: int = STAMP_NS, ego_from_lidar: Pose | None = None) -> Sample:
    rng = np.random.default_rng(stamp_ns % 1000 + 3)
    n, m = 400, 60
    ego_from_lidar = ego_from_lidar or Pose.identity()
    lidar = PointCloud(
        rng.normal(0, 20, (n, 3)).astype(np.float32),
        {"intensity": rng.uniform(0, 255, n).astype(np.float32)},
        ego_from_lidar,
        stamp_ns,
    )
    radar = PointCloud(
        rng.uniform(1, 50, (m, 3)).astype(np.float32),
        {name: rng.normal(0, 10, m).astype(np.float32) for name in ("rcs", "radial_velocity", "radial_velocity_comp")},
        ego_from_lidar @ Pose.from_yaw(0.01, (2.5, 0.06, -1.15)),
        stamp_ns,
    )
    ramp = np.linspace(0, 255, 96 * 160).reshape(96, 160)
    rgb = np.stack([ramp, ramp[::-1], np.full_like(ramp, 90)], -1).astype(np.uint8)
    intrinsic = np.array([[120.0, 0, 79.5], [0, 118.0, 50.25], [0, 0, 1]])
    camera = CameraImage(rgb, intrinsic, ego_from_lidar @ Pose(OPTICAL, np.array([0.9, 0.15, -0.4])), stamp_ns)
    odom_from_ego = Pose.from_yaw(0.2, (3.0, 1.0, 0.5))
    return Sample(stamp_ns, {"top": lidar}, {"front": radar}, {"front": camera}, odom_from_ego, token="00007")


def write(root: Path, *samples: tuple[Sample, Truth | None], split: str = "train") -> Path:
    with ViewOfDelftWriter(root) as writer:
        writer.start_sequence(map_from_ego, split)
        for sample, truth in samples:
            writer.add_sample(sample, truth)
    return root


def assert_pose(a: Pose, b: Pose, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(a.matrix, b.matrix, atol=atol)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write(tmp_path, (make_sample(), Truth(make_boxes(STAMP_NS))))


@pytest.fixture(scope="module")
def real(shared_data: Path) -> ViewOfDelft:
    """The three real frames without LiDAR, of which two have none."""
    return ViewOfDelft(ViewOfDelftConfig(root=shared_data / "view_of_delft", lidars=()))


# --- the real frames -------------------------------------------------------------------------------------------------


def test_real_frames_are_found_and_fit_the_published_ranges(real: ViewOfDelft) -> None:
    assert isinstance(real, Dataset)
    assert real.tokens == ("00549", "01047", "01201")
    radars = [real[i].radars["front"] for i in range(3)]
    assert [len(r) for r in radars] == [322, 352, 242]
    rcs = np.concatenate([r.field("rcs") for r in radars])
    speed = np.concatenate([r.field("radial_velocity") for r in radars])
    assert (round(float(rcs.min())), round(float(rcs.max()))) == (-57, 51)
    assert (round(float(speed.min())), round(float(speed.max()))) == (-26, 19)
    for i, radar in enumerate(radars):
        assert real[i].cameras["front"].rgb.shape == (1216, 1936, 3)
        assert radar.xyz[:, 0].min() > -1, "a front radar sees forward"
        assert abs(np.median(radar.field("radial_velocity_comp"))) < 0.02, "most returns are of the standing world"
        assert (radar.field("sweep") == 0).all()
        # Standing returns differ from the relative speed by the car's own motion along the ray alone.
        standing = np.abs(radar.field("radial_velocity_comp")) < 0.05
        ray = radar.xyz[standing] / np.linalg.norm(radar.xyz[standing], axis=1, keepdims=True)
        relative = radar.field("radial_velocity")[standing]
        sensor_velocity = np.linalg.lstsq(ray, -relative, rcond=None)[0]
        assert np.median(np.abs(ray @ sensor_velocity + relative)) < 0.1
        assert sensor_velocity[0] > 1, "the car drives forward: what it closes in on has a negative radial velocity"


def test_real_lidar_points_fill_the_boxes(shared_data: Path) -> None:
    data = ViewOfDelft(ViewOfDelftConfig(root=shared_data / "view_of_delft"))
    lidar, boxes = data[0].lidars["top"], data.truth(0).boxes
    assert len(lidar) == 167_772
    assert 0 <= lidar.field("intensity").min() <= lidar.field("intensity").max() <= 255
    inside = points_in_boxes(lidar.xyz_ego(), boxes).sum(1)
    assert (inside >= 10).all()
    turned = Boxes3D(
        boxes.center, boxes.size, -boxes.yaw, boxes.velocity, boxes.score, boxes.label, CLASSES, boxes.stamp_ns
    )
    assert inside.sum() > 1.1 * points_in_boxes(lidar.xyz_ego(), turned).sum(), "yaw is counter-clockwise"


def test_real_boxes_project_onto_their_2d_boxes(real: ViewOfDelft, shared_data: Path) -> None:
    for i, token in enumerate(real.tokens):
        image, boxes = real[i].cameras["front"], real.truth(i).boxes
        path = shared_data / "view_of_delft" / "lidar" / "training" / "label_2" / f"{token}.txt"
        labelled = np.array([line.split()[4:8] for line in path.read_text().splitlines()], np.float64)
        pixel, depth = project(image.ego_from_camera.inverse().apply(box_corners(boxes)), image.intrinsic)
        assert (depth > 0).all()
        limit = np.array([1935, 1215] * 2)
        drawn = np.clip(np.concatenate([pixel.min(1), pixel.max(1)], 1), 0, limit)
        low, high = np.maximum(drawn[:, :2], labelled[:, :2]), np.minimum(drawn[:, 2:], labelled[:, 2:])
        shared = np.clip(high - low, 0, None).prod(1)
        union = sum((r[:, 2:] - r[:, :2]).prod(1) for r in (drawn, labelled)) - shared
        assert (shared / union).min() > 0.7
        assert (shared / union).mean() > 0.85


def test_real_boxes_agree_with_the_annotators_own_file(real: ViewOfDelft, shared_data: Path) -> None:
    """The JSON beside the labels has the same boxes in the radar's frame turned half round x (y right, z down)."""
    for i, token in enumerate(real.tokens):
        radar, boxes = real[i].radars["front"], real.truth(i).boxes
        entries = json.loads(
            (shared_data / "view_of_delft" / "radar" / "training" / "label_2" / f"{token}.json").read_text()
        )
        center = np.array([[e["geometry"]["center"][axis] for axis in "xyz"] for e in entries]) * (1, -1, -1)
        size = np.array([[e["geometry"]["size"][k] for k in ("length", "width", "height")] for e in entries])
        yaw = []
        for e in entries:
            x, y, z, w = (e["geometry"]["quaternion"][k] for k in "xyzw")
            yaw.append(-np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))
        in_radar = transform_boxes(radar.ego_from_sensor.inverse(), boxes)
        if len(entries) != len(boxes):
            pytest.fail(f"{token}: {len(entries)} entries, {len(boxes)} boxes")
        distance = np.linalg.norm(in_radar.center[:, None] - center[None], axis=-1)
        match = (distance + np.abs(boxes.size[:, None] - size[None]).sum(-1)).argmin(1)
        assert sorted(match) == list(range(len(boxes)))
        assert distance[np.arange(len(boxes)), match].max() < 0.05
        np.testing.assert_allclose(boxes.size, size[match], atol=1e-9)
        turn = in_radar.yaw - np.array(yaw)[match]
        assert np.abs(np.arctan2(np.sin(turn), np.cos(turn))).max() < 0.02


def test_real_poses_stand_upright(real: ViewOfDelft) -> None:
    for i in range(3):
        sample, truth = real[i], real.truth(i)
        for pose in (sample.odom_from_ego, truth.map_from_ego):
            assert pose.rotation[2, 2] > 0.99999, "the LiDAR's z axis is vertical"
            assert pose.translation[2] == pytest.approx(1.65, abs=0.001)
        assert np.linalg.norm(sample.odom_from_ego.translation) < 200
        assert np.linalg.norm(truth.map_from_ego.translation) > 1000
        assert_pose(truth.map_from_ego, real.map_from_ego(i))


def test_real_frame_without_lidar_says_so(shared_data: Path) -> None:
    data = ViewOfDelft(ViewOfDelftConfig(root=shared_data / "view_of_delft"))
    with pytest.raises(DataError, match=r"velodyne/01047\.bin: no such file"):
        data[1]


# --- written and read back -------------------------------------------------------------------------------------------


def test_round_trip(written: Path) -> None:
    sample, boxes = make_sample(), make_boxes(STAMP_NS)
    data = ViewOfDelft(ViewOfDelftConfig(root=written, split="train", track_ids=True))
    got, truth = data[0], data.truth(0)
    assert (len(data), data.tokens, got.token, got.stamp_ns) == (1, ("00007",), "00007", STAMP_NS)
    for kind in ("lidars", "radars"):
        for role, cloud in getattr(sample, kind).items():
            other = getattr(got, kind)[role]
            np.testing.assert_array_equal(other.xyz, cloud.xyz)
            for name, values in cloud.fields.items():
                np.testing.assert_array_equal(other.field(name), values)
            assert_pose(other.ego_from_sensor, cloud.ego_from_sensor)
            assert other.stamp_ns == cloud.stamp_ns
    image, other = sample.cameras["front"], got.cameras["front"]
    assert np.abs(image.rgb.astype(int) - other.rgb).mean() < 3, "JPEG, not another image"
    np.testing.assert_array_equal(other.intrinsic, image.intrinsic)
    assert_pose(other.ego_from_camera, image.ego_from_camera)
    assert_pose(got.odom_from_ego, sample.odom_from_ego)
    assert_pose(truth.map_from_ego, map_from_ego(STAMP_NS))
    for name in ("center", "size", "yaw"):
        np.testing.assert_allclose(getattr(truth.boxes, name), getattr(boxes, name), atol=1e-9)
    for name in ("label", "track_id", "visibility"):
        np.testing.assert_array_equal(getattr(truth.boxes, name), getattr(boxes, name))
    assert np.isnan(truth.boxes.velocity).all()


def test_ego_of_what_is_read_is_the_lidar(tmp_path: Path) -> None:
    """A rig whose LiDAR is not at ego: all of it comes back seen from the LiDAR."""
    ego_from_lidar = Pose.from_yaw(0.7, (1.2, 0.1, 1.8))
    sample = make_sample(ego_from_lidar=ego_from_lidar)
    in_ego = transform_boxes(ego_from_lidar, make_boxes(STAMP_NS))
    data = ViewOfDelft(ViewOfDelftConfig(root=write(tmp_path, (sample, Truth(in_ego)))))
    got, truth = data[0], data.truth(0)
    assert_pose(got.lidars["top"].ego_from_sensor, Pose.identity())
    for role in ("radars", "cameras"):
        name = "ego_from_sensor" if role == "radars" else "ego_from_camera"
        ours, theirs = getattr(sample, role)["front"], getattr(got, role)["front"]
        assert_pose(ego_from_lidar @ getattr(theirs, name), getattr(ours, name))
    np.testing.assert_allclose(truth.boxes.center, make_boxes(STAMP_NS).center, atol=1e-9)
    np.testing.assert_allclose(truth.boxes.yaw, make_boxes(STAMP_NS).yaw, atol=1e-9)
    assert_pose(truth.map_from_ego, map_from_ego(STAMP_NS) @ ego_from_lidar)
    assert truth.boxes.track_id is None, "the second column is truncation unless track_ids is set"


def test_2d_boxes_written_surround_the_projected_corners(written: Path) -> None:
    words = (written / "lidar" / "training" / "label_2" / "00007.txt").read_text().split("\n")[0].split()
    image, boxes = make_sample().cameras["front"], make_boxes(STAMP_NS)
    pixel, _ = project(image.ego_from_camera.inverse().apply(box_corners(boxes)), image.intrinsic)
    np.testing.assert_allclose(np.array(words[4:8], float), [*pixel[0].min(0), *pixel[0].max(0)], atol=1e-6)
    rotation, (x, _, z) = float(words[14]), map(float, words[11:14])
    assert float(words[3]) == pytest.approx(rotation - np.arctan2(x, z)), "alpha, KITTI's observation angle"


def test_odometry_starts_with_the_sequence(tmp_path: Path) -> None:
    def bare(stamp_ns: int) -> Sample:
        sample = make_sample(stamp_ns)
        return Sample(stamp_ns, sample.lidars, sample.radars, sample.cameras)

    root = write(tmp_path, (bare(STAMP_NS), None), (bare(STAMP_NS + 100_000_000), None))
    data = ViewOfDelft(ViewOfDelftConfig(root=root))
    assert_pose(data[0].odom_from_ego, Pose.identity())
    assert_pose(data[1].odom_from_ego, map_from_ego(STAMP_NS).inverse() @ map_from_ego(STAMP_NS + 100_000_000))
    assert data.truth(0).boxes is None


def test_accumulated_scans_come_newest_first(written: Path) -> None:
    rows = np.zeros((5, 7), np.float32)
    rows[:, 0] = (1, 2, 3, 4, 5)
    rows[:, 6] = (-2, -1, 0, -1, 0)
    folder = written / "radar_3_scans" / "training" / "velodyne"
    folder.mkdir(parents=True)
    rows.tofile(folder / "00007.bin")
    radar = ViewOfDelft(ViewOfDelftConfig(root=written, radar_scans=3))[0].radars["front"]
    np.testing.assert_array_equal(radar.field("sweep"), (0, 0, 1, 1, 2))
    np.testing.assert_array_equal(radar.xyz[:, 0], (3, 5, 2, 4, 1))
    np.testing.assert_allclose(radar.field("time_lag"), np.array([0, 0, 1, 1, 2]) / 13, rtol=1e-6)
    assert_pose(radar.ego_from_sensor, make_sample().radars["front"].ego_from_sensor)


def test_only_what_is_asked_for_is_opened(written: Path) -> None:
    for path in (written / "lidar" / "training").glob("image_2/*"):
        path.unlink()
    (written / "lidar" / "training" / "velodyne" / "00007.bin").unlink()
    sample = ViewOfDelft(ViewOfDelftConfig(root=written, lidars=(), cameras=()))[0]
    assert (list(sample.lidars), list(sample.radars), list(sample.cameras)) == ([], ["front"], [])


def test_workers_give_the_same_samples(tmp_path: Path) -> None:
    samples = [make_sample(STAMP_NS + k * 100_000_000) for k in range(4)]
    data = ViewOfDelft(ViewOfDelftConfig(root=write(tmp_path, *((s, None) for s in samples))))
    assert pickle.loads(pickle.dumps(data)).tokens == data.tokens
    loader = DataLoader(data, batch_size=None, num_workers=2, collate_fn=lambda sample: sample)
    for sample, got in zip(samples, loader, strict=True):
        np.testing.assert_array_equal(got.radars["front"].xyz, sample.radars["front"].xyz)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_missing_root_split_and_folder(written: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no radar with a folder training in it; it holds nothing"):
        ViewOfDelft(ViewOfDelftConfig(root=tmp_path / "absent"))
    with pytest.raises(DataError, match=r"val\.txt: no such split; there are: train"):
        ViewOfDelft(ViewOfDelftConfig(root=written, split="val"))
    with pytest.raises(DataError, match=r"no radar_5frames or radar_5_scans .* it holds lidar, radar"):
        ViewOfDelft(ViewOfDelftConfig(root=written, radar_scans=5))
    with pytest.raises(ConfigError, match=r"dataset\.cameras: no sensor back in this data set\n  choose of: front"):
        ViewOfDelft(ViewOfDelftConfig(root=written, cameras=("back",)))


def test_truncated_split_list(written: Path) -> None:
    (written / "lidar" / "ImageSets" / "train.txt").write_text("00007\nsome words\n")
    with pytest.raises(DataError, match="expected frame numbers, got 'some'"):
        ViewOfDelft(ViewOfDelftConfig(root=written, split="train"))


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("radar/training/velodyne/00007.bin", b"\0" * 30, r"30 bytes are no whole number of rows of 7 float32"),
        ("lidar/training/velodyne/00007.bin", b"\0" * 18, r"18 bytes are no whole number of rows of 4 float32"),
        (
            "lidar/training/velodyne/00007.bin",
            np.full(4, np.nan, np.float32).tobytes(),
            "1 of 1 rows hold values that are not finite",
        ),
        (
            "radar/training/velodyne/00007.bin",
            np.full(7, 3.0, np.float32).tobytes(),
            "column time is 3 to 3, expected -4 to 0",
        ),
        ("lidar/training/image_2/00007.jpg", b"\xff\xd8half", r"6 bytes that are no whole \.jpg image"),
        ("lidar/training/calib/00007.txt", b"P2: 1 2 3\n", r"has no line Tr_velo_to_cam; it has P2"),
        ("lidar/training/calib/00007.txt", b"P2: 1 2 3\nTr_velo_to_cam: 1\n", r"P2: expected 12 numbers, got '1 2 3'"),
        (
            "radar/training/calib/00007.txt",
            b"P2: 1 0 0 0 0 1 0 0 0 0 1 0\nTr_velo_to_cam: 2 0 0 0 0 1 0 0 0 0 1 0\n",
            "Tr_velo_to_cam: Pose.rotation: not a rotation",
        ),
        ("lidar/training/pose/00007.json", b'{"odomToCamera": [1, 0]}', "expected lines of JSON with 16 numbers"),
        ("lidar/training/pose/00007.json", b"", "has no odomToCamera, mapToCamera, UTMToCamera"),
    ],
)
def test_damaged_sensor_files(written: Path, path: str, content: bytes, message: str) -> None:
    (written / path).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        ViewOfDelft(ViewOfDelftConfig(root=written))[0]
    assert str(written / path) in caught.value.what


def test_half_a_jpeg_is_not_padded(written: Path) -> None:
    path = written / "lidar" / "training" / "image_2" / "00007.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"no whole \.jpg image"):
        ViewOfDelft(ViewOfDelftConfig(root=written))[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Car 0 0 0", r"00007\.txt:1: expected 15 or 16 columns, got 4"),
        ("Tram 0 0 0 0 0 1 1 1 1 1 1 1 9 0", "class 'Tram' is none of Car, Pedestrian"),
        ("Car 0 7 0 0 0 1 1 1 1 1 1 1 9 0", "occluded is '7', expected 0, 1, 2 or 3"),
        ("Car 0 0 0 0 0 1 1 1 1 1 x 1 9 0", "expected 7 numbers, got '1 1 1 x 1 9 0'"),
    ],
)
def test_foreign_labels(written: Path, line: str, message: str) -> None:
    (written / "lidar" / "training" / "label_2" / "00007.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        ViewOfDelft(ViewOfDelftConfig(root=written)).truth(0)


def test_labels_of_a_test_frame_are_unknown_and_of_a_train_frame_required(written: Path) -> None:
    (written / "lidar" / "training" / "label_2" / "00007.txt").unlink()
    assert ViewOfDelft(ViewOfDelftConfig(root=written)).truth(0).boxes is None
    with pytest.raises(DataError, match=r"label_2/00007\.txt: no such file"):
        ViewOfDelft(ViewOfDelftConfig(root=written, split="train")).truth(0)


def test_frame_of_dont_care_alone_has_no_boxes(written: Path) -> None:
    (written / "lidar" / "training" / "label_2" / "00007.txt").write_text("DontCare -1 -1 -10 1 2 3 4 -1 -1 -1\n")
    assert len(ViewOfDelft(ViewOfDelftConfig(root=written)).truth(0).boxes) == 0


def test_the_writer_refuses_what_the_layout_cannot_hold(tmp_path: Path) -> None:
    sample, boxes = make_sample(), make_boxes(STAMP_NS)
    with ViewOfDelftWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="start_sequence comes before add_sample"):
            writer.add_sample(sample)
        writer.start_sequence(map_from_ego)
        with pytest.raises(ValueError, match="has no radar front, camera front"):
            writer.add_sample(Sample(STAMP_NS, sample.lidars))
        with pytest.raises(ValueError, match=r"700000001 ns is no new multiple of 0\.1 s"):
            writer.add_sample(Sample(STAMP_NS + 1, sample.lidars, sample.radars, sample.cameras))
        twice = accumulate([sample.lidars["top"], sample.lidars["top"]])
        with pytest.raises(ValueError, match="LiDAR top holds 2 sweeps; give single ones to a writer"):
            writer.add_sample(Sample(STAMP_NS, {"top": twice}, sample.radars, sample.cameras))
        writer.add_sample(sample)
        with pytest.raises(ValueError, match="no new multiple"):
            writer.add_sample(sample)
        named = Boxes3D(
            boxes.center, boxes.size, boxes.yaw, boxes.velocity, boxes.score, boxes.label, ("a", "b", "c"), STAMP_NS
        )
        later = make_sample(STAMP_NS + 100_000_000)
        with pytest.raises(ValueError, match="no class a, b, c; the layout has Car"):
            writer.add_sample(later, Truth(named))
    with pytest.raises(DataError, match="already holds lidar or radar"):
        ViewOfDelftWriter(tmp_path)
