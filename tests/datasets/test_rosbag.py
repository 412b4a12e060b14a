"""Rosbag and RosbagWriter: round trip in both storages, independent readers, time and frames, failure paths."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

pytest.importorskip("rosbags", reason="rosbags (extra: bag) is not installed")
from rosbags.highlevel import AnyReader
from rosbags.interfaces import QosDurability, QosReliability
from rosbags.rosbag2 import Reader, StoragePlugin, Writer

from perception.cli import main
from perception.datasets import detect_layout, rosbag_messages
from perception.datasets.rosbag import Rosbag, RosbagConfig, RosbagWriter
from perception.datasets.rosbag_file import BagFile, Logged, read_header, typestore
from perception.errors import ConfigError, DataError, PerceptionError
from perception.frames import FrameError
from perception.types import (
    CameraImage,
    Dataset,
    Gnss,
    Imu,
    OccupancyGrid3D,
    Odometry,
    PointCloud,
    Pose,
    Sample,
    Truth,
    VoxelGrid,
)

START_NS = 1_532_402_927_647_951_123
PERIOD_NS = 100_000_000
COUNT = 6
LAG_NS = {"lidar_top": 0, "cam_front": 40_000_000, "cam_back_left": 15_000_000, "radar_front": 23_000_000}
INTRINSIC = np.array([[40.0, 0, 31.5], [0, 40.0, 19.5], [0, 0, 1]])
RADAR_FIELDS = ("rcs", "radial_velocity", "vx_comp", "vy_comp", "snr")


def drive(stamp_ns: int) -> Pose:
    """A vehicle that turns, climbs and rolls, far from the map's origin."""
    t = (stamp_ns - START_NS) * 1e-9
    rotation = Rotation.from_euler("zyx", [2.4 + 0.3 * t, 0.03 * np.sin(t), 0.02 * np.cos(t)]).as_matrix()
    return Pose(rotation, np.array([366_600.0 + 8 * t, 1600.0 + 3 * t * t, 1.5 + 0.2 * t]))


def straight(stamp_ns: int) -> Pose:
    """10 m/s along x."""
    return Pose(np.eye(3), np.array([10.0 * (stamp_ns - START_NS) * 1e-9, 0.0, 0.0]))


def mount(channel: str) -> Pose:
    """ego_from_sensor: another rotation and place for each channel."""
    seed = sum(map(ord, channel))
    return Pose(Rotation.random(random_state=seed).as_matrix(), np.random.default_rng(seed).uniform(-2, 2, 3))


WORLD = np.random.default_rng(7).uniform(-30, 30, (300, 3))
"""Points at rest, about where the vehicle starts."""


