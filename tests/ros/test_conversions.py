"""Messages written by numpy are, byte for byte, what the libraries of ROS write of the same message built of objects.

The objects here are those of `rosbags`, in the definitions of Humble and of Kilted; with rclpy installed its own
serialisation is a second witness. What a message says is tested by reading its bytes back.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rosbags", reason="rosbags (extra: bag) is not installed")
pytest.importorskip("perception_ros", reason="ros2_ws/src/perception_ros is not installed")
from builders import EGO_FROM_LIDAR, camera, cloud
from perception_ros import detections, localization, markers, occupancy, overlay
from perception_ros.cdr import CdrWriter
from perception_ros.interfaces import add_package
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from perception.datasets.rosbag_file import Header
from perception.errors import DataError
from perception.types import IGNORE_LABEL, Boxes3D, Localization, OccupancyGrid3D, Odometry, Pose, Sample, VoxelGrid
from perception.visualize import color_of

pytestmark = pytest.mark.usefixtures("interfaces")
WORKSPACE = Path(__file__).resolve().parents[2] / "ros2_ws" / "src"
HEADER = Header(1_700_000_000_123_456_789, "base_link")

VISION = {
    "vision_msgs/msg/ObjectHypothesis": "string class_id\nfloat64 score",
    "vision_msgs/msg/ObjectHypothesisWithPose": (
        "vision_msgs/ObjectHypothesis hypothesis\ngeometry_msgs/PoseWithCovariance pose"
    ),
    "vision_msgs/msg/BoundingBox3D": "geometry_msgs/Pose center\ngeometry_msgs/Vector3 size",
    "vision_msgs/msg/Detection3D": (
        "std_msgs/Header header\nvision_msgs/ObjectHypothesisWithPose[] results\nvision_msgs/BoundingBox3D bbox\n"
        "string id"
    ),
    "vision_msgs/msg/Detection3DArray": "std_msgs/Header header\nvision_msgs/Detection3D[] detections",
}
AUTOWARE = {
    "autoware_perception_msgs/msg/ObjectClassification": "uint8 label\nfloat32 probability",
    "autoware_perception_msgs/msg/DetectedObjectKinematics": (
        "geometry_msgs/PoseWithCovariance pose_with_covariance\nbool has_position_covariance\n"
        "uint8 orientation_availability\ngeometry_msgs/TwistWithCovariance twist_with_covariance\nbool has_twist\n"
        "bool has_twist_covariance"
    ),
    "autoware_perception_msgs/msg/Shape": (
        "uint8 type\ngeometry_msgs/Polygon footprint\ngeometry_msgs/Vector3 dimensions"
    ),
    "autoware_perception_msgs/msg/DetectedObject": (
        "float32 existence_probability\nautoware_perception_msgs/ObjectClassification[] classification\n"
        "autoware_perception_msgs/DetectedObjectKinematics kinematics\nautoware_perception_msgs/Shape shape"
    ),
    "autoware_perception_msgs/msg/DetectedObjects": (
        "std_msgs/Header header\nautoware_perception_msgs/DetectedObject[] objects"
    ),
}
"""Definitions of packages that need not be installed (vision_msgs 4, autoware_perception_msgs 1)."""


@lru_cache
def store(release: str = "ROS2_KILTED") -> Any:
    """Message types of a release, ours and those above."""
    types = get_typestore(Stores[release])
    ours = {f"perception_msgs/msg/{p.stem}": p.read_text() for p in WORKSPACE.glob("perception_msgs/msg/*.msg")}
    found = {}
    for name, text in {**ours, **VISION, **AUTOWARE}.items():
        found.update(get_types_from_msg(text, name))
    types.register(found)
    return types


def read(raw: bytes, name: str) -> Any:
    """The message in some bytes, after the check that both releases' libraries, and rclpy, write them the same."""
    for release in ("ROS2_HUMBLE", "ROS2_KILTED"):
        message = store(release).deserialize_cdr(raw, name)
        assert bytes(store(release).serialize_cdr(message, name)) == raw
    package, _, kind = name.replace("/msg/", "/").partition("/")
    try:
        module = import_module(f"{package}.msg")
        from rclpy.serialization import deserialize_message, serialize_message
    except ImportError:
        return message
    theirs = serialize_message(deserialize_message(raw, getattr(module, kind)))
    # Fast CDR leaves what was in its buffer between the fields; read back and written again, zeros stand there.
    assert len(theirs) == len(raw)
    assert bytes(store().serialize_cdr(store().deserialize_cdr(theirs, name), name)) == raw
    return message


