"""Predictions read back are those that were written, to the bit; what is no such file is said so."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import fields
from typing import Any

import builders
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from perception.errors import DataError
from perception.evaluation.result import WeightsProvenance
from perception.prediction_files import PredictedFrame, PredictionWriter, read_predictions
from perception.predictor import TruthEchoConfig
from perception.types import IGNORE_LABEL, Boxes3D, Localization, OccupancyGrid3D, Pose, VoxelGrid

WEIGHTS = WeightsProvenance.not_needed("a test")
USED = {"lidar_top": (7, 5, 3), "cam_front": (6,)}


def written(path, predictions):
    with PredictionWriter(path, "boxes", "drive.mcap", TruthEchoConfig(), WEIGHTS) as writer:
        for i, prediction in enumerate(predictions):
            writer.add(PredictedFrame(f"token-{i}", USED, prediction))
    return path


def assert_same(found: Any, expected: Any) -> None:
    """Field by field, arrays bit by bit."""
    assert type(found) is type(expected)
    for field in fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, field.name)
        elif isinstance(b, VoxelGrid | Pose):
            assert_same(a, b)
        else:
            assert a == b, field.name


finite = st.floats(-1e9, 1e9)


@given(
    arrays(np.float64, (3, 3), elements=finite),
    arrays(np.float64, (3, 3), elements=st.floats(1e-3, 1e3)),
    arrays(np.float64, (3, 2), elements=st.one_of(finite, st.just(np.nan))),
    arrays(np.float64, 3, elements=st.floats(0, 1)),
    st.booleans(),
)
def test_boxes(tmp_path_factory, center, size, velocity, score, known):
    boxes = Boxes3D(
        center, size, center[:, 0], velocity, score, np.array([1, 0, 1]), ("car", "bus"), 17,
        attribute=np.array(["", "cycle.with_rider", "é"]) if known else None,
        track_id=np.array(["1", "2", ""]) if known else None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("boxes") / "boxes.json"
    found = read_predictions(written(path, [boxes, Boxes3D.empty(("car",), 18)]))
    assert_same(found.frames[0].prediction, boxes)
    assert len(found.frames[1].prediction) == 0 and found.frames[1].prediction.stamp_ns == 18
    assert found.frames[0].token == "token-0" and found.frames[0].used == USED


@pytest.mark.parametrize("scored", [False, True])
def test_occupancy(tmp_path, scored):
    rng = np.random.default_rng(0)
    label = rng.choice(np.array([0, 1, 2, IGNORE_LABEL], np.uint8), (5, 4, 3))
    score = rng.uniform(0, 1, label.shape).astype(np.float32) if scored else None
    grid = VoxelGrid((-1.1, 0.3, -2.0), (0.1, 0.2, 0.3), label.shape, Pose.from_yaw(0.3, (1, 2, 3)))
    occupancy = OccupancyGrid3D(grid, label, ("free", "car", "road"), 0, 5, score)
    assert_same(read_predictions(written(tmp_path / "o.json", [occupancy])).frames[0].prediction, occupancy)


def test_localization(tmp_path):
    root = np.random.default_rng(0).normal(size=(6, 6))
    fix = Localization(Pose.from_yaw(1.0, (1e6, 2.5, 0.1)), root @ root.T, 3, "degenerate", 9)
    assert_same(read_predictions(written(tmp_path / "p.json", [fix])).frames[0].prediction, fix)


def test_the_file_says_what_made_it(tmp_path):
    path = written(tmp_path / "new" / "boxes.json", [])
    found, data = read_predictions(path), json.loads(path.read_text())
    assert (found.system, found.source, found.weights, found.frames) == ("boxes", "drive.mcap", WEIGHTS, ())
    assert found.config == {"name": "truth_echo", "output": "boxes"}
    assert data["versions"]["numpy"] == np.__version__ and "commit" in data["code"]


def test_a_run_that_fails_leaves_no_file(tmp_path):
    def frames():
        yield builders.boxes()
        raise RuntimeError("network")

    with pytest.raises(RuntimeError, match="network"):
        written(tmp_path / "a.json", frames())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/boxes\.json: cannot be written"):
        written(tmp_path / "file" / "boxes.json", [])


def damaged(change):
    """The text of a file of one occupancy after a change of its data."""
    grid = VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (2, 2, 2), Pose.identity())

    def make(tmp_path):
        path = written(tmp_path / "o.json", [OccupancyGrid3D(grid, np.zeros((2, 2, 2), np.uint8), ("free",), 0, 0)])
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        return path

    return make


def packed(count: int) -> str:
    return base64.b64encode(zlib.compress(bytes(count))).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), r"not 'perception predictions' of version 1"),
        (lambda d: d["frames"][0].pop("used"), r"damaged: KeyError: 'used'"),
        (lambda d: d["frames"][0]["occupancy"].update(label=packed(7)), r"7 bytes for 8"),
        (lambda d: d["frames"][0]["occupancy"].update(label=packed(10**7)), r"more than 8 bytes for 8"),
        (lambda d: d["frames"][0]["occupancy"].update(label="?"), r"damaged: "),
        (lambda d: d["frames"][0]["occupancy"].update(shape=[2**20, 2**20, 2**20]), r"a grid of 1048576 x"),
        (lambda d: d["frames"][0]["occupancy"].update(shape=[-1, -1, 8]), r"a grid of -1 x|negative|must be positive"),
        (lambda d: d.update(frames=3), r"damaged: TypeError"),
    ],
)
def test_damage_is_told(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_predictions(damaged(change)(tmp_path))


def test_what_is_no_such_file(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_predictions(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_predictions(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="not 'perception predictions'"):
        read_predictions(tmp_path / "list.json")