def sample(k: int, map_from_ego: Callable[[int], Pose] = drive) -> Sample:
    """All sensors, each taken at its own lag before the LiDAR; the clouds see the points at rest."""
    stamp, rng = START_NS + k * PERIOD_NS, np.random.default_rng(k)
    world = map_from_ego(START_NS).apply(WORLD)

    def placed(channel: str) -> tuple[int, Pose]:
        taken = stamp - LAG_NS[channel]
        return taken, map_from_ego(stamp).inverse() @ map_from_ego(taken) @ mount(channel)

    def seen(channel: str, fields: Iterable[str]) -> PointCloud:
        taken, ego_from_sensor = placed(channel)
        xyz = (map_from_ego(taken) @ mount(channel)).inverse().apply(world).astype(np.float32)
        values = {name: rng.uniform(0, 255, len(xyz)).astype(np.float32) for name in fields}
        return PointCloud(xyz, values, ego_from_sensor, taken)

    def picture(channel: str) -> CameraImage:
        taken, ego_from_camera = placed(channel)
        ramp = np.linspace(0, 200, 64)[None, :, None] + np.linspace(0, 50, 40)[:, None, None]
        return CameraImage(np.tile(ramp, (1, 1, 3)).astype(np.uint8), INTRINSIC, ego_from_camera, taken)

    lidar = seen("lidar_top", ("intensity", "ring"))
    lidar.fields["time_offset"] = rng.uniform(-0.05, 0, len(lidar)).astype(np.float32)
    fast = stamp - PERIOD_NS + np.arange(1, 11) * (PERIOD_NS // 10)
    return Sample(
        stamp,
        {"top": lidar},
        {"front": seen("radar_front", RADAR_FIELDS)},
        {"front": picture("cam_front"), "back_left": picture("cam_back_left")},
        imu=Imu(fast, rng.normal(size=(10, 3)), rng.normal(size=(10, 3))),
        odometry=Odometry(fast[1::2], rng.normal(size=(5, 3)), rng.normal(size=(5, 3))),
        gnss=Gnss(1.3, 103.8, 12.0, np.diag([1.0, 2.0, 3.0]), stamp - 1),
    )


def write(path: Path, map_from_ego: Callable[[int], Pose] = drive, storage="mcap", count: int = COUNT) -> Path:
    with RosbagWriter(path, storage) as writer:
        writer.start(map_from_ego)
        for k in range(count):
            writer.add(sample(k, map_from_ego))
    return path


@pytest.fixture(scope="module", params=["mcap", "sqlite3"])
def bag(request, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp(request.param) / "drive", storage=request.param)


@pytest.fixture(scope="module")
def mcap(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("mcap") / "drive")


def logged(path: Path) -> list[Logged]:
    file = BagFile(path)
    return list(file.messages(file.topics))


def write_raw(path: Path, types: dict[str, str], messages: Iterable[Logged]) -> Path:
    """A bag of serialised messages, written without the writer under test."""
    writer = Writer(path, version=8, storage_plugin=StoragePlugin.MCAP)
    with writer:
        connections = {t: writer.add_connection(t, types[t], typestore=typestore()) for t in types}
        for topic, log_ns, raw in sorted(messages, key=lambda m: m.log_ns):
            writer.write(connections[topic], log_ns, raw)
    return path


def edited(source: Path, target: Path, edit: Callable[[Logged], Logged | None]) -> Path:
    """A copy of a bag with its messages changed or left out."""
    types = {name: topic.type for name, topic in BagFile(source).topics.items()}
    return write_raw(target, types, [new for m in logged(source) if (new := edit(m)) is not None])


def without(*topics: str) -> Callable[[Logged], Logged | None]:
    return lambda m: None if m.topic in topics else m


def opened(root: Path, **config) -> Rosbag:
    return Rosbag(RosbagConfig(root=root, **config))


def assert_same_pose(a: Pose, b: Pose, meters: float = 1e-6) -> None:
    np.testing.assert_allclose(a.translation, b.translation, atol=meters, rtol=0)
    np.testing.assert_allclose(a.rotation, b.rotation, atol=1e-9)


def assert_same(a: Sample, b: Sample) -> None:
    """Every part of two samples, bit by bit."""
    assert (a.stamp_ns, a.token, list(a.lidars), list(a.radars), list(a.cameras)) == (
        b.stamp_ns, b.token, list(b.lidars), list(b.radars), list(b.cameras)
    )  # fmt: skip
    for kind in ("lidars", "radars"):
        for role, cloud in getattr(a, kind).items():
            other = getattr(b, kind)[role]
            np.testing.assert_array_equal(cloud.xyz, other.xyz)
            assert list(cloud.fields) == list(other.fields)
            for name in cloud.fields:
                np.testing.assert_array_equal(cloud.fields[name], other.fields[name])
    for role, image in a.cameras.items():
        np.testing.assert_array_equal(image.rgb, b.cameras[role].rgb)
    np.testing.assert_array_equal(a.odom_from_ego.matrix, b.odom_from_ego.matrix)


# --- Round trip -------------------------------------------------------------------------------------------------------


def test_a_bag_gives_back_the_samples_that_were_written(bag):
    dataset = opened(bag)
    assert isinstance(dataset, Dataset)
    assert dataset.tokens == tuple(str(START_NS + k * PERIOD_NS) for k in range(COUNT))
    for k in range(COUNT):
        got, want = dataset[k], sample(k)
        assert (got.stamp_ns, got.token, dataset.scene_name(k)) == (want.stamp_ns, dataset.tokens[k], "drive")
        assert (set(got.lidars), set(got.radars), set(got.cameras)) == ({"top"}, {"front"}, {"front", "back_left"})
        for mine, theirs in ((got.lidars["top"], want.lidars["top"]), (got.radars["front"], want.radars["front"])):
            np.testing.assert_array_equal(mine.xyz, theirs.xyz)
            for name, values in theirs.fields.items():
                np.testing.assert_array_equal(mine.field(name), values)
            assert set(mine.fields) == {*theirs.fields, "time_lag", "sweep"}
            assert mine.stamp_ns == theirs.stamp_ns
            assert_same_pose(mine.ego_from_sensor, theirs.ego_from_sensor)
        for role, image in want.cameras.items():
            assert np.abs(got.cameras[role].rgb.astype(int) - image.rgb).max() <= 6
            np.testing.assert_array_equal(got.cameras[role].intrinsic, INTRINSIC)
            assert got.cameras[role].stamp_ns == image.stamp_ns
            assert_same_pose(got.cameras[role].ego_from_camera, image.ego_from_camera)
        assert_same_pose(dataset.truth(k).map_from_ego, drive(want.stamp_ns))
        assert_same_pose(got.odom_from_ego, drive(START_NS).inverse() @ drive(want.stamp_ns))


def test_readings_since_the_sample_before_come_back(bag):
    dataset = opened(bag)
    for k in range(COUNT):
        got, want = dataset[k], sample(k)
        for name in ("stamp_ns", "angular_velocity", "linear_acceleration"):
            np.testing.assert_array_equal(getattr(got.imu, name), getattr(want.imu, name))
        for name in ("stamp_ns", "linear_velocity", "angular_velocity"):
            np.testing.assert_array_equal(getattr(got.odometry, name), getattr(want.odometry, name))
        assert (got.gnss.latitude_deg, got.gnss.longitude_deg, got.gnss.altitude_m) == (1.3, 103.8, 12.0)
        np.testing.assert_array_equal(got.gnss.covariance, want.gnss.covariance)
        assert got.gnss.stamp_ns == want.gnss.stamp_ns


def test_one_file_of_a_bag_is_a_bag_too(bag):
    (file,) = [p for p in bag.iterdir() if p.suffix in (".mcap", ".db3")]
    assert_same(opened(file)[2], opened(bag)[2])
    assert detect_layout(file) == {"name": "rosbag", "root": file}
    assert detect_layout(bag) == {"name": "rosbag", "root": bag}


def test_random_access_is_the_same_as_one_pass(bag):
    dataset = opened(bag, sweeps=3)
    played = list(dataset.play())
    assert len(played) == len(dataset)
    for i in np.random.default_rng(0).permutation(len(dataset)).tolist():
        assert_same(dataset[i], played[i])


def test_worker_processes_read_the_same(bag):
    dataset = opened(bag)
    first = dataset[0]  # the file is open when the workers fork
    copy = pickle.loads(pickle.dumps(dataset))
    assert_same(copy[3], dataset[3])
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, collate_fn=lambda s: s)
    for i, got in enumerate(loader):
        assert_same(got, dataset[i])
    assert_same(dataset[0], first)