def some_boxes(count: int, seed: int = 0, classes: tuple[str, ...] = ("car", "pedestrian", "dödö")) -> Boxes3D:
    """Random boxes; every third stands still, every fifth is of unknown velocity."""
    rng = np.random.default_rng(seed)
    velocity = rng.uniform(-9, 9, (count, 2))
    velocity[::3], velocity[::5] = 0.0, np.nan
    return Boxes3D(
        rng.uniform(-50, 50, (count, 3)),
        rng.uniform(0.3, 9, (count, 3)),
        rng.uniform(-4, 4, count),
        velocity,
        rng.uniform(0, 1, count),
        rng.integers(0, len(classes), count),
        classes,
        HEADER.stamp_ns,
        track_id=np.array([f"{seed}-{'x' * (i % 7)}" for i in range(count)], dtype=str) if seed % 2 else None,
    )


def some_occupancy(shape: tuple[int, int, int], seed: int = 0, score: bool = True) -> OccupancyGrid3D:
    rng = np.random.default_rng(seed)
    label = rng.choice(np.array([0, 1, 2, 3, IGNORE_LABEL], np.uint8), shape, p=[0.5, 0.2, 0.1, 0.1, 0.1])
    grid = VoxelGrid((-4.0, -2.5, -1.0), (0.5, 0.5, 0.25), shape, EGO_FROM_LIDAR)
    scores = rng.uniform(0, 1, shape).astype(np.float32) if score else None
    return OccupancyGrid3D(grid, label, ("free", "car", "driveable_surface", "vegetation"), 0, HEADER.stamp_ns, scores)


headers = st.builds(
    Header,
    st.integers(0, 2**31 * 1_000_000_000 - 1),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9),
)


class TestCdr:
    def test_numbers_lie_at_multiples_of_their_size_behind_the_encapsulation(self):
        out = CdrWriter()
        out.numbers("B", 1)
        out.numbers("d", 1.0)
        out.string("ab")
        out.numbers("I", 7)
        raw = out.finish()
        assert raw[:4] == b"\0\1\0\0"
        assert raw[4:] == (
            b"\1" + bytes(7) + b"\0\0\0\0\0\0\xf0\x3f" + b"\3\0\0\0ab\0" + bytes(1) + b"\7\0\0\0"
        )  # fmt: skip

    def test_an_empty_sequence_is_its_length_alone(self):
        out = CdrWriter()
        out.sequence(np.zeros(0))
        assert out.finish()[4:] == bytes(4)

    def test_numbers_of_the_other_byte_order_are_turned(self):
        out = CdrWriter()
        out.sequence(np.array([1, 2], ">u4"))
        assert out.finish()[4:] == b"\2\0\0\0\1\0\0\0\2\0\0\0"


class TestDetections:
    @settings(max_examples=25)
    @given(headers, st.integers(0, 7), st.integers(0, 9))
    def test_detections(self, header, count, seed):
        boxes = some_boxes(count, seed)
        message = read(detections.detections(boxes, header), "perception_msgs/msg/Detections3D")
        assert stamp(message.header) == header.stamp_ns and message.header.frame_id == header.frame
        assert tuple(message.classes) == boxes.classes and len(message.detections) == count
        for i, found in enumerate(message.detections):
            assert found.label == boxes.label[i] and found.score == np.float32(boxes.score[i])
            assert found.track_id == ("" if boxes.track_id is None else boxes.track_id[i])
            np.testing.assert_array_equal(vector(found.pose.position), boxes.center[i])
            np.testing.assert_array_equal(vector(found.size), boxes.size[i])
            np.testing.assert_array_equal(vector(found.velocity)[:2], boxes.velocity[i])
            np.testing.assert_array_equal(vector(found.velocity)[2], 0 * boxes.velocity[i, 0])  # NaN where unknown
            turned = Pose.from_quaternion(vector(found.pose.orientation, "xyzw"))
            np.testing.assert_allclose(turned.rotation, Pose.from_yaw(boxes.yaw[i]).rotation, atol=1e-12)

    @settings(max_examples=25)
    @given(headers, st.integers(0, 7), st.integers(0, 9))
    def test_vision_detections(self, header, count, seed):
        boxes = some_boxes(count, seed)
        message = read(detections.vision_detections(boxes, header), "vision_msgs/msg/Detection3DArray")
        assert [d.results[0].hypothesis.class_id for d in message.detections] == [boxes.classes[k] for k in boxes.label]
        assert [d.results[0].hypothesis.score for d in message.detections] == boxes.score.tolist()
        for i, found in enumerate(message.detections):
            np.testing.assert_array_equal(vector(found.bbox.center.position), boxes.center[i])
            np.testing.assert_array_equal(vector(found.results[0].pose.pose.position), boxes.center[i])
            np.testing.assert_array_equal(vector(found.bbox.size), boxes.size[i])
            assert stamp(found.header) == header.stamp_ns

    @settings(max_examples=25)
    @given(headers, st.integers(0, 7), st.integers(0, 9))
    def test_autoware_objects(self, header, count, seed):
        boxes = some_boxes(count, seed)
        raw = detections.autoware_objects(boxes, header)
        message = read(raw, "autoware_perception_msgs/msg/DetectedObjects")
        assert [o.classification[0].label for o in message.objects] == [(1, 7, 0)[k] for k in boxes.label]
        for i, found in enumerate(message.objects):
            known = bool(np.isfinite(boxes.velocity[i]).all())
            twist = vector(found.kinematics.twist_with_covariance.twist.linear)
            along = Pose.from_yaw(boxes.yaw[i]).rotation @ twist
            assert found.kinematics.has_twist == known and found.kinematics.orientation_availability == 2
            np.testing.assert_allclose(along[:2], boxes.velocity[i] if known else 0.0, atol=1e-12)
            np.testing.assert_array_equal(vector(found.shape.dimensions), boxes.size[i])


