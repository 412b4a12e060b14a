"""The vehicle's configuration and the assembly of samples; the bag's tests go through all of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from perception.assembly import assemble
from perception.errors import ConfigError, DataError
from perception.frames import FrameError, FrameTree
from perception.rectify import CameraModel
from perception.types import Pose
from perception.vehicle import CameraSensor, VehicleConfig

MS = 1_000_000
POINT = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("intensity", "<f4")])


def vehicle(**keys) -> VehicleConfig:
    sensors = {
        "lidars": {"top": {"topic": "/points"}},
        "radars": {"front": {"topic": "/radar"}},
        "cameras": {"front": {"topic": "/eye/image_raw/compressed", "tolerance_s": 0.03}},
    }
    return VehicleConfig.model_validate({"sensors": sensors, **keys})


def header(stamp_ns: int, frame: str) -> SimpleNamespace:
    return SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=stamp_ns), frame_id=frame)


def cloud(stamp_ns: int, xyz: tuple[float, float, float] = (1, 0, 0), frame: str = "lidar") -> Any:
    points = np.array([(*xyz, 100.0), (np.nan, 0, 0, 1.0)], POINT)
    fields = [SimpleNamespace(name=n, offset=4 * i, datatype=7, count=1) for i, n in enumerate(POINT.names or ())]
    return SimpleNamespace(
        header=header(stamp_ns, frame), height=1, width=2, fields=fields, is_bigendian=False,
        point_step=16, row_step=32, data=points.tobytes(),
    )  # fmt: skip


def image(stamp_ns: int, width: int = 8) -> Any:
    data = np.full(4 * width, 77, np.uint8).tobytes()
    return SimpleNamespace(
        header=header(stamp_ns, "eye"), height=4, width=width, encoding="mono8", step=width, data=data
    )


MODEL = {"cam_front": CameraModel("plumb_bob", 8, 4, (4.0, 4.0), (3.5, 1.5), ())}


@pytest.fixture
def frames() -> FrameTree:
    """1 m/s along x; the sensors sit above the base."""
    tree = FrameTree()
    for frame, height in {"lidar": 2.0, "eye": 1.0}.items():
        tree.add_static("base_link", frame, Pose(np.eye(3), np.array([0.0, 0, height])))
    for k in range(11):
        tree.add("odom", "base_link", k * 100 * MS, Pose(np.eye(3), np.array([0.1 * k, 0, 0])))
    return tree


def test_channels_name_the_sensors_in_the_synchroniser():
    config = vehicle()
    assert config.sync.anchor == "lidar_top"
    assert list(config.sync.sensors) == ["lidar_top", "radar_front", "cam_front"]
    assert config.sync.sensors["cam_front"].tolerance_s == 0.03
    assert config.sync.sensors["lidar_top"].sweeps_s == 0  # one sweep needs no past
    assert vehicle(sweeps=10).sync.sensors["lidar_top"].sweeps_s == 0.5
    assert vehicle(anchor="cam_front").sync.anchor == "cam_front"
    with pytest.raises(ConfigError, match=r"anchor: 'cam_rear' is none of .*\n.*lidar_top, radar_front, cam_front"):
        _ = vehicle(anchor="cam_rear").sync
    with pytest.raises(ConfigError, match=r"anchor: None is none of .*\n.*none"):
        _ = VehicleConfig().sync
    with pytest.raises(ValidationError, match="Extra inputs"):
        vehicle(wait=0.1)


@pytest.mark.parametrize(
    ("topic", "info"),
    [
        ("/eye/image_raw", "/eye/camera_info"),
        ("/eye/image_raw/compressed", "/eye/camera_info"),
        ("/cam_front/image_rect_compressed", "/cam_front/camera_info"),
        ("/image", "/camera_info"),
    ],
)
def test_calibration_is_looked_for_beside_the_image(topic, info):
    assert CameraSensor(topic=topic).camera_info == info
    assert CameraSensor(topic=topic, info_topic="/own").camera_info == "/own"


def test_everything_is_in_ego_at_the_samples_stamp(frames):
    messages = {"lidar_top": [cloud(1000 * MS), cloud(900 * MS, (1.1, 0, 0))], "cam_front": [image(950 * MS)]}
    sample, dropped = assemble(vehicle(sweeps=2), 1000 * MS, messages, frames, MODEL)
    top = sample.lidars["top"]
    np.testing.assert_allclose(top.xyz_ego(), [[1, 0, 2], [1, 0, 2]], atol=1e-6)  # a thing at rest, seen twice
    np.testing.assert_allclose(top.field("time_lag"), [0, 0.1], atol=1e-7)
    np.testing.assert_allclose(sample.cameras["front"].ego_from_camera.translation, [-0.05, 0, 1], atol=1e-9)
    assert sample.cameras["front"].stamp_ns == 950 * MS
    np.testing.assert_allclose(sample.odom_from_ego.translation, [1.0, 0, 0])
    assert dropped == {"lidar_top": 2}
    assert sample.radars == {}
    single, _ = assemble(vehicle(), 1000 * MS, messages, frames, MODEL)
    assert len(single.lidars["top"]) == 1


def test_intensity_is_brought_to_one_range(frames):
    config = vehicle(sensors={"lidars": {"top": {"topic": "/points", "intensity_max": 65535}}})
    sample, _ = assemble(config, 0, {"lidar_top": [cloud(0)]}, frames, {})
    np.testing.assert_allclose(sample.lidars["top"].field("intensity"), [100 * 255 / 65535], rtol=1e-6)


def test_a_frame_may_be_put_in_place_of_the_headers(frames):
    config = vehicle(sensors={"lidars": {"top": {"topic": "/points", "frame": "eye"}}})
    sample, _ = assemble(config, 0, {"lidar_top": [cloud(0, frame="nonsense")]}, frames, {})
    assert sample.lidars["top"].ego_from_sensor.translation.tolist() == [0, 0, 1]


def test_no_transform_is_an_error_never_identity(frames):
    with pytest.raises(FrameError, match=r"no frame 'laser'; there are: base_link, eye, lidar, odom"):
        assemble(vehicle(), 0, {"lidar_top": [cloud(0, frame="laser")]}, frames, {})
    with pytest.raises(FrameError, match=r"'odom' -> 'base_link' is known from 0.000 to 1.000 s") as error:
        assemble(vehicle(), 1000 * MS, {"cam_front": [image(1100 * MS - 1)]}, frames, MODEL)
    assert error.value.reason == "after_buffer"


def test_an_image_of_another_size_than_its_calibration_names_the_topic(frames):
    with pytest.raises(DataError, match=r"/eye/image_raw/compressed: image is 6x4 px, its camera model 8x4"):
        assemble(vehicle(), 0, {"cam_front": [image(0, width=6)]}, frames, MODEL)


def test_points_are_put_where_the_stamp_would_see_them_on_request(frames):
    points = np.array([(1, 0, 0, 0.1), (1, 0, 0, 0.0)], [(n, "<f4") for n in ("x", "y", "z", "time")])
    message = cloud(500 * MS)
    message.fields[3].name, message.data = "time", points.tobytes()
    sensor = {"topic": "/points", "deskew": True}
    sample, _ = assemble(vehicle(sensors={"lidars": {"top": sensor}}), 500 * MS, {"lidar_top": [message]}, frames, {})
    np.testing.assert_allclose(sample.lidars["top"].xyz[:, 0], [1.1, 1.0], atol=1e-6)  # 0.1 s later, 0.1 m further on
    assert "time_offset" not in sample.lidars["top"].fields
    late = vehicle(sensors={"lidars": {"top": {**sensor, "stamp_at": "start"}}})
    message.header = header(950 * MS, "lidar")
    with pytest.raises(FrameError, match=r"'odom' -> 'base_link' is known from 0\.000 to 1\.000 s"):
        assemble(late, 950 * MS, {"lidar_top": [message]}, frames, {})


def test_an_image_without_calibration_is_an_error(frames):
    with pytest.raises(DataError, match=r"compressed: no calibration for it yet\n  publish its CameraInfo on /eye/"):
        assemble(vehicle(), 0, {"cam_front": [image(0)]}, frames, {})


def test_the_topics_name_tells_a_compressed_image():
    assert CameraSensor(topic="/cam_front/image_rect_compressed").is_compressed
    assert CameraSensor(topic="/compressed/image_raw").is_compressed is False
    assert CameraSensor(topic="/image", compressed=True).is_compressed
