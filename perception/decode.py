"""ROS messages to boundary types by their attributes alone: live messages and those of a bag reader serve alike.

PointCloud2 is `height` rows, `row_step` bytes apart, of `width` points, `point_step` bytes apart, with named numbers
at offsets; Image is `height` rows, `step` bytes apart. Points with a non-finite number are dropped and counted.

A radar may give range, azimuth and elevation (radar_msgs/RadarReturn: m, rad about +z, rad up) instead of x, y and z;
RadarReturn's names of what it measures become ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from pydantic import Field

from perception.config import Config
from perception.errors import DataError, PerceptionError
from perception.rectify import CameraModel
from perception.types import Array, PointCloud, Pose

# sensor_msgs/PointField.datatype
_DATATYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}

# radar_msgs/RadarReturn's names -> PointCloud's.
_POLAR = ("range", "azimuth", "elevation")
_RADAR_NAMES = {"doppler_velocity": "radial_velocity", "amplitude": "power"}

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}

# Fields that drivers give a point's time in: Ouster t, Velodyne time, Hesai and RoboSense timestamp, Livox
# offset_time, Autoware time_stamp.
_TIME_FIELDS = ("time_offset", "t", "time", "timestamp", "offset_time", "time_stamp")
_LONGEST_SWEEP_S = 1.0

# sensor_msgs/image_encodings -> channels and OpenCV's conversion to RGB. OpenCV's own two-letter Bayer names are taken
# from the second row; the four-letter ones mean what ROS means.
_ENCODINGS: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "8UC3": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "8UC4": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
    "8UC1": (1, cv2.COLOR_GRAY2RGB),
    "bayer_rggb8": (1, cv2.COLOR_BayerRGGB2RGB),
    "bayer_bggr8": (1, cv2.COLOR_BayerBGGR2RGB),
    "bayer_gbrg8": (1, cv2.COLOR_BayerGBRG2RGB),
    "bayer_grbg8": (1, cv2.COLOR_BayerGRBG2RGB),
    "yuv422": (2, cv2.COLOR_YUV2RGB_UYVY),
    "uyvy": (2, cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": (2, cv2.COLOR_YUV2RGB_YUYV),
    "yuyv": (2, cv2.COLOR_YUV2RGB_YUYV),
}


JpegDecoder = Literal["opencv", "simplejpeg"]
_JPEG_MAGIC = b"\xff\xd8"


class PointTime(Config):
    """Which field holds each point's time, where the usual names and units do not tell."""

    field: str
    unit: Literal["s", "ms", "us", "ns"] = "s"
    absolute: bool = False
    """Counted from the epoch, not from the message's stamp."""


class CloudFields(Config):
    """How a driver's point fields become ours."""

    fields: dict[str, str] = Field(default_factory=dict)
    """Our name -> the driver's, e.g. intensity: reflectivity."""
    time: PointTime | None = None
    """None: `time_offset`, `t`, `time`, `timestamp`, `offset_time` or `time_stamp`, the unit told by type and size."""
    stamp_at: Literal["start", "end"] | None = None
    """Which end of the sweep the header's stamp marks: the points' times are moved so that the first, or the last, is
    at the stamp. None: the driver counts them from its stamp, wherever in the sweep that is.
    """


class DecodedCloud(NamedTuple):
    """A cloud and how many of the message's points had a non-finite number."""

    cloud: PointCloud
    dropped_nonfinite: int


def stamp_ns(header: Any) -> int:
    """Nanoseconds of a std_msgs/Header."""
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


def decode_cloud(
    message: Any,
    ego_from_sensor: Pose,
    config: CloudFields | None = None,
    needed: Sequence[str] = (),
    where: str = "PointCloud2",
) -> DecodedCloud:
    """A sensor_msgs/PointCloud2 of a LiDAR or radar. Fields of more than one number, and those named _, are left out.

    Args:
        message: anything with PointCloud2's attributes; `data` gives its bytes.
        ego_from_sensor: maps the cloud's frame into ego at the sample's stamp.
        config: names and time of the fields.
        needed: our names of fields without which the cloud is of no use.
        where: names the message in errors; its topic.

    Raises:
        DataError: a needed field or x, y, z is missing, the layout contradicts itself, data is cut off, or the points'
            times are not within a second of the stamp.
    """
    config = config or CloudFields()
    points = _points(message, where)
    columns = {name: points[name] for name in points.dtype.names or () if points[name].ndim == 1}
    for ours, theirs in config.fields.items():
        if theirs not in columns:
            raise _missing_field(where, theirs, ours, columns)
    kept = {name: values for name, values in columns.items() if name not in config.fields.values()}
    columns = {**kept, **{ours: columns[theirs] for ours, theirs in config.fields.items()}}
    columns |= {
        ours: columns.pop(name) for name, ours in _RADAR_NAMES.items() if name in columns and ours not in columns
    }
    if (time := _time_offset(columns, config, stamp_ns(message.header), where)) is not None:
        columns["time_offset"] = time
    if "x" not in columns and all(name in columns for name in _POLAR):
        _to_cartesian(columns)
    for name in ("x", "y", "z", *needed):
        if name not in columns:
            raise _missing_field(where, name, name, columns)

    finite = np.ones(len(points), bool)
    for values in columns.values():
        if values.dtype.kind == "f":
            finite &= np.isfinite(values)
    keep: Any = slice(None) if finite.all() else finite
    xyz = np.empty((int(finite.sum()), 3), np.float32)
    for i, axis in enumerate("xyz"):
        xyz[:, i] = columns.pop(axis)[keep]
    fields = {name: _native(values[keep]) for name, values in columns.items()}
    cloud = PointCloud(xyz, fields, ego_from_sensor, stamp_ns(message.header))
    return DecodedCloud(cloud, len(points) - len(cloud))


