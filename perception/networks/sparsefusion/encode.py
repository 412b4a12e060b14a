"""Samples to SparseFusion's tensors: points to voxels, images onto the canvas, the cameras' calibration.

The points are taken as they come, the key sweep first: a voxel keeps its first points, so their order counts, and no
point is cut off before. The sparse depth map holds the key sweep alone, since what moves has left its earlier places.

On a GPU everything but the copying runs there. Points and images go up as they are through pinned memory, a sample's
camera numbers in one tensor; the host waits for the device once a sample, for the number of voxels, and for
`padded_voxels` not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.errors import DataError
from perception.networks.layers.resize import resize_uint8
from perception.networks.sparsefusion.config import ImageConfig, Mounting, SparseFusionConfig
from perception.networks.sparsefusion.lidar import heights
from perception.networks.sparsefusion.tensors import Calibration, Inputs
from perception.types import Array, CameraImage, PointCloud, Pose, Sample, VoxelGrid
from perception.voxelize import hard_voxels, padded_voxels

BLACK_LEVEL = 8
"""An image without a pixel brighter than this, of 255, shows nothing: a covered lens or a dead sensor."""

DEPTH_MEAN_M, DEPTH_VARIANCE_M2 = 14.41, 156.89
"""Of the depths of LiDAR points in nuScenes' images (official configuration of SparseDepth)."""
_LEAST_DEPTH_M = 1e-4

# A camera's numbers as they go up: rotation, translation, intrinsic, valid and visible size, presence.
_CAMERA_NUMBERS = (9, 3, 9, 2, 2, 1)


def ego_from_network(sample: Sample, config: SparseFusionConfig) -> Pose:
    """Where the network's frame is: the configured mounting, else the LiDAR's own place. See the configuration.

    Raises:
        DataError: the sample has no such LiDAR.
    """
    if config.mounting is not None or config.modality == "camera":
        return (config.mounting or Mounting()).ego_from_network
    return _cloud(sample, config).ego_from_sensor


def absent_cameras(sample: Sample, roles: Sequence[str]) -> dict[str, Literal["missing", "black"]]:
    """Which of the cameras show nothing, and why."""
    absent: dict[str, Literal["missing", "black"]] = {}
    for role in roles:
        if role not in sample.cameras:
            absent[role] = "missing"
        elif _shows_nothing(sample.cameras[role].rgb):
            absent[role] = "black"
    return absent


def _shows_nothing(rgb: Array) -> bool:
    """Whether every eighth row is black; a few pixels of nearly any image tell that it is not."""
    return bool(rgb[::64, ::64].max() <= BLACK_LEVEL and rgb[::8].max() <= BLACK_LEVEL)


class CanvasFit(NamedTuple):
    """How an image comes to lie on the canvas: width and height in pixels, and the factors that K is scaled by."""

    size_px: tuple[int, int]
    factors: tuple[float, float]


def fit_canvas(image: CameraImage, config: ImageConfig) -> CanvasFit:
    """The largest size of the image's shape that fits the canvas, rounded: width and height scale a little apart."""
    height, width = image.rgb.shape[:2]
    scale = min(config.canvas_px[0] / width, config.canvas_px[1] / height)
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    return CanvasFit(size, (size[0] / width, size[1] / height))


