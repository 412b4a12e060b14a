"""What a surface is, and what the benchmarks call it."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from perception.datasets.nuscenes_layout import LIDARSEG_CLASSES
from perception.types import Array


class Label(IntEnum):
    """Surfaces of the city, finer than any benchmark's classes. The first ten are the detection classes."""

    CAR = 0
    TRUCK = 1
    CONSTRUCTION_VEHICLE = 2
    BUS = 3
    TRAILER = 4
    BARRIER = 5
    MOTORCYCLE = 6
    BICYCLE = 7
    PEDESTRIAN = 8
    TRAFFIC_CONE = 9
    EGO = 10
    ROAD = 11
    PARKING = 12
    SIDEWALK = 13
    TERRAIN = 14
    PAVED = 15
    BUILDING = 16
    FENCE = 17
    POLE = 18
    SIGN = 19
    FURNITURE = 20
    FOLIAGE = 21
    TRUNK = 22
    MOTORCYCLIST = 23
    BICYCLIST = 24


NUSCENES_CLASSES = (*LIDARSEG_CLASSES, "free")
"""nuScenes-lidarseg's classes, and 17 for free voxels, as in Occ3D."""

# A row per Label: nuScenes, SemanticKITTI, OmniHD.
_TABLE = np.array(
    [
        (4, 1, 1), (10, 4, 4), (5, 5, 4), (3, 5, 4), (9, 5, 4), (1, 14, 7), (6, 3, 5), (2, 2, 5), (7, 6, 2), (8, 0, 6),
        (0, 0, 0), (11, 9, 8), (11, 10, 8), (13, 11, 9), (14, 17, 10), (12, 12, 9), (15, 13, 11), (15, 14, 11),
        (15, 18, 11), (15, 19, 11), (15, 0, 11), (16, 15, 10), (16, 16, 10), (6, 8, 3), (2, 7, 3),
    ],
    np.uint8,
)  # fmt: skip

NUSCENES_LABEL: Array = np.ascontiguousarray(_TABLE[:, 0])
SEMANTICKITTI_LABEL: Array = np.ascontiguousarray(_TABLE[:, 1])
OMNIHD_LABEL: Array = np.ascontiguousarray(_TABLE[:, 2])
"""Label -> index into the benchmark's classes."""
