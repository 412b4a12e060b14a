"""Submissions: raw ids in the right places, a zip with folder entries, and every fault of it named."""

import zipfile

import numpy as np
import pytest

from perception.datasets.semantickitti_voxels import CLASSES, SHAPE, grid, read_label_voxels
from perception.errors import DataError
from perception.evaluation.occupancy import SEMANTICKITTI, OccupancyEvaluator
from perception.evaluation.semantickitti_submission import (
    TEST_SEQUENCES,
    pack_submission,
    validate_submission,
    write_prediction,
)
from perception.types import IGNORE_LABEL, OccupancyGrid3D, Pose

SEQUENCES = ("11", "12")


def occupancy(label):
    return OccupancyGrid3D(grid(Pose.identity()), label, CLASSES, 0, 0)


@pytest.fixture(scope="module")
def label():
    label = np.zeros(SHAPE, np.uint8)
    label[:20] = np.random.default_rng(0).integers(0, 20, (20, 256, 32))
    return label


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The inputs of three test frames."""
    root = tmp_path_factory.mktemp("dataset")
    for sequence, frame in (("11", 0), ("11", 5), ("12", 0)):
        path = root / "sequences" / sequence / "voxels" / f"{frame:06d}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(256 * 256 * 32 // 8))
        path.with_suffix(".occluded").write_bytes(b"not asked for")
    return root


@pytest.fixture(scope="module")
def predictions(tmp_path_factory, label):
    root = tmp_path_factory.mktemp("predictions")
    for sequence, frame in (("11", 0), ("11", 5), ("12", 0)):
        write_prediction(root, sequence, frame, occupancy(label if frame == 0 else label * 0))
    (root / "notes.txt").write_text("not for the server")
    return root


def test_a_prediction_holds_raw_ids_in_xyz_order(tmp_path):
    label = np.zeros(SHAPE, np.uint8)
    label[1, 2, 3] = 1
    label[255, 255, 31] = 19
    path = write_prediction(tmp_path, "11", 5, occupancy(label))
    assert path == tmp_path / "sequences" / "11" / "predictions" / "000005.label"
    raw = np.fromfile(path, "<u2")
    assert raw.size == 256 * 256 * 32
    assert raw[(1 * 256 + 2) * 32 + 3] == 10  # car
    assert raw[-1] == 81  # traffic-sign
    assert np.count_nonzero(raw) == 2


def test_a_prediction_read_back_scores_perfectly(predictions, label):
    back = read_label_voxels(predictions / "sequences" / "11" / "predictions" / "000000.label")
    evaluator = OccupancyEvaluator(SEMANTICKITTI)
    evaluator.update(occupancy(back), occupancy(label))
    assert evaluator.score().miou == 1.0
    assert evaluator.score().classes == CLASSES[1:]


def test_a_packed_submission_is_valid(predictions, dataset, tmp_path):
    (predictions / "description.txt").write_text("method: test\n")
    archive = tmp_path / "new" / "submission.zip"
    assert pack_submission(predictions, archive, SEQUENCES) == 3
    assert validate_submission(archive, dataset, SEQUENCES) == 3
    with zipfile.ZipFile(archive) as bundle:
        names = bundle.namelist()
        folder = bundle.getinfo("sequences/11/predictions/")
        assert folder.is_dir()
        assert folder.external_attr >> 16 & 0o700 == 0o700  # unpacked, it can be entered
        assert bundle.getinfo("sequences/11/predictions/000000.label").file_size == 4_194_304
    assert set(names) == {
        "sequences/",
        "sequences/11/",
        "sequences/11/predictions/",
        "sequences/12/",
        "sequences/12/predictions/",
        "sequences/11/predictions/000000.label",
        "sequences/11/predictions/000005.label",
        "sequences/12/predictions/000000.label",
        "description.txt",
    }
    assert [path.name for path in archive.parent.iterdir()] == ["submission.zip"]


def test_the_test_split_is_sequences_11_to_21(predictions, tmp_path):
    assert TEST_SEQUENCES == tuple(str(s) for s in range(11, 22))
    with pytest.raises(DataError, match=r"no predictions of sequence 13, 14, 15, 16, 17, 18, 19, 20, 21"):
        pack_submission(predictions, tmp_path / "submission.zip")


def repacked(predictions, tmp_path, change):
    """A zip whose entries {name: bytes} were changed."""
    pack_submission(predictions, tmp_path / "good.zip", SEQUENCES)
    with zipfile.ZipFile(tmp_path / "good.zip") as bundle:
        entries = {name: bundle.read(name) for name in bundle.namelist()}
    change(entries)
    with zipfile.ZipFile(tmp_path / "submission.zip", "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data in entries.items():
            bundle.writestr(name, data)
    return tmp_path / "submission.zip"


FIRST = "sequences/11/predictions/000000.label"


def raw_id(value):
    def change(entries):
        raw = np.frombuffer(entries[FIRST], "<u2").copy()
        raw[7] = value
        entries[FIRST] = raw.tobytes()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("sequences/12/"), r"no entry for the folder sequences/12/ \(1 missing\)"),
        (lambda e: e.pop(FIRST), rf"1 missing files: {FIRST}"),
        (lambda e: e.update({"sequences/11/predictions/000001.label": b""}), "1 unneeded files: .*000001.label"),
        (lambda e: e.update({FIRST: e[FIRST][:-2]}), "000000.label has 4,194,302 bytes, not 4,194,304"),
        (raw_id(300), r"000000.label: label ids \[300\] are none of SemanticKITTI's raw ids"),
        (raw_id(99), "000000.label: 1 voxels of ids that nobody scores"),
    ],
    ids=["folder", "missing", "unneeded", "size", "unknown id", "ignored id"],
)
def test_every_fault_of_a_zip_is_named(predictions, dataset, tmp_path, change, message):
    archive = repacked(predictions, tmp_path, change)
    with pytest.raises(DataError, match=f"submission.zip: .*{message}"):
        validate_submission(archive, dataset, SEQUENCES)


def test_what_is_no_submission(predictions, dataset, tmp_path):
    with pytest.raises(DataError, match=r"submission.tar: a submission is a .zip(?s:.)*submission.zip"):
        pack_submission(predictions, tmp_path / "submission.tar", SEQUENCES)
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"broken.zip: not a whole zip"):
        validate_submission(tmp_path / "broken.zip", dataset, SEQUENCES)
    with pytest.raises(DataError, match=r"absent.zip: No such file"):
        validate_submission(tmp_path / "absent.zip", dataset, SEQUENCES)
    with pytest.raises(DataError, match=r"sequences/13/voxels: no .bin files"):
        validate_submission(tmp_path / "absent.zip", dataset, ("13",))


def test_a_prediction_of_another_benchmark_is_refused(tmp_path, label):
    small = OccupancyGrid3D(grid(Pose.identity()), label, (*CLASSES[:-1], "sign"), 0, 0)
    with pytest.raises(DataError, match=r"sequence 11 frame 0: \(256, 256, 32\) voxels of \(free, .*sign\)"):
        write_prediction(tmp_path, "11", 0, small)
    ignored = label.copy()
    ignored[0, 0, :3] = IGNORE_LABEL
    with pytest.raises(DataError, match="sequence 11 frame 0: 3 voxels without a class"):
        write_prediction(tmp_path, "11", 0, occupancy(ignored))
