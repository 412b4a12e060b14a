from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from perception.errors import PerceptionError
from perception.frames import FrameError, FrameTree
from perception.sweeps import accumulate, compensate_radial_velocity, deskew, remove_close
from perception.types import PointCloud, Pose

SECOND = 1_000_000_000
EGO_FROM_LIDAR = Pose.from_quaternion((0.02, -0.01, 0.7, 0.7), (0.9, 0.1, 1.8))


def cloud(xyz, stamp_ns: int = 0, ego_from_sensor: Pose | None = None, **fields) -> PointCloud:
    xyz = np.asarray(xyz, np.float32).reshape(-1, 3)
    return PointCloud(xyz, {n: np.asarray(v) for n, v in fields.items()}, ego_from_sensor or Pose.identity(), stamp_ns)


def odom_from_ego(t_s: float) -> Pose:
    """A turn to the left at 0.5 rad/s and 10 m/s: a circle of 20 m about (0, 20)."""
    return Pose.from_yaw(0.5 * t_s, (20 * np.sin(0.5 * t_s), 20 * (1 - np.cos(0.5 * t_s)), 0.0))


def landmarks() -> np.ndarray:
    return np.random.default_rng(0).uniform(-30, 30, (50, 3))


# --- accumulate -------------------------------------------------------------------------------------------------------


def seen_at(t_s: float, key_s: float) -> PointCloud:
    """The landmarks in odom as the LiDAR sees them at t, with ego motion up to the key's time folded in."""
    odom_from_lidar = odom_from_ego(t_s) @ EGO_FROM_LIDAR
    key_ego_from_lidar = odom_from_ego(key_s).inverse() @ odom_from_lidar
    xyz = odom_from_lidar.inverse().apply(landmarks())
    return cloud(xyz, round(t_s * SECOND), key_ego_from_lidar, intensity=np.arange(50.0))


def test_the_world_at_rest_coincides_in_the_key_sweeps_frame():
    sweeps = [seen_at(t, key_s=2.0) for t in (2.0, 1.95, 1.9)]
    merged = accumulate(sweeps)
    np.testing.assert_allclose(merged.xyz, np.tile(sweeps[0].xyz, (3, 1)), atol=2e-5)
    np.testing.assert_allclose(merged.xyz_ego()[:50], odom_from_ego(2.0).inverse().apply(landmarks()), atol=2e-5)
    assert merged.stamp_ns == 2 * SECOND
    assert merged.ego_from_sensor is sweeps[0].ego_from_sensor
    np.testing.assert_array_equal(merged.field("sweep"), np.repeat([0, 1, 2], 50))
    np.testing.assert_allclose(merged.field("time_lag"), np.repeat([0, 0.05, 0.1], 50), rtol=1e-6)
    assert merged.field("time_lag").dtype == np.float32
    assert merged.field("sweep").dtype == np.int64
    np.testing.assert_array_equal(merged.field("intensity"), np.tile(np.arange(50.0), 3))


def test_the_key_sweep_is_kept_bit_for_bit():
    key = seen_at(2.0, 2.0)
    np.testing.assert_array_equal(accumulate([key, seen_at(1.9, 2.0)]).xyz[:50], key.xyz)


def test_only_fields_common_to_all_sweeps_are_kept_and_empty_sweeps_count():
    merged = accumulate(
        [
            cloud([[1, 2, 3]], 2, ring=[7], intensity=[0.5]),
            cloud([], 1, intensity=np.zeros(0)),
            cloud([[4, 5, 6]], 0, intensity=[1.5]),
        ]
    )
    assert set(merged.fields) == {"intensity", "time_lag", "sweep"}
    np.testing.assert_array_equal(merged.field("sweep"), [0, 2])
    assert len(accumulate([cloud([])])) == 0