@pytest.mark.slow  # builds two packages, once
def test_packages_that_are_not_installed_by_rclpy():
    for package, texts in (("vision_msgs", VISION), ("autoware_perception_msgs", AUTOWARE)):
        add_package(package, {name.rpartition("/")[2]: text for name, text in texts.items()})
        import_module(f"{package}.msg")
    boxes = some_boxes(9)
    read(detections.vision_detections(boxes, HEADER), "vision_msgs/msg/Detection3DArray")
    read(detections.autoware_objects(boxes, HEADER), "autoware_perception_msgs/msg/DetectedObjects")


class TestMarkers:
    @settings(max_examples=25)
    @given(headers, st.integers(0, 6), st.integers(0, 9))
    def test_bytes(self, header, count, seed):
        message = read(markers.markers(some_boxes(count, seed), header), "visualization_msgs/msg/MarkerArray")
        assert all(stamp(m.header) == header.stamp_ns and m.header.frame_id == header.frame for m in message.markers)

    def test_everything_old_goes_first_and_what_comes_does_not_stay(self):
        message = read(markers.markers(some_boxes(5), HEADER, 0.25), "visualization_msgs/msg/MarkerArray")
        assert [m.action for m in message.markers] == [3] + [0] * (len(message.markers) - 1)
        assert {(m.lifetime.sec, m.lifetime.nanosec) for m in message.markers[1:]} == {(0, 250_000_000)}
        named = [(m.ns, m.id) for m in message.markers[1:]]
        assert len(set(named)) == len(named)

    def test_no_boxes_still_delete_what_is_shown(self):
        message = read(markers.markers(some_boxes(0), HEADER), "visualization_msgs/msg/MarkerArray")
        assert [m.action for m in message.markers] == [3]

    def test_edges_headings_arrows_and_labels(self):
        boxes = Boxes3D(
            np.array([[10.0, 2.0, 1.0], [5.0, 0.0, 0.5]]),
            np.array([[4.0, 2.0, 1.5], [1.0, 1.0, 1.0]]),
            np.zeros(2),
            np.array([[3.0, -1.0], [np.nan, np.nan]]),
            np.array([0.87, 1.0]),
            np.array([0, 1]),
            ("car", "pedestrian"),
            0,
        )
        message = read(markers.markers(boxes, HEADER), "visualization_msgs/msg/MarkerArray")
        _, edges, arrow, *labels = message.markers
        points = np.array([vector(p) for p in edges.points])
        assert edges.type == 5 and points.shape == (2 * 13 * 2, 3) and len(edges.colors) == len(points)
        np.testing.assert_allclose(points[:26].max(0)[0], 12.0 + 0.35 * 2)  # past the front face: the heading
        colors = np.array([[c.r, c.g, c.b, c.a] for c in edges.colors])
        np.testing.assert_allclose(colors[0], [*np.array(color_of("car")) / 255, 1], atol=1e-6)
        np.testing.assert_allclose(colors[-1], [*np.array(color_of("pedestrian")) / 255, 1], atol=1e-6)
        assert arrow.type == 0
        np.testing.assert_allclose([vector(p) for p in arrow.points], [[10, 2, 1], [13, 1, 1]])
        assert [m.text for m in labels] == ["car 0.87", "pedestrian 1.00"] and {m.type for m in labels} == {9}
        assert labels[0].pose.position.z > 1.75