def test_single_sensor_sweeps_make_the_same_bag(tmp_path):
    """What key frames hold may be added sensor by sensor, and a reading that stands in two samples is written once."""
    with RosbagWriter(tmp_path / "parts") as writer:
        writer.start(drive)
        for k in range(COUNT):
            whole = sample(k)
            image = whole.cameras["back_left"]
            taken = image.stamp_ns
            own = replace(image, ego_from_camera=mount("cam_back_left"))
            writer.add(Sample(taken, cameras={"back_left": own}))
            writer.add(whole)
    whole, parts = opened(write(tmp_path / "whole")), opened(tmp_path / "parts")
    assert parts._bag.topics["/cam_back_left/image_rect_compressed"].messages == COUNT
    for k in range(COUNT):
        got, want = parts[k], whole[k]
        assert_same_pose(got.cameras["back_left"].ego_from_camera, want.cameras["back_left"].ego_from_camera)
        np.testing.assert_array_equal(got.lidars["top"].xyz, want.lidars["top"].xyz)


def test_roles_may_be_left_out(mcap):
    got = opened(mcap, cameras=(), radars=())[0]
    assert (set(got.lidars), set(got.radars), set(got.cameras)) == ({"top"}, set(), set())
    with pytest.raises(ConfigError, match=r"cameras: no sensor rear in this data set\n.*back_left"):
        opened(mcap, cameras=("rear",))
    with pytest.raises(ConfigError, match=r"no sensor is to be read"):
        opened(mcap, cameras=(), radars=(), lidars=())


# --- Independent readers ----------------------------------------------------------------------------------------------


def test_the_mcap_library_reads_what_was_written(mcap):
    reader = pytest.importorskip("mcap.reader")
    factory = pytest.importorskip("mcap_ros2.decoder").DecoderFactory()
    with (mcap / "drive.mcap").open("rb") as file:
        source = reader.make_reader(file, decoder_factories=[factory])
        summary = source.get_summary()
        assert {chunk.compression for chunk in summary.chunk_indexes} == {"zstd"}
        found = list(source.iter_decoded_messages(log_time_order=False))
    logs = [message.log_time for _, _, message, _ in found]
    assert logs == sorted(logs)  # in the file's own order: a streaming player needs no index
    types = {channel.topic: schema.name for schema, channel, _, _ in found}
    assert types == {
        "/lidar_top": "sensor_msgs/msg/PointCloud2",
        "/radar_front": "sensor_msgs/msg/PointCloud2",
        "/cam_front/image_rect_compressed": "sensor_msgs/msg/CompressedImage",
        "/cam_back_left/image_rect_compressed": "sensor_msgs/msg/CompressedImage",
        "/cam_front/camera_info": "sensor_msgs/msg/CameraInfo",
        "/cam_back_left/camera_info": "sensor_msgs/msg/CameraInfo",
        "/odom": "nav_msgs/msg/Odometry",
        "/imu": "sensor_msgs/msg/Imu",
        "/gps": "sensor_msgs/msg/NavSatFix",
        "/pose": "geometry_msgs/msg/PoseStamped",
        "/tf": "tf2_msgs/msg/TFMessage",
        "/tf_static": "tf2_msgs/msg/TFMessage",
    }
    clouds = [(message, decoded) for _, channel, message, decoded in found if channel.topic == "/lidar_top"]
    assert len(clouds) == COUNT
    for k, (message, decoded) in enumerate(clouds):
        stamp = decoded.header.stamp.sec * 10**9 + decoded.header.stamp.nanosec
        assert message.log_time == message.publish_time == stamp == START_NS + k * PERIOD_NS
        assert [f.name for f in decoded.fields] == ["x", "y", "z", "intensity", "ring", "time_offset"]
        assert (decoded.header.frame_id, decoded.point_step, decoded.width) == ("lidar_top", 24, len(WORLD))
        points = np.frombuffer(decoded.data, "<f4").reshape(-1, 6)
        np.testing.assert_array_equal(points[:, :3], sample(k).lidars["top"].xyz)
        np.testing.assert_array_equal(points[:, 4], sample(k).lidars["top"].fields["ring"])
    (static,) = [decoded for _, channel, _, decoded in found if channel.topic == "/tf_static"]
    assert {(t.header.frame_id, t.child_frame_id) for t in static.transforms} == {
        ("base_link", channel) for channel in LAG_NS
    }
    edges = {(t.header.frame_id, t.child_frame_id) for _, c, _, d in found if c.topic == "/tf" for t in d.transforms}
    assert edges == {("map", "odom"), ("odom", "base_link")}


def test_the_definitions_in_the_bag_decode_it(bag):
    with AnyReader([bag]) as reader:  # types as the bag itself defines them
        for connection, log_ns, raw in reader.messages():
            message = reader.deserialize(raw, connection.msgtype)
            header = message.transforms[0].header if hasattr(message, "transforms") else message.header
            assert log_ns == header.stamp.sec * 10**9 + header.stamp.nanosec
        assert sum(c.msgcount for c in reader.connections if c.topic == "/imu") == 10 * COUNT


