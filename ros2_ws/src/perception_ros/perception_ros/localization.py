"""A localized pose as messages: pose with covariance, odometry, and the transform map -> odom.

A Localization whose status is no fix (see `LocalizationStatus`) still has a pose; whether to publish it is the node's
to say.
"""

from __future__ import annotations

import numpy as np

from perception.datasets.rosbag_file import Header
from perception.types import Localization, Odometry, Pose
from perception_ros.cdr import CdrWriter, begin, put_header, put_pose, put_pose_with_covariance

_UNKNOWN = np.zeros((6, 6))


def pose(localization: Localization, header: Header) -> bytes:
    """geometry_msgs/PoseWithCovarianceStamped of ego; the header's frame is the map."""
    out = begin(header)
    put_pose_with_covariance(out, localization.map_from_ego, localization.covariance)
    return out.finish()


def odometry(
    localization: Localization, header: Header, base_frame: str = "base_link", moving: Odometry | None = None
) -> bytes:
    """nav_msgs/Odometry of ego in the map, its twist the last reading of `moving`, along ego's axes.

    Without readings the twist is zero, and so is its covariance, which says unknown.
    """
    out = begin(header)
    out.string(base_frame)
    put_pose_with_covariance(out, localization.map_from_ego, localization.covariance)
    twist = (0.0,) * 6
    if moving is not None and len(moving.stamp_ns):
        twist = (*moving.linear_velocity[-1], *moving.angular_velocity[-1])
    out.numbers("d", *twist)
    out.array(_UNKNOWN)
    return out.finish()


def map_to_odom(localization: Localization, header: Header, odom_from_ego: Pose, odom_frame: str = "odom") -> bytes:
    """tf2_msgs/TFMessage with the one transform that a localizer owns (REP 105): odom in the map (the header's frame).

    Args:
        localization: ego in the map.
        header: the map's frame, the sensor's stamp.
        odom_from_ego: ego by odometry at the same stamp.
        odom_frame: the child.
    """
    out = CdrWriter()
    out.numbers("I", 1)
    put_header(out, header)
    out.string(odom_frame)
    put_pose(out, localization.map_from_ego @ odom_from_ego.inverse())
    return out.finish()
