"""The index of nuScenes' tables: columns, velocities, staleness, several processes, broken tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from perception.datasets.nuscenes_index import open_index
from perception.datasets.nuscenes_tables import Rows, Tables
from perception.errors import DataError

Record = dict[str, object]
ZERO: Record = {"translation": [0.0, 0.0, 0.0], "rotation": [1.0, 0.0, 0.0, 0.0]}


def annotation(token: str, sample: str, x: float, previous: str = "", following: str = "") -> Record:
    return {
        "token": token,
        "sample_token": sample,
        "instance_token": "car",
        "attribute_tokens": ["moving"],
        "visibility_token": "4",
        "translation": [x, 2.0 * x, 0.0],
        "size": [2.0, 4.0, 1.5],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "num_lidar_pts": 5,
        "num_radar_pts": 1,
        "prev": previous,
        "next": following,
    }


def tables() -> dict[str, list[Record]]:
    """One scene of four samples, out of order in their table; stamps 0, 0.5, 1.5 and 3.5 s."""
    stamps = {"s0": 0, "s1": 500_000, "s2": 1_500_000, "s3": 3_500_000}
    readings = [("d0", "s0", 0, True), ("dx", "s1", 400_000, False), ("d1", "s1", 500_000, True)]
    readings += [("d2", "s2", 1_500_000, True), ("d3", "s3", 3_500_000, True)]
    chain = ["", *(token for token, *_ in readings), ""]
    return {
        "scene": [{"token": "scene", "name": "scene-0001"}],
        "sample": [{"token": t, "timestamp": stamps[t], "scene_token": "scene"} for t in ("s2", "s0", "s3", "s1")],
        "sensor": [{"token": "lidar", "channel": "LIDAR_TOP", "modality": "lidar"}],
        "calibrated_sensor": [{"token": "c", "sensor_token": "lidar", "camera_intrinsic": [], **ZERO}],
        "ego_pose": [{"token": t, **ZERO, "translation": [i, 0, 0]} for i, (t, *_) in enumerate(readings)][::-1],
        "sample_data": [
            {
                "token": t,
                "sample_token": s,
                "ego_pose_token": t,
                "calibrated_sensor_token": "c",
                "timestamp": stamp,
                "filename": f"samples/{t}.pcd.bin",
                "width": 0,
                "height": 0,
                "is_key_frame": key,
                "prev": chain[i],
            }
            for i, (t, s, stamp, key) in enumerate(readings)
        ],
        "category": [{"token": "k", "name": "vehicle.car"}, {"token": "a", "name": "animal"}],
        "attribute": [{"token": "moving", "name": "vehicle.moving"}],
        "visibility": [{"token": "4", "level": "v80-100"}],
        "instance": [{"token": "car", "category_token": "k"}, {"token": "dog", "category_token": "a"}],
        "sample_annotation": [
            annotation("a0", "s0", 0.0, "", "a1"),
            annotation("a1", "s1", 1.0, "a0", "a2"),
            annotation("a2", "s2", 4.0, "a1", "a3"),
            annotation("a3", "s3", 9.0, "a2", ""),
            annotation("b0", "s0", 5.0) | {"instance_token": "dog", "attribute_tokens": [], "visibility_token": ""},
        ],
    }


def write(root: Path, content: dict[str, list[Record]]) -> Path:
    folder = root / "v1.0-tiny"
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in content.items():
        (folder / f"{name}.json").write_text(json.dumps(records, indent=0))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "set", tables())
    return tmp_path / "set"


def build(root: Path):
    return open_index(root, "v1.0-tiny", root.parent / "cache")


def test_rows_take_the_place_of_tokens(root: Path):
    index = build(root)
    assert index.sample_token.tolist() == [b"s0", b"s1", b"s2", b"s3"]  # in time, whatever the table's order
    assert index.sample_data[:, 0].tolist() == [0, 2, 3, 4]  # data row 1 is a sweep
    assert index.sample_lidar_token.tolist() == [b"d0", b"d1", b"d2", b"d3"]
    assert index.data_previous.tolist() == [-1, 0, 1, 2, 3]
    assert index.data_map_from_ego[:, 0].tolist() == [0, 1, 2, 3, 4]  # each reading got its own pose
    assert index.data_stamp_ns.tolist() == [0, 400_000_000, 500_000_000, 1_500_000_000, 3_500_000_000]
    assert index.sample_boxes.tolist() == [0, 2, 3, 4, 5]
    assert index.box_label.tolist() == [0, -1, 0, 0, 0]
    assert index.box_attribute.tolist() == [0, -1, 0, 0, 0]
    assert index.box_visibility.tolist() == [4, 0, 4, 4, 4]
    assert index.box_size[0].tolist() == [4.0, 2.0, 1.5]  # length before width


def test_the_size_of_what_is_no_image_may_be_null(root: Path):
    content = tables()
    content["sample_data"][0] |= {"width": None, "height": None}
    write(root, content)
    assert build(root).data_image_size[0].tolist() == [0, 0]


def test_velocity_is_a_difference_of_near_annotations(root: Path):
    velocity = build(root).box_velocity
    np.testing.assert_allclose(velocity[0], [2, 4, 0])  # forward: 1 m in 0.5 s
    assert np.isnan(velocity[1]).all()  # alone
    np.testing.assert_allclose(velocity[2], [4 / 1.5, 8 / 1.5, 0])  # central over 1.5 s
    np.testing.assert_allclose(velocity[3], [8 / 3, 16 / 3, 0])  # central over 3 s, the most that counts
    assert np.isnan(velocity[4]).all()  # backward over 2 s, more than 1.5 s


def test_columns_are_mapped_not_read(root: Path):
    index = build(root)
    assert isinstance(index.data_file, np.memmap)
    assert not index.data_file.flags.writeable


def test_second_opening_builds_nothing(root: Path, monkeypatch: pytest.MonkeyPatch):
    folder = build(root).folder
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr("perception.datasets.nuscenes_index.Tables", None)
    assert build(root).folder == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_changed_tables_are_indexed_anew_and_the_old_index_goes(root: Path):
    old = build(root)
    content = tables()
    content["scene"][0]["name"] = "scene-0002"  # as long as before: only the time of change tells
    write(root, content)
    path = root / "v1.0-tiny" / "scene.json"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    new = build(root)
    assert new.scene_name.tolist() == [b"scene-0002"]
    assert not old.folder.exists()
    assert old.scene_name.tolist() == [b"scene-0001"]  # who had it open reads on
    (unfinished := new.folder.parent / "unfinished-killed").mkdir()
    os.utime(path, ns=(0, 1))
    build(root)
    assert not unfinished.exists()


def test_two_sets_in_one_cache_do_not_mix(root: Path):
    other = root.parent / "other"
    content = tables()
    content["scene"][0]["name"] = "scene-0002"
    write(other, content)
    assert build(root).scene_name.tolist() == [b"scene-0001"]
    assert build(other).scene_name.tolist() == [b"scene-0002"]
    assert build(root).scene_name.tolist() == [b"scene-0001"]


def test_cache_is_where_xdg_says(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_index(root, "v1.0-tiny").folder.is_relative_to(tmp_path / "xdg" / "perception" / "nuscenes")


def test_processes_that_build_at_once_end_with_one_index(root: Path):
    script = (
        "import sys; from pathlib import Path; from perception.datasets.nuscenes_index import open_index;"
        "print(open_index(Path(sys.argv[1]), 'v1.0-tiny', Path(sys.argv[2])).sample_boxes.tolist())"
    )
    command = [sys.executable, "-c", script, str(root), str(root.parent / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in outputs] == ["[0, 2, 3, 4, 5]\n"] * 3
    assert [err for _, err in outputs] == [""] * 3  # no progress bar where there is no terminal
    (home,) = (root.parent / "cache" / "nuscenes").iterdir()
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == [build(root).folder.name]


def test_progress_is_shown_on_a_terminal(root: Path):
    script = (
        "import sys; from pathlib import Path; from perception.datasets.nuscenes_index import open_index;"
        "open_index(Path(sys.argv[1]), 'v1.0-tiny', Path(sys.argv[2]))"
    )
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", script, str(root), str(root.parent / "cache")]
    run = subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, env=os.environ | {"TERM": "xterm"}, check=True)
    os.close(theirs)
    assert b"nuScenes index" in os.read(ours, 1 << 16)
    os.close(ours)
    assert run.stdout == b""


def test_a_cache_that_cannot_be_written_says_so(root: Path):
    (root.parent / "cache").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"index of .*v1.0-tiny cannot be written.*\n.*XDG_CACHE_HOME"):
        build(root)


def test_an_index_that_lost_a_column_says_so(root: Path):
    folder = build(root).folder
    (folder / "box_size.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"not a whole index.*\n.*delete this folder"):
        build(root)


def test_a_missing_table_is_named(root: Path):
    (root / "v1.0-tiny" / "ego_pose.json").unlink()
    with pytest.raises(DataError, match=r"ego_pose.json: No such file.*\n.*Metadata"):
        build(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON list: it begins with ''"),
        ('{"token": "a"}', "is no JSON list"),
        ('[{"token": "a", "name": "vehicle.car"}, {"tok', "broken after 1 records"),
        ('[{"token": "a", "name": "vehicle.car"},', "broken after 1 records"),
        ('[{"token": "a" "name": "vehicle.car"}]', "broken after 0 records: Expecting ',' delimiter"),
        ("[3]", "record 0 is int, not an object"),
        ('[{"token": "a"}]', "no key 'name' in the record {'token': 'a'}"),
        ('[{"token": 7, "name": "x"}]', "'token': 'int' object has no attribute 'encode'"),
        ('[{"token": "a", "name": "x"}, {"token": "a", "name": "y"}]', "token 'a' occurs twice"),
    ],
)
def test_a_damaged_table_is_named(root: Path, text: str, message: str):
    (root / "v1.0-tiny" / "category.json").write_text(text)
    with pytest.raises(DataError) as error:
        build(root)
    assert "category.json" in error.value.what
    assert message in error.value.what
    assert "tables again" in error.value.do
    assert not list((root.parent / "cache").rglob("*.npy"))  # a build that fails leaves no index


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        (
            "sample_data",
            "ego_pose_token",
            "lost",
            r"sample_data.ego_pose_token: 'lost' is no record of .*ego_pose.json \(1 of 5",
        ),
        ("sample_data", "prev", "lost", r"sample_data.prev: 'lost' is no record of"),
        ("sample", "scene_token", "", r"sample.scene_token: '' is no record of .*scene.json"),
        ("sample_annotation", "instance_token", "lost", r"sample_annotation.instance_token: 'lost'"),
        ("sample_annotation", "translation", [1.0, 2.0], "'translation': "),
        ("sample_annotation", "translation", [1.0, 2.0, float("nan")], "a number is not finite"),
        ("sample_annotation", "size", [2.0, 0.0, 1.5], r"'size': a box of size \[2.0, 0.0, 1.5\]"),
        ("ego_pose", "rotation", [0, 0, 0, 0], r"ego_pose.json: 'rotation': a quaternion of zeros"),
        ("calibrated_sensor", "rotation", [0, 0, 0, 0], r"calibrated_sensor.json: 'rotation'"),
        ("sample_annotation", "attribute_tokens", ["moving", "moving"], "more than one attribute"),
        ("sample_data", "timestamp", "soon", "'timestamp': invalid literal"),
        ("visibility", "level", "v40", r"visibility.json: level 'v40' is none of v0-40, "),
    ],
)
def test_a_record_that_does_not_fit_is_named(root: Path, table: str, key: str, value: object, message: str):
    content = tables()
    content[table][0][key] = value
    write(root, content)
    with pytest.raises(DataError, match=message):
        build(root)


def test_records_longer_than_the_buffer_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every place where a chunk may end, by reading a few characters at a time."""
    records = [{"token": f"t{i}", "name": 'ü, ] } \\ " ' * i, "more": {"nested": [1, [2]]}} for i in range(9)]
    path = tmp_path / "scene.json"
    for text in (json.dumps(records), json.dumps(records, indent=0), json.dumps(records, ensure_ascii=False)):
        path.write_text(text, encoding="utf-8")
        for size in (1, 7, 64):
            monkeypatch.setattr("perception.datasets.nuscenes_tables._CHUNK", size)
            read = []
            columns = Tables({"scene": path}, read.append).read("scene")
            assert [name.decode() for name in columns["name"]] == [record["name"] for record in records]
            assert sum(read) == len(text)


def test_a_large_table_costs_its_columns_not_its_text(tmp_path: Path):
    path = tmp_path / "ego_pose.json"
    record = json.dumps({"token": "0" * 32, "timestamp": 0, "rotation": [0.123456789] * 4, "translation": [600.5] * 3})
    path.write_text("[" + ",\n".join([record] * 60_000) + "]")
    tracemalloc.start()
    columns = Tables({"ego_pose": path}, lambda n: None).read("ego_pose")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kept = sum(column.nbytes for column in columns.values())
    assert columns["rotation"].shape == (60_000, 4)
    assert peak < 2.5 * kept + 64e6  # as one list of records it takes over 100 MB


def test_rows_of_an_empty_table():
    rows = Rows(Path("x.json"), np.zeros(0, "S32"))
    assert rows.of(np.array([b"", b""]), "y", optional=True).tolist() == [-1, -1]
    with pytest.raises(DataError, match=r"y: 'a' is no record of x.json \(1 of 2"):
        rows.of(np.array([b"", b"a"]), "y", optional=True)
