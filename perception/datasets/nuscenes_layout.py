"""What stands written in nuScenes v1.0 (Caesar et al., CVPR 2020): channels, classes, splits, names of files.

Tables are JSON lists of records in `{root}/{version}/`, files lie in `{root}/samples/{channel}/` (key frames) and
`{root}/sweeps/{channel}/`. Lengths are metres, stamps microseconds, quaternions (w, x, y, z), box sizes (width, length,
height). Reader, index and writer take every such fact from here, and the sensor files from `nuscenes_files`.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from perception.datasets import occ3d, openoccupancy, surroundocc
from perception.datasets.sensor_files import read_json
from perception.errors import DataError
from perception.types import OccupancyGrid3D, Pose

Modality = Literal["lidar", "camera", "radar"]

ANCHOR_CHANNEL = "LIDAR_TOP"
"""The sensor whose key frame gives a sample its stamp and its ego pose."""

CHANNELS: dict[str, Modality] = {
    "LIDAR_TOP": "lidar",
    "CAM_FRONT": "camera",
    "CAM_FRONT_RIGHT": "camera",
    "CAM_BACK_RIGHT": "camera",
    "CAM_BACK": "camera",
    "CAM_BACK_LEFT": "camera",
    "CAM_FRONT_LEFT": "camera",
    "RADAR_FRONT": "radar",
    "RADAR_FRONT_LEFT": "radar",
    "RADAR_FRONT_RIGHT": "radar",
    "RADAR_BACK_LEFT": "radar",
    "RADAR_BACK_RIGHT": "radar",
}
"""The official rig. Another rig may have other channels; their modality stands in its sensor table."""

_PREFIX: dict[Modality, str] = {"lidar": "LIDAR", "camera": "CAM", "radar": "RADAR"}

DETECTION_CLASSES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)

CATEGORIES = (
    "noise",
    "animal",
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.stroller",
    "human.pedestrian.wheelchair",
    "movable_object.barrier",
    "movable_object.debris",
    "movable_object.pushable_pullable",
    "movable_object.trafficcone",
    "static_object.bicycle_rack",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.car",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.motorcycle",
    "vehicle.trailer",
    "vehicle.truck",
    "flat.driveable_surface",
    "flat.other",
    "flat.sidewalk",
    "flat.terrain",
    "static.manmade",
    "static.other",
    "static.vegetation",
    "vehicle.ego",
)
"""All 32 in the order of their lidarseg index."""

OBJECT_CATEGORIES = CATEGORIES[1:24]
"""The 23 that boxes may have; the category table of a version without lidarseg holds these alone."""

DETECTION_OF_CATEGORY = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.construction": "construction_vehicle",
    "vehicle.bus.rigid": "bus",
    "vehicle.bus.bendy": "bus",
    "vehicle.trailer": "trailer",
    "movable_object.barrier": "barrier",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
}
"""Boxes of other categories belong to no detection class."""

LIDARSEG_CLASSES = ("noise", *openoccupancy.CLASSES[1:])
"""The lidarseg challenge's classes; 0 gathers all that the challenge does not score."""

LIDARSEG_OF_CATEGORY = DETECTION_OF_CATEGORY | {
    "flat.driveable_surface": "driveable_surface",
    "flat.other": "other_flat",
    "flat.sidewalk": "sidewalk",
    "flat.terrain": "terrain",
    "static.manmade": "manmade",
    "static.vegetation": "vegetation",
}
"""Categories that are absent here are noise."""

ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)

VISIBILITY_LEVELS = ("v0-40", "v40-60", "v60-80", "v80-100")
"""Visibility 1 to 4: per cent of an object that the six cameras see."""

VELOCITY_MAX_GAP_S = 1.5
"""Annotations further apart give no velocity (twice this for a central difference), as in the devkit."""

