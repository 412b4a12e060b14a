from __future__ import annotations

import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.decode import (
    CloudFields,
    PointTime,
    decode_camera_info,
    decode_cloud,
    decode_compressed_image,
    decode_image,
    stamp_ns,
)
from perception.errors import DataError
from perception.types import Pose

STAMP = 1_700_000_000_123_456_789
KINDS = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 8}


def header() -> Any:
    return SimpleNamespace(stamp=SimpleNamespace(sec=STAMP // 10**9, nanosec=STAMP % 10**9), frame_id="lidar_top")


@dataclass
class Cloud:
    """sensor_msgs/PointCloud2, by its attributes."""

    height: int
    width: int
    fields: list[Any]
    point_step: int
    row_step: int
    data: Any
    is_bigendian: bool = False
    is_dense: bool = True
    header: Any = field(default_factory=header)


def cloud(points: np.ndarray, height: int = 1, row_pad: int = 0, big: bool = False) -> Cloud:
    """A message of a structured array (N,), with whatever gaps its dtype has."""
    if big:
        points = points.astype(points.dtype.newbyteorder(">"))
    fields = [
        SimpleNamespace(name=n, offset=o, datatype=KINDS[d.base.str[1:]], count=int(np.prod(d.shape, dtype=int)))
        for n, (d, o, *_) in points.dtype.fields.items()
    ]
    width, step = len(points) // height, points.dtype.itemsize
    rows = [points[i * width : (i + 1) * width].tobytes() + b"\xaa" * row_pad for i in range(height)]
    data = array.array("B", b"".join(rows))
    return Cloud(height, width, fields, step, width * step + row_pad, data, big)


def points(n: int = 6, **fields: Any) -> np.ndarray:
    """x, y, z = 1, 2, 3; 4, 5, 6; ... and other fields by name -> values."""
    arrays = {"x": np.arange(n) * 3 + 1, "y": np.arange(n) * 3 + 2, "z": np.arange(n) * 3 + 3}
    arrays = {name: values.astype("f4") for name, values in arrays.items()} | fields
    out = np.zeros(n, [(name, np.asarray(v).dtype.str) for name, v in arrays.items()])
    for name, values in arrays.items():
        out[name] = values
    return out


def decode(message: Cloud, **kwargs: Any):
    return decode_cloud(message, Pose.identity(), **kwargs)


# --- PointCloud2 ------------------------------------------------------------------------------------------------------


def test_xyz_fields_and_stamp():
    got, dropped = decode(cloud(points(intensity=np.arange(6, dtype="f4"), ring=np.arange(6, dtype="u2"))))
    np.testing.assert_array_equal(got.xyz, np.arange(1, 19).reshape(6, 3))
    assert got.xyz.dtype == np.float32
    np.testing.assert_array_equal(got.field("ring"), np.arange(6))
    assert got.field("ring").dtype == np.uint16
    assert (got.stamp_ns, dropped) == (STAMP, 0)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)])
def test_data_of_any_buffer(kind):
    message = cloud(points())
    message.data = kind(message.data.tobytes())
    np.testing.assert_array_equal(decode(message).cloud.xyz, np.arange(1, 19).reshape(6, 3))


def test_gaps_padded_rows_and_big_endian():
    dtype = np.dtype(
        {
            "names": ["ring", "z", "x", "y", "t64"],
            "formats": ["u1", "f4", "f8", "i2", "f8"],
            "offsets": [1, 3, 8, 17, 20],  # nothing aligned, nothing in order
            "itemsize": 31,
        }
    )
    raw = np.zeros(6, dtype)
    raw["x"], raw["y"], raw["z"], raw["ring"], raw["t64"] = 1.5, -7, 2.25, np.arange(6), 1e-3
    for big in (False, True):
        got, _ = decode(cloud(raw, height=3, row_pad=5, big=big))
        np.testing.assert_array_equal(got.xyz, np.tile(np.float32([1.5, -7, 2.25]), (6, 1)))
        np.testing.assert_array_equal(got.field("ring"), np.arange(6))
        assert got.field("t64").dtype == np.dtype("f8")  # native order
        assert got.field("t64").dtype.isnative
        assert got.field("t64").flags.c_contiguous


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from(sorted(KINDS)), min_size=3, max_size=8),
    st.integers(0, 20),
    st.integers(1, 3),
    st.integers(0, 7),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_layout_reads_back_what_was_written(kinds, width, height, pad, big, random):
    names = ["x", "y", "z", *(f"f{i}" for i in range(len(kinds) - 3))]
    random.shuffle(names)
    offsets = np.concatenate([[pad], pad + np.cumsum([np.dtype(k).itemsize + random.randrange(4) for k in kinds])])
    dtype = np.dtype(
        {"names": names, "formats": kinds, "offsets": offsets[:-1].tolist(), "itemsize": int(offsets[-1]) + pad}
    )
    raw = np.zeros(width * height, dtype)
    for i, name in enumerate(names):
        raw[name] = (np.arange(len(raw)) + i) % 100
    got, dropped = decode(cloud(raw, height, row_pad=pad, big=big))
    assert dropped == 0
    for axis, name in enumerate("xyz"):
        np.testing.assert_array_equal(got.xyz[:, axis], raw[name])
    for name in names:
        if name not in "xyz":
            np.testing.assert_array_equal(got.field(name), raw[name])
            assert got.field(name).dtype == raw.dtype[name]


