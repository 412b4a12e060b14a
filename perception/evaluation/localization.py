"""Localization: errors of every fix in the true vehicle's frame, recall, availability, integrity, consistency.

With `map_from_ego` estimated (R, t) and true (R*, t*):

* translation `R*^T (t - t*)` = (longitudinal, lateral, vertical): forward, left, up of the TRUE vehicle;
* yaw and geodesic rotation: heading and angle of `R*^T R`;
* NEES: `e^T P^-1 e` with `e = (t - t*, log(R R*^T))`, in the map frame's fixed axes and in the order x, y, z, rot x,
  rot y, rot z: those of `Localization.covariance`. Expected value 6 (Bar-Shalom et al. 2001, section 5.4.2).

A frame has a fix when its prediction's status is `ok` or `degenerate`. Errors are of the fixes; availability and recall
are shares of ALL frames, so that a localizer that keeps silent when in doubt cannot look better than it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.transform import Rotation
from scipy.stats import chi2

from perception.errors import DataError
from perception.types import Array, Localization, Pose

ACCEPTED = ("ok", "degenerate")
"""Statuses that are a fix."""

RECALLS = ((0.25, 2.0), (0.5, 5.0), (5.0, 10.0))
"""(metres, degrees) of the visual-localization benchmarks: translation norm and geodesic rotation, both within."""

DRIVING_RECALLS_M = (0.1, 0.3, 0.5, 1.0)
"""Metres of lateral, and of longitudinal, error."""

ALERT_LATERAL_M, ALERT_LONGITUDINAL_M = 0.5, 1.5
"""A fix beyond either without notice is an integrity failure."""

NEES_BOUNDS: tuple[float, float] = (float(chi2.ppf(0.025, 6)), float(chi2.ppf(0.975, 6)))
"""95 % of the NEES of an honest covariance lie between."""


@dataclass(frozen=True, slots=True)
class PoseError:
    """Signed errors of one pose, in the true vehicle's frame; `rotation_rad` and `translation_m` are norms."""

    longitudinal_m: float
    lateral_m: float
    vertical_m: float
    yaw_rad: float
    rotation_rad: float
    translation_m: float


def pose_error(estimate: Pose, truth: Pose) -> PoseError:
    """Error of an estimated `map_from_ego` against the true one."""
    error = truth.inverse() @ estimate  # true ego from estimated ego
    longitudinal, lateral, vertical = error.translation
    return PoseError(
        float(longitudinal),
        float(lateral),
        float(vertical),
        error.yaw,
        float(Rotation.from_matrix(error.rotation).magnitude()),
        float(np.linalg.norm(error.translation)),
    )


def nees(estimate: Localization, truth: Pose) -> float:
    """Normalised estimation error squared, 6 degrees of freedom.

    Raises:
        DataError: the covariance is not positive definite.
    """
    rotation = estimate.map_from_ego.rotation @ truth.rotation.T
    error = np.concatenate(
        [estimate.map_from_ego.translation - truth.translation, Rotation.from_matrix(rotation).as_rotvec()]
    )
    try:
        return float(error @ cho_solve(cho_factor(np.asarray(estimate.covariance, np.float64)), error))
    except np.linalg.LinAlgError:
        raise DataError(
            f"the covariance of the fix at {estimate.stamp_ns} ns is not positive definite (least eigenvalue "
            f"{np.linalg.eigvalsh(estimate.covariance).min():.3g})",
            "an axis that is not observed has a large finite variance, never zero",
        ) from None