class TestOccupancy:
    @settings(max_examples=25)
    @given(headers, st.tuples(*[st.integers(1, 5)] * 3), st.booleans())
    def test_grid(self, header, shape, score):
        grid = some_occupancy(shape, score=score)
        message = read(occupancy.occupancy_grid(grid, header), "perception_msgs/msg/OccupancyGrid3D")
        assert tuple(message.shape) == shape and tuple(message.classes) == grid.classes and message.free_label == 0
        np.testing.assert_array_equal(message.label.reshape(shape), grid.label)
        assert message.UNKNOWN == IGNORE_LABEL
        if score:
            np.testing.assert_allclose(message.score.reshape(shape) / 255, grid.score, atol=0.5 / 255 + 1e-6)
        else:
            assert len(message.score) == 0
        corner = grid.grid.ego_from_grid.apply(np.array(grid.grid.min_corner))
        np.testing.assert_allclose(vector(message.origin.position), corner)
        turned = Pose.from_quaternion(vector(message.origin.orientation, "xyzw"))
        np.testing.assert_allclose(turned.rotation, grid.grid.ego_from_grid.rotation, atol=1e-12)

    @settings(max_examples=25)
    @given(headers, st.tuples(*[st.integers(1, 5)] * 3), st.booleans())
    def test_voxel_cloud(self, header, shape, score):
        grid = some_occupancy(shape, score=score)
        message = read(occupancy.voxel_cloud(grid, header), "sensor_msgs/msg/PointCloud2")
        voxels = np.frombuffer(message.data, layout(message))
        index = np.argwhere(grid.occupied)
        assert message.width == len(index) == len(voxels) and message.row_step == len(message.data)
        where = grid.grid.ego_from_grid.apply(grid.grid.center(index))
        np.testing.assert_allclose(np.stack([voxels[a] for a in "xyz"], 1), where, atol=1e-5)
        np.testing.assert_array_equal(voxels["label"], grid.label[tuple(index.T)])
        np.testing.assert_array_equal(voxels["confidence"], grid.score[tuple(index.T)] if score else 1.0)
        blue, green, red, _ = np.ascontiguousarray(voxels["rgb"]).view(np.uint8).reshape(-1, 4).T
        expected = [color_of(grid.classes[k]) for k in voxels["label"]]
        np.testing.assert_array_equal(np.stack([red, green, blue], 1), np.reshape(expected, (-1, 3)))

    def test_seen_from_above(self):
        label = np.full((3, 2, 2), 0, np.uint8)
        label[0, 0] = IGNORE_LABEL  # nothing known
        label[1, 0] = (2, 0)  # road
        label[2, 0] = (2, 3)  # a tree over the road
        label[2, 1] = (1, 3)  # a car under a tree
        score = np.full(label.shape, 0.5, np.float32)
        score[2, 1] = (0.9, 0.6)
        grid = VoxelGrid((1.0, -4.0, -3.0), (0.5, 0.5, 1.0), label.shape, Pose.from_yaw(np.pi / 2, (0, 0, 1.8)))
        classes = ("free", "car", "driveable_surface", "vegetation")
        message = read(
            occupancy.bev_grid(OccupancyGrid3D(grid, label, classes, 0, 0, score), HEADER), "nav_msgs/msg/OccupancyGrid"
        )
        assert (message.info.width, message.info.height, message.info.resolution) == (3, 2, 0.5)
        assert message.data.reshape(2, 3).tolist() == [[-1, 0, 50], [0, 0, 90]]  # rows along y, x fastest
        np.testing.assert_allclose(vector(message.info.origin.position), [4.0, 1.0, 0.0], atol=1e-12)

    def test_voxels_that_are_not_square_from_above_are_refused(self):
        grid = VoxelGrid((0.0, 0.0, 0.0), (0.5, 0.4, 0.5), (1, 1, 1), Pose.identity())
        odd = OccupancyGrid3D(grid, np.zeros((1, 1, 1), np.uint8), ("free",), 0, 0)
        with pytest.raises(DataError, match=r"0\.5 by 0\.4 m: nav_msgs/OccupancyGrid has square cells"):
            occupancy.bev_grid(odd, HEADER)


