"""The report on a sample: its numbers are the sample's, and what a person must not miss is a warning."""

from __future__ import annotations

from dataclasses import replace

import builders
import numpy as np

from perception.inspection import describe
from perception.types import OccupancyGrid3D, PointCloud, Pose, Sample, Segmentation, Truth, VoxelGrid


def row(rows, name):
    return next(r for r in rows if r.name == name)


def test_the_numbers_are_the_samples_own():
    xyz = np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]], np.float32)
    lidar = PointCloud(xyz, {"intensity": np.array([10.0, 20.0], np.float32)}, Pose.identity(), 50_000_000)
    rows = describe(Sample(0, lidars={"top": lidar}, cameras={"front": builders.camera(stamp_ns=-20_000_000)}), None)
    facts = row(rows, "LiDAR top").facts
    assert "2 points" in facts and "range 2.0 to 5.0 m" in facts and "+50 ms" in facts and "ego x 0..3" in facts
    assert row(rows, "camera front").facts == "160x90; 90 deg wide; brightness 90; -20 ms"
    assert row(rows, "truth").facts == "none: a test split"


def test_what_is_wrong_is_a_warning():
    empty = PointCloud(np.zeros((0, 3), np.float32), {}, Pose.identity(), 0)
    flat = replace(builders.cloud(), fields={"intensity": np.zeros(500, np.float32)})
    dark = builders.camera(level=0)
    rows = describe(Sample(0, lidars={"top": empty, "roof": flat}, cameras={"front": dark}), Truth())
    assert row(rows, "LiDAR top").warning == "an empty cloud"
    assert row(rows, "LiDAR roof").warning == "intensity is 0 everywhere"
    assert row(rows, "camera front").warning == "black image"


def test_boxes_and_labels_are_counted():
    label = np.zeros((4, 4, 2), np.uint8)
    label[0, 0, 0], label[1, 1, 1] = 1, 255
    grid = VoxelGrid((0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (4, 4, 2), Pose.identity())
    occupancy = OccupancyGrid3D(grid, label, ("free", "car"), 0, 0, observed={"camera": label == 1})
    points = Segmentation(np.array([0, 0, 0, 1], np.uint8), ("road", "car"))
    boxes = builders.boxes(velocity=(3.0, 4.0))
    rows = describe(Sample(0), Truth(boxes=boxes, occupancy=occupancy, point_label={"top": points}))
    assert (
        "fastest 5.0 m/s" in row(rows, "boxes pedestrian").facts and "14 to 14 m" in row(rows, "boxes pedestrian").facts
    )
    assert row(rows, "point labels top").facts == "road 75.0 %, car 25.0 %"
    assert "1 occupied, 30 free, 1 ignored" in row(rows, "occupancy").facts
    assert row(rows, "occupied voxels").facts == "car 1"