_SPLIT_RANGES = {
    "train_detect": (
        "1-2 41-76 161-168 170-176 190-196 199-200 202-204 206-214 254-264 283-306 315-318 321 323-324 "
        "347-375 382 420-439 457-459 461-465 467-469 471-472 474-480 566 568 570-578 580 582-583 665-679 681 "
        "683-689 739-741 744 746-747 749-752 757-765 767-769 868-873 875-878 880 882-903 945 947 949 952-953 "
        "955-961 975-984 988-991 1011-1025 1074-1102 1104-1105"
    ),
    "train_track": (
        "4-11 19-34 120-135 138-139 149-152 154-155 157-160 177-185 187-188 218-220 222 224-253 328 376-381 "
        "383-386 388-403 405-408 410-419 440-456 499-502 504-515 517-518 525-539 541-546 584-600 639-664 "
        "695-698 700-701 703-719 726-728 730-731 733-738 786-787 789-792 803-806 808-813 815-817 819-822 "
        "847-856 858 860-866 992 994-1010 1044-1058 1106-1110"
    ),
    "val": (
        "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 "
        "770-771 775 777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073"
    ),
    "test": (
        "77-91 111-119 140 142-148 265-266 279-282 307-314 333-343 481-498 547-551 601-604 606-624 827-831 "
        "833-842 844-846 932-933 935-943 1026-1043"
    ),
    "mini_train": "61 553 655 757 796 1077 1094 1100",
    "mini_val": "103 916",
}
"""Scene numbers of the official splits, as ranges; train is its two halves together."""


def role_of(channel: str) -> str:
    """`CAM_FRONT_LEFT` -> `front_left`: the channel without its kind of sensor, in small letters."""
    return channel.partition("_")[2].lower() or channel.lower()


def channel_of(modality: Modality, role: str) -> str:
    """`camera`, `front_left` -> `CAM_FRONT_LEFT`."""
    return f"{_PREFIX[modality]}_{role.upper()}"


def official_splits() -> dict[str, tuple[str, ...]]:
    """Split -> scene names in ascending order, as the devkit's `create_splits_scenes`."""
    splits = {name: tuple(_scene_names(ranges)) for name, ranges in _SPLIT_RANGES.items()}
    return {"train": tuple(sorted(splits["train_detect"] + splits["train_track"]))} | splits


def own_splits(tables: Path) -> dict[str, tuple[str, ...]]:
    """Split -> scene names of the `splits.json` beside a version's tables, empty where there is none.

    Raises DataError where it has another form.
    """
    path = tables / "splits.json"
    if not path.exists():
        return {}
    splits = read_json(path, "the version's tables")
    if not isinstance(splits, dict) or not all(isinstance(scenes, list) for scenes in splits.values()):
        raise DataError(f"{path}: is no object of lists", "write it as  {split: [scene names]}")
    return {split: tuple(map(str, scenes)) for split, scenes in splits.items()}


def _scene_names(ranges: str) -> list[str]:
    ends = [tuple(map(int, part.split("-"))) for part in ranges.split()]
    return [f"scene-{number:04d}" for number in chain.from_iterable(range(end[0], end[-1] + 1) for end in ends)]


class KeyFrameNames(NamedTuple):
    """What the occupancy benchmarks call the files of a key frame by."""

    scene_name: str
    scene_token: str
    sample_token: str
    lidar_token: str
    lidar_filename: str


OccupancyLayout = Literal["openoccupancy", "surroundocc", "occ3d"]


def occupancy_path(layout: OccupancyLayout, root: Path, names: KeyFrameNames) -> Path:
    """Where a benchmark keeps the occupancy of a key frame under its root."""
    if layout == "openoccupancy":
        return openoccupancy.file_path(root, names.scene_token, names.lidar_token)
    if layout == "surroundocc":
        return surroundocc.file_path(root, names.lidar_filename)
    return occ3d.file_path(root, names.scene_name, names.sample_token)


def read_occupancy(layout: OccupancyLayout, path: Path, ego_from_lidar: Pose, stamp_ns: int) -> OccupancyGrid3D:
    """The occupancy of a key frame, in the frame of its benchmark."""
    if layout == "openoccupancy":
        return openoccupancy.read(path, ego_from_lidar, stamp_ns)
    if layout == "surroundocc":
        return surroundocc.read(path, ego_from_lidar, stamp_ns)
    return occ3d.read(path, stamp_ns)


def write_occupancy(layout: OccupancyLayout, path: Path, occupancy: OccupancyGrid3D) -> None:
    """Write the occupancy of a key frame; ValueError where it is one of another benchmark."""
    {"openoccupancy": openoccupancy, "surroundocc": surroundocc, "occ3d": occ3d}[layout].write(path, occupancy)
