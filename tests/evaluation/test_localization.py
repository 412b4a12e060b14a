"""Localization metrics: triangles, counts by hand, and the NEES of errors drawn from their own covariance."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from perception.errors import DataError
from perception.evaluation.localization import (
    NEES_BOUNDS,
    LocalizationFrame,
    evaluate_localization,
    nees,
    pose_error,
    summarize,
)
from perception.types import Localization, Pose

SECOND = 1_000_000_000


def fix(pose, stamp_ns=0, status="ok", covariance=None):
    return Localization(pose, np.eye(6) if covariance is None else covariance, 10, status, stamp_ns)


def drive(*statuses, step_m=10.0, sequence=""):
    """One frame a second, `step_m` apart along +x; None: no prediction."""
    return [
        LocalizationFrame(
            i * SECOND,
            Pose.from_yaw(0.0, (i * step_m, 0.0, 0.0)),
            None if status is None else fix(Pose.from_yaw(0.0, (i * step_m, 0.0, 0.0)), i * SECOND, status),
            sequence,
        )
        for i, status in enumerate(statuses)
    ]


def displaced(truth, longitudinal_m=0.0, lateral_m=0.0, vertical_m=0.0, yaw_rad=0.0):
    """The pose that is off by so much in the true vehicle's frame."""
    return truth @ Pose.from_yaw(yaw_rad, (longitudinal_m, lateral_m, vertical_m))


def test_errors_are_along_the_true_vehicle():
    truth = Pose.from_yaw(math.pi / 2, (100.0, 50.0, 0.0))  # heading along the map's +y
    estimate = Pose.from_yaw(math.pi / 2 + 0.1, (96.0, 53.0, 12.0))
    error = pose_error(estimate, truth)
    assert error.longitudinal_m == pytest.approx(3.0)
    assert error.lateral_m == pytest.approx(4.0)  # the map's -x is the vehicle's left
    assert error.vertical_m == pytest.approx(12.0)
    assert error.translation_m == pytest.approx(13.0)
    assert error.yaw_rad == pytest.approx(0.1)
    assert error.rotation_rad == pytest.approx(0.1)


def test_geodesic_rotation_holds_roll_and_pitch_too():
    turn = Rotation.from_rotvec([0.3, 0.0, 0.4]).as_matrix()
    error = pose_error(Pose(turn, np.zeros(3)), Pose.identity())
    assert error.rotation_rad == pytest.approx(0.5)
    assert abs(error.yaw_rad) < 0.5


numbers = st.floats(-20, 20)
angles = st.floats(-3, 3)


@settings(max_examples=50)
@given(numbers, numbers, numbers, angles, angles, numbers, numbers)
def test_errors_do_not_depend_on_where_the_vehicle_is(lon, lat, up, yaw, heading, x, y):
    truth = Pose.from_yaw(heading, (x, y, 1.0))
    error = pose_error(displaced(truth, lon, lat, up, yaw), truth)
    got = [error.longitudinal_m, error.lateral_m, error.vertical_m, error.yaw_rad, error.rotation_rad]
    np.testing.assert_allclose(got, [lon, lat, up, yaw, abs(yaw)], atol=1e-7)


def test_summary_by_hand():
    summary = summarize([-1.0, 2.0, -3.0, 4.0, 10.0])
    assert asdict(summary) == pytest.approx({"median": 3.0, "mean": 4.0, "p95": 8.8, "p99": 9.76, "max": 10.0})


def test_truth_against_itself_is_perfect():
    score = evaluate_localization(drive("ok", "ok", "degenerate"))
    assert score.recalls == (1.0, 1.0, 1.0)
    assert score.lateral_recalls == score.longitudinal_recalls == (1.0, 1.0, 1.0, 1.0)
    assert (score.availability, score.longest_gap_s, score.longest_gap_m) == (1.0, 0.0, 0.0)
    assert (score.over_alert_limit, score.mean_nees, score.fixes) == (0.0, 0.0, 3)
    assert all(summary.max == 0.0 for _, summary in score.rows())


def test_recalls_and_integrity_by_hand():
    truth = Pose.from_yaw(1.0, (5.0, 5.0, 0.0))
    estimates = [
        displaced(truth, 0.05, 0.05),
        displaced(truth, 0.2, 0.2),  # 0.283 m: outside 0.25 m
        displaced(truth, 0.0, 0.6),  # beyond the lateral alert limit
        displaced(truth, 1.4, 0.0, yaw_rad=math.radians(6)),
        displaced(truth, 1.6, 0.0, yaw_rad=math.radians(11)),  # beyond the longitudinal one, and 10 degrees
    ]
    frames = [LocalizationFrame(i, truth, fix(e, i)) for i, e in enumerate(estimates)]
    frames.append(LocalizationFrame(5, truth, None))
    frames.append(LocalizationFrame(6, truth, fix(truth, 6, "ambiguous")))  # right, and not a fix
    frames.append(LocalizationFrame(7, truth, fix(displaced(truth, 9.0), 7, "rejected")))  # wrong, and it said so
    score = evaluate_localization(frames)
    assert score.recalls == pytest.approx((1 / 8, 2 / 8, 4 / 8))
    assert score.lateral_recalls == pytest.approx((3 / 8, 4 / 8, 4 / 8, 5 / 8))
    assert score.longitudinal_recalls == pytest.approx((2 / 8, 3 / 8, 3 / 8, 3 / 8))
    assert score.over_alert_limit == pytest.approx(2 / 5)
    assert score.availability == pytest.approx(5 / 8)
    assert (score.frames, score.fixes) == (8, 5)
    assert score.lateral_m.max == pytest.approx(0.6)
    assert score.longitudinal_m.median == pytest.approx(0.2)
    metrics = score.metrics()
    assert metrics["recall/0.25m_2.0deg"] == pytest.approx(1 / 8)
    assert metrics["recall/lateral_0.5m"] == pytest.approx(4 / 8)
    assert metrics["lateral_m/max"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("statuses", "gap_s"),
    [
        (("ok", None, "ok", "ok"), 2),
        (("ok", "lost", None, "coasting", "ok"), 4),
        ((None, None, "ok", "ok"), 2),  # from the first frame
        (("ok", "ok", None, None), 2),  # to the last frame
        ((None, "ok", None, None, "ok", None), 3),
        ((None, None, None), 2),
        (("ok",), 0),
        ((None,), 0),
    ],
)
def test_longest_gap(statuses, gap_s):
    score = evaluate_localization(drive(*statuses))
    assert score.longest_gap_s == pytest.approx(gap_s)
    assert score.longest_gap_m == pytest.approx(gap_s * 10.0)