def test_publishers_quality_is_recorded(bag):
    with Reader(bag) as reader:
        offered = {c.topic: c.ext.offered_qos_profiles[0] for c in reader.connections}
    static, cloud = offered["/tf_static"], offered["/lidar_top"]
    assert (static.durability, static.reliability) == (QosDurability.TRANSIENT_LOCAL, QosReliability.RELIABLE)
    assert (cloud.durability, cloud.reliability) == (QosDurability.VOLATILE, QosReliability.BEST_EFFORT)
    assert offered["/tf"].reliability is QosReliability.RELIABLE
    if (bag / "drive.mcap").exists():
        assert (bag / "metadata.yaml").read_text().count("durability: 1") == 1  # Humble reads numbers in a string


# --- Time and frames --------------------------------------------------------------------------------------------------


def test_ego_motion_between_camera_and_sample_is_folded_in(tmp_path):
    got = opened(write(tmp_path / "bag", straight))[3]
    # The camera saw the world 40 ms, at 10 m/s 0.4 m, before the sample: in ego at the sample it stands 0.4 m behind.
    moved = got.cameras["front"].ego_from_camera.translation - mount("cam_front").translation
    np.testing.assert_allclose(moved, [-0.4, 0, 0], atol=1e-9)
    moved = got.radars["front"].ego_from_sensor.translation - mount("radar_front").translation
    np.testing.assert_allclose(moved, [-0.23, 0, 0], atol=1e-9)
    assert_same_pose(got.lidars["top"].ego_from_sensor, mount("lidar_top"), 1e-12)


def test_accumulated_sweeps_of_a_world_at_rest_fall_onto_each_other(bag):
    dataset = opened(bag, sweeps=4)
    for cloud in (dataset[5].lidars["top"], dataset[5].radars["front"]):
        assert len(cloud) == 4 * len(WORLD)
        np.testing.assert_array_equal(np.unique(cloud.fields["sweep"]), range(4))
        np.testing.assert_allclose(np.unique(cloud.fields["time_lag"]), np.arange(4) * 0.1, atol=1e-6)
        key = cloud.xyz[: len(WORLD)]
        assert np.abs(cloud.xyz.reshape(4, -1, 3) - key).max() < 1e-4
    assert len(dataset[0].lidars["top"]) == len(WORLD)  # nothing came before
    assert len(opened(bag, sweeps=4, sensors=sensors(lidars={"top": "/lidar_top"}, sweeps_s=0.1))[5].lidars["top"]) == (
        2 * len(WORLD)
    )


def sensors(lidars=None, radars=None, cameras=None, **options) -> dict:
    """`sensors` of a configuration, of topics by role, all with the same options."""
    kinds = {"lidars": lidars, "radars": radars, "cameras": cameras}
    return {
        kind: {role: {"topic": topic, **options} for role, topic in (topics or {}).items()}
        for kind, topics in kinds.items()
    }


def test_an_odometry_that_drifts_is_kept_apart_from_the_map(tmp_path):
    def drifting(stamp_ns: int) -> Pose:
        t = (stamp_ns - START_NS) * 1e-9
        return Pose.from_yaw(0.02 * t, (1.0 + 0.1 * t, 5.0, 0.0)) @ straight(stamp_ns)

    with RosbagWriter(tmp_path / "bag") as writer:
        writer.start(straight, drifting)
        for k in range(COUNT):
            writer.add(replace(sample(k, straight), odom_from_ego=drifting(START_NS + k * PERIOD_NS)))
    dataset = opened(tmp_path / "bag")
    for k in range(COUNT):
        stamp = START_NS + k * PERIOD_NS
        assert_same_pose(dataset[k].odom_from_ego, drifting(stamp))
        assert_same_pose(dataset.truth(k).map_from_ego, straight(stamp))
        seen_ns = stamp - LAG_NS["cam_front"]
        moved = drifting(stamp).inverse() @ drifting(seen_ns) @ mount("cam_front")
        assert_same_pose(dataset[k].cameras["front"].ego_from_camera, moved)


def test_a_camera_that_comes_late_is_waited_for_or_replaced(mcap, tmp_path):
    def late(m: Logged) -> Logged:
        return m._replace(log_ns=m.log_ns + 90_000_000) if m.topic == "/cam_front/image_rect_compressed" else m

    path = edited(mcap, tmp_path / "late", late)
    at_once = opened(path)
    # 40 ms before the LiDAR and 90 ms under way: the image before it is nearest, 140 ms away and not within 120.
    assert all(set(at_once[k].cameras) == {"back_left"} for k in range(COUNT))
    assert at_once.counts["cam_front"].missing == 1
    assert at_once.counts["cam_front"].stale == COUNT - 1
    waiting = opened(path, wait_s=0.2)
    for k in range(COUNT):
        assert waiting[k].cameras["front"].stamp_ns == START_NS + k * PERIOD_NS - LAG_NS["cam_front"]
        assert_same_pose(waiting[k].cameras["front"].ego_from_camera, sample(k).cameras["front"].ego_from_camera)


def test_a_camera_that_dies_is_absent_and_counted(mcap, tmp_path):
    died_ns = START_NS + 2 * PERIOD_NS
    path = edited(mcap, tmp_path / "dead", lambda m: m if "cam_front" not in m.topic or m.log_ns < died_ns else None)
    dataset = opened(path)
    assert [sorted(dataset[k].cameras) for k in range(COUNT)] == [["back_left", "front"]] * 3 + [["back_left"]] * 3
    assert (dataset.counts["cam_front"].matched, dataset.counts["cam_front"].stale) == (3, 3)
    required = sensors(lidars={"top": "/lidar_top"})
    required["cameras"] = {"front": {"topic": "/cam_front/image_rect_compressed", "required": True}}
    dataset = opened(path, sensors=required)
    assert len(dataset) == 3
    assert dataset.counts["lidar_top"].incomplete == 3


