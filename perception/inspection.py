"""What is in a sample: counts, ranges and warnings that a person would look for before trusting a sensor or a label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perception.types import (
    IGNORE_LABEL,
    Array,
    Boxes3D,
    CameraImage,
    OccupancyGrid3D,
    PointCloud,
    Sample,
    Segmentation,
    Truth,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report: what, its facts, and a warning or ""."""

    name: str
    facts: str
    warning: str = ""


def describe(sample: Sample, truth: Truth | None) -> list[Row]:
    """The report on a sample and its truth, sensors first."""
    rows = [_cloud(f"LiDAR {role}", cloud, sample) for role, cloud in sample.lidars.items()]
    rows += [_cloud(f"radar {role}", cloud, sample) for role, cloud in sample.radars.items()]
    rows += [_camera(f"camera {role}", image, sample) for role, image in sample.cameras.items()]
    if sample.odom_from_ego is not None:
        x, y, z = sample.odom_from_ego.translation
        rows.append(Row("odometry", f"ego at ({x:.2f}, {y:.2f}, {z:.2f}) m"))
    if truth is None:
        return [*rows, Row("truth", "none: a test split")]
    if truth.map_from_ego is not None:
        x, y, z = truth.map_from_ego.translation
        rows.append(
            Row(
                "pose",
                f"ego at ({x:.2f}, {y:.2f}, {z:.2f}) m in the map, yaw {np.degrees(truth.map_from_ego.yaw):.1f} deg",
            )
        )
    if truth.boxes is not None:
        rows += _boxes(truth.boxes)
    for role, labels in truth.point_label.items():
        rows.append(Row(f"point labels {role}", _shares(labels)))
    if truth.occupancy is not None:
        rows += _occupancy(truth.occupancy)
    return rows


def _lag_ms(stamp_ns: int, sample: Sample) -> float:
    return (stamp_ns - sample.stamp_ns) / 1e6


def _cloud(name: str, cloud: PointCloud, sample: Sample) -> Row:
    if not len(cloud):
        return Row(name, "0 points", "an empty cloud")
    xyz = cloud.xyz_ego()
    distance = np.linalg.norm(cloud.xyz, axis=1)
    low, high = xyz.min(0), xyz.max(0)
    facts = [
        f"{len(cloud):,} points",
        f"range {distance.min():.1f} to {distance.max():.1f} m",
        f"ego x {low[0]:.0f}..{high[0]:.0f}, y {low[1]:.0f}..{high[1]:.0f}, z {low[2]:.1f}..{high[2]:.1f} m",
    ]
    if "sweep" in cloud.fields:
        sweeps = int(cloud.fields["sweep"].max()) + 1
        lag_s = float(cloud.fields["time_lag"].max())
        facts.append(f"{sweeps} sweep{'s' if sweeps > 1 else ''} over {lag_s:.2f} s")
    for field in ("intensity", "rcs", "power", "radial_velocity"):
        if field in cloud.fields:
            facts.append(f"{field} p1/p50/p99 {_percentiles(cloud.fields[field])}")
    facts.append(f"fields {', '.join(cloud.fields)}")
    facts.append(f"{_lag_ms(cloud.stamp_ns, sample):+.0f} ms")
    warning = ""
    if "intensity" in cloud.fields and float(cloud.fields["intensity"].max()) == 0:
        warning = "intensity is 0 everywhere"
    return Row(name, "; ".join(facts), warning)


def _percentiles(values: Array) -> str:
    return "/".join(f"{v:.3g}" for v in np.percentile(values, (1, 50, 99)))


def _camera(name: str, image: CameraImage, sample: Sample) -> Row:
    height, width = image.rgb.shape[:2]
    brightness = float(image.rgb[::4, ::4].mean())
    field_of_view = 2 * np.degrees(np.arctan(width / 2 / image.intrinsic[0, 0]))
    lag_ms = _lag_ms(image.stamp_ns, sample)
    facts = f"{width}x{height}; {field_of_view:.0f} deg wide; brightness {brightness:.0f}; {lag_ms:+.0f} ms"
    return Row(name, facts, "black image" if brightness < 2 else "")


def _boxes(boxes: Boxes3D) -> list[Row]:
    rows = []
    for label in np.unique(boxes.label):
        mine = boxes.select(boxes.label == label)
        distance = np.linalg.norm(mine.center[:, :2], axis=1)
        facts = [
            f"{len(mine)}",
            f"{distance.min():.0f} to {distance.max():.0f} m",
            "mean size {:.1f} x {:.1f} x {:.1f} m".format(*mine.size.mean(0)),
        ]
        speed = np.linalg.norm(mine.velocity, axis=1)
        if np.isfinite(speed).any():
            facts.append(f"fastest {np.nanmax(speed):.1f} m/s")
        if mine.num_points is not None:
            facts.append(f"{int(mine.num_points.sum()):,} points, {int((mine.num_points == 0).sum())} boxes without")
        rows.append(Row(f"boxes {boxes.classes[label]}", "; ".join(facts)))
    return rows or [Row("boxes", "none")]


def _shares(labels: Segmentation) -> str:
    counts = np.bincount(labels.label.ravel(), minlength=256)
    shares = [(int(counts[i]), name) for i, name in enumerate(labels.classes)] + [
        (int(counts[IGNORE_LABEL]), "ignored")
    ]
    return ", ".join(
        f"{name} {100 * n / max(labels.label.size, 1):.1f} %" for n, name in sorted(shares, reverse=True) if n
    )


def _occupancy(occupancy: OccupancyGrid3D) -> list[Row]:
    grid, label = occupancy.grid, occupancy.label
    x, y, z = grid.shape
    counts = np.bincount(label.ravel(), minlength=256)
    occupied = int(occupancy.occupied.sum())
    shares = sorted(
        ((int(counts[i]), n) for i, n in enumerate(occupancy.classes) if i != occupancy.free_label), reverse=True
    )
    facts = [
        f"{x} x {y} x {z} voxels of {grid.voxel_size[0]:g} m from {grid.min_corner}",
        f"{occupied:,} occupied, {int(counts[occupancy.free_label]):,} free, {int(counts[IGNORE_LABEL]):,} ignored",
    ]
    facts += [f"seen by {kind} {int(mask.sum()):,}" for kind, mask in occupancy.observed.items()]
    parts = ", ".join(f"{name} {n:,}" for n, name in shares if n)
    return [Row("occupancy", "; ".join(facts), "" if occupied else "no occupied voxel"), Row("occupied voxels", parts)]
