"""Decoding, scoring, suppression and overlaps equal the official model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity.kit import Kit
from parity.sparsefusion_outputs import camera_rows_7, config_of, head_outputs, lidar_rows_7

from perception.networks.sparsefusion.boxes import class_scores, detect, encode_boxes, keep, suppressed
from perception.networks.sparsefusion.config import LidarConfig
from perception.networks.sparsefusion.iou import iou_3d

CENTER_ROUNDING_M = 5e-6
"""Of a box 54 m from the map's corner whose cell is stored in float32."""


@pytest.mark.parametrize(("file", "case"), [("head_full", "full"), ("head_small_b2", "small")])
def test_detections(kit: Kit, file: str, case: str):
    """Scores, boxes, labels, range filter and circle suppression of every query."""
    config, outputs = config_of(kit, case), head_outputs(kit, file)
    scores, detections = class_scores(outputs), detect(outputs, config)
    for b in range(len(scores)):
        kit.assert_close(file, f"dec{b}_scores400x10", scores[b].T)
        kit.assert_close(file, f"dec{b}_boxes400", detections.box[b], rounding=CENTER_ROUNDING_M)
        kit.assert_close(file, f"dec{b}_score400", detections.score[b])
        kit.assert_close(file, f"dec{b}_label400", detections.label[b])
        columns = (detections.box[b], detections.score[b][:, None], detections.label[b][:, None])
        rows = torch.cat(columns, -1).numpy()
        everywhere = config.model_copy(update={"nms_radius_squared_m2": {}})
        kit.assert_close(file, f"dec{b}_inrange400", torch.from_numpy(keep(rows, everywhere)))
        kit.assert_close(file, f"final{b}_keep400", torch.from_numpy(keep(rows, config)))


def test_circle_suppression(kit: Kit):
    dets = kit.array("units", "circle_dets").astype(np.float64)
    thresholds = [n for n in kit.names("units") if n.startswith("circle_keep_")]
    assert thresholds
    for name in thresholds:
        radius_squared = np.array([float(name.rpartition("_")[2])])
        out = suppressed(dets[:, :2], dets[:, 2], np.zeros(len(dets), np.int64), radius_squared)
        assert set(np.flatnonzero(~out)) == set(kit.array("units", name).tolist())


def test_overlaps_in_space_and_in_the_camera(kit: Kit):
    a, b = kit.array("units", "iou_a"), kit.array("units", "iou_b")
    kit.assert_close("units", "iou_lidar", iou_3d(lidar_rows_7(a), lidar_rows_7(b)))
    kit.assert_close("units", "iou_camera", iou_3d(camera_rows_7(a), camera_rows_7(b)))


def test_box_code(kit: Kit):
    boxes = kit.tensor("units", "coder_boxes", torch.float64)
    kit.assert_close("units", "coder_lidar_target", encode_boxes(boxes, LidarConfig()))