def _points(message: Any, where: str) -> Array:
    """The points (N,) as a structured view of the message's bytes, nothing copied unless rows are padded."""
    height, width, step = int(message.height), int(message.width), int(message.point_step)
    order = ">" if message.is_bigendian else "<"
    names, formats, offsets = [], [], []
    for f in message.fields:
        if f.name == "_" or f.count > 1:
            continue
        if f.datatype not in _DATATYPES:
            raise DataError(
                f"{where}: field {f.name!r} has datatype {f.datatype}", "sensor_msgs/PointField knows 1 (INT8) to 8"
            )
        # PCL packs colour bytes into a float; read as one, an opaque colour is NaN.
        form = np.dtype(order + ("u4" if f.name in ("rgb", "rgba") and f.datatype == 7 else _DATATYPES[f.datatype]))
        if f.offset + form.itemsize > step or f.name in names:
            raise DataError(
                f"{where}: field {f.name!r} at byte {f.offset} (+{form.itemsize}) does not fit a point_step of {step}, "
                "or stands twice",
                "mend the driver's fields and point_step",
            )
        names.append(f.name)
        formats.append(form)
        offsets.append(f.offset)
    data = np.frombuffer(message.data, np.uint8) if len(message.data) else np.zeros(0, np.uint8)
    row_step = int(message.row_step) if height > 1 else width * step  # some drivers leave it 0 with a single row
    need = (height - 1) * row_step + width * step if height * width else 0
    if row_step < width * step or len(data) < need:
        raise DataError(
            f"{where}: {height} x {width} points of {step} bytes (row_step {row_step}) need {need} bytes, "
            f"data has {len(data)}",
            "the message was cut off or its sizes are wrong: check the transport and the driver",
        )
    if not height * width:
        return np.zeros(0, np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": step}))
    dtype = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": step})
    return np.ndarray((height, width), dtype, data, strides=(row_step, step)).reshape(-1)


def _to_cartesian(columns: dict[str, Array]) -> None:
    """x, y, z in place of range, azimuth and elevation."""
    distance, azimuth, elevation = (columns.pop(name).astype(np.float64) for name in _POLAR)
    flat = distance * np.cos(elevation)
    columns |= {"x": flat * np.cos(azimuth), "y": flat * np.sin(azimuth), "z": distance * np.sin(elevation)}


def _time_offset(columns: dict[str, Array], config: CloudFields, stamp: int, where: str) -> Array | None:
    """Seconds (N,) float32 since the stamp, its field taken out of the columns; None where points carry no time."""
    time = config.time
    name = time.field if time else next((n for n in _TIME_FIELDS if n in columns), None)
    if name is None:
        return None
    if name not in columns:
        raise _missing_field(where, name, "time_offset", columns)
    column = columns.pop(name)
    values, stamp_s = column.astype(np.float64), stamp * 1e-9
    with np.errstate(invalid="ignore"):
        if time:
            seconds = values * _SECONDS[time.unit] - (stamp_s if time.absolute else 0.0)
        elif column.dtype.kind != "f":
            seconds = values * 1e-9
        elif name == "timestamp":
            middle = float(np.nanmedian(values)) if np.isfinite(values).any() else stamp_s
            unit = min(_SECONDS.values(), key=lambda scale: abs(middle * scale - stamp_s))
            seconds = values * unit - stamp_s
        else:
            seconds = values
        finite = seconds[np.isfinite(seconds)]
        if config.stamp_at and len(finite):
            seconds = seconds - (finite.min() if config.stamp_at == "start" else finite.max())
            finite = seconds[np.isfinite(seconds)]
    if len(finite) and max(abs(finite.min()), abs(finite.max())) > _LONGEST_SWEEP_S:
        raise DataError(
            f"{where}: point times in {name!r} run from {finite.min():.6g} to {finite.max():.6g} s about the stamp",
            f"state what they are, e.g.  time: {{field: {name}, unit: us, absolute: false}}",
        )
    return seconds.astype(np.float32)


def _native(values: Array) -> Array:
    """Contiguous, in this machine's byte order."""
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def _missing_field(where: str, theirs: str, ours: str, columns: Mapping[str, Array]) -> DataError:
    near = difflib.get_close_matches(theirs, columns, n=1, cutoff=0.4)
    example = near[0] if near else next((name for name in columns if name not in "xyz"), "its_name")
    return DataError(
        f"{where}: point cloud has fields ({', '.join(columns)}); {theirs} is needed",
        f"map the driver's name, e.g.  fields: {{{ours}: {example}}}",
    )


def decode_image(message: Any, where: str = "Image") -> Array:
    """A sensor_msgs/Image -> (H, W, 3) uint8 RGB; a view of the message's bytes where they are rgb8 already.

    Raises:
        DataError: an encoding that is no 8-bit colour or grey image, or data that is cut off.
    """
    if message.encoding not in _ENCODINGS:
        raise DataError(
            f"{where}: encoding {message.encoding!r} is not an 8-bit image", f"known: {', '.join(_ENCODINGS)}"
        )
    channels, conversion = _ENCODINGS[message.encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = np.frombuffer(message.data, np.uint8) if len(message.data) else np.zeros(0, np.uint8)
    need = (height - 1) * step + width * channels
    if min(height, width) <= 0 or step < width * channels or len(data) < need:
        raise DataError(
            f"{where}: {width}x{height} {message.encoding} with step {step} needs {need} bytes, data has {len(data)}",
            "the message was cut off or its sizes are wrong: check the transport and the driver",
        )
    pixels: Array = np.ndarray((height, width, channels), np.uint8, data, strides=(step, channels, 1))
    if channels == 2 and width % 2:
        raise DataError(
            f"{where}: {width}x{height} {message.encoding}: two pixels share their colour, and the width is odd",
            "crop or scale the image to an even width in its driver",
        )
    if conversion is None:
        return pixels
    return cv2.cvtColor(np.ascontiguousarray(pixels), conversion)


def decode_compressed_image(message: Any, where: str = "CompressedImage", jpeg: JpegDecoder = "opencv") -> Array:
    """A sensor_msgs/CompressedImage (JPEG, PNG, ...) -> (H, W, 3) uint8 RGB, never turned by an EXIF flag.

    Args:
        message: anything with CompressedImage's attributes.
        where: names the message in errors; its topic.
        jpeg: what decodes a JPEG; both give the same pixels.

    Raises:
        DataError: a depth or 16-bit image, or bytes that do not decode.
        PerceptionError: the decoder asked for is not installed.
    """
    encoding = message.format.partition(";")[0].strip()
    if "compressedDepth" in message.format or encoding in ("16UC1", "32FC1", "mono16"):
        raise DataError(
            f"{where}: format {message.format!r} is no 8-bit colour image", "subscribe to the colour image's topic"
        )
    data = np.frombuffer(message.data, np.uint8) if len(message.data) else np.zeros(0, np.uint8)
    if jpeg == "simplejpeg" and data[:2].tobytes() == _JPEG_MAGIC:
        image = _simplejpeg(data)
    else:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION) if len(data) else None
    if image is None:
        raise DataError(
            f"{where}: {len(data)} bytes of format {message.format!r}, beginning {data[:8].tobytes().hex(' ')!r}, "
            "do not decode",
            "the image was cut off or is of another format: check the transport and the driver",
        )
    return image


def _simplejpeg(data: Array) -> Array | None:
    """The image in JPEG bytes; None where they do not decode."""
    try:
        import simplejpeg
    except ImportError as error:
        raise PerceptionError(
            "simplejpeg is not installed; the vehicle's `jpeg` asks for it",
            "pip install 'perception[jpeg]', or set jpeg: opencv",
        ) from error
    try:
        image: Array = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None
    return image


def decode_camera_info(
    message: Any, rectified: bool = False, balance: float = 0.0, where: str = "CameraInfo"
) -> CameraModel:
    """A sensor_msgs/CameraInfo.

    Its K and D describe the raw image, its P the rectified one of the same driver (`image_rect`). R is not applied:
    a rectified stereo pair's frame_id names the rectified frame.

    Args:
        message: anything with CameraInfo's attributes.
        rectified: the images are rectified already; P is their intrinsic.
        balance: see `CameraModel`.
        where: names the message in errors; its topic.

    Raises:
        DataError: no calibration, an unknown distortion model, binning, or a region of interest off the corner.
    """
    roi = message.roi
    if max(message.binning_x, message.binning_y) > 1 or roi.x_offset or roi.y_offset:
        raise DataError(
            f"{where}: binning {message.binning_x}x{message.binning_y}, region of interest at "
            f"({roi.x_offset}, {roi.y_offset})",
            "send full images, or the CameraInfo of the binned or cropped image itself",
        )
    size = int(message.width), int(message.height)
    try:
        if rectified:
            p = np.asarray(message.p, np.float64).reshape(3, 4)
            return CameraModel(
                "plumb_bob", *size, (float(p[0, 0]), float(p[1, 1])), (float(p[0, 2]), float(p[1, 2])), ()
            )
        k = np.asarray(message.k, np.float64).reshape(3, 3)
        return CameraModel(
            message.distortion_model,
            *size,
            (float(k[0, 0]), float(k[1, 1])),
            (float(k[0, 2]), float(k[1, 2])),
            tuple(float(d) for d in message.d),
            balance,
        )
    except DataError as error:
        raise DataError(f"{where}: {error.what}", error.do) from None