def test_velocities_turn_with_the_frame_and_times_with_the_stamp():
    quarter = Pose.from_yaw(np.pi / 2)
    old = cloud(
        [[1, 0, 0]], 0, quarter, vx_comp=np.float32([3]), vy_comp=np.float32([1]), time_offset=np.float32([0.01])
    )
    key = cloud(
        [[1, 0, 0]], SECOND // 10, None, vx_comp=np.float32([5]), vy_comp=np.float32([6]), time_offset=np.float32([0])
    )
    merged = accumulate([key, old])
    np.testing.assert_allclose(merged.xyz[1], [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(merged.field("vx_comp"), [5, -1], atol=1e-6)
    np.testing.assert_allclose(merged.field("vy_comp"), [6, 3], atol=1e-6)
    np.testing.assert_allclose(merged.field("time_offset"), [0, -0.09], atol=1e-6)


def test_accumulate_refuses_what_it_cannot_mean():
    with pytest.raises(PerceptionError, match="no sweeps"):
        accumulate([])
    with pytest.raises(PerceptionError, match=r"sweep 1 is 0\.500 s newer than the key sweep"):
        accumulate([cloud([], 0), cloud([], SECOND // 2)])
    with pytest.raises(PerceptionError, match="sweep 0 is accumulated already"):
        accumulate([accumulate([cloud([])])])


# --- deskew -----------------------------------------------------------------------------------------------------------


def tree() -> FrameTree:
    frames = FrameTree()
    for i in range(101):
        frames.add("odom", "base_link", i * SECOND // 100, odom_from_ego(i / 100))
    frames.add_static("base_link", "lidar", EGO_FROM_LIDAR)
    return frames


def test_deskewing_a_turn_puts_each_point_where_it_was_at_the_stamp():
    world, offset_s = landmarks(), np.linspace(-0.05, 0.05, 50)
    poses = [odom_from_ego(0.5 + dt) @ EGO_FROM_LIDAR for dt in offset_s]
    seen = np.stack([pose.inverse().apply(p) for pose, p in zip(poses, world, strict=True)])
    raw = cloud(seen, SECOND // 2, EGO_FROM_LIDAR, time_offset=offset_s.astype(np.float32), ring=np.arange(50))
    fixed = deskew(raw, partial(tree().poses, "odom", "lidar"))
    expected = (odom_from_ego(0.5) @ EGO_FROM_LIDAR).inverse().apply(world)
    assert np.abs(raw.xyz - expected).max() > 0.5  # 10 m/s for 50 ms, and the turn
    np.testing.assert_allclose(fixed.xyz, expected, atol=1e-3)  # of interpolating a circle every 10 ms
    assert set(fixed.fields) == {"ring"}
    assert fixed.stamp_ns == raw.stamp_ns


def test_deskewing_without_motion_changes_nothing():
    frames = FrameTree()
    for stamp in (0, SECOND):
        frames.add("odom", "lidar", stamp, EGO_FROM_LIDAR)
    raw = cloud(landmarks(), SECOND // 2, time_offset=np.linspace(-0.4, 0.4, 50))
    np.testing.assert_allclose(deskew(raw, partial(frames.poses, "odom", "lidar")).xyz, raw.xyz, atol=1e-5)


def test_deskewing_an_empty_cloud_needs_only_the_stamp():
    assert len(deskew(cloud([], SECOND // 2, time_offset=np.zeros(0)), partial(tree().poses, "odom", "lidar"))) == 0


def test_deskew_says_what_it_lacks():
    with pytest.raises(PerceptionError, match=r"has fields \(x, y, z, ring\); time_offset is needed"):
        deskew(cloud([[0, 0, 0]], ring=[1]), partial(tree().poses, "odom", "lidar"))
    with pytest.raises(FrameError, match=r"100\.0 ms after"):
        deskew(cloud([[0, 0, 0]], SECOND, time_offset=[0.1]), partial(tree().poses, "odom", "lidar"))


# --- points on the vehicle --------------------------------------------------------------------------------------------


def test_remove_close_drops_the_square_about_the_sensor():
    kept = remove_close(cloud([[0.9, -0.9, 5], [1.0, 0, 0], [0, -1.2, 0], [0.5, 0.5, -9]], ring=[0, 1, 2, 3]))
    np.testing.assert_array_equal(kept.field("ring"), [1, 2])
    assert len(remove_close(kept, half_side_m=2.0)) == 0


# --- radar ------------------------------------------------------------------------------------------------------------


def doppler(xyz: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """Range rate of points (N, 3) that move with velocity (N, 3) relative to the sensor."""
    return (velocity * xyz).sum(1) / np.linalg.norm(xyz, axis=1)


def test_straight_ahead_at_10_mps_a_wall_ahead_closes_at_10_mps():
    raw = cloud([[20, 0, 0], [0, 20, 0], [-3, 0, 4]], radial_velocity=np.float32([-10, 0, 6]))
    fixed = compensate_radial_velocity(raw, Pose.identity(), np.array([10.0, 0, 0]), np.zeros(3))
    np.testing.assert_allclose(fixed.field("radial_velocity_comp"), 0, atol=1e-6)


def test_the_mount_of_a_corner_radar_swings_in_a_turn():
    # 3.5 m ahead of the axle at 0.3 rad/s: the sensor moves left at 1.05 m/s, and sees it looking left.
    mount = Pose.from_yaw(np.pi / 2, (3.5, 0, 0.5))
    raw = cloud([[10, 0, 0]], radial_velocity=np.float32([-1.05]))
    fixed = compensate_radial_velocity(raw, mount, np.zeros(3), np.array([0, 0, 0.3]))
    np.testing.assert_allclose(fixed.field("radial_velocity_comp"), 0, atol=1e-6)


def test_static_points_come_out_at_rest_and_a_moving_one_with_its_own_velocity():
    rng = np.random.default_rng(1)
    mount = Pose.from_quaternion(rng.normal(size=4), (3.4, -0.8, 0.6))
    v, omega = np.array([12.0, 0.3, 0.0]), np.array([0.01, -0.02, 0.4])
    xyz = rng.uniform(-40, 40, (200, 3))
    own = np.zeros((200, 3))
    own[-1] = (5.0, -2.0, 1.0)  # over ground, along the sensor's axes
    # The sensor's velocity by a finite difference of where ego's motion takes the mount within 1 us.
    dt = 1e-6
    turned = np.array(
        [[1, -omega[2] * dt, omega[1] * dt], [omega[2] * dt, 1, -omega[0] * dt], [-omega[1] * dt, omega[0] * dt, 1]]
    )
    sensor = mount.rotation.T @ ((turned @ mount.translation + v * dt - mount.translation) / dt)
    raw = cloud(xyz, radial_velocity=doppler(xyz, own - sensor).astype(np.float32), ego_from_sensor=mount)
    fixed = compensate_radial_velocity(raw, mount, v, omega)
    np.testing.assert_allclose(fixed.field("radial_velocity_comp")[:-1], 0, atol=1e-5)
    radial = doppler(xyz, own)[-1]
    ray = xyz[-1] / np.linalg.norm(xyz[-1])
    np.testing.assert_allclose(fixed.field("radial_velocity_comp")[-1], radial, atol=1e-5)
    np.testing.assert_allclose(fixed.field("vx_comp")[-1], radial * ray[0], atol=1e-5)
    np.testing.assert_allclose(fixed.field("vy_comp")[-1], radial * ray[1], atol=1e-5)
    assert fixed.field("vx_comp").dtype == np.float32
    np.testing.assert_array_equal(fixed.field("radial_velocity"), raw.field("radial_velocity"))


def test_a_return_at_the_antenna_has_no_direction():
    fixed = compensate_radial_velocity(
        cloud([[0, 0, 0]], radial_velocity=[-2.0]), Pose.identity(), np.array([10.0, 0, 0]), np.zeros(3)
    )
    assert fixed.field("radial_velocity_comp")[0] == -2.0
    with pytest.raises(ValueError, match="'radial_velocity' is needed"):
        compensate_radial_velocity(cloud([[1, 0, 0]]), Pose.identity(), np.zeros(3), np.zeros(3))