def test_non_finite_points_are_dropped_and_counted():
    raw = points(intensity=np.arange(6, dtype="f4"))
    raw["x"][1], raw["z"][2], raw["intensity"][4] = np.nan, -np.inf, np.inf
    got, dropped = decode(cloud(raw))
    assert dropped == 3
    np.testing.assert_array_equal(got.field("intensity"), [0, 3, 5])
    raw["x"] = np.nan
    got, dropped = decode(cloud(raw))
    assert (len(got), dropped) == (0, 6)
    assert set(got.fields) == {"intensity"}


def test_an_empty_message_is_an_empty_cloud():
    for message in (cloud(points(0)), cloud(points(0), height=4)):
        message.data = b""
        got, dropped = decode(message)
        assert (len(got), dropped) == (0, 0)


def test_fields_are_renamed_even_swapped():
    raw = points(reflectivity=np.full(6, 3, "u2"), a=np.full(6, 1.0), b=np.full(6, 2.0))
    fields = {"intensity": "reflectivity", "a": "b", "b": "a"}
    got, _ = decode(cloud(raw), config=CloudFields(fields=fields), needed=("intensity",))
    assert set(got.fields) == {"intensity", "a", "b"}
    assert got.field("intensity")[0] == 3
    assert (got.field("a")[0], got.field("b")[0]) == (2.0, 1.0)


def test_paddings_and_vectors_are_left_out_and_packed_colour_is_no_float():
    dtype = np.dtype([("x", "f4"), ("y", "f4"), ("z", "f4"), ("_", "u1", (3,)), ("normal", "f4", (3,)), ("rgb", "f4")])
    raw = np.zeros(2, dtype)
    raw["normal"] = np.nan
    raw["rgb"] = np.array([0xFFFF8000, 0xFF00FF00], "u4").view("f4")  # NaN as a float
    got, dropped = decode(cloud(raw))
    assert (len(got), dropped, set(got.fields)) == (2, 0, {"rgb"})
    np.testing.assert_array_equal(got.field("rgb"), [0xFFFF8000, 0xFF00FF00])


def test_a_missing_field_names_those_there_are_and_the_cure():
    message = cloud(points(intensty=np.zeros(6)))
    with pytest.raises(
        DataError,
        match=r"/lidar/points: point cloud has fields \(x, y, z, intensty\); intensity is needed\n"
        r"  map the driver's name, e.g.  fields: \{intensity: intensty\}",
    ):
        decode(message, needed=("intensity",), where="/lidar/points")
    with pytest.raises(DataError, match=r"reflectivity is needed\n .*fields: \{intensity: "):
        decode(message, config=CloudFields(fields={"intensity": "reflectivity"}))
    raw = np.zeros(2, [("x", "f4"), ("y", "f4")])
    with pytest.raises(DataError, match=r"has fields \(x, y\); z is needed"):
        decode(cloud(raw))


def test_a_truncated_or_contradictory_message_is_refused():
    message = cloud(points(), height=2, row_pad=4)
    message.data = message.data[:-5]
    with pytest.raises(DataError, match=r"2 x 3 points of 12 bytes \(row_step 40\) need 76 bytes, data has 75"):
        decode(message)
    message = cloud(points())
    message.width = 2**31  # nothing of that size is allocated
    with pytest.raises(DataError, match="need 25769803776 bytes, data has 72"):
        decode(message)
    message = cloud(points(), height=2)
    message.row_step = 8
    with pytest.raises(DataError, match="row_step 8"):
        decode(message)
    message = cloud(points())
    message.point_step = 11
    with pytest.raises(DataError, match=r"field 'z' at byte 8 \(\+4\) does not fit a point_step of 11"):
        decode(message)
    message.fields[0].datatype = 9
    with pytest.raises(DataError, match="field 'x' has datatype 9"):
        decode(message)


