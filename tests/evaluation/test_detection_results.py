"""The nuScenes results file: what is written is what the devkit reads; a bad file is refused with box and reason."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from perception.datasets.nuscenes_layout import DETECTION_CLASSES
from perception.errors import DataError
from perception.evaluation.detection_results import (
    MAX_BOXES,
    Modalities,
    likely_attribute,
    read_results,
    write_results,
)
from perception.types import Boxes3D, Needs, Pose

LIDAR = Modalities(camera=False, lidar=True, radar=False)


def boxes(*labels, center=None, yaw=None, velocity=None, score=None, attribute=None, classes=DETECTION_CLASSES):
    m = len(labels)
    return Boxes3D(
        np.zeros((m, 3)) if center is None else np.array(center, np.float64),
        np.tile([4.0, 2.0, 1.5], (m, 1)),
        np.zeros(m) if yaw is None else np.array(yaw, np.float64),
        np.zeros((m, 2)) if velocity is None else np.array(velocity, np.float64),
        np.full(m, 0.5) if score is None else np.array(score, np.float64),
        np.array([classes.index(label) for label in labels], np.int64),
        classes,
        0,
        None if attribute is None else np.array(attribute, np.str_),
    )


def written(tmp_path, *predictions):
    write_results(tmp_path / "results.json", predictions, LIDAR)
    return json.loads((tmp_path / "results.json").read_text())["results"]


def test_a_box_stands_in_the_global_frame(tmp_path):
    # Ego heads along the map's +y: its forward is +y, its left is -x.
    map_from_ego = Pose.from_yaw(math.pi / 2, (100.0, 200.0, 1.0))
    car = boxes("car", center=[[10.0, 3.0, 0.5]], yaw=[0.3], velocity=[[5.0, 1.0]], score=[0.75])
    [record] = written(tmp_path, ("a", car, map_from_ego))["a"]
    assert record["translation"] == pytest.approx([97.0, 210.0, 1.5])
    assert record["size"] == [2.0, 4.0, 1.5]  # width, length, height
    w, x, y, z = record["rotation"]
    assert [x, y] == pytest.approx([0.0, 0.0])
    assert 2 * math.atan2(z, w) == pytest.approx(math.pi / 2 + 0.3)
    assert record["velocity"] == pytest.approx([-1.0, 5.0])
    assert (record["sample_token"], record["detection_name"], record["detection_score"]) == ("a", "car", 0.75)
    assert record["attribute_name"] == "vehicle.moving"


def test_meta_and_samples_without_boxes_are_there(tmp_path):
    path = tmp_path / "new" / "results.json"
    empty = boxes()
    dropped = write_results(
        path,
        iter([("a", empty, Pose.identity()), ("b", boxes("bus"), Pose.identity())]),
        Modalities.of(Needs(lidar=("intensity",), cameras=("front",))),
    )
    data = json.loads(path.read_text())
    assert data["meta"] == {
        "use_camera": True,
        "use_lidar": True,
        "use_radar": False,
        "use_map": False,
        "use_external": False,
    }
    assert dropped == 0
    assert data["results"]["a"] == []
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    results = read_results(path)
    assert results.modalities == Modalities(camera=True, lidar=True, radar=False)
    assert list(results.records) == ["a", "b"]
    assert len(results.boxes("a", Pose.identity(), 0)) == 0


@settings(max_examples=30)
@given(
    st.lists(st.tuples(*[st.floats(-50, 50)] * 3, st.floats(-3.1, 3.1), *[st.floats(-9, 9)] * 2), max_size=5),
    st.floats(-3.1, 3.1),
    st.floats(0, 1),
)
def test_read_back_in_ego_they_are_the_same(tmp_path_factory, rows, heading, score):
    rows = np.array(rows, np.float64).reshape(-1, 6)
    labels = DETECTION_CLASSES[: len(rows)]
    given_boxes = boxes(
        *labels, center=rows[:, :3], yaw=rows[:, 3], velocity=rows[:, 4:], score=np.full(len(rows), score)
    )
    map_from_ego = Pose.from_yaw(heading, (1000.0, -2000.0, 3.0))
    path = tmp_path_factory.mktemp("results") / "results.json"
    write_results(path, [("a", given_boxes, map_from_ego)], LIDAR)
    back = read_results(path).boxes("a", map_from_ego, 0)
    assert [back.classes[c] for c in back.label] == list(labels)
    np.testing.assert_allclose(back.center, given_boxes.center, atol=1e-9)
    np.testing.assert_allclose(back.size, given_boxes.size)
    np.testing.assert_allclose(np.exp(1j * back.yaw), np.exp(1j * given_boxes.yaw), atol=1e-9)
    np.testing.assert_allclose(back.velocity, given_boxes.velocity, atol=1e-9)
    np.testing.assert_array_equal(back.score, given_boxes.score)


def test_a_tilted_car_tilts_the_boxes(tmp_path):
    tilt = Rotation.from_euler("zyx", [0.5, 0.05, -0.03]).as_matrix()
    [record] = written(tmp_path, ("a", boxes("car", yaw=[0.2]), Pose(tilt, np.zeros(3))))["a"]
    rotation = Rotation.from_quat(np.roll(record["rotation"], -1)).as_matrix()
    np.testing.assert_allclose(rotation, tilt @ Rotation.from_euler("z", 0.2).as_matrix(), atol=1e-12)


def test_the_best_500_are_kept_in_their_order(tmp_path):
    m = MAX_BOXES + 3
    score = np.linspace(0.9, 0.1, m)
    score[[5, 6, 7]] = 0.0
    center = np.stack([np.arange(m), np.zeros(m), np.zeros(m)], 1)
    many = boxes(*["car"] * m, center=center, score=score)
    path = tmp_path / "results.json"
    assert write_results(path, [("a", many, Pose.identity())], LIDAR) == 3
    kept = [record["translation"][0] for record in json.loads(path.read_text())["results"]["a"]]
    assert kept == [float(i) for i in range(m) if i not in (5, 6, 7)]


def test_unknown_velocity_is_written_as_standing(tmp_path):
    records = written(tmp_path, ("a", boxes("car", "pedestrian", velocity=np.full((2, 2), np.nan)), Pose.identity()))[
        "a"
    ]
    assert [r["velocity"] for r in records] == [[0.0, 0.0]] * 2
    assert [r["attribute_name"] for r in records] == ["vehicle.parked", "pedestrian.moving"]


def test_predicted_attributes_are_kept(tmp_path):
    predicted = ["vehicle.stopped", "", "pedestrian.sitting_lying_down"]
    given_boxes = boxes("car", "barrier", "pedestrian", velocity=[[9.0, 0.0]] * 3, attribute=predicted)
    assert [r["attribute_name"] for r in written(tmp_path, ("a", given_boxes, Pose.identity()))["a"]] == predicted


@pytest.mark.parametrize(
    ("label", "moving", "still"),
    [
        ("car", "vehicle.moving", "vehicle.parked"),
        ("bus", "vehicle.moving", "vehicle.stopped"),
        ("bicycle", "cycle.with_rider", "cycle.without_rider"),
        ("pedestrian", "pedestrian.moving", "pedestrian.standing"),
        ("traffic_cone", "", ""),
    ],
)
def test_likely_attributes(label, moving, still):
    assert (likely_attribute(label, 0.21), likely_attribute(label, 0.19)) == (moving, still)


def test_every_class_has_likely_attributes_that_the_devkit_allows():
    allowed = pytest.importorskip("nuscenes.eval.detection.utils").detection_name_to_rel_attributes
    for label in DETECTION_CLASSES:
        for speed in (0.0, 5.0, math.nan):
            assert likely_attribute(label, speed) in (allowed(label) or [""])


def test_predictions_that_cannot_be_written(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(DataError, match="sample a was predicted twice"):
        write_results(path, [("a", boxes(), Pose.identity())] * 2, LIDAR)
    with pytest.raises(DataError, match=r"sample a: box 1 is a 'tram'(?s:.)*known: car, truck"):
        write_results(path, [("a", boxes("car", "tram", classes=("car", "tram")), Pose.identity())], LIDAR)
    with pytest.raises(DataError, match=r"sample a: box 0 \(car\) has the attribute 'vehicle.flying'"):
        write_results(path, [("a", boxes("car", attribute=["vehicle.flying"]), Pose.identity())], LIDAR)
    assert list(tmp_path.iterdir()) == []


def results_file(tmp_path, **changes):
    """A file of one car, with some of its keys changed or (None) absent."""
    record = {
        "sample_token": "a",
        "translation": [1.0, 2.0, 3.0],
        "size": [2.0, 4.0, 1.5],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "velocity": [0.0, 0.0],
        "detection_name": "car",
        "detection_score": 0.5,
        "attribute_name": "vehicle.parked",
    } | changes
    good = dict(record, **{key: value for key, value in changes.items() if value is None})
    path = tmp_path / "results.json"
    kept = {key: value for key, value in good.items() if value is not None}
    path.write_text(json.dumps({"meta": {"use_lidar": True}, "results": {"b": [], "a": [kept]}}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotation": None}, r"box 0 \(car\): lacks rotation"),
        ({"detection_name": None}, r"box 0 \(no class\): lacks detection_name"),
        ({"sample_token": "b"}, "its sample_token is 'b'"),
        ({"translation": [1.0, math.nan, 3.0]}, r"translation: \[1.0, nan, 3.0\] is not finite"),
        ({"size": [1.0, 2.0]}, r"size: expected 3 numbers, got \[1.0, 2.0\]"),
        ({"size": [1.0, 2.0, "x"]}, "size: expected 3 numbers"),
        ({"size": [1.0, 0.0, 1.0]}, "size: .* is not positive"),
        ({"rotation": [0.0, 0.0, 0.0, 0.0]}, "rotation: .* is no rotation"),
        ({"velocity": [0.0, math.inf]}, "velocity: .* is not finite"),
        ({"velocity": [0.0, math.nan]}, "velocity: .* is not finite"),
        ({"velocity": [[0.0, 0.0]]}, "velocity: expected 2 numbers"),
        ({"detection_score": math.nan}, "detection_score: expected a finite number, got nan"),
        ({"detection_score": -0.5}, "detection_score: -0.5 is outside 0 to 1"),
        ({"detection_score": 1.5}, "detection_score: 1.5 is outside 0 to 1"),
        ({"detection_score": "0.5"}, "detection_score: expected a finite number, got '0.5'"),
        ({"detection_name": "tram"}, r"box 0 \(tram\): detection_name: 'tram'(?s:.)*classes: car"),
        ({"attribute_name": "flying"}, "attribute_name: 'flying'"),
    ],
)
def test_a_bad_box_is_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=rf"results.json: sample a: .*{message}"):
        read_results(results_file(tmp_path, **changes))


def test_an_unknown_velocity_is_no_fault_of_a_file(tmp_path):
    results = read_results(results_file(tmp_path, velocity=[math.nan, math.nan]))
    assert np.isnan(results.boxes("a", Pose.identity(), 7).velocity).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"meta": {}, "results": {"a": [', r"not JSON(?s:.)*truncated"),
        ("[1, 2]", "expected the keys meta and results, each an object; found list"),
        ('{"results": {}}', "expected the keys meta and results, each an object; found results"),
        ('{"meta": {}, "results": {"a": {}}}', "sample a: expected a list of boxes, got dict"),
        ('{"meta": {}, "results": {"a": [3]}}', r"sample a: box 0 \(no class\): expected an object, got int"),
        (json.dumps({"meta": {}, "results": {"a": [{}] * 501}}), "sample a: 501 boxes; the benchmark allows 500"),
    ],
)
def test_a_file_that_is_no_results_file(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_results(tmp_path / "results.json")


def test_compressed_and_missing_files_are_named(tmp_path):
    (tmp_path / "results.json.gz").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(DataError, match=r"results.json.gz: not JSON(?s:.)*still compressed"):
        read_results(tmp_path / "results.json.gz")
    with pytest.raises(DataError, match=r"absent.json: No such file"):
        read_results(tmp_path / "absent.json")
