"""OmniHD-Scenes: an analytic drive written and read back, files made by hand as the kit describes them, and faults."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from torch.utils.data import DataLoader

from perception.datasets import omnihd_occupancy
from perception.datasets.omnihd import OmniHD, OmniHDConfig, OmniHDWriter
from perception.datasets.omnihd_layout import CLASSES, doubled_intrinsic, halved_intrinsic
from perception.errors import ConfigError, DataError
from perception.sweeps import accumulate
from perception.types import (
    Boxes3D,
    CameraImage,
    Dataset,
    Imu,
    OccupancyGrid3D,
    Odometry,
    PointCloud,
    Pose,
    Sample,
    Truth,
)

START_NS = 1_693_714_828_633_418_000
FRAME_NS = 100_000_000
CLIP = "1693714828633418"
SPEED_MPS, TURN_RADPS = 8.0, 0.3

# Optical axes (x right, y down, z forward) in a frame with x forward, y left, z up.
OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
CAMERA_YAW = {"front": 0, "front_left": 55, "front_right": -55, "back": 180, "back_left": 125, "back_right": -125}
RADAR_MOUNT = {
    "front": Pose.from_yaw(0.0, (3.6, 0.0, 0.6)),
    "front_left": Pose.from_yaw(1.0, (3.3, 0.9, 0.6)),
    "front_right": Pose.from_yaw(-1.0, (3.3, -0.9, 0.6)),
    "back": Pose.from_yaw(np.pi, (-1.1, 0.0, 0.6)),
    "back_left": Pose.from_yaw(2.4, (-0.9, 0.8, 0.6)),
    "back_right": Pose.from_yaw(-2.4, (-0.9, -0.8, 0.6)),
}


def map_from_ego(stamp_ns: int) -> Pose:
    """A circle at constant speed: the velocity along ego's axes is (SPEED_MPS, 0, 0)."""
    angle = TURN_RADPS * ((stamp_ns - START_NS) * 1e-9)
    radius = SPEED_MPS / TURN_RADPS
    return Pose.from_yaw(angle, (400 + radius * np.sin(angle), -90 + radius * (1 - np.cos(angle)), 12.0))


def ego_from(stamp_ns: int, sensor_stamp_ns: int, mount: Pose) -> Pose:
    return map_from_ego(stamp_ns).inverse() @ map_from_ego(sensor_stamp_ns) @ mount


def landmarks() -> np.ndarray:
    """(L, 3) things that stand in the map."""
    rng = np.random.default_rng(4)
    return np.stack([rng.uniform(370, 430, 300), rng.uniform(-120, -30, 300), rng.uniform(11, 15, 300)], -1)


def make_radar(role: str, stamp_ns: int, sensor_stamp_ns: int) -> PointCloud:
    """The landmarks before the radar, with the Doppler of a sensor that moves with v + omega x r."""
    mount = RADAR_MOUNT[role]
    xyz = (map_from_ego(sensor_stamp_ns) @ mount).inverse().apply(landmarks())
    xyz = xyz[xyz[:, 0] > 1].astype(np.float32)
    velocity = np.array([SPEED_MPS, 0.0, 0.0]) + np.cross([0.0, 0.0, TURN_RADPS], mount.translation)
    ray = xyz / np.linalg.norm(xyz, axis=1, keepdims=True)
    n = len(xyz)
    fields = {
        "radial_velocity": (-ray @ (mount.rotation.T @ velocity)).astype(np.float32),
        "power": np.linspace(10, 60, n).astype(np.float32),
        "motion_state": (np.arange(n) % 3).astype(np.float32),
        "snr": np.linspace(30, 5, n).astype(np.float32),
        "valid": (np.arange(n) % 2).astype(np.float32),
    }
    return PointCloud(xyz, fields, ego_from(stamp_ns, sensor_stamp_ns, mount), sensor_stamp_ns)


