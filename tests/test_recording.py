"""The rerun recording holds the sample; without rerun the extra is named."""

from __future__ import annotations

import sys

import builders
import cv2
import numpy as np
import pytest

from perception.errors import PerceptionError
from perception.recording import Recording, write_rrd
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


def test_a_recording_of_predictions_holds_their_numbers_at_their_stamps(tmp_path):
    pytest.importorskip("rerun", reason="extra rerun is not installed")
    from rerun.dataframe import load_recording

    recording = Recording(tmp_path / "drive.rrd")
    stamps = [1_700_000_000_000_000_000, 1_700_000_000_500_000_000]
    seen, nothing = builders.boxes(), builders.boxes().select(np.zeros(len(builders.boxes()), bool))
    for stamp_ns, boxes in zip(stamps, (seen, nothing), strict=True):
        sample = Sample(stamp_ns, lidars={"top": builders.cloud()}, cameras={"front": builders.camera(level=120)})
        recording.add(sample, boxes)
    recording.flush()
    view = load_recording(str(tmp_path / "drive.rrd")).view(index="stamp", contents="/ego/**")
    table = view.select().read_all().combine_chunks()
    assert table["stamp"].to_numpy().astype("datetime64[ns]").astype(np.int64).tolist() == stamps
    first, second = table["/ego/boxes:PoseTranslation3D"].to_pylist()
    np.testing.assert_allclose(first, seen.center, atol=1e-5)
    assert second == []  # cleared, not kept on
    np.testing.assert_allclose(table["/ego/lidar/top:Position3D"].to_pylist()[0], builders.cloud().xyz_ego(), atol=1e-4)
    jpeg = np.array(table["/ego/camera/front:Blob"].to_pylist()[0][0], np.uint8)
    assert cv2.imdecode(jpeg, cv2.IMREAD_COLOR).mean() == pytest.approx(120, abs=2)