def test_gaps_stay_within_a_sequence_and_time_and_way_are_measured_apart():
    slow = drive("ok", None, None, None, "ok", None, step_m=1.0, sequence="slow")
    fast = drive(None, "ok", None, "ok", step_m=20.0, sequence="fast")
    score = evaluate_localization(slow + fast)
    assert score.longest_gap_s == pytest.approx(4.0)
    assert score.longest_gap_m == pytest.approx(40.0)


def test_way_is_measured_along_the_road():
    corner = [(0.0, 0.0, 0.0), (30.0, 0.0, 0.0), (30.0, 40.0, 0.0)]
    frames = [LocalizationFrame(i, Pose.from_yaw(0.0, p), None) for i, p in enumerate(corner)]
    assert evaluate_localization(frames).longest_gap_m == pytest.approx(70.0)


def test_without_a_fix_errors_are_unknown_and_recall_is_zero():
    score = evaluate_localization(drive(None, "lost"))
    assert (score.availability, score.recalls) == (0.0, (0.0, 0.0, 0.0))
    assert math.isnan(score.lateral_m.median)
    assert math.isnan(score.mean_nees)
    assert math.isnan(score.over_alert_limit)


def test_nees_by_hand():
    truth = Pose.from_yaw(0.7, (4.0, 5.0, 6.0))
    turned = Pose(
        Rotation.from_rotvec([0.0, 0.02, 0.0]).as_matrix() @ truth.rotation, truth.translation + np.array([3.0, 0, 0])
    )
    covariance = np.diag([9.0, 1.0, 1.0, 1.0, 1e-4, 1.0])
    assert nees(fix(turned, covariance=covariance), truth) == pytest.approx(1.0 + 4.0)
    assert NEES_BOUNDS == pytest.approx((1.2373, 14.4494), abs=1e-4)


def monte_carlo(claimed_over_true, draws=2000):
    rng = np.random.default_rng(20)
    mixing = rng.normal(size=(6, 6)) * [[0.3], [0.3], [0.1], [0.01], [0.01], [0.03]]
    covariance = mixing @ mixing.T + 1e-6 * np.eye(6)
    errors = rng.multivariate_normal(np.zeros(6), covariance, draws)
    frames = []
    for i, error in enumerate(errors):
        truth = Pose(Rotation.random(random_state=i).as_matrix(), rng.normal(size=3) * 100)
        rotation = Rotation.from_rotvec(error[3:]).as_matrix() @ truth.rotation  # a turn about the map's axes
        estimate = Pose(rotation, truth.translation + error[:3])
        frames.append(LocalizationFrame(i, truth, fix(estimate, i, covariance=claimed_over_true * covariance)))
    return evaluate_localization(frames)


def test_an_honest_covariance_has_mean_nees_six():
    score = monte_carlo(1.0)
    assert score.mean_nees == pytest.approx(6.0, abs=0.25)  # standard error sqrt(12 / 2000) = 0.08
    assert score.nees_consistent == pytest.approx(0.95, abs=0.02)


def test_an_overconfident_covariance_shows():
    score = monte_carlo(0.25, draws=1000)
    assert score.mean_nees == pytest.approx(24.0, abs=1.5)
    assert score.nees_consistent < 0.5


def test_an_unobserved_axis_with_a_large_variance_is_consistent():
    truth = Pose.from_yaw(0.4, (1.0, 2.0, 3.0))
    covariance = np.diag([1e-4, 1e4, 1e-4, 1e-6, 1e-6, 1e-6])
    estimate = Pose(truth.rotation, truth.translation + np.array([0.01, 50.0, 0.0]))
    assert nees(fix(estimate, status="degenerate", covariance=covariance), truth) == pytest.approx(1.25, rel=1e-6)


def test_wrong_inputs_are_named():
    truth = Pose.identity()
    with pytest.raises(DataError, match="no frame to score"):
        evaluate_localization([])
    with pytest.raises(DataError, match="sequence 'a': stamp 5 ns follows 5 ns"):
        evaluate_localization([LocalizationFrame(5, truth, None, "a")] * 2)
    with pytest.raises(DataError, match="frame at 5 ns is stamped 6 ns"):
        evaluate_localization([LocalizationFrame(5, truth, fix(truth, 6))])
    with pytest.raises(DataError, match="the frames of sequence 'a' are not together"):
        evaluate_localization([LocalizationFrame(i, truth, None, name) for i, name in enumerate(("a", "b", "a"))])
    flat = np.diag([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    with pytest.raises(DataError, match=r"fix at 7 ns is not positive definite .*eigenvalue 0(?s:.)*never zero"):
        evaluate_localization([LocalizationFrame(7, truth, fix(truth, 7, covariance=flat))])
