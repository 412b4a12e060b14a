"""Several sweeps as one cloud, and one sweep as if measured at one instant: ego motion undone, points and Doppler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perception.errors import PerceptionError
from perception.frames import PosesAt
from perception.types import Array, PointCloud, Pose


def accumulate(clouds: Sequence[PointCloud]) -> PointCloud:
    """One cloud of several sweeps, the key sweep first, in the key sweep's sensor frame and with its stamp.

    Every cloud's `ego_from_sensor` must map into ego at the same stamp, the sample's, ego motion folded in. Kept are
    the fields that all sweeps have, plus `time_lag` (float32 s, key stamp minus sweep stamp) and `sweep` (int64, place
    in `clouds`). `vx_comp` and `vy_comp` are turned into the key's frame and `time_offset` becomes relative to the
    key's stamp, so that each field keeps the meaning that `PointCloud` gives it.

    Raises:
        PerceptionError: no cloud at all, a sweep newer than the key sweep, or one that is accumulated already.
    """
    if not clouds:
        raise PerceptionError("accumulate: no sweeps", "pass the key sweep first, older ones after it")
    key = clouds[0]
    names = [name for name in key.fields if all(name in cloud.fields for cloud in clouds)]
    xyz, lags = [], []
    fields: dict[str, list[Array]] = {name: [] for name in names}
    for i, cloud in enumerate(clouds):
        if "sweep" in cloud.fields or "time_lag" in cloud.fields:
            raise PerceptionError(f"accumulate: sweep {i} is accumulated already", "pass single sweeps")
        lag_s = (key.stamp_ns - cloud.stamp_ns) / 1e9
        if lag_s < 0:
            raise PerceptionError(
                f"accumulate: sweep {i} is {-lag_s:.3f} s newer than the key sweep", "pass the newest sweep first"
            )
        lags.append(np.full(len(cloud), lag_s, np.float32))
        if i == 0:
            xyz.append(cloud.xyz)
            moved = cloud.fields
        else:
            key_from_sweep = key.ego_from_sensor.inverse() @ cloud.ego_from_sensor
            xyz.append(key_from_sweep.apply(cloud.xyz))
            moved = {**cloud.fields, **_moved_fields(cloud, key_from_sweep, lag_s)}
        for name in names:
            fields[name].append(moved[name])
    merged = {name: np.concatenate(parts) for name, parts in fields.items()}
    merged["time_lag"] = np.concatenate(lags)
    merged["sweep"] = np.repeat(np.arange(len(clouds)), [len(cloud) for cloud in clouds])
    return PointCloud(np.concatenate(xyz), merged, key.ego_from_sensor, key.stamp_ns)


def _moved_fields(cloud: PointCloud, key_from_sweep: Pose, lag_s: float) -> dict[str, Array]:
    """The fields whose values depend on the frame or the stamp, as the key sweep would give them."""
    moved = {}
    if "vx_comp" in cloud.fields and "vy_comp" in cloud.fields:
        vx, vy = cloud.fields["vx_comp"], cloud.fields["vy_comp"]
        velocity = np.stack([vx, vy], -1) @ key_from_sweep.rotation[:2, :2].T
        moved["vx_comp"], moved["vy_comp"] = velocity[:, 0].astype(vx.dtype), velocity[:, 1].astype(vy.dtype)
    if "time_offset" in cloud.fields:
        offset = cloud.fields["time_offset"]
        moved["time_offset"] = (offset - lag_s).astype(offset.dtype)
    return moved


def deskew(cloud: PointCloud, odom_from_sensor_at: PosesAt) -> PointCloud:
    """Each point where the sensor would have seen it at `cloud.stamp_ns`, for a world at rest.

    A point measured at t moves by `sensor(stamp)_from_odom @ odom_from_sensor(t)`. The field `time_offset` is used up,
    so that no cloud is deskewed twice.

    Args:
        cloud: one sweep with the field `time_offset` (s, point time minus `cloud.stamp_ns`).
        odom_from_sensor_at: the sensor's poses at stamps; `partial(frames.poses, "odom", sensor_frame)`.

    Raises:
        PerceptionError: no `time_offset`, or (from `odom_from_sensor_at`) a stamp whose pose is not known.
    """
    if "time_offset" not in cloud.fields:
        raise PerceptionError(
            f"deskew: the cloud has fields ({', '.join(['x', 'y', 'z', *cloud.fields])}); time_offset is needed",
            "the driver must give a time to each point (Ouster t, Velodyne time, Hesai timestamp), or do not deskew",
        )
    offset_ns = np.rint(cloud.fields["time_offset"].astype(np.float64) * 1e9).astype(np.int64)
    stamps_ns, which = np.unique(np.append(offset_ns, 0) + cloud.stamp_ns, return_inverse=True)
    rotation, translation = odom_from_sensor_at(stamps_ns)  # (T, 3, 3), (T, 3)
    which = which.reshape(-1)
    sensor_from_odom = rotation[which[-1]].T
    rotation = sensor_from_odom @ rotation
    translation = (translation - translation[which[-1]]) @ sensor_from_odom.T
    point = which[:-1]
    xyz = np.einsum("nij,nj->ni", rotation[point], cloud.xyz.astype(np.float64)) + translation[point]
    fields = {name: values for name, values in cloud.fields.items() if name != "time_offset"}
    return PointCloud(xyz.astype(np.float32), fields, cloud.ego_from_sensor, cloud.stamp_ns)


def remove_close(cloud: PointCloud, half_side_m: float = 1.0) -> PointCloud:
    """Without the points inside the upright square |x| < half_side_m, |y| < half_side_m about the sensor.

    They are the vehicle's own roof and the sensor's mount; nuScenes' devkit and mmdet3d use 1 m and the same square.
    """
    return cloud.select(~(np.abs(cloud.xyz[:, :2]) < half_side_m).all(1))


def compensate_radial_velocity(
    cloud: PointCloud, ego_from_sensor: Pose, linear_velocity: Array, angular_velocity: Array
) -> PointCloud:
    """A radar cloud with `radial_velocity_comp`, `vx_comp` and `vy_comp` added: Doppler less the sensor's own motion.

    The sensor moves with `v + omega x r`, r being its place on the vehicle: a corner radar 3.5 m out sees 1 m/s of
    a turn at 0.3 rad/s. `radial_velocity` is relative and negative when closing, so the sensor's velocity along the
    ray is added: a thing at rest comes out as 0. The components are along x and y of the sensor's frame.

    Args:
        cloud: with the field `radial_velocity`, m/s.
        ego_from_sensor: the mount alone. (`cloud.ego_from_sensor` has ego motion between two stamps folded in.)
        linear_velocity: (3,) of ego at the cloud's stamp, along ego's axes, m/s.
        angular_velocity: (3,) of ego, along ego's axes, rad/s.
    """
    measured = cloud.field("radial_velocity").astype(np.float64)
    mount_velocity = linear_velocity + np.cross(angular_velocity, ego_from_sensor.translation)
    sensor_velocity = ego_from_sensor.rotation.T @ mount_velocity
    xyz = cloud.xyz.astype(np.float64)
    distance = np.linalg.norm(xyz, axis=1, keepdims=True)
    ray = np.divide(xyz, distance, out=np.zeros_like(xyz), where=distance > 0)  # (N, 3)
    radial = measured + ray @ sensor_velocity
    fields = {
        **cloud.fields,
        "radial_velocity_comp": radial.astype(np.float32),
        "vx_comp": (radial * ray[:, 0]).astype(np.float32),
        "vy_comp": (radial * ray[:, 1]).astype(np.float32),
    }
    return PointCloud(cloud.xyz, fields, cloud.ego_from_sensor, cloud.stamp_ns)