def test_log_times_are_not_stamps(mcap, tmp_path):
    """A recorder logs when a message arrives, several at one time."""
    path = edited(mcap, tmp_path / "slow", lambda m: m._replace(log_ns=(m.log_ns // PERIOD_NS + 70) * PERIOD_NS))
    dataset, original = opened(path, wait_s=0.2), opened(mcap)
    assert len(dataset) == len(original)
    for k in range(COUNT):
        assert_same(dataset[k], original[k])


def test_a_looping_bag_begins_a_new_epoch(mcap, tmp_path):
    """The same stamps again, on another road: nothing of the first round may be used in the second."""
    other = write(tmp_path / "other", straight)
    types = {name: topic.type for name, topic in BagFile(mcap).topics.items()}
    again = [m._replace(log_ns=m.log_ns + 10 * COUNT * PERIOD_NS) for m in logged(other)]
    path = write_raw(tmp_path / "loop", types, [*logged(mcap), *again])
    dataset = opened(path, sweeps=3, clock_jump_s=0.3)  # the bag is 0.6 s long
    first, second = opened(mcap, sweeps=3), opened(other, sweeps=3)
    assert len(dataset) == 2 * COUNT
    assert dataset.tokens[COUNT:] == tuple(f"{token}-1" for token in first.tokens)
    assert [dataset.scene_name(k) for k in (0, COUNT)] == ["loop", "loop-1"]
    assert len(dataset[COUNT].lidars["top"]) == len(WORLD)
    for k in range(COUNT):
        assert_same(replace(dataset[COUNT + k], token=second.tokens[k]), second[k])
        assert_same_pose(dataset.truth(COUNT + k).map_from_ego, straight(START_NS + k * PERIOD_NS))
        if k:  # of the first in a bag, the readings since the sample before
            np.testing.assert_array_equal(dataset[COUNT + k].imu.stamp_ns, sample(k).imu.stamp_ns)
        assert_same(dataset[k], first[k])
    assert len(list(dataset.play())) == 2 * COUNT


def test_samples_that_no_transform_covers_are_left_out_and_counted(mcap, tmp_path):
    begin, end = START_NS + PERIOD_NS - 30_000_000, START_NS + 4 * PERIOD_NS + 1
    path = edited(mcap, tmp_path / "short", lambda m: None if m.topic == "/tf" and not begin <= m.log_ns < end else m)
    dataset = opened(path)
    assert dataset.tokens == tuple(str(START_NS + k * PERIOD_NS) for k in range(1, 5))
    assert dataset.no_transform["lidar_top"] == 2
    assert set(dataset[0].cameras) == {"back_left"}  # the front one saw the world before /tf began
    assert dataset.no_transform["cam_front"] == 3
    assert set(dataset[1].cameras) == {"back_left", "front"}


def test_a_bag_without_transforms_says_which_frames_there_are(mcap, tmp_path):
    path = edited(mcap, tmp_path / "none", without("/tf", "/tf_static"))
    with pytest.raises(FrameError, match=r"lidar_top \(frame 'lidar_top'\): no frame .*there are: none at all"):
        opened(path)
    path = edited(mcap, tmp_path / "timed", without("/tf_static"))
    with pytest.raises(FrameError, match=r"no frame 'lidar_top'; there are: base_link, map, odom"):
        opened(path)
    path = edited(mcap, tmp_path / "static", without("/tf"))
    with pytest.raises(
        FrameError, match=r"radar_front .*no frame 'odom'.*\n.*stood still, set odom_frame to base_link"
    ):
        opened(path)
    still = opened(path, odom_frame="base_link")
    assert_same_pose(still[0].cameras["front"].ego_from_camera, mount("cam_front"))
    assert still[0].odom_from_ego is None
    assert still.truth(0) is None
    assert opened(path, cameras=(), radars=())[0].odom_from_ego is None  # nothing to compensate


# --- Other vehicles ---------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A vehicle with names, fields and lenses of its own, at rest."""
    types, messages, msgs = {}, [], typestore().types
    pixels = np.full((40, 64), 90, np.uint8)
    static = rosbag_messages.transforms(
        [("base_link", "velo", 0, mount("velo")), ("base_link", "eye", 0, mount("eye"))]
    )

    def put(topic: str, kind: str, log_ns: int, message) -> None:
        types[topic] = kind
        messages.append(Logged(topic, log_ns, bytes(typestore().serialize_cdr(message, kind))))

    put("/tf_static", "tf2_msgs/msg/TFMessage", START_NS - 1, static)
    put("/chatter", "std_msgs/msg/String", START_NS, msgs["std_msgs/msg/String"]("hello"))
    for k in range(3):
        stamp = START_NS + k * PERIOD_NS
        xyz = np.arange(30, dtype=np.float32).reshape(10, 3)
        fields = {"reflectivity": np.linspace(0, 1, 10, dtype=np.float32)}
        cloud = PointCloud(xyz, fields, Pose.identity(), stamp)
        xyz[4, 1] = np.nan  # as a driver says that nothing came back
        message = rosbag_messages.point_cloud(cloud, "/velo")
        put("/velodyne_points", "sensor_msgs/msg/PointCloud2", stamp, message)
        header = rosbag_messages.header(stamp, "eye")
        image = msgs["sensor_msgs/msg/Image"](header, 40, 64, "mono8", 0, 64, pixels.reshape(-1))
        put("/eye/image_raw", "sensor_msgs/msg/Image", stamp, image)
        seen = CameraImage(np.zeros((40, 64, 3), np.uint8), INTRINSIC, Pose.identity(), stamp)
        info = rosbag_messages.camera_info(seen, "eye")
        info.d[:] = [0.3, 0.1, 0.0, 0.0, 0.0]
        put("/eye/camera_info", "sensor_msgs/msg/CameraInfo", stamp, info)
    return write_raw(tmp_path / "foreign", types, messages)


def foreign_sensors(fields: dict[str, str] | None = None, **cloud) -> dict:
    fields = {"intensity": "reflectivity"} if fields is None else fields
    return {
        "lidars": {"top": {"topic": "/velodyne_points", "fields": fields, **cloud}},
        "cameras": {"front": {"topic": "/eye/image_raw"}},
    }


def test_names_fields_and_lenses_of_another_vehicle(foreign):
    dataset = opened(foreign, sensors=foreign_sensors(intensity_max=1.0), odom_frame="base_link")
    got = dataset[1]
    np.testing.assert_allclose(
        got.lidars["top"].field("intensity"), 255 * np.linspace(0, 1, 10)[np.arange(10) != 4], 1e-6
    )
    assert_same_pose(got.lidars["top"].ego_from_sensor, mount("velo"))
    assert got.cameras["front"].rgb[20, 32].tolist() == [90, 90, 90]
    assert got.cameras["front"].rgb.min() < 90  # what the lens did not see is black
    assert dataset.dropped_nonfinite == {"lidar_top": 1}
    assert (got.imu, got.odometry, got.gnss) == (None, None, None)


def test_a_wrong_name_is_answered_with_those_that_there_are(foreign):
    with pytest.raises(
        DataError, match=r"no topic is named like /lidar_top.*clouds: /velodyne_points; images: /eye"
    ) as e:
        opened(foreign)
    assert (
        "sensors: {lidars: {top: {topic: /velodyne_points}}, cameras: {front: {topic: /eye/image_raw}}}" in e.value.do
    )
    with pytest.raises(
        DataError, match=r"'/points' is not in the bag; sensors.lidars.top.topic needs sensor_msgs"
    ) as e:
        opened(foreign, sensors=sensors(lidars={"top": "/points"}))
    assert "--set dataset.sensors.lidars.top.topic=/velodyne_points" in e.value.do
    with pytest.raises(
        DataError, match=r"'/chatter' has std_msgs/msg/String; sensors.lidars.top.topic needs sensor_msgs"
    ):
        opened(foreign, sensors=sensors(lidars={"top": "/chatter"}))
    with pytest.raises(DataError, match=r"'/eye/info' is not in the bag; sensors.cameras.front.info_topic needs"):
        opened(foreign, sensors=sensors(cameras={"front": "/eye/image_raw"}, info_topic="/eye/info"))
    with pytest.raises(DataError, match=r"'/chatter' has std_msgs/msg/String; imu_topic needs sensor_msgs/msg/Imu"):
        opened(foreign, sensors=foreign_sensors(), imu_topic="/chatter")
    with pytest.raises(
        ConfigError, match=r"anchor: 'lidar_back' is none of the vehicle's sensors\n.*lidar_top, cam_front"
    ):
        opened(foreign, sensors=foreign_sensors(), anchor="lidar_back")
    with pytest.raises(ConfigError, match=r"topic '/velodyne_points' stands twice"):
        opened(foreign, sensors=sensors(lidars={"top": "/velodyne_points", "back": "/velodyne_points"}))


def test_a_field_that_is_not_there_is_named(foreign):
    dataset = opened(foreign, sensors=foreign_sensors({}, needed=["intensity"]), cameras=())
    with pytest.raises(
        DataError, match=r"/velodyne_points: point cloud has fields \(x, y, z, reflectivity\); intensity is"
    ):
        dataset[0]


def test_a_camera_may_be_the_anchor(foreign):
    dataset = opened(foreign, sensors=foreign_sensors(), anchor="cam_front", lidars=())
    assert len(dataset) == 3
    assert not dataset[0].lidars


def test_a_required_sensor_that_never_matches_leaves_no_sample(foreign):
    far = foreign_sensors(offset_s=-5.0, required=True)
    with pytest.raises(
        DataError, match=r"no sample: cam_front has 3 messages; lidar_top is required and (stale|missing)"
    ):
        opened(foreign, sensors=far, anchor="cam_front")


# --- Damage -----------------------------------------------------------------------------------------------------------


def test_what_is_no_bag_is_told_in_a_word(mcap, tmp_path):
    for path, said in {
        tmp_path / "nowhere": "no such bag",
        tmp_path / "old.bag": "a bag of ROS 1",
        tmp_path: "no metadata.yaml, its recorder did not finish",
        Path(__file__): "not a rosbag2",
    }.items():
        with pytest.raises(DataError, match=said):
            opened(path)
    for name, said in {"text.mcap": "no .mcap file", "text.db3": "no .db3 file"}.items():
        (tmp_path / name).write_text("not a bag at all")
        with pytest.raises(DataError, match=said):
            opened(tmp_path / name)
    (tmp_path / "garbage.db3").write_bytes(b"SQLite format 3\0" + bytes(200))
    with pytest.raises(DataError, match="not a readable rosbag2"):
        opened(tmp_path / "garbage.db3")
    whole = (mcap / "drive.mcap").read_bytes()
    for profile in (b"\4\0\0\0ros1", b"\4\0\0\0abcd"):
        (tmp_path / "profile.mcap").write_bytes(whole.replace(b"\4\0\0\0ros2", profile, 1))
        with pytest.raises(DataError, match="Profile is not ros2"):
            opened(tmp_path / "profile.mcap")


def test_an_unfinished_recording_says_how_to_mend_it(mcap, tmp_path):
    def fail() -> None:
        with RosbagWriter(tmp_path / "killed") as writer:
            writer.start(drive)
            for k in range(20):
                writer.add(sample(k))
            raise RuntimeError("out of power")

    with pytest.raises(RuntimeError, match="out of power"):
        fail()
    with pytest.raises(DataError, match=r"(?s)no metadata.yaml.*holds killed.mcap.*ros2 bag reindex"):
        opened(tmp_path / "killed")
    whole = (mcap / "drive.mcap").read_bytes()
    for cut in (9, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.mcap").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"(?s)cut.mcap: the file of .* has no end.*mcap recover"):
            opened(tmp_path / "cut.mcap")
    shutil.copytree(write(tmp_path / "sqlite", storage="sqlite3"), tmp_path / "open")
    (tmp_path / "open" / "sqlite.db3-wal").write_bytes(b"pages")
    with pytest.raises(DataError, match=r"(?s)still in sqlite.db3-wal.*wal_checkpoint"):
        opened(tmp_path / "open")


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_damage_within_a_bag_is_a_data_error(mcap, tmp_path):
    whole = bytearray((mcap / "drive.mcap").read_bytes())
    for at in np.random.default_rng(0).integers(8, len(whole) - 8, 40).tolist():
        damaged = bytearray(whole)
        damaged[at : at + 16] = bytes(b ^ 0xFF for b in damaged[at : at + 16])
        (tmp_path / "damaged.mcap").write_bytes(damaged[: len(whole)])
        with suppress(PerceptionError):  # what the user can mend; anything else is a library's traceback
            dataset = opened(tmp_path / "damaged.mcap")
            for i in range(len(dataset)):
                dataset[i]


def test_messages_that_contradict_their_type(mcap, tmp_path):
    cut = edited(mcap, tmp_path / "cut", lambda m: m._replace(raw=m.raw[:200]) if m.topic == "/lidar_top" else m)
    dataset = opened(cut)
    with pytest.raises(DataError, match=r"a message of /lidar_top is no sensor_msgs/msg/PointCloud2"):
        dataset[0]
    path = edited(mcap, tmp_path / "short", lambda m: m._replace(raw=m.raw[:9]) if m.topic == "/lidar_top" else m)
    with pytest.raises(DataError, match=r"a message of /lidar_top is damaged: no header"):
        opened(path)
    path = edited(mcap, tmp_path / "tf", lambda m: m._replace(raw=m.raw[:40]) if m.topic == "/tf" else m)
    with pytest.raises(DataError, match=r"a message of /tf is no tf2_msgs/msg/TFMessage"):
        opened(path)
    nowhere = Pose.identity()
    object.__setattr__(nowhere, "translation", np.array([np.nan, 0, 0]))
    bad = typestore().serialize_cdr(
        rosbag_messages.transforms([("odom", "base_link", START_NS, nowhere)]), "tf2_msgs/msg/TFMessage"
    )
    path = edited(mcap, tmp_path / "nan", lambda m: m._replace(raw=bytes(bad)) if m.topic == "/tf" else m)
    with pytest.raises(DataError, match=r"/tf has 'odom' -> 'base_link' with translation \(nan"):
        opened(path)

    def two_frames(m: Logged) -> Logged:
        if m.topic != "/lidar_top" or m.log_ns == START_NS:
            return m
        return m._replace(raw=m.raw.replace(b"lidar_top\0", b"lidar_low\0", 1))

    path = edited(mcap, tmp_path / "frames", two_frames)
    with pytest.raises(DataError, match=r"messages of /lidar_top come from frames 'lidar_top' and 'lidar_low'"):
        opened(path)


def test_a_camera_without_calibration(mcap, tmp_path):
    path = edited(mcap, tmp_path / "bag", without("/cam_front/camera_info"))
    with pytest.raises(DataError, match=r"/cam_front/camera_info has no messages"):
        opened(path)
    assert "front" not in opened(path, cameras=("back_left",))[0].cameras


@given(st.integers(0, 2**31 - 1), st.integers(0, 999_999_999), st.text(max_size=30).filter(lambda t: "\0" not in t))
def test_headers_are_read_without_their_messages(sec, nanosec, frame):
    header = rosbag_messages.header(sec * 10**9 + nanosec, frame)
    message = typestore().types["sensor_msgs/msg/CompressedImage"](header, "jpeg", np.zeros(5, np.uint8))
    for little_endian in (True, False):
        raw = bytes(typestore().serialize_cdr(message, "sensor_msgs/msg/CompressedImage", little_endian=little_endian))
        assert read_header(raw) == (sec * 10**9 + nanosec, frame.lstrip("/"))
    with pytest.raises(ValueError, match=r"header|frame_id"):
        read_header(raw[: 16 + len(frame.encode())])


# --- The writer's own checks ------------------------------------------------------------------------------------------


def test_the_writer_refuses_what_a_bag_cannot_hold(tmp_path):
    with pytest.raises(DataError, match="is there already"):
        RosbagWriter(tmp_path)
    writer = RosbagWriter(tmp_path / "bag")
    with pytest.raises(ValueError, match="call start first"):
        writer.add(sample(0))
    writer.start(drive)
    with pytest.raises(ValueError, match="a bag holds one"):
        writer.start(drive)
    writer.add(sample(1))
    with pytest.raises(ValueError, match=rf"sample at {START_NS} ns after one at"):
        writer.add(sample(0))
    late, lidar = sample(2), sample(2).lidars["top"]
    moved = replace(lidar, ego_from_sensor=Pose.identity())
    with pytest.raises(ValueError, match=r"lidar_top moved on the vehicle by .* m since its first reading"):
        writer.add(replace(late, lidars={"top": moved}))
    double = replace(lidar, fields={**lidar.fields, "sweep": np.arange(len(lidar)) % 2})
    with pytest.raises(ValueError, match=r"lidar_top holds 2 sweeps"):
        writer.add(replace(late, lidars={"top": double}))
    with pytest.raises(ValueError, match=r"its odom_from_ego differs by .* give that to start"):
        writer.add(replace(late, odom_from_ego=Pose.identity()))


def test_a_cloud_read_from_a_bag_may_be_written_again(mcap, tmp_path):
    """Single sweeps carry `time_lag` and `sweep`, as every reader gives them; they add nothing and are not written."""
    first = opened(mcap)
    with RosbagWriter(tmp_path / "again") as writer:
        writer.start(drive)
        for k in range(COUNT):
            writer.add(first[k])
    again = opened(tmp_path / "again")
    for k in range(COUNT):
        np.testing.assert_array_equal(again[k].lidars["top"].xyz, first[k].lidars["top"].xyz)
        assert set(again[k].lidars["top"].fields) == set(first[k].lidars["top"].fields)


def test_an_empty_cloud_goes_through(tmp_path):
    with RosbagWriter(tmp_path / "bag") as writer:
        writer.start(straight)
        fields = {"intensity": np.zeros(0, np.float32)}
        writer.add(Sample(START_NS, {"top": PointCloud(np.zeros((0, 3), np.float32), fields, mount("a"), START_NS)}))
    got = opened(tmp_path / "bag")[0].lidars["top"]
    assert len(got) == 0
    assert set(got.fields) == {"intensity", "time_lag", "sweep"}


def test_inspect_opens_a_bag(mcap, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["perception", "inspect", str(mcap / "drive.mcap"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):
        main()
    said = capsys.readouterr().out
    assert f"Rosbag: {COUNT} samples" in said
    assert "camera back_left" in said
    assert {"bev.png", "cameras.png"} <= {p.name for p in tmp_path.iterdir()}


def test_a_camera_that_is_calibrated_anew_midway(mcap, tmp_path):
    def sharper(m: Logged) -> Logged:
        if m.topic != "/cam_front/camera_info" or m.log_ns < START_NS + 3 * PERIOD_NS - LAG_NS["cam_front"]:
            return m
        info = BagFile(mcap).decode(m.topic, m.raw)
        info.p = np.where(np.isin(np.arange(12), [0, 5]), 50.0, info.p)
        return m._replace(raw=bytes(typestore().serialize_cdr(info, "sensor_msgs/msg/CameraInfo")))

    dataset = opened(edited(mcap, tmp_path / "bag", sharper))
    assert [dataset[k].cameras["front"].intrinsic[0, 0] for k in range(COUNT)] == [40.0] * 3 + [50.0] * 3
    assert dataset[COUNT - 1].cameras["back_left"].intrinsic[0, 0] == 40.0


def test_an_imu_on_its_side_is_turned_into_ego(mcap, tmp_path):
    bag = BagFile(mcap)

    def turned(m: Logged) -> Logged:
        if m.topic == "/tf_static":
            message = bag.decode(m.topic, m.raw)
            own = Pose(np.array([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]]), np.zeros(3))
            message.transforms += rosbag_messages.transforms([("base_link", "imu_link", m.log_ns, own)]).transforms
        elif m.topic == "/imu":
            message = bag.decode(m.topic, m.raw)
            message.header = rosbag_messages.header(m.log_ns, "imu_link")
        else:
            return m
        return m._replace(raw=bytes(typestore().serialize_cdr(message, bag.topics[m.topic].type)))

    dataset = opened(edited(mcap, tmp_path / "bag", turned))
    x, y, z = sample(2).imu.linear_acceleration.T
    np.testing.assert_allclose(dataset[2].imu.linear_acceleration, np.stack([-z, y, x], 1))


def test_truth_lies_beside_the_bag(tmp_path):
    stamp = START_NS
    label = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    grid = VoxelGrid((-1.0, 2.0, 0.5), (0.4, 0.4, 0.2), (2, 3, 4), drive(START_NS))
    voxels = OccupancyGrid3D(grid, label, tuple(f"c{i}" for i in range(24)), 17, stamp)
    with RosbagWriter(tmp_path / "drive") as writer:
        writer.start(drive)
        writer.add(sample(0), Truth(builders.boxes(stamp, (1.0, 2.0)), voxels))
        writer.add(sample(1))
    bag = opened(tmp_path / "drive")
    first, second = bag.truth(0), bag.truth(1)
    for name in ("center", "size", "yaw", "velocity", "score", "label", "num_points"):
        np.testing.assert_array_equal(getattr(first.boxes, name), getattr(builders.boxes(stamp, (1.0, 2.0)), name))
    assert first.boxes.classes == builders.CLASSES and first.boxes.stamp_ns == stamp
    assert first.occupancy.free_label == 17 and first.occupancy.classes[23] == "c23"
    np.testing.assert_array_equal(first.occupancy.label, label)
    assert_same_pose(first.occupancy.grid.ego_from_grid, drive(START_NS), 0)
    assert_same_pose(first.map_from_ego, drive(START_NS), 1e-3)
    assert second.boxes is None and second.map_from_ego is not None
    (tmp_path / "drive" / "truth" / f"{stamp}.npz").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(DataError, match=rf"{stamp}.npz: not a truth file.*\n  write the bag again"):
        bag.truth(0)