OFFSETS = np.array([0.0, 0.01, 0.05, 0.0999, -0.02, 0.03])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("t", np.rint(np.abs(OFFSETS) * 1e9).astype("u4")),  # Ouster: ns since the stamp
        ("offset_time", np.rint(np.abs(OFFSETS) * 1e9).astype("u4")),  # Livox
        ("time", OFFSETS.astype("f4")),  # Velodyne: s about the stamp
        ("time_offset", OFFSETS.astype("f4")),
        ("timestamp", STAMP * 1e-9 + OFFSETS),  # Hesai, RoboSense: s since 1970
        ("timestamp", STAMP + OFFSETS * 1e9),  # Livox: ns since 1970
        ("timestamp", STAMP * 1e-3 + OFFSETS * 1e6),  # us since 1970
    ],
)
def test_point_times_of_the_usual_drivers(name, values):
    got, _ = decode(cloud(points(**{name: values})))
    assert set(got.fields) == {"time_offset"}
    assert got.field("time_offset").dtype == np.float32
    expected = np.abs(OFFSETS) if values.dtype.kind == "u" else OFFSETS
    np.testing.assert_allclose(got.field("time_offset"), expected, atol=1e-6)


def test_point_times_of_other_drivers_are_stated():
    config = CloudFields(time=PointTime(field="stamp_us", unit="us", absolute=True))
    got, _ = decode(cloud(points(stamp_us=STAMP * 1e-3 + OFFSETS * 1e6)), config=config)
    np.testing.assert_allclose(got.field("time_offset"), OFFSETS, atol=1e-6)
    micro = cloud(points(t=np.rint(np.abs(OFFSETS) * 1e6).astype("u4")))
    got, _ = decode(micro, config=CloudFields(time=PointTime(field="t", unit="us")))
    np.testing.assert_allclose(got.field("time_offset"), np.abs(OFFSETS), atol=1e-6)
    with pytest.raises(DataError, match="stamp_us is needed"):
        decode(micro, config=config)


def test_point_times_far_from_the_stamp_are_refused():
    message = cloud(points(time=np.float32([0, 0, 0, 0, 0, 53])))
    with pytest.raises(
        DataError, match=r"/points: point times in 'time' run from 0 to 53 s about the stamp\n.*unit: us"
    ):
        decode(message, where="/points")


def test_the_stamp_marks_the_start_or_the_end_of_the_sweep():
    points = np.zeros(3, [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("t", "<u4")])
    points["t"] = [20_000_000, 0, 100_000_000]

    def offset(**keys):
        return decode_cloud(cloud(points), Pose.identity(), CloudFields(**keys)).cloud.field("time_offset")

    np.testing.assert_allclose(offset(), [0.02, 0, 0.1], atol=1e-8)
    np.testing.assert_allclose(offset(stamp_at="start"), [0.02, 0, 0.1], atol=1e-8)
    np.testing.assert_allclose(offset(stamp_at="end"), [-0.08, -0.1, 0], atol=1e-8)
    points["t"] += 2_000_000_000  # a clock of its own
    np.testing.assert_allclose(offset(stamp_at="end"), [-0.08, -0.1, 0], atol=1e-8)
    with pytest.raises(DataError, match=r"point times in 't' run from 2 to 2\.1 s"):
        offset()


def test_a_radar_in_polar_coordinates_with_radar_msgs_names():
    names = ("range", "azimuth", "elevation", "doppler_velocity", "amplitude")
    points = np.array([(10, 0, 0, -3, 7), (2, np.pi / 2, np.pi / 6, 1, 9)], [(n, "<f4") for n in names])
    found = decode_cloud(cloud(points), Pose.identity(), needed=("radial_velocity",)).cloud
    np.testing.assert_allclose(found.xyz, [[10, 0, 0], [0, 3**0.5, 1]], atol=1e-6)
    assert found.field("radial_velocity").tolist() == [-3, 1] and found.field("power").tolist() == [7, 9]
    assert set(found.fields) == {"radial_velocity", "power"}