class TestLocalization:
    RNG = np.random.default_rng(3)
    ROOT = RNG.uniform(-1, 1, (6, 6))
    FIX = Localization(Pose.from_yaw(0.7, (9.0, -8.0, 1.0)), ROOT @ ROOT.T, 12, "ok", HEADER.stamp_ns)

    @settings(max_examples=25)
    @given(headers)
    def test_pose(self, header):
        message = read(localization.pose(self.FIX, header), "geometry_msgs/msg/PoseWithCovarianceStamped")
        np.testing.assert_array_equal(vector(message.pose.pose.position), [9.0, -8.0, 1.0])
        np.testing.assert_array_equal(message.pose.covariance.reshape(6, 6), self.FIX.covariance)

    @settings(max_examples=25)
    @given(headers, st.text("ab", max_size=6), st.integers(0, 3))
    def test_odometry(self, header, base, readings):
        turns = np.arange(3.0 * readings).reshape(-1, 3)
        moving = Odometry(np.arange(readings), turns + 1, turns)
        message = read(localization.odometry(self.FIX, header, base, moving), "nav_msgs/msg/Odometry")
        assert message.child_frame_id == base
        expected = turns[-1] if readings else np.zeros(3)
        np.testing.assert_array_equal(vector(message.twist.twist.angular), expected)
        np.testing.assert_array_equal(vector(message.twist.twist.linear), expected + (1 if readings else 0))

    @settings(max_examples=25)
    @given(headers)
    def test_map_to_odom_and_odometry_lead_to_the_fix(self, header):
        odom_from_ego = Pose.from_yaw(-0.2, (100.0, 3.0, 0.5))
        raw = localization.map_to_odom(self.FIX, header, odom_from_ego, "odometry")
        (message,) = read(raw, "tf2_msgs/msg/TFMessage").transforms
        assert (message.header.frame_id, message.child_frame_id) == (header.frame, "odometry")
        turn, shift = vector(message.transform.rotation, "xyzw"), vector(message.transform.translation)
        there = Pose.from_quaternion(turn, shift) @ odom_from_ego
        np.testing.assert_allclose(there.matrix, self.FIX.map_from_ego.matrix, atol=1e-12)


class TestOverlay:
    def test_points_and_boxes_are_drawn_where_the_camera_sees_them(self):
        view = camera()
        ahead = Boxes3D(
            np.array([[12.0, 0.0, 1.5]]), np.full((1, 3), 2.0), np.zeros(1), np.zeros((1, 2)), np.ones(1),
            np.zeros(1, np.int64), ("car",), 0,
        )  # fmt: skip
        sample = Sample(0, lidars={"top": cloud(points=2000)}, cameras={"front": view})
        bare, drawn = overlay.overlay(sample, "front"), overlay.overlay(sample, "front", ahead)
        assert (bare != view.rgb).any(2).sum() > 20  # points
        differs = (bare != drawn).any(2)
        rows, columns = np.nonzero(differs)
        assert differs.any() and rows.min() > 25 and rows.max() < 65 and columns.min() > 60 and columns.max() < 100

    def test_a_camera_that_is_missing_is_named(self):
        with pytest.raises(DataError, match="no image of camera 'back'"):
            overlay.overlay(Sample(0, cameras={"front": camera()}), "back")

    @settings(max_examples=25)
    @given(headers, st.integers(1, 9), st.integers(1, 9))
    def test_image(self, header, height, width):
        rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        message = read(overlay.image(rgb, header), "sensor_msgs/msg/Image")
        assert (message.height, message.width, message.step, message.encoding) == (height, width, 3 * width, "rgb8")
        np.testing.assert_array_equal(message.data.reshape(rgb.shape), rgb)

    @settings(max_examples=25)
    @given(headers)
    def test_compressed_image(self, header):
        rgb = np.full((16, 24, 3), (200, 90, 20), np.uint8)
        message = read(overlay.compressed_image(rgb, header), "sensor_msgs/msg/CompressedImage")
        bgr = cv2.imdecode(message.data, cv2.IMREAD_COLOR)
        assert message.format == "jpeg" and np.abs(bgr[..., ::-1].astype(int) - rgb).max() < 8


def layout(message: Any) -> np.dtype:
    """The points' type, from the fields of a PointCloud2."""
    return np.dtype(
        {
            "names": [f.name for f in message.fields],
            "formats": [{2: "u1", 7: "<f4"}[f.datatype] for f in message.fields],
            "offsets": [f.offset for f in message.fields],
            "itemsize": message.point_step,
        }
    )


def stamp(header: Any) -> int:
    return header.stamp.sec * 1_000_000_000 + header.stamp.nanosec


def vector(xyz: Any, names: str = "xyz") -> np.ndarray:
    return np.array([getattr(xyz, name) for name in names])
