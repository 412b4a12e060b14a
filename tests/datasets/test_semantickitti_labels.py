"""Label ids of SemanticKITTI."""

from __future__ import annotations

import numpy as np
import pytest

from perception.datasets import semantickitti_labels as labels
from perception.errors import DataError
from perception.types import IGNORE_LABEL, Segmentation


def test_the_maps_are_the_official_ones():
    assert labels.RAW_FROM_LEARNING == (0, 10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81)
    assert len(labels.LEARNING_FROM_RAW) == 34
    by_name = {raw: labels.POINT_CLASSES[label] for raw, label in labels.LEARNING_FROM_RAW.items()}
    assert {raw for raw, name in by_name.items() if name == "other-vehicle"} == {13, 16, 20, 256, 257, 259}
    assert by_name[60] == by_name[40] == "road"
    assert by_name[252] == by_name[10] == "car"
    assert by_name[253] == by_name[31] == "bicyclist"
    assert by_name[254] == by_name[30] == "person"
    assert by_name[81] == "traffic-sign"
    assert {raw for raw, name in by_name.items() if name == "unlabeled"} == {0, 1, 52, 99}


def test_the_splits_are_the_official_ones():
    assert [len(labels.SPLITS[s]) for s in ("train", "val", "test")] == [10, 1, 11]
    assert sorted(sum(labels.SPLITS.values(), ())) == [f"{i:02d}" for i in range(22)]
    assert labels.SPLITS["val"] == ("08",)


def test_raw_and_learning_labels_are_inverse():
    label = np.arange(20, dtype=np.uint8)
    raw = labels.raw_labels(label)
    assert raw.dtype == np.uint16
    np.testing.assert_array_equal(labels.point_labels(raw, "a test"), label)
    np.testing.assert_array_equal(labels.voxel_labels(raw, "a test"), label)


def test_points_and_voxels_differ_where_nobody_scores():
    raw = np.array([0, 1, 52, 99, 10], np.uint16)
    assert labels.point_labels(raw, "a test").tolist() == [0, 0, 0, 0, 1]
    assert labels.voxel_labels(raw, "a test").tolist() == [0, IGNORE_LABEL, IGNORE_LABEL, IGNORE_LABEL, 1]


@pytest.mark.parametrize("unknown", [2, 19, 260, 358, 65535])
def test_ids_that_are_not_defined(unknown):
    with pytest.raises(DataError, match=rf"a file: label ids \[{unknown}\] are none of SemanticKITTI's raw ids"):
        labels.point_labels(np.array([10, unknown], np.uint16), "a file")


@pytest.mark.parametrize("label", [20, IGNORE_LABEL])
def test_labels_without_raw_id_are_not_written(label):
    with pytest.raises(ValueError, match=f"label {label} has no raw id"):
        labels.raw_labels(np.array([label], np.uint8))


def test_point_labels_with_instances_written_and_read_back(tmp_path):
    rng = np.random.default_rng(0)
    written = Segmentation(
        rng.integers(0, 20, 500).astype(np.uint8), labels.POINT_CLASSES, rng.integers(0, 1 << 16, 500).astype(np.uint16)
    )
    path = tmp_path / "labels/000000.label"
    labels.write_point_labels(path, written)
    read = labels.read_point_labels(path, 500)
    np.testing.assert_array_equal(read.label, written.label)
    np.testing.assert_array_equal(read.instance, written.instance)
    assert np.fromfile(path, "<u4")[0] == labels.RAW_FROM_LEARNING[written.label[0]] + (int(written.instance[0]) << 16)


def test_labels_of_another_scan(tmp_path):
    path = tmp_path / "000000.label"
    np.full(10, 40, "<u4").tofile(path)
    with pytest.raises(DataError, match=r"000000\.label: 10 labels for a scan of 12 points"):
        labels.read_point_labels(path, 12)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="39 bytes, which is no whole number of 4-byte records"):
        labels.read_point_labels(path, 10)
    with pytest.raises(ValueError, match="expected the classes"):
        labels.write_point_labels(path, Segmentation(np.zeros(3, np.uint8), ("unlabeled", "car")))