def test_real_message_classes_decode_too():
    stores = pytest.importorskip("rosbags.typesys", reason="rosbags (extra: bag) is not installed")
    types = stores.get_typestore(stores.Stores.ROS2_HUMBLE).types
    plain = cloud(points(intensity=np.arange(6, dtype="f4")))
    fields = [types["sensor_msgs/msg/PointField"](f.name, f.offset, f.datatype, f.count) for f in plain.fields]
    time = types["builtin_interfaces/msg/Time"](STAMP // 10**9, STAMP % 10**9)
    message = types["sensor_msgs/msg/PointCloud2"](
        types["std_msgs/msg/Header"](time, "lidar"),
        plain.height,
        plain.width,
        fields,
        False,
        plain.point_step,
        plain.row_step,
        np.frombuffer(plain.data, np.uint8),
        True,
    )
    np.testing.assert_array_equal(decode(message).cloud.xyz, np.arange(1, 19).reshape(6, 3))


def test_stamp_of_a_header_is_exact():
    assert stamp_ns(header()) == STAMP
    assert type(stamp_ns(SimpleNamespace(stamp=SimpleNamespace(sec=np.int32(7), nanosec=np.uint32(5))))) is int


# --- Image ------------------------------------------------------------------------------------------------------------

RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def image(encoding: str, pixels: np.ndarray, pad: int = 0) -> Any:
    rows = pixels.reshape(len(pixels), -1)
    data = np.concatenate([rows, np.full((len(rows), pad), 170, np.uint8)], 1)
    return SimpleNamespace(
        height=pixels.shape[0],
        width=pixels.shape[1],
        encoding=encoding,
        is_bigendian=0,
        step=data.shape[1],
        data=array.array("B", data.tobytes()),
    )


@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "pixels"),
    [
        ("rgb8", RGB),
        ("bgr8", RGB[..., ::-1]),
        ("rgba8", np.dstack([RGB, RGB[..., :1]])),
        ("bgra8", np.dstack([RGB[..., ::-1], RGB[..., :1]])),
        ("8UC3", RGB[..., ::-1]),
    ],
)
def test_colour_images(encoding, pixels, pad):
    got = decode_image(image(encoding, pixels, pad))
    np.testing.assert_array_equal(got, RGB)
    assert got.dtype == np.uint8


def test_grey_images_have_three_equal_channels():
    got = decode_image(image("mono8", RGB[..., :1], pad=3))
    np.testing.assert_array_equal(got, np.repeat(RGB[..., :1], 3, -1))


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_names_give_the_first_two_pixels_of_the_first_two_rows(pattern):
    colour = {"r": 200, "g": 100, "b": 30}
    tile = np.array([[colour[pattern[0]], colour[pattern[1]]], [colour[pattern[2]], colour[pattern[3]]]], np.uint8)
    got = decode_image(image(f"bayer_{pattern}8", np.tile(tile, (4, 5))[..., None]))
    assert got[2:-2, 2:-2].reshape(-1, 3).tolist() == [[200, 100, 30]] * 24


def test_yuv422_of_an_odd_width_is_a_bad_frame():
    with pytest.raises(DataError, match=r"7x4 uyvy: .*width is odd"):
        decode_image(image("uyvy", np.zeros((4, 7, 2), np.uint8)))


@pytest.mark.parametrize(("encoding", "order"), [("yuv422", "uyvy"), ("yuv422_yuy2", "yuyv")])
def test_yuv422_pairs_share_their_colour(encoding, order):
    # BT.601 red, limited range: Y 81, U 90, V 240.
    quad = {"uyvy": [90, 81, 240, 81], "yuyv": [81, 90, 81, 240]}[order]
    got = decode_image(image(encoding, np.tile(np.uint8(quad), (2, 3)).reshape(2, 6, 2)))
    np.testing.assert_allclose(got, np.broadcast_to([254, 0, 0], (2, 6, 3)), atol=2)


def test_images_that_are_none_are_refused():
    with pytest.raises(DataError, match=r"/depth: encoding '16UC1' is not an 8-bit image\n  known: rgb8"):
        decode_image(image("16UC1", RGB[..., :2]), "/depth")
    cut = image("rgb8", RGB)
    cut.data = cut.data[:-1]
    with pytest.raises(DataError, match="6x4 rgb8 with step 18 needs 72 bytes, data has 71"):
        decode_image(cut)
    cut.height = 0
    with pytest.raises(DataError, match="6x0"):
        decode_image(cut)


SMOOTH = np.stack(np.broadcast_arrays(np.arange(64), np.arange(48)[:, None] * 4, 90), -1).astype(np.uint8)


def compressed(form: str, suffix: str, rgb: np.ndarray = SMOOTH) -> Any:
    return SimpleNamespace(format=form, data=cv2.imencode(suffix, rgb[..., ::-1])[1].tobytes())


def test_jpeg_and_png():
    np.testing.assert_array_equal(decode_compressed_image(compressed("bgr8; png compressed bgr8", ".png")), SMOOTH)
    got = decode_compressed_image(compressed("jpeg", ".jpg"))
    np.testing.assert_allclose(got.astype(int), SMOOTH.astype(int), atol=12)
    assert got.shape == (48, 64, 3)