@dataclass(frozen=True, slots=True, eq=False)
class LocalizationFrame:
    """One frame of a drive.

    Attributes:
        stamp_ns: the sensor's stamp.
        map_from_ego: the true pose at it.
        prediction: None where there is none, which counts against availability and recall.
        sequence: names the drive; gaps do not reach from one into the next.
    """

    stamp_ns: int
    map_from_ego: Pose
    prediction: Localization | None
    sequence: str = ""


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Of absolute errors over the fixes, in the unit of the error; NaN without a fix."""

    median: float
    mean: float
    p95: float
    p99: float
    max: float


def summarize(errors: Sequence[float] | Array) -> ErrorSummary:
    """Median, mean, 95th and 99th percentile (linear interpolation) and largest of the absolute values."""
    size = np.abs(np.asarray(errors, np.float64))
    if not len(size):
        return ErrorSummary(*[math.nan] * 5)
    median, p95, p99 = np.percentile(size, (50, 95, 99))
    return ErrorSummary(float(median), float(size.mean()), float(p95), float(p99), float(size.max()))


@dataclass(frozen=True, slots=True)
class LocalizationScore:
    """What is measured over all frames. Shares are fractions.

    Attributes:
        longitudinal_m ... translation_m: over the fixes; NaN without one. Angles in radians.
        recalls: share of all frames within each of RECALLS.
        lateral_recalls, longitudinal_recalls: share of all frames within each of DRIVING_RECALLS_M.
        availability: share of all frames with a fix.
        longest_gap_s, longest_gap_m: longest time, and longest way driven, from one fix to the next with a frame
            without a fix between (or from the sequence's first frame, or to its last); 0 when every frame has a fix.
        over_alert_limit: share of fixes beyond ALERT_LATERAL_M or ALERT_LONGITUDINAL_M (integrity; 0 is best).
        mean_nees: over the fixes, 6 when the covariance is honest, more when it is over-confident.
        nees_consistent: share of fixes inside NEES_BOUNDS, 0.95 when the covariance is honest.
        frames, fixes: how many.
    """

    longitudinal_m: ErrorSummary
    lateral_m: ErrorSummary
    vertical_m: ErrorSummary
    yaw_rad: ErrorSummary
    rotation_rad: ErrorSummary
    translation_m: ErrorSummary
    recalls: tuple[float, ...]
    lateral_recalls: tuple[float, ...]
    longitudinal_recalls: tuple[float, ...]
    availability: float
    longest_gap_s: float
    longest_gap_m: float
    over_alert_limit: float
    mean_nees: float
    nees_consistent: float
    frames: int
    fixes: int

    def rows(self) -> list[tuple[str, ErrorSummary]]:
        """Lines of the error table."""
        return [
            ("longitudinal_m", self.longitudinal_m),
            ("lateral_m", self.lateral_m),
            ("vertical_m", self.vertical_m),
            ("yaw_rad", self.yaw_rad),
            ("rotation_rad", self.rotation_rad),
            ("translation_m", self.translation_m),
        ]

    def metrics(self) -> dict[str, float]:
        """Flat, for a result file."""
        flat = {
            f"{name}/{statistic}": getattr(summary, statistic)
            for name, summary in self.rows()
            for statistic in ("median", "mean", "p95", "p99", "max")
        }
        flat |= {f"recall/{m}m_{deg}deg": r for (m, deg), r in zip(RECALLS, self.recalls, strict=True)}
        flat |= {f"recall/lateral_{m}m": r for m, r in zip(DRIVING_RECALLS_M, self.lateral_recalls, strict=True)}
        flat |= {
            f"recall/longitudinal_{m}m": r for m, r in zip(DRIVING_RECALLS_M, self.longitudinal_recalls, strict=True)
        }
        return flat | {
            "availability": self.availability,
            "longest_gap_s": self.longest_gap_s,
            "longest_gap_m": self.longest_gap_m,
            "over_alert_limit": self.over_alert_limit,
            "mean_nees": self.mean_nees,
            "nees_consistent": self.nees_consistent,
        }


def evaluate_localization(frames: Iterable[LocalizationFrame]) -> LocalizationScore:
    """Score the frames of one or more sequences, each in the order of its stamps.

    Raises:
        DataError: no frame at all, stamps that do not grow within a sequence, a prediction of another stamp than its
            frame's, or a covariance that is not positive definite.
    """
    frames = list(frames)
    if not frames:
        raise DataError("no frame to score", "does the data set have true poses (Truth.map_from_ego)?")
    sequences = [list(group) for _, group in groupby(frames, lambda frame: frame.sequence)]
    _check_stamps(sequences)

    fixes = [(fix, frame.map_from_ego) for frame in frames if (fix := _fix(frame)) is not None]
    errors = [pose_error(fix.map_from_ego, truth) for fix, truth in fixes]

    def column(name: str) -> Array:
        return np.array([getattr(error, name) for error in errors], np.float64)

    longitudinal, lateral = np.abs(column("longitudinal_m")), np.abs(column("lateral_m"))
    translation, rotation = column("translation_m"), column("rotation_rad")
    consistency = np.array([nees(fix, truth) for fix, truth in fixes])
    gaps = [_longest_gap(sequence) for sequence in sequences]

    def share_of_frames(within: Array) -> float:
        return float(within.sum()) / len(frames)

    def mean_of_fixes(values: Array) -> float:
        return float(values.mean()) if len(fixes) else math.nan

    return LocalizationScore(
        longitudinal_m=summarize(longitudinal),
        lateral_m=summarize(lateral),
        vertical_m=summarize(column("vertical_m")),
        yaw_rad=summarize(column("yaw_rad")),
        rotation_rad=summarize(rotation),
        translation_m=summarize(translation),
        recalls=tuple(share_of_frames((translation <= m) & (rotation <= math.radians(deg))) for m, deg in RECALLS),
        lateral_recalls=tuple(share_of_frames(lateral <= m) for m in DRIVING_RECALLS_M),
        longitudinal_recalls=tuple(share_of_frames(longitudinal <= m) for m in DRIVING_RECALLS_M),
        availability=len(fixes) / len(frames),
        longest_gap_s=max(seconds for seconds, _ in gaps),
        longest_gap_m=max(metres for _, metres in gaps),
        over_alert_limit=mean_of_fixes((lateral > ALERT_LATERAL_M) | (longitudinal > ALERT_LONGITUDINAL_M)),
        mean_nees=mean_of_fixes(consistency),
        nees_consistent=mean_of_fixes((NEES_BOUNDS[0] <= consistency) & (consistency <= NEES_BOUNDS[1])),
        frames=len(frames),
        fixes=len(fixes),
    )


def _fix(frame: LocalizationFrame) -> Localization | None:
    return frame.prediction if frame.prediction is not None and frame.prediction.status in ACCEPTED else None


def _check_stamps(sequences: Sequence[Sequence[LocalizationFrame]]) -> None:
    names = [sequence[0].sequence for sequence in sequences]
    if len(set(names)) != len(names):
        raise DataError(
            f"the frames of sequence {next(n for n in names if names.count(n) > 1)!r} are not together",
            "give the frames one sequence after the other",
        )
    for sequence in sequences:
        for before, after in pairwise(sequence):
            if after.stamp_ns <= before.stamp_ns:
                raise DataError(
                    f"sequence {after.sequence!r}: stamp {after.stamp_ns} ns follows {before.stamp_ns} ns",
                    "give the frames in the order of their stamps, each once; two drives are two sequences",
                )
        for frame in sequence:
            if frame.prediction is not None and frame.prediction.stamp_ns != frame.stamp_ns:
                raise DataError(
                    f"sequence {frame.sequence!r}: the prediction of the frame at {frame.stamp_ns} ns is stamped "
                    f"{frame.prediction.stamp_ns} ns",
                    "compare a prediction with the truth at its own stamp; a moving vehicle makes the rest an error",
                )


def _longest_gap(sequence: Sequence[LocalizationFrame]) -> tuple[float, float]:
    """(seconds, metres driven) of the longest stretches without a fix, by either measure on its own."""
    position = np.array([frame.map_from_ego.translation for frame in sequence])  # (T, 3)
    driven_m = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(position, axis=0), axis=1))])
    has_fix = [_fix(frame) is not None for frame in sequence]
    longest_s = longest_m = 0.0
    last = 0  # the last fix before frame i, or the first frame
    for i in range(1, len(sequence)):
        if not (has_fix[i - 1] and has_fix[i]):
            longest_s = max(longest_s, (sequence[i].stamp_ns - sequence[last].stamp_ns) / 1e9)
            longest_m = max(longest_m, float(driven_m[i] - driven_m[last]))
        if has_fix[i]:
            last = i
    return longest_s, longest_m
