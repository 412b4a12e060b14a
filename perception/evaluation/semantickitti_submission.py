"""Submissions to SemanticKITTI's scene completion benchmark: one file a frame, one zip, checked before it is uploaded.

    sequences/11/predictions/000000.label ... sequences/21/predictions/NNNNNN.label

A file holds uint16 raw ids of 256 x 256 x 32 voxels, as the truth does. A zip has entries for the folders themselves,
one file for each `.bin` of the test sequences, and nothing else but an optional `description.txt`: what the official
`validate_submission.py --task completion` asks for.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from perception.datasets.semantickitti_labels import SPLITS, voxel_labels
from perception.datasets.semantickitti_voxels import CLASSES, SHAPE, prediction_path, write_label_voxels
from perception.errors import DataError
from perception.types import IGNORE_LABEL, OccupancyGrid3D

TEST_SEQUENCES = SPLITS["test"]

_FILE_BYTES = int(np.prod(SHAPE)) * 2


def write_prediction(root: Path, sequence: str, frame: int, prediction: OccupancyGrid3D) -> Path:
    """Write `root/sequences/{sequence}/predictions/{frame}.label` as raw ids; the path is returned.

    Raises:
        DataError: another class list or grid than the benchmark's, or voxels without a class.
    """
    if prediction.classes != CLASSES or prediction.label.shape != SHAPE:
        raise DataError(
            f"sequence {sequence} frame {frame}: {prediction.label.shape} voxels of ({', '.join(prediction.classes)})",
            f"SemanticKITTI has {SHAPE} of ({', '.join(CLASSES)})",
        )
    if ignored := int((prediction.label == IGNORE_LABEL).sum()):
        raise DataError(
            f"sequence {sequence} frame {frame}: {ignored} voxels without a class",
            "every voxel of a submission has a class or is free",
        )
    path = prediction_path(root, sequence, frame)
    write_label_voxels(path, prediction.label)
    return path


def pack_submission(root: Path, archive: Path, sequences: Sequence[str] = TEST_SEQUENCES) -> int:
    """Zip the predictions of a folder, with entries for the folders; returns how many files went in.

    `description.txt` of the folder goes with them; anything else stays out.

    Raises:
        DataError: the archive's name does not end in `.zip`, or a sequence has no predictions.
    """
    _check_name(archive)
    files = {sequence: sorted((root / _folder(sequence)).glob("*.label")) for sequence in sequences}
    if empty := [sequence for sequence, found in files.items() if not found]:
        raise DataError(
            f"{root}: no predictions of sequence {', '.join(empty)}",
            f"predict all test sequences; they are looked for in {root / _folder(empty[0])}",
        )
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as bundle:
            for folder in _folders(sequences):
                bundle.writestr(folder, b"")
            for sequence, found in files.items():
                for path in found:
                    bundle.write(path, f"{_folder(sequence)}{path.name}")
            if (root / "description.txt").is_file():
                bundle.write(root / "description.txt", "description.txt")
        part.replace(archive)
    finally:
        part.unlink(missing_ok=True)
    return sum(map(len, files.values()))


def validate_submission(archive: Path, dataset_root: Path, sequences: Sequence[str] = TEST_SEQUENCES) -> int:
    """Check a zip against the data set; returns how many predictions it holds.

    Besides what the official validator checks, every id must be one that the evaluation knows: it crashes on others.

    Args:
        archive: the zip.
        dataset_root: the folder that holds `sequences/XX/voxels/*.bin`.
        sequences: which must be there.

    Raises:
        DataError: no zip, folder entries or predictions missing, files that do not belong, a file of another size, or
            an id that no class has.
    """
    _check_name(archive)
    expected = _expected_files(dataset_root, sequences)
    try:
        with zipfile.ZipFile(archive) as bundle:
            entries = {info.filename: info for info in bundle.infolist()}
            _check_entries(archive, entries, expected, sequences)
            for name in sorted(expected):
                _check_file(archive, bundle, entries[name])
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{archive}: not a whole zip: {error}", "pack it again") from error
    except OSError as error:
        raise DataError(f"{archive}: {error.strerror or error}", "give the zip that pack_submission wrote") from error
    return len(expected)


def _folder(sequence: str) -> str:
    return f"sequences/{sequence}/predictions/"


def _folders(sequences: Sequence[str]) -> list[str]:
    """Every folder entry that the official validator looks for."""
    return ["sequences/", *(f for s in sequences for f in (f"sequences/{s}/", _folder(s)))]


def _check_name(archive: Path) -> None:
    if archive.suffix != ".zip":
        raise DataError(f"{archive}: a submission is a .zip", f"name it {archive.with_suffix('.zip').name}")


def _expected_files(dataset_root: Path, sequences: Sequence[str]) -> set[str]:
    expected: set[str] = set()
    for sequence in sequences:
        folder = dataset_root / "sequences" / sequence / "voxels"
        frames = [path.stem for path in folder.glob("*.bin")]
        if not frames:
            raise DataError(f"{folder}: no .bin files", "unpack the voxel download of the test sequences there")
        expected |= {f"{_folder(sequence)}{frame}.label" for frame in frames}
    return expected


def _check_entries(
    archive: Path, entries: dict[str, zipfile.ZipInfo], expected: set[str], sequences: Sequence[str]
) -> None:
    if absent := [folder for folder in _folders(sequences) if folder not in entries]:
        raise DataError(
            f"{archive}: has no entry for the folder {absent[0]} ({len(absent)} missing)",
            "pack it with pack_submission; `zip -r` leaves folders out with -D",
        )
    files = {name for name in entries if not name.endswith("/")} - {"description.txt"}
    for kind, names in (("missing", expected - files), ("unneeded", files - expected)):
        if names:
            raise DataError(
                f"{archive}: {len(names)} {kind} files: {', '.join(islice(sorted(names), 3))}"
                + (", ..." if len(names) > 3 else ""),
                "one prediction for every .bin of the test sequences, and nothing else",
            )


def _check_file(archive: Path, bundle: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    if info.file_size != _FILE_BYTES:
        raise DataError(
            f"{archive}: {info.filename} has {info.file_size:,} bytes, not {_FILE_BYTES:,}",
            "a prediction is uint16 for each of 256 x 256 x 32 voxels",
        )
    labels = voxel_labels(np.frombuffer(bundle.read(info), "<u2"), f"{archive}: {info.filename}")
    if (labels == IGNORE_LABEL).any():
        raise DataError(
            f"{archive}: {info.filename}: {int((labels == IGNORE_LABEL).sum())} voxels of ids that nobody scores",
            "the evaluation fails on raw ids 1, 52 and 99: every voxel has one of the 19 classes or is free (0)",
        )