@pytest.mark.parametrize("color", [True, False])
def test_both_jpeg_decoders_give_the_same_pixels(color):
    pytest.importorskip("simplejpeg", reason="extra jpeg is not installed")
    image = np.random.default_rng(1).integers(0, 255, (45, 80, 3), np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 3) if color else image[..., 0]
    data = cv2.imencode(".jpg", image)[1].tobytes()
    fast, plain = (
        decode_compressed_image(SimpleNamespace(format="jpeg", data=data), jpeg=decoder)
        for decoder in ("simplejpeg", "opencv")
    )
    np.testing.assert_array_equal(fast, plain)
    with pytest.raises(DataError, match="do not decode"):
        decode_compressed_image(SimpleNamespace(format="jpeg", data=data[:40]), jpeg="simplejpeg")


def test_exif_does_not_turn_the_image():
    message = compressed("jpeg", ".jpg")
    # APP1 with one tag: orientation (0x0112) = 6, a quarter turn.
    tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    app1 = b"Exif\0\0" + tiff
    message.data = message.data[:2] + b"\xff\xe1" + (len(app1) + 2).to_bytes(2, "big") + app1 + message.data[2:]
    assert cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_COLOR).shape == (64, 48, 3)  # it would
    assert decode_compressed_image(message).shape == (48, 64, 3)


def test_compressed_images_that_are_none_are_refused():
    with pytest.raises(DataError, match="'16UC1; compressedDepth png' is no 8-bit colour image"):
        decode_compressed_image(compressed("16UC1; compressedDepth png", ".png"))
    with pytest.raises(DataError, match="mono16"):
        decode_compressed_image(compressed("mono16; png compressed", ".png"))
    with pytest.raises(DataError, match=r"/cam: 4 bytes of format 'jpeg', beginning 'ff d8 ff e0', do not decode"):
        decode_compressed_image(SimpleNamespace(format="jpeg", data=b"\xff\xd8\xff\xe0"), "/cam")
    with pytest.raises(DataError, match="0 bytes"):
        decode_compressed_image(SimpleNamespace(format="jpeg", data=b""))


# --- CameraInfo -------------------------------------------------------------------------------------------------------


def info(**changes: Any) -> Any:
    message = SimpleNamespace(
        width=640,
        height=480,
        distortion_model="plumb_bob",
        d=[0.1, -0.2, 0.001, 0.002, 0.05],
        k=np.array([500.0, 0, 320, 0, 510, 240, 0, 0, 1]),
        r=np.eye(3).ravel(),
        p=np.array([450.0, 0, 310, 0, 0, 460, 230, 0, 0, 0, 1, 0]),
        binning_x=0,
        binning_y=1,
        roi=SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0, do_rectify=False),
    )
    return SimpleNamespace(**{**vars(message), **changes})


def test_camera_info_gives_the_lens():
    model = decode_camera_info(info())
    assert (model.model, model.width, model.height) == ("plumb_bob", 640, 480)
    assert (model.focal_px, model.center_px) == ((500.0, 510.0), (320.0, 240.0))
    assert model.distortion == (0.1, -0.2, 0.001, 0.002, 0.05)
    fisheye = decode_camera_info(info(distortion_model="equidistant", d=[0.1, 0, 0, 0]), balance=0.5)
    assert (fisheye.model, fisheye.balance) == ("equidistant", 0.5)
    assert hash(model) == hash(decode_camera_info(info()))


def test_a_rectified_topic_has_p_and_no_distortion():
    model = decode_camera_info(info(distortion_model="whatever"), rectified=True)
    rgb = np.zeros((480, 640, 3), np.uint8)
    same, k = model.rectify(rgb)
    assert same is rgb
    np.testing.assert_array_equal(k, [[450, 0, 310], [0, 460, 230], [0, 0, 1]])


def test_camera_info_that_does_not_describe_the_image_is_refused():
    with pytest.raises(DataError, match=r"/cam/info: camera model: unknown distortion model ''"):
        decode_camera_info(info(distortion_model=""), where="/cam/info")
    with pytest.raises(DataError, match=r"/cam/info: .*not a calibration\n.*uncalibrated"):
        decode_camera_info(info(k=np.zeros(9)), where="/cam/info")
    with pytest.raises(DataError, match="binning 2x1"):
        decode_camera_info(info(binning_x=2))
    with pytest.raises(DataError, match=r"region of interest at \(8, 0\)"):
        decode_camera_info(info(roi=SimpleNamespace(x_offset=8, y_offset=0)))
