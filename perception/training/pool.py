"""Simulated samples in a folder, for trainings that run beside each other: each street is simulated by one of them.

A RAM disk is the place for it. A street is claimed by creating its file `.claim`, which only one process can; a pair is
one safetensors file (arrays, and a JSON header), whole as soon as it has its name. Nothing in it is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from perception.errors import DataError
from perception.synthetic.stream import Pair
from perception.types import Array, Boxes3D, CameraImage, PointCloud, Pose, Sample, Truth

_BOX_ARRAYS = ("center", "size", "yaw", "velocity", "score", "label", "num_points")


class SharedPool:
    """The pairs in a folder, written and drawn by any number of processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)

    def claim(self, street: int) -> bool:
        """Whether this process is the one to simulate a street."""
        try:
            (self._folder / f"{street}.claim").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def add(self, pair: Pair) -> None:
        """Write a pair under its sample's token."""
        write_pair(self._folder / f"{pair[0].token}.safetensors", *pair)

    def refresh(self) -> int:
        """Look for pairs that other processes wrote, and count all there are."""
        self._paths = sorted(self._folder.glob("*.safetensors"))
        return len(self._paths)

    def draw(self, rng: np.random.Generator) -> Pair:
        """One of the pairs that there were at the last look."""
        return read_pair(self._paths[rng.integers(len(self._paths))])


def write_pair(path: Path, sample: Sample, truth: Truth) -> None:
    """Write clouds, cameras and boxes, whole or not at all; nothing else of sample and truth is kept."""
    arrays: dict[str, Array] = {}
    header: dict[str, object] = {"stamp_ns": sample.stamp_ns, "token": sample.token}
    for kind, clouds in (("lidars", sample.lidars), ("radars", sample.radars)):
        header[kind] = {role: {"stamp_ns": c.stamp_ns, "fields": list(c.fields)} for role, c in clouds.items()}
        for role, cloud in clouds.items():
            arrays |= {f"{kind}/{role}/pose": cloud.ego_from_sensor.matrix, f"{kind}/{role}/xyz": cloud.xyz}
            arrays |= {f"{kind}/{role}/fields/{name}": values for name, values in cloud.fields.items()}
    header["cameras"] = {
        role: {"stamp_ns": image.stamp_ns, "valid_size": image.valid_size} for role, image in sample.cameras.items()
    }
    for role, image in sample.cameras.items():
        place = f"cameras/{role}"
        arrays |= {f"{place}/rgb": image.rgb, f"{place}/intrinsic": image.intrinsic}
        arrays[f"{place}/pose"] = image.ego_from_camera.matrix
    if truth.boxes is not None:
        header["boxes"] = {"stamp_ns": truth.boxes.stamp_ns, "classes": truth.boxes.classes}
        found = {name: getattr(truth.boxes, name) for name in _BOX_ARRAYS}
        arrays |= {f"boxes/{name}": values for name, values in found.items() if values is not None}
    part = path.with_suffix(".part")
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, part, {"pair": json.dumps(header)})
    part.replace(path)


def read_pair(path: Path) -> Pair:
    """What `write_pair` wrote. Raises DataError where the file is not that."""
    try:
        with safe_open(path, framework="numpy") as stream:
            header = json.loads(stream.metadata()["pair"])
            arrays = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no mapping
        sample = Sample(
            header["stamp_ns"],
            {role: _cloud(arrays, f"lidars/{role}", about) for role, about in header["lidars"].items()},
            {role: _cloud(arrays, f"radars/{role}", about) for role, about in header["radars"].items()},
            {role: _camera(arrays, f"cameras/{role}", about) for role, about in header["cameras"].items()},
            token=header["token"],
        )
        return sample, Truth(_boxes(arrays, header["boxes"]) if "boxes" in header else None)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: no pair of sample and truth: {type(error).__name__}: {error}", "empty the folder"
        ) from error


def _cloud(arrays: Mapping[str, Array], place: str, about: Mapping[str, object]) -> PointCloud:
    fields = {name: arrays[f"{place}/fields/{name}"] for name in about["fields"]}  # type: ignore[attr-defined]
    pose = Pose.from_matrix(arrays[f"{place}/pose"])
    return PointCloud(arrays[f"{place}/xyz"], fields, pose, about["stamp_ns"])  # type: ignore[arg-type]


def _camera(arrays: Mapping[str, Array], place: str, about: Mapping[str, object]) -> CameraImage:
    size = about["valid_size"]
    return CameraImage(
        arrays[f"{place}/rgb"],
        arrays[f"{place}/intrinsic"],
        Pose.from_matrix(arrays[f"{place}/pose"]),
        about["stamp_ns"],  # type: ignore[arg-type]
        None if size is None else tuple(size),  # type: ignore[arg-type]
    )


def _boxes(arrays: Mapping[str, Array], about: Mapping[str, object]) -> Boxes3D:
    there = {name: arrays.get(f"boxes/{name}") for name in _BOX_ARRAYS}
    return Boxes3D(**there, classes=tuple(about["classes"]), stamp_ns=about["stamp_ns"])  # type: ignore[arg-type]
