"""The rerun recording holds the sample; without rerun the extra is named."""

from __future__ import annotations

import sys

import builders
import numpy as np
import pytest

from perception.errors import PerceptionError
from perception.recording import write_rrd
from perception.types import OccupancyGrid3D, Pose, Sample, Truth, VoxelGrid


def test_without_rerun_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(PerceptionError, match=r"rerun does not import.*\n.*\.\[rerun\]"):
        write_rrd(tmp_path / "sample.rrd", Sample(0), None)


def test_every_entity_is_in_the_recording(tmp_path):
    pytest.importorskip("rerun", reason="extra rerun is not installed")
    from rerun.dataframe import load_recording

    label = np.zeros((4, 4, 2), np.uint8)
    label[1, 2, 0] = 1
    grid = VoxelGrid((0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (4, 4, 2), Pose.identity())
    truth = Truth(boxes=builders.boxes(), occupancy=OccupancyGrid3D(grid, label, ("free", "car"), 0, 0))
    sample = Sample(0, lidars={"top": builders.cloud()}, cameras={"front": builders.camera()})
    path = write_rrd(tmp_path / "new" / "sample.rrd", sample, truth)
    columns = {c.entity_path for c in load_recording(str(path)).schema().component_columns()}
    assert {"/ego/lidar/top", "/ego/camera/front", "/ego/boxes", "/ego/occupancy"} <= columns
