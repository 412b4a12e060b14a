"""Samples with truth or predictions as a recording (.rrd) for the rerun viewer (extra `rerun`, imported here only)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from perception.errors import PerceptionError
from perception.types import Boxes3D, OccupancyGrid3D, Pose, Prediction, Sample, Truth
from perception.visualize import boxes_and_occupancy, color_of, draw_occupancy, draw_points


def _rerun() -> Any:
    try:
        import rerun
    except ImportError as error:
        raise PerceptionError(f"rerun does not import: {error}", "pip install -e '.[rerun]'") from error
    return rerun


def write_rrd(path: Path, sample: Sample, shown: Truth | Prediction | None) -> Path:
    """Write a recording of one sample; PerceptionError where rerun is not installed."""
    recording = Recording(path)
    recording.add(sample, shown)
    recording.flush()
    return path


class Recording:
    """A .rrd file: `ego/` with every cloud, camera, box and occupied voxel, on the timeline `stamp`.

    Open it with `rerun FILE`. Raises PerceptionError where rerun is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._rr = _rerun()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._recording = self._rr.RecordingStream("perception")
        self._recording.save(str(path))
        self._recording.log("ego", self._rr.ViewCoordinates.FLU, static=True)

    def add(self, sample: Sample, shown: Truth | Prediction | None) -> None:
        """A sample, and its truth or a prediction."""
        rr, recording = self._rr, self._recording
        recording.set_time("stamp", timestamp=np.datetime64(sample.stamp_ns, "ns"))
        for kind, clouds in (("lidar", sample.lidars), ("radar", sample.radars)):
            for role, cloud in clouds.items():
                points = draw_points(cloud)
                recording.log(f"ego/{kind}/{role}", rr.Points3D(points.xyz, colors=points.color, radii=0.04))
        for role, image in sample.cameras.items():
            height, width = image.rgb.shape[:2]
            recording.log(f"ego/camera/{role}", _transform(rr, image.ego_from_camera))
            pinhole = rr.Pinhole(
                image_from_camera=image.intrinsic, resolution=[width, height], image_plane_distance=2.0
            )
            recording.log(f"ego/camera/{role}", pinhole)
            recording.log(f"ego/camera/{role}", rr.Image(image.rgb).compress(jpeg_quality=85))
        boxes, occupancy = boxes_and_occupancy(shown)
        if boxes is not None:
            recording.log("ego/boxes", _boxes(rr, boxes))
        if occupancy is not None:
            recording.log("ego/occupancy", _transform(rr, occupancy.grid.ego_from_grid))
            recording.log("ego/occupancy", _voxels(rr, occupancy))

    def flush(self) -> None:
        """Everything added is in the file."""
        self._recording.flush()


def _transform(rr: Any, ego_from_it: Pose) -> Any:
    return rr.Transform3D(translation=ego_from_it.translation, mat3x3=ego_from_it.rotation)


def _boxes(rr: Any, boxes: Boxes3D) -> Any:
    turned = Rotation.from_euler("z", boxes.yaw[:, None]).as_quat()
    names = [boxes.classes[k] for k in boxes.label]
    return rr.Boxes3D(
        centers=boxes.center,
        half_sizes=boxes.size / 2,
        quaternions=turned,
        labels=names,
        colors=[color_of(name) for name in names],
        show_labels=False,
    )


def _voxels(rr: Any, occupancy: OccupancyGrid3D) -> Any:
    voxels = draw_occupancy(occupancy)
    half = np.tile(np.asarray(voxels.size) / 2, (len(voxels.center), 1))
    return rr.Boxes3D(centers=voxels.center, half_sizes=half, colors=voxels.color, fill_mode="solid")