def make_camera(role: str, stamp_ns: int, sensor_stamp_ns: int) -> CameraImage:
    mount = Pose.from_yaw(np.deg2rad(CAMERA_YAW[role])) @ Pose(OPTICAL, np.array([1.5, 0.0, 1.6]))
    ramp = np.linspace(0, 255, 54 * 96).reshape(54, 96)
    rgb = np.stack([ramp, ramp[::-1], np.full_like(ramp, 20 + CAMERA_YAW[role] % 200)], -1).astype(np.uint8)
    intrinsic = np.array([[70.0, 0, 47.25], [0, 71.0, 26.5], [0, 0, 1]])
    return CameraImage(rgb, intrinsic, ego_from(stamp_ns, sensor_stamp_ns, mount), sensor_stamp_ns)


def make_sample(k: int) -> Sample:
    """Synchronised frame k: the radars and cameras a little before and after the LiDAR."""
    stamp_ns = START_NS + k * FRAME_NS
    rng = np.random.default_rng(k)
    lidar = PointCloud(
        rng.normal(0, 15, (500, 3)).astype(np.float32),
        {"intensity": rng.uniform(0, 255, 500).astype(np.float32)},
        Pose.identity(),
        stamp_ns,
    )
    early, late = stamp_ns - 13_000_000, stamp_ns + 7_000_000
    radars = {role: make_radar(role, stamp_ns, early if "front" in role else late) for role in RADAR_MOUNT}
    cameras = {role: make_camera(role, stamp_ns, late if role == "front" else stamp_ns) for role in CAMERA_YAW}
    stamps = np.array([stamp_ns - 50_000_000, stamp_ns])
    motion = np.full((2, 3), (0.0, 0.0, TURN_RADPS))
    imu = Imu(stamps, motion, np.array([[0.1, SPEED_MPS * TURN_RADPS, 9.8], [0.2, 2.4, 9.9]]))
    odometry = Odometry(stamps, np.array([[SPEED_MPS, 0.0, 0.0], [SPEED_MPS, 0.01, 0.0]]), motion)
    return Sample(stamp_ns, {"top": lidar}, radars, cameras, imu=imu, odometry=odometry)


OBJECT_VELOCITY = np.array([[3.0, -1.0, 0.0], [0.0, 0.0, 0.0], [-2.0, 4.0, 0.0]])  # in the map


def make_truth(k: int) -> Truth:
    """Objects that move straight in the map; the third is seen in this frame alone."""
    stamp_ns = START_NS + k * FRAME_NS
    pose = map_from_ego(stamp_ns)
    place = np.array([[420.0, -85.0, 12.8], [410.0, -95.0, 12.9], [415.0, -100.0, 13.4]])
    place = place + OBJECT_VELOCITY * (k * FRAME_NS * 1e-9)
    yaw = np.array([0.3, -2.0, 1.4]) - pose.yaw
    boxes = Boxes3D(
        pose.inverse().apply(place),
        np.array([[4.4, 1.8, 1.5], [0.6, 0.7, 1.7], [9.0, 2.5, 3.2]]),
        np.arctan2(np.sin(yaw), np.cos(yaw)),
        (OBJECT_VELOCITY @ pose.rotation)[:, :2],
        np.ones(3),
        np.array([0, 1, 3]),
        CLASSES,
        stamp_ns,
        track_id=np.array(["a", "b", f"c{k}"]),
        visibility=np.array([4, 1, 4]),
    )
    label = np.zeros((240, 160, 16), np.uint8)
    label[:, :, 5] = 8
    label[130 + k, 80, 6:9] = 1
    occupancy = OccupancyGrid3D(omnihd_occupancy.grid(), label, omnihd_occupancy.CLASSES, 0, stamp_ns)
    return Truth(boxes, occupancy, pose)


KEYS = (0, 5, 10)
LAST = 10


def write(root: Path, change: Callable[[Sample], Sample] = lambda sample: sample) -> Path:
    """A clip of eleven frames at 10 Hz, key frames at 2 Hz, and an empty test clip."""
    with OmniHDWriter(root) as writer:
        writer.start_clip(CLIP, map_from_ego, split="val")
        for k in range(LAST + 1):
            if k in KEYS:
                writer.add_sample(change(make_sample(k)), make_truth(k))
            else:
                writer.add_sweep(change(make_sample(k)))
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so not to be changed: tests that damage files write their own."""
    return write(tmp_path_factory.mktemp("omnihd"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two key frames of LiDAR, one radar and one camera, to be damaged."""
    with OmniHDWriter(tmp_path) as writer:
        writer.start_clip(CLIP, map_from_ego)
        for k in (0, 5):
            s = make_sample(k)
            writer.add_sample(
                replace(s, radars={"front": s.radars["front"]}, cameras={"front": s.cameras["front"]}), make_truth(k)
            )
    return tmp_path