class Encoder(nn.Module):
    """Samples -> Inputs, on the device and in the float type that the module is moved to (float32 or float64).

    In training mode fewer voxels are kept, and projected points count as seen within the valid part of an image only,
    as in the official training.

    Attributes:
        voxels_dropped: of the last batch, those beyond the most that are kept.
    """

    def __init__(self, config: SparseFusionConfig) -> None:
        super().__init__()
        self.config = config
        self.voxels_dropped = 0
        lidar = config.lidar
        self.grid = VoxelGrid(lidar.range_m[:3], lidar.voxel_size_m, lidar.grid, Pose.identity())
        self.register_buffer("mean", torch.tensor(config.image.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.image.std), persistent=False)

    mean: Tensor
    std: Tensor

    def forward(self, samples: Sequence[Sample]) -> Inputs:
        """A batch of samples.

        Raises:
            DataError: a sample without the LiDAR, or a cloud without `intensity`.
        """
        with_lidar, with_cameras = (self.config.modality != other for other in ("camera", "lidar"))
        points = [self.points(sample) for sample in samples] if with_lidar else []
        voxels, coordinates, height_min, height_max = self.voxels(points) if with_lidar else (None,) * 4
        calibration = self.calibration(samples) if with_cameras else None
        depth = None
        if calibration is not None and with_lidar:
            key_sweeps = [p[: self.key_sweep(sample)] for p, sample in zip(points, samples, strict=True)]
            depth = torch.stack([self.sparse_depth(p, _of_sample(calibration, b)) for b, p in enumerate(key_sweeps)])
        images = self.all_images(samples) if with_cameras else None
        return Inputs(voxels, coordinates, height_min, height_max, images, depth, calibration, len(samples))

    # LiDAR

    def points(self, sample: Sample) -> Tensor:
        """(N, 5) of the sweeps that the network reads: x, y, z (m), intensity (0 to 255), time lag (s)."""
        cloud = _cloud(sample, self.config)
        if "sweep" in cloud.fields and (older := cloud.fields["sweep"] >= self.config.sweeps).any():
            cloud = cloud.select(~older)
        if "intensity" not in cloud.fields:
            role, names = self.config.lidar.role, ", ".join(["x", "y", "z", *cloud.fields])
            raise DataError(
                f"sparsefusion: LiDAR {role!r} has fields ({names}); the network needs intensity",
                f"the vehicle's sensors.lidars.{role}.fields maps names, e.g.  fields: {{intensity: reflectivity}}",
            )
        # Two blocks that are copied as they lie; the columns are put side by side on the device.
        xyz, fields = self._host((len(cloud), 3)), self._host((2, len(cloud)))
        xyz.numpy()[:] = self._in_network_frame(cloud, sample)
        fields.numpy()[0] = cloud.fields["intensity"]
        fields.numpy()[1] = cloud.fields.get("time_lag", 0.0)  # a cloud that is not accumulated is the key sweep
        return torch.cat([self._upload(xyz), self._upload(fields).T], 1)

    def key_sweep(self, sample: Sample) -> int:
        """Points of the cloud before the first with a time lag: the key sweep's, which `accumulate` puts first."""
        cloud = _cloud(sample, self.config)
        if "time_lag" not in cloud.fields or not len(cloud):
            return len(cloud)
        older = cloud.fields["time_lag"] != 0
        first = int(older.argmax())
        return first if older[first] else len(cloud)

    def _in_network_frame(self, cloud: PointCloud, sample: Sample) -> Array:
        if self.config.mounting is None:
            return cloud.xyz
        return (ego_from_network(sample, self.config).inverse() @ cloud.ego_from_sensor).apply(cloud.xyz)

    def voxels(self, points: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Voxel means (V, 5), coordinates (V, 4) int32 and both height maps (B, Y, X) of points (N, 5) of B clouds."""
        lidar = self.config.lidar
        most = lidar.max_voxels_training if self.training else lidar.max_voxels
        means, coordinates, height = [], [], []
        self.voxels_dropped = 0
        for b, cloud in enumerate(points):
            found = hard_voxels(cloud, self.grid, lidar.max_points, most, stop_when_full=True)
            self.voxels_dropped += found.voxels_dropped
            means.append(found.points.sum(1) / found.count[:, None])
            coordinates.append(F.pad(found.index.flip(1).int(), (1, 0), value=b))
            height.append(heights(found, lidar))
        low, high = (torch.stack(maps) for maps in zip(*height, strict=True))
        return torch.cat(means), torch.cat(coordinates), low, high

    def padded_voxels(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`voxels` of one cloud without waiting for the device: in `max_voxels` rows, and how many there are, () int64.

        In rows without a voxel means are 0 and coordinates -1.
        """
        lidar = self.config.lidar
        found = padded_voxels(points, self.grid, lidar.max_points, lidar.max_voxels, stop_when_full=True)
        means = found.points.sum(1) / found.count.clamp(min=1)[:, None]
        coordinates = F.pad(found.index.flip(1).int(), (1, 0)).masked_fill((found.count == 0)[:, None], -1)
        low, high = heights(found, lidar)
        return means, coordinates, low[None], high[None], found.found

    def sparse_depth(self, points: Tensor, calibration: Calibration) -> Tensor:
        """(K, 2, H/4, W/4) depth of the nearest point of the key sweep, normalised, and where there is one.

        Args:
            points: (N, 5); those with a time lag other than 0 do not count.
            calibration: of one sample, without the batch axis.
        """
        width, height = (n // 4 for n in self.config.image.canvas_px)
        xyz, views = points[:, None, :3], len(calibration.rotation)
        camera = (calibration.rotation[:, None] * xyz[None]).sum(-1) + calibration.translation[:, None]  # (K, N, 3)
        # As the official code: a point behind the camera is not cut off, its tiny depth throws it out of the image.
        depth = camera[..., 2].clamp(min=_LEAST_DEPTH_M)
        pixel = (calibration.intrinsic[:, None, :2] * camera[:, :, None]).sum(-1) / depth[..., None]  # (K, N, 2)
        seen = (pixel > 0) & (pixel < calibration.visible_px[:, None] - 1)
        seen = seen.all(-1) & calibration.present[:, None] & (points[:, 4] == 0)
        column, row = (pixel / 4).floor().where(seen[..., None], 0).long().unbind(-1)
        place = (torch.arange(views, device=points.device)[:, None] * height + row) * width + column
        place = torch.where(seen, place, views * height * width)  # one more takes the points that are not seen
        nearest = depth.new_full((views * height * width + 1,), torch.inf)
        nearest = nearest.scatter_reduce(0, place.flatten(), depth.flatten(), "amin")[:-1]
        nearest = nearest.view(views, height, width)
        filled = torch.isfinite(nearest)
        normal = (nearest - DEPTH_MEAN_M) / DEPTH_VARIANCE_M2**0.5
        return torch.stack([torch.where(filled, normal, 0), filled.to(normal.dtype)], 1)

    # cameras

    def calibration(self, samples: Sequence[Sample]) -> Calibration:
        """Of all cameras, the absent ones with numbers that harm nothing."""
        return as_calibration(self.camera_numbers(samples))

    def camera_numbers(self, samples: Sequence[Sample]) -> Tensor:
        """(B, K, 26) what `as_calibration` reads, in one transfer."""
        host = self._host((len(samples), len(self.config.cameras), sum(_CAMERA_NUMBERS)))
        rows = host.numpy()
        for b, sample in enumerate(samples):
            absent = absent_cameras(sample, self.config.cameras)
            frame = ego_from_network(sample, self.config)
            for k, role in enumerate(self.config.cameras):
                rows[b, k] = self._camera_numbers(sample.cameras.get(role), frame, role not in absent)
        return self._upload(host)

    def _camera_numbers(self, image: CameraImage | None, frame: Pose, present: bool) -> Array:
        canvas = self.config.image.canvas_px
        if image is None:
            intrinsic = np.diag([canvas[0], canvas[0], 1.0])
            return np.concatenate([np.eye(3).ravel(), np.zeros(3), intrinsic.ravel(), canvas, canvas, [0.0]])
        camera_from_ego = image.ego_from_camera.rotation.T  # as plain arrays: a Pose is checked each time it is made
        factors = np.array(fit_canvas(image, self.config.image).factors)
        intrinsic = image.intrinsic.copy()
        intrinsic[:2] *= factors.astype(np.float32)[:, None]  # the official loader's factors are float32
        height, width = image.rgb.shape[:2]
        valid = np.array(image.valid_size or (width, height)) * factors
        translation = camera_from_ego @ (frame.translation - image.ego_from_camera.translation)
        pose = ((camera_from_ego @ frame.rotation).ravel(), translation)
        visible = valid if self.training else canvas
        return np.concatenate([*pose, intrinsic.ravel(), valid, visible, [float(present)]])

    def all_images(self, samples: Sequence[Sample]) -> Tensor:
        """(B, K, 3, H, W), see `images`."""
        return torch.stack([self.images(sample) for sample in samples])

    def images(self, sample: Sample) -> Tensor:
        """(K, 3, H, W): each image resized to fit the canvas, normalised; zero beyond it, and where a camera is absent.

        The resizing is OpenCV's bilinear of uint8, on the CPU and on a GPU to the bit.
        """
        width, height = self.config.image.canvas_px
        canvas = self.mean.new_zeros((len(self.config.cameras), 3, height, width))
        absent = absent_cameras(sample, self.config.cameras)
        by_shape: dict[tuple[int, ...], dict[int, CameraImage]] = {}
        for k, role in enumerate(self.config.cameras):
            if role not in absent:
                by_shape.setdefault(sample.cameras[role].rgb.shape, {})[k] = sample.cameras[role]
        for shape, views in by_shape.items():
            there = torch.empty((len(views), *shape), dtype=torch.uint8, device=self.mean.device)
            for row, image in zip(there, views.values(), strict=True):
                # One by one: the device fetches an image while the host copies the next.
                host = self._host(shape, torch.uint8)
                host.copy_(torch.from_numpy(np.require(image.rgb, requirements=["C", "W"])))
                row.copy_(host, non_blocking=True)
            (w, h), _ = fit_canvas(next(iter(views.values())), self.config.image)
            resized = resize_uint8(there, w, h)
            normal = (resized.to(self.mean.dtype) - self.mean) / self.std  # (k, h, w, 3)
            for view, values in zip(views, normal.permute(0, 3, 1, 2), strict=True):
                canvas[view, :, :h, :w] = values
        return canvas

    def _host(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory to fill and `_upload`: pinned for a GPU, which then fetches it while the host goes on."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.mean.device.type == "cuda")

    def _upload(self, host: Tensor) -> Tensor:
        there = host.to(self.mean.device, non_blocking=True)
        return there.to(self.mean.dtype) if there.is_floating_point() else there


def as_calibration(camera_numbers: Tensor) -> Calibration:
    """What `Encoder.camera_numbers` gave, by name."""
    rotation, translation, intrinsic, valid, visible, present = camera_numbers.split(_CAMERA_NUMBERS, -1)
    matrix = (*rotation.shape[:2], 3, 3)
    return Calibration(
        rotation.reshape(matrix), translation, intrinsic.reshape(matrix), valid, visible, present[..., 0] > 0
    )


def _cloud(sample: Sample, config: SparseFusionConfig) -> PointCloud:
    role = config.lidar.role
    if role not in sample.lidars:
        raise DataError(
            f"sparsefusion: sample {sample.token or sample.stamp_ns} has no LiDAR {role!r}; "
            f"it has: {_names(sample.lidars)}",
            f"name one of them with predictor.lidar.role, or {role!r} in the data set's or vehicle's sensors",
        )
    return sample.lidars[role]


def _names(sensors: Mapping[str, object]) -> str:
    return ", ".join(sensors) or "none"


def _of_sample(calibration: Calibration, b: int) -> Calibration:
    return Calibration(*(values[b] for values in calibration))
