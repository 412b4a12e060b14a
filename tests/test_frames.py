from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from perception.frames import FrameError, FrameTree
from perception.types import Pose

SECOND = 1_000_000_000


def random_pose(seed: int) -> Pose:
    rng = np.random.default_rng(seed)
    return Pose(Rotation.random(random_state=seed).as_matrix(), rng.normal(0, 10, 3))


def assert_same(a: Pose, b: Pose, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(a.matrix, b.matrix, atol=atol)


def driving(buffer_s: float = 30.0) -> FrameTree:
    """1 m/s along x and pi/2 rad/s about z, one reading a second from 10 to 20 s; a LiDAR and a camera on top."""
    frames = FrameTree(buffer_s)
    for t in range(10, 21):
        frames.add("odom", "base_link", t * SECOND, Pose.from_yaw((t - 10) * np.pi / 2, (t - 10.0, 0, 0)))
    frames.add_static("base_link", "lidar_top", Pose.from_yaw(0.0, (1.0, 0, 2.0)))
    frames.add_static("lidar_top", "camera_front", Pose.from_yaw(np.pi / 2, (0, 0.5, 0)))
    return frames


def test_a_static_chain_is_the_product_of_its_transforms_in_both_directions():
    frames, poses = FrameTree(), [random_pose(i) for i in range(5)]
    for i, pose in enumerate(poses):
        frames.add_static(f"f{i}", f"f{i + 1}", pose)
    product = poses[0] @ poses[1] @ poses[2] @ poses[3] @ poses[4]
    assert_same(frames.lookup("f0", "f5", 0), product)
    assert_same(frames.lookup("f5", "f0", 123), product.inverse())
    assert_same(frames.lookup("f2", "f2", 0), Pose.identity())


def test_siblings_meet_at_their_lowest_common_ancestor():
    frames = FrameTree()
    a, b = random_pose(1), random_pose(2)
    frames.add_static("base_link", "a", a)
    frames.add_static("base_link", "b", b)
    frames.add("odom", "base_link", 5 * SECOND, random_pose(3))  # known at 5 s only: not needed between a and b
    assert_same(frames.lookup("a", "b", 99 * SECOND), a.inverse() @ b)


def test_interpolation_is_linear_in_place_and_spherical_in_rotation():
    frames = driving()
    assert_same(frames.lookup("odom", "base_link", 12 * SECOND), Pose.from_yaw(np.pi, (2.0, 0, 0)))
    assert_same(
        frames.lookup("odom", "base_link", 12 * SECOND + SECOND // 4), Pose.from_yaw(np.pi * 1.125, (2.25, 0, 0))
    )
    # Half a turn further the LiDAR, 1 m ahead of the axle, is where the turn took it.
    lidar = frames.lookup("odom", "lidar_top", 10 * SECOND + SECOND // 2)
    np.testing.assert_allclose(lidar.translation, [0.5 + np.cos(np.pi / 4), np.sin(np.pi / 4), 2.0], atol=1e-12)


def test_interpolation_keeps_nanoseconds_since_1970():
    frames, start = FrameTree(), 1_700_000_000 * SECOND
    frames.add("odom", "base_link", start, Pose.identity())
    frames.add("odom", "base_link", start + 1000, Pose.from_yaw(0.0, (1.0, 0, 0)))
    for ns in (1, 250, 999):
        assert frames.lookup("odom", "base_link", start + ns).translation[0] == pytest.approx(ns / 1000, abs=1e-12)


def test_many_stamps_at_once_are_the_single_lookups():
    frames = driving()
    stamps = np.random.default_rng(0).integers(10 * SECOND, 20 * SECOND, 50)
    rotation, translation = frames.poses("camera_front", "odom", stamps)
    for i, stamp in enumerate(stamps):
        single = frames.lookup("camera_front", "odom", int(stamp))
        np.testing.assert_allclose(rotation[i], single.rotation, atol=1e-12)
        np.testing.assert_allclose(translation[i], single.translation, atol=1e-12)
    rotation, translation = frames.poses("camera_front", "odom", stamps[:0])
    assert rotation.shape == (0, 3, 3)
    assert translation.shape == (0, 3)


def test_lookup_across_time_goes_through_the_fixed_frame():
    frames = driving()
    now_from_then = frames.lookup_across("base_link", 14 * SECOND, "base_link", 10 * SECOND, "odom")
    # Four quarter turns later the heading is the same, 4 m further on.
    assert_same(now_from_then, Pose.from_yaw(0.0, (-4.0, 0, 0)))
    expected = frames.lookup("lidar_top", "odom", 13 * SECOND) @ frames.lookup("odom", "camera_front", 11 * SECOND)
    assert_same(frames.lookup_across("lidar_top", 13 * SECOND, "camera_front", 11 * SECOND, "odom"), expected)


@settings(max_examples=30)
@given(st.permutations(range(8)), st.integers(0, 7 * SECOND))
def test_the_order_of_insertion_does_not_matter(order, stamp_ns):
    sorted_in, shuffled = FrameTree(), FrameTree()
    for i in range(8):
        sorted_in.add("odom", "base_link", i * SECOND, random_pose(i))
        shuffled.add("odom", "base_link", order[i] * SECOND, random_pose(order[i]))
    there = shuffled.lookup("odom", "base_link", stamp_ns)
    assert_same(there, sorted_in.lookup("odom", "base_link", stamp_ns), atol=0)
    assert_same(there @ shuffled.lookup("base_link", "odom", stamp_ns), Pose.identity())


def test_the_same_stamp_again_replaces_the_former():
    frames = FrameTree()
    frames.add("odom", "base_link", 1, Pose.identity())
    frames.add("odom", "base_link", 1, Pose.from_yaw(1.0))
    frames.add_static("base_link", "lidar", Pose.identity())
    frames.add_static("base_link", "lidar", Pose.from_yaw(0.5))
    assert frames.lookup("odom", "lidar", 1).yaw == pytest.approx(1.5)


def test_only_what_is_younger_than_the_buffer_is_kept():
    frames = driving(buffer_s=3.0)
    frames.lookup("odom", "base_link", 17 * SECOND)
    with pytest.raises(FrameError, match=r"known from 17\.000 to 20\.000 s; 16\.500 s is 500\.0 ms before") as error:
        frames.lookup("odom", "base_link", 16 * SECOND + SECOND // 2)
    assert error.value.reason == "before_buffer"
    frames.add("odom", "base_link", 15 * SECOND, Pose.identity())  # late, and too old to be kept
    with pytest.raises(FrameError, match="before"):
        frames.lookup("odom", "base_link", 16 * SECOND)


def test_nothing_is_extrapolated():
    with pytest.raises(FrameError, match=r"20\.045 s is 45\.0 ms after\n  wait for newer transforms") as error:
        driving().lookup("odom", "lidar_top", 20 * SECOND + 45_000_000)
    assert error.value.reason == "after_buffer"


def test_an_unknown_frame_is_named_with_those_there_are():
    with pytest.raises(
        FrameError, match="no frame 'lidar_tp'; there are: base_link, camera_front, lidar_top, odom"
    ) as e:
        driving().lookup("odom", "lidar_tp", 10 * SECOND)
    assert e.value.reason == "missing_frame"
    assert "did you mean 'lidar_top'?" in str(e.value)
    with pytest.raises(FrameError, match="none at all"):
        FrameTree().lookup("a", "a", 0)


def test_separate_trees_are_not_connected():
    frames = driving()
    frames.add_static("map", "gnss", Pose.identity())
    with pytest.raises(FrameError, match="lidar_top -> base_link -> odom and gnss -> map are separate trees") as error:
        frames.lookup("lidar_top", "gnss", 10 * SECOND)
    assert error.value.reason == "not_connected"


def test_contradictions_of_the_tree_are_errors():
    frames = driving()
    with pytest.raises(FrameError, match="'lidar_top' has the parent 'base_link' and is now given 'odom'") as error:
        frames.add_static("odom", "lidar_top", Pose.identity())
    assert error.value.reason == "two_parents"
    with pytest.raises(FrameError, match="both as static and with stamps") as error:
        frames.add("base_link", "lidar_top", 10 * SECOND, Pose.identity())
    assert error.value.reason == "static_and_timed"
    with pytest.raises(FrameError, match="closes a cycle: camera_front -> lidar_top -> base_link -> odom") as error:
        frames.add_static("camera_front", "odom", Pose.identity())
    assert error.value.reason == "cycle"
    with pytest.raises(FrameError, match="cycle"):
        frames.add_static("a", "a", Pose.identity())


def test_clear_forgets_the_timed_and_keeps_the_static():
    frames = driving()
    frames.clear()
    assert_same(frames.lookup("lidar_top", "camera_front", 0), Pose.from_yaw(np.pi / 2, (0, 0.5, 0)))
    with pytest.raises(FrameError, match="no frame 'odom'"):
        frames.lookup("odom", "base_link", 12 * SECOND)
    frames.add("odom", "base_link", 1 * SECOND, Pose.identity())  # an earlier clock begins afresh
    assert_same(frames.lookup("odom", "base_link", 1 * SECOND), Pose.identity())


def test_a_frame_error_survives_a_worker_process():
    error = pickle.loads(pickle.dumps(FrameError("what", "do", "cycle")))
    assert (error.what, error.do, error.reason) == ("what", "do", "cycle")