def edit(root: Path, table: str, change: Callable[[Any], Any]) -> None:
    path = root / "v1.0-trainval" / f"{table}.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def assert_pose(a: Pose, b: Pose, atol: float = 1e-8) -> None:
    np.testing.assert_allclose(a.matrix, b.matrix, atol=atol)


# --- written and read back -------------------------------------------------------------------------------------------


def test_samples_come_back(written: Path) -> None:
    data = OmniHD(OmniHDConfig(root=written, split="val", occupancy=True))
    assert isinstance(data, Dataset)
    assert data.tokens == tuple(str((START_NS + k * FRAME_NS) // 1000) for k in KEYS)
    for i, k in enumerate(KEYS):
        sample, got = make_sample(k), data[i]
        assert (got.stamp_ns, got.token) == (sample.stamp_ns, data.tokens[i])
        assert set(got.radars) == set(sample.radars)
        assert set(got.cameras) == set(sample.cameras)
        for role, cloud, other in [
            ("top", sample.lidars["top"], got.lidars["top"]),
            *((role, cloud, got.radars[role]) for role, cloud in sample.radars.items()),
        ]:
            np.testing.assert_array_equal(other.xyz, cloud.xyz, role)
            for name, values in cloud.fields.items():
                np.testing.assert_array_equal(other.field(name), values)
            assert_pose(other.ego_from_sensor, cloud.ego_from_sensor)
            assert other.stamp_ns == cloud.stamp_ns
            assert (other.field("sweep") == 0).all()
        for role, image in sample.cameras.items():
            other = got.cameras[role]
            assert other.rgb.shape == image.rgb.shape
            assert np.abs(other.rgb.astype(int) - image.rgb).mean() < 3, "JPEG, not another image"
            np.testing.assert_allclose(other.intrinsic, image.intrinsic, atol=1e-12)
            assert_pose(other.ego_from_camera, image.ego_from_camera)
            assert other.stamp_ns == image.stamp_ns
        assert_pose(got.odom_from_ego, map_from_ego(START_NS).inverse() @ map_from_ego(sample.stamp_ns))


def test_readings_since_the_previous_sample_come_back(written: Path) -> None:
    data = OmniHD(OmniHDConfig(root=written, split="val", lidars=(), cameras=(), radars=()))
    for i, k in enumerate(KEYS):
        got = data[i]
        since = START_NS + KEYS[i - 1] * FRAME_NS if i else 0
        assert (np.diff(got.imu.stamp_ns) > 0).all()
        assert since < got.imu.stamp_ns[0] <= got.imu.stamp_ns[-1] == got.stamp_ns
        np.testing.assert_array_equal(got.odometry.stamp_ns, got.imu.stamp_ns)
        for earlier in range(KEYS[i - 1] + 1 if i else 0, k + 1):
            given = make_sample(earlier)
            rows = np.searchsorted(got.imu.stamp_ns, given.imu.stamp_ns)
            np.testing.assert_array_equal(got.imu.stamp_ns[rows], given.imu.stamp_ns)
            np.testing.assert_allclose(got.imu.angular_velocity[rows], given.imu.angular_velocity, atol=1e-12)
            np.testing.assert_allclose(got.imu.linear_acceleration[rows], given.imu.linear_acceleration, atol=1e-12)
            np.testing.assert_allclose(got.odometry.linear_velocity[rows], given.odometry.linear_velocity, atol=1e-12)
        # Rows that no reading gave, at the radars' stamps, hold the motion of the poses.
        derived = got.imu.stamp_ns == got.stamp_ns - 13_000_000
        np.testing.assert_allclose(got.odometry.linear_velocity[derived], [[SPEED_MPS, 0, 0]], atol=1e-4)
        np.testing.assert_allclose(got.odometry.angular_velocity[derived], [[0, 0, TURN_RADPS]], atol=1e-6)
        turning = [[0, SPEED_MPS * TURN_RADPS, 9.80665]]
        np.testing.assert_allclose(got.imu.linear_acceleration[derived], turning, atol=1e-3)


def test_truth_comes_back(written: Path) -> None:
    data = OmniHD(OmniHDConfig(root=written, split="val", occupancy=True))
    for i, k in enumerate(KEYS):
        truth, got = make_truth(k), data.truth(i)
        for name in ("center", "size", "yaw"):
            np.testing.assert_allclose(getattr(got.boxes, name), getattr(truth.boxes, name), atol=1e-9)
        for name in ("label", "track_id", "visibility"):
            np.testing.assert_array_equal(getattr(got.boxes, name), getattr(truth.boxes, name))
        assert got.boxes.classes == CLASSES
        np.testing.assert_allclose(got.boxes.velocity[:2], truth.boxes.velocity[:2], atol=1e-6)
        assert np.isnan(got.boxes.velocity[2]).all(), "a track seen once has no velocity"
        np.testing.assert_array_equal(got.occupancy.label, truth.occupancy.label)
        assert got.occupancy.stamp_ns == truth.occupancy.stamp_ns
        assert_pose(got.map_from_ego, truth.map_from_ego)
        assert_pose(data.map_from_ego(i), truth.map_from_ego)
    assert OmniHD(OmniHDConfig(root=written, split="val")).truth(0).occupancy is None


def test_the_names_are_those_of_the_development_kit(written: Path) -> None:
    tables = written / "v1.0-trainval"
    assert {p.stem for p in tables.glob("*.json")} == {
        *("annotations", "ego_pose", "imu_data", "meta", "sample", "sample_data", "scene_split", "sensor_calibration")
    }
    row = json.loads((tables / "sample_data.json").read_text())[0]
    token = str(START_NS // 1000)
    assert row["lidar"] == {"lidar_top_compensation": f"{CLIP}/lidar/lidar_top_compensation/{token}.bin"}
    assert row["ego_pose"]["radar_left_back"] == str((START_NS + 7_000_000) // 1000)
    assert (row["token"], row["prev"], row["is_key_frame"]) == (token, "", True)
    sides = ("front", "back", "left_front", "right_front", "left_back", "right_back")
    assert set(row["cameras"]) == {f"camera_{side}" for side in sides}
    box = json.loads((tables / "annotations.json").read_text())[0]["annotations"][2]
    assert (box["category"], box["size"]["x"], box["visibility"]) == ("truck", 9.0, 1), "x is the length"
    imu = json.loads((tables / "imu_data.json").read_text())[1]
    assert imu["gyro_xyz"][2] == pytest.approx(np.rad2deg(TURN_RADPS)), "degrees per second"
    assert imu["acc_xyz"][2] == pytest.approx(1.0, abs=0.02), "in g"
    assert imu["acc_xyz"][0] == pytest.approx(-SPEED_MPS * TURN_RADPS / 9.80665, abs=0.01), "x is to the right"


# --- radars ----------------------------------------------------------------------------------------------------------


def test_standing_things_have_no_compensated_doppler(written: Path) -> None:
    """In a turn, at the corner radars: only the lever arm makes it zero."""
    sample = OmniHD(OmniHDConfig(root=written, split="val", lidars=(), cameras=()))[1]
    for role, radar in sample.radars.items():
        assert np.abs(radar.field("radial_velocity")).max() > 1, role
        # The velocity at the frame's own stamp was written with 0.01 m/s of side slip; the radars' stamps have none.
        np.testing.assert_allclose(radar.field("radial_velocity_comp"), 0, atol=1e-3)
        np.testing.assert_allclose(radar.field("vx_comp"), 0, atol=1e-3)


def test_three_sweeps_lie_on_the_same_landmarks(written: Path) -> None:
    config = OmniHDConfig(root=written, split="val", sweeps=3, cameras=())
    sample = OmniHD(config)[1]
    where = map_from_ego(sample.stamp_ns)
    for role, radar in sample.radars.items():
        np.testing.assert_array_equal(np.unique(radar.field("sweep")), (0, 1, 2))
        np.testing.assert_allclose(np.unique(radar.field("time_lag")), (0, 0.1, 0.2), atol=1e-6)
        assert_pose(radar.ego_from_sensor, make_sample(5).radars[role].ego_from_sensor)
        in_map = where.apply(radar.xyz_ego().astype(np.float64))
        nearest = np.linalg.norm(in_map[:, None] - landmarks()[None], axis=-1).min(1)
        assert nearest.max() < 1e-3, role
    lidar = sample.lidars["top"]
    assert len(lidar) == 1500
    older = make_sample(4).lidars["top"].xyz.astype(np.float64)
    np.testing.assert_allclose(
        lidar.xyz[lidar.field("sweep") == 1],
        ego_from(sample.stamp_ns, START_NS + 4 * FRAME_NS, Pose.identity()).apply(older),
        atol=1e-4,
    )


def test_at_the_start_of_a_clip_the_first_radar_sweep_is_repeated(written: Path) -> None:
    sample = OmniHD(OmniHDConfig(root=written, split="val", sweeps=3, cameras=()))[0]
    radar, single = sample.radars["back"], make_sample(0).radars["back"]
    assert len(radar) == 3 * len(single)
    for sweep in range(3):
        np.testing.assert_array_equal(radar.xyz[radar.field("sweep") == sweep], single.xyz)
    assert (radar.field("time_lag") == 0).all()
    assert len(sample.lidars["top"]) == 500, "the LiDAR's is not"


# --- cameras ---------------------------------------------------------------------------------------------------------


def test_halving_keeps_the_place_of_a_point() -> None:
    """The centre of pixel (u, v) of a 2 x 2 mean lies at (2u + 0.5, 2v + 0.5) of the stored image."""
    stored = np.array([[140.0, 0, 95.0], [0, 142.0, 53.0], [0, 0, 1]])
    point = np.array([0.3, -0.2, 1.0])
    before, after = (stored @ point)[:2], (halved_intrinsic(stored) @ point)[:2]
    np.testing.assert_allclose(2 * after + 0.5, before)
    np.testing.assert_allclose(doubled_intrinsic(halved_intrinsic(stored)), stored)


@pytest.mark.parametrize(("key", "role", "scale"), [("camera_back", "back", 2), ("camera_left_front", "front_left", 1)])
def test_distorted_images_are_rectified(tmp_path: Path, key: str, role: str, scale: int) -> None:
    """Dots of known rays, drawn where a distorting lens puts them, are found where a pinhole would."""
    size, distortion = (640 * scale, 360 * scale), [-0.30, 0.09, 0.001, -0.0005, -0.01]
    stored = np.array([[330.0 * scale, 0, 318.0 * scale], [0, 332.0 * scale, 181.0 * scale], [0, 0, 1]])
    rays = np.array([(x, y, 1.0) for x in (-0.6, -0.2, 0.3, 0.65) for y in (-0.3, 0.05, 0.35)])
    dots = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), stored, np.array(distortion))[0].reshape(-1, 2)
    yy, xx = np.mgrid[: size[1], : size[0]]
    canvas = sum(255 * np.exp(-((xx - u) ** 2 + (yy - v) ** 2) / (2 * (3.0 * scale) ** 2)) for u, v in dots)
    sample = make_sample(0)
    with OmniHDWriter(tmp_path) as writer:
        writer.start_clip(CLIP, map_from_ego)
        writer.add_sample(replace(sample, radars={}, cameras={role: sample.cameras[role]}))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    cv2.imwrite(str(next(tmp_path.glob(f"*/cameras/{key}/*.jpg"))), np.repeat(image[..., None], 3, 2))

    def calibrate(rows: list[dict[str, Any]]) -> None:
        rows[0]["calib"][key] |= {"intrinsic": stored.tolist(), "distortion": distortion}

    edit(tmp_path, "sensor_calibration", calibrate)
    got = OmniHD(OmniHDConfig(root=tmp_path))[0].cameras[role]
    assert got.rgb.shape == (360, 640, 3)
    pinhole = (rays @ got.intrinsic.T)[:, :2]
    straight = (rays @ (halved_intrinsic(stored) if scale == 2 else stored).T)[:, :2]
    np.testing.assert_allclose(pinhole, straight, atol=1e-9)
    bent = halved_intrinsic(stored) if scale == 2 else stored
    bent_dots = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), bent, np.array(distortion))[0].reshape(-1, 2)
    assert np.abs(bent_dots - pinhole).max() > 20, "the distortion matters"
    for u, v in pinhole:
        x0, y0 = round(u) - 9, round(v) - 9
        patch = got.rgb[y0 : y0 + 19, x0 : x0 + 19, 0].astype(np.float64)
        patch[patch < 40] = 0
        centroid = np.array([(patch.sum(0) * np.arange(19)).sum(), (patch.sum(1) * np.arange(19)).sum()]) / patch.sum()
        np.testing.assert_allclose(np.add(centroid, (x0, y0)), (u, v), atol=0.3)


def test_without_a_pose_of_its_own_a_camera_is_simultaneous_with_the_lidar(small: Path) -> None:
    """The front camera is 7 ms late; a frame that names no pose for it is read as the development kit reads it."""
    sample = make_sample(5)
    mount = Pose(OPTICAL, np.array([1.5, 0.0, 1.6]))
    moved = OmniHD(OmniHDConfig(root=small))[1].cameras["front"].ego_from_camera
    assert_pose(moved, sample.cameras["front"].ego_from_camera)
    assert np.linalg.norm(moved.translation - mount.translation) > 0.05

    def forget(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            del row["ego_pose"]["camera_front"]

    edit(small, "sample_data", forget)
    assert_pose(OmniHD(OmniHDConfig(root=small))[1].cameras["front"].ego_from_camera, mount)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_opened(small: Path) -> None:
    for folder in ("lidar", "cameras"):
        for path in small.glob(f"*/{folder}/*/*"):
            path.unlink()
    sample = OmniHD(OmniHDConfig(root=small, lidars=(), cameras=()))[0]
    assert (list(sample.lidars), list(sample.radars), list(sample.cameras)) == ([], ["front"], [])


def test_a_sensor_that_a_frame_lacks_is_an_absent_key(small: Path) -> None:
    sample = OmniHD(OmniHDConfig(root=small))[0]
    assert (list(sample.radars), list(sample.cameras)) == (["front"], ["front"])


def test_split_file_and_imu_json(small: Path) -> None:
    tables = small / "v1.0-trainval"
    (tables / "imu_data.json").rename(tables / "imu.json")
    (small / "suggested.json").write_text(json.dumps({"train": [], "val": [CLIP], "test": []}))
    data = OmniHD(OmniHDConfig(root=small, split="val", split_file=small / "suggested.json"))
    assert len(data) == 2
    assert len(data[1].imu.stamp_ns) > 0


def test_frames_without_annotations_have_no_boxes(tmp_path: Path) -> None:
    sample = make_sample(0)
    with OmniHDWriter(tmp_path) as writer:
        writer.start_clip(CLIP, map_from_ego, split="test")
        writer.add_sample(sample)
        writer.add_sample(make_sample(5), Truth(Boxes3D.empty(CLASSES, make_sample(5).stamp_ns)))
    data = OmniHD(OmniHDConfig(root=tmp_path, split="test"))
    assert data.truth(0).boxes is None
    assert_pose(data.truth(0).map_from_ego, map_from_ego(START_NS))
    assert len(data.truth(1).boxes) == 0


def test_categories_are_merged_and_far_key_frames_tell_no_velocity(small: Path) -> None:
    names = ("tricyclist", "handcart", "engineering_vehicle")

    def rename(rows: list[dict[str, Any]]) -> None:
        for box, name in zip(rows[0]["annotations"], names, strict=True):
            box["category"] = name

    edit(small, "annotations", rename)
    boxes = OmniHD(OmniHDConfig(root=small)).truth(0).boxes
    assert [CLASSES[k] for k in boxes.label] == ["car", "car", "large_vehicle"]
    assert np.isfinite(boxes.velocity[:2]).all(), "0.5 s"
    with OmniHDWriter(small / "far") as writer:
        writer.start_clip(CLIP, map_from_ego)
        for k in (0, 16):
            writer.add_sample(replace(make_sample(k), radars={}, cameras={}), make_truth(k))
    assert np.isnan(OmniHD(OmniHDConfig(root=small / "far")).truth(0).boxes.velocity).all(), "1.6 s"


def test_workers_give_the_same_samples(written: Path) -> None:
    data = OmniHD(OmniHDConfig(root=written, split="val", cameras=()))
    assert pickle.loads(pickle.dumps(data)).tokens == data.tokens
    loader = DataLoader(data, batch_size=None, num_workers=2, collate_fn=lambda sample: sample)
    for k, got in zip(KEYS, loader, strict=True):
        np.testing.assert_array_equal(got.lidars["top"].xyz, make_sample(k).lidars["top"].xyz)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_missing_tables_splits_and_roles(small: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"scene_split\.json: no such file\n  it is part of OmniHD-Scenes"):
        OmniHD(OmniHDConfig(root=tmp_path / "absent"))
    with pytest.raises(DataError, match=r"has no split 'val'; it has .*train \(1\)"):
        OmniHD(OmniHDConfig(root=small, split="val"))
    with pytest.raises(ConfigError, match=r"dataset\.radars: no sensor left in this data set\n  choose of: front, "):
        OmniHD(OmniHDConfig(root=small, radars=("left",)))
    edit(small, "sample", lambda rows: [{**row, "scene_token": "0"} for row in rows])
    with pytest.raises(DataError, match=r"no key frame belongs to the 1 clips of split 'train'"):
        OmniHD(OmniHDConfig(root=small))


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("sample", "[{", "not JSON"),
        ("sample", '{"a": 1}', "expected a list of rows with a token each"),
        ("sample", '[{"token": "1"}]', "1 of 1 rows have no 'scene_token', first '1'"),
        ("sample", '[{"token": "x", "scene_token": "y"}]', "token 'x' is no stamp in microseconds"),
        ("sample_data", '[{"token": "1", "prev": ""}]', "rows have no 'ego_pose'"),
        ("sample_data", "[]", r"has no frame for 2 of 2 samples, first '1693714828633418'"),
        (
            "ego_pose",
            f'[{{"token": "1", "scene_token": "{CLIP}", "pose": [1, 2]}}]',
            r"'pose': cannot reshape .*\n  expected 16 numbers",
        ),
        ("sensor_calibration", "[]", f"clip {CLIP}: KeyError"),
        (
            "annotations",
            f'[{{"token": "1693714828633418", "scene_token": "{CLIP}", "annotations": [{{"category": "tram"}}]}}]',
            "unknown category tram; known: car, suv",
        ),
        (
            "annotations",
            f'[{{"token": "1693714828633418", "scene_token": "{CLIP}", "annotations": [{{"category": "car"}}]}}]',
            "a box: KeyError: 'center'",
        ),
        ("scene_split", "[]", "has no split 'train'; it has none"),
    ],
)
def test_damaged_tables(small: Path, table: str, content: str, message: str) -> None:
    (small / "v1.0-trainval" / f"{table}.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        OmniHD(OmniHDConfig(root=small))
    assert f"{table}.json" in caught.value.what


@pytest.mark.parametrize(
    ("pattern", "content", "message"),
    [
        ("lidar/*/*.bin", b"\0" * 40, r"40 bytes are no whole number of rows of 6 float32 \(24 bytes\)"),
        ("radars/*/*.bin", b"\0" * 40, r"40 bytes are no whole number of rows of 8 float32 \(32 bytes\)"),
        ("radars/*/*.bin", np.full(8, np.inf, np.float32).tobytes(), "1 of 1 rows hold values that are not finite"),
        ("cameras/*/*.jpg", b"no image", r"8 bytes that are no whole \.jpg image"),
        ("lidar/*/*.bin", None, "no such file"),
        ("cameras/*/*.jpg", None, "no such file"),
    ],
)
def test_damaged_sensor_files(small: Path, pattern: str, content: bytes | None, message: str) -> None:
    path = min((small / CLIP).glob(pattern))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        OmniHD(OmniHDConfig(root=small))[0]
    assert str(path) in caught.value.what


def test_a_radar_without_motion_pose_or_calibration(small: Path) -> None:
    edit(small, "imu_data", lambda rows: [r for r in rows if not r["token"].endswith("620418")])
    with pytest.raises(DataError, match=r"imu_data\.json: has no row at the stamp of .*radar_front/\d+\.bin"):
        OmniHD(OmniHDConfig(root=small))[0]
    edit(small, "ego_pose", lambda rows: [r for r in rows if not r["token"].endswith("620418")])
    with pytest.raises(DataError, match=r"ego_pose\.json: has no pose of radar_front for frame 1693714828633418"):
        OmniHD(OmniHDConfig(root=small))[0]
    edit(small, "sensor_calibration", lambda rows: rows[0]["calib"].pop("radar_front") and None)
    with pytest.raises(DataError, match=r"sensor_calibration\.json has no radar_front for its clip"):
        OmniHD(OmniHDConfig(root=small))[1]


def test_a_foreign_lens(small: Path) -> None:
    def shorten(rows: list[dict[str, Any]]) -> None:
        rows[0]["calib"]["camera_front"]["distortion"] = [0.1, 0.2]

    edit(small, "sensor_calibration", shorten)
    with pytest.raises(DataError, match=r"camera_front of its clip .* 2 distortion coefficients for plumb_bob"):
        OmniHD(OmniHDConfig(root=small))[0]


def test_missing_occupancy(small: Path) -> None:
    for path in small.glob("*/occ_gt/*.npz"):
        path.unlink()
    with pytest.raises(DataError, match=r"occ_gt/1693714828633418\.npz: No such file"):
        OmniHD(OmniHDConfig(root=small, occupancy=True)).truth(0)


def test_the_writer_refuses_what_the_layout_cannot_hold(tmp_path: Path) -> None:
    sample = replace(make_sample(0), radars={}, cameras={})
    later = replace(make_sample(1), radars={}, cameras={})
    with OmniHDWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="start_clip comes before add_sample"):
            writer.add_sample(sample)
        writer.start_clip(CLIP, map_from_ego)
        with pytest.raises(ValueError, match="is no new name of a folder"):
            writer.start_clip(CLIP, map_from_ego)
        with pytest.raises(ValueError, match="LiDAR 'top' is missing"):
            writer.add_sample(replace(sample, lidars={}))
        with pytest.raises(ValueError, match=r"LiDAR 'top' is at \d+ ns; it gives the frame its stamp"):
            writer.add_sample(replace(sample, lidars=later.lidars))
        with pytest.raises(ValueError, match="is no whole microsecond"):
            writer.add_sample(replace(sample, stamp_ns=sample.stamp_ns + 1))
        writer.add_sample(later, make_truth(1))
        with pytest.raises(ValueError, match="is not later than the last of clip"):
            writer.add_sample(sample)
        odd = replace(make_truth(2).boxes, classes=("car", "tram", "rider", "bus"))
        with pytest.raises(ValueError, match="no class tram; the layout has car, pedestrian, rider, large_vehicle"):
            writer.add_sample(replace(make_sample(2), radars={}, cameras={}), Truth(odd))
        writer.add_sample(replace(make_sample(3), cameras={}))
        moved = make_sample(4)
        front = moved.radars["front"]
        front = replace(front, ego_from_sensor=Pose.from_yaw(0.1) @ front.ego_from_sensor)
        with pytest.raises(ValueError, match=rf"radar2ego of radar_front changes within clip {CLIP}"):
            writer.add_sample(replace(moved, radars={"front": front}, cameras={}))
        with pytest.raises(ValueError, match="radar front holds 2 sweeps; give single ones to a writer"):
            writer.add_sample(replace(moved, radars={"front": accumulate([front, front])}, cameras={}))
        bare = replace(front, fields={"radial_velocity": front.field("radial_velocity")})
        with pytest.raises(ValueError, match="'power' is needed"):
            writer.add_sample(replace(moved, radars={"front": bare}, cameras={}))
    with pytest.raises(DataError, match="is there already"):
        OmniHDWriter(tmp_path)
