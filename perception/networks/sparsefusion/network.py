"""SparseFusion whole: samples in, boxes out, and what training needs of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from perception.networks.layers import sparse_triton
from perception.networks.layers.folding import fold_norms
from perception.networks.sparsefusion.boxes import Detections, detect, to_boxes3d
from perception.networks.sparsefusion.config import SparseFusionConfig
from perception.networks.sparsefusion.encode import Encoder, absent_cameras, ego_from_network
from perception.networks.sparsefusion.fast import FastForward
from perception.networks.sparsefusion.head import Head
from perception.networks.sparsefusion.image import ImageBranch
from perception.networks.sparsefusion.lidar import LidarBranch
from perception.networks.sparsefusion.losses import losses
from perception.networks.sparsefusion.official import from_original
from perception.networks.sparsefusion.targets import Targets, encode_targets
from perception.networks.sparsefusion.tensors import Calibration, Inputs, Outputs
from perception.types import Boxes3D, Needs, Sample, Truth


class Supervision(NamedTuple):
    """The truth of a batch, and the cameras that it was seen by (None for the modality `lidar`)."""

    targets: Targets
    calibration: Calibration | None


class SparseFusion(nn.Module):
    """See the package. Weights are random until a state is loaded.

    Attributes:
        needs: what it reads of a sample; the ablations need one kind of sensor alone.
        fast: what predicts in place of the modules once `accelerate` was called on a GPU; None otherwise.
        output: what it predicts.
    """

    output: Literal["boxes"] = "boxes"

    def __init__(self, config: SparseFusionConfig) -> None:
        super().__init__()
        self.config = config
        self.needs = _needs(config)
        self.encoder = Encoder(config)
        self.lidar = LidarBranch(config.lidar) if config.modality != "camera" else None
        self.image = ImageBranch(config.image) if config.modality != "lidar" else None
        self.head = Head(config)
        self.fast: FastForward | None = None
        self._voxels: int | None = None  # in range of the last sample predicted, kept or not; None without a LiDAR

    @classmethod
    def from_original(cls, state_dict: Mapping[str, Tensor], config: SparseFusionConfig) -> SparseFusion:
        """The network with the state of a released checkpoint; DataError names what does not fit."""
        network = cls(config)
        network.load_state_dict(from_original(state_dict, config))
        return network

    def encode(self, samples: Sequence[Sample]) -> Inputs:
        """Tensors of a batch of samples, on the network's device; see `Encoder` for training mode and errors."""
        inputs: Inputs = self.encoder(samples)
        return inputs

    def forward(self, inputs: Inputs) -> Outputs:
        """All predictions of a batch. A batch without any voxel is the caller's to leave out."""
        bev, levels = None, None
        if self.lidar is not None:
            bev = self.lidar(inputs.voxels, inputs.coordinates, inputs.batch_size)  # (B, C, Y, X)
        if self.image is not None and inputs.images is not None:
            levels = self.image(inputs.images.flatten(0, 1))  # four of (B * K, C, H / 2^(l+2), W / 2^(l+2))
        outputs: Outputs = self.head(
            bev, inputs.height_min, inputs.height_max, levels, inputs.sparse_depth, inputs.calibration
        )
        return outputs

    def decode(self, outputs: Outputs, samples: Sequence[Sample]) -> list[Boxes3D]:
        """The detections of each sample, in ego at its stamp. The host waits for the device once."""
        return self.boxes(detect(outputs, self.config), samples)

    def boxes(self, detections: Detections, samples: Sequence[Sample]) -> list[Boxes3D]:
        """Those of each sample that stay, see `to_boxes3d`."""
        frames = [ego_from_network(sample, self.config) for sample in samples]
        stamps_ns = [sample.stamp_ns for sample in samples]
        return to_boxes3d(detections, self.config, frames, stamps_ns)

    @torch.inference_mode()
    def predict(self, sample: Sample) -> Boxes3D:
        """The boxes of one sample; none where no LiDAR point is in range, or no camera shows anything to the ablation.

        Raises:
            DataError: the sample lacks the LiDAR or its field `intensity`.
        """
        cameras = self.needs.cameras
        if self.config.modality == "camera" and len(absent_cameras(sample, cameras)) == len(cameras):
            return Boxes3D.empty(self.config.classes, sample.stamp_ns)
        if self.fast is not None:
            frame = self.fast(sample)
            self._voxels = frame.voxels
            if frame.voxels == 0:
                return Boxes3D.empty(self.config.classes, sample.stamp_ns)
            return self.boxes(frame.detections, [sample])[0]
        inputs = self.encode([sample])
        self._voxels = None if inputs.voxels is None else len(inputs.voxels) + self.encoder.voxels_dropped
        if self._voxels == 0:
            return Boxes3D.empty(self.config.classes, sample.stamp_ns)
        return self.decode(self(inputs), [sample])[0]

    def accelerate(self) -> None:
        """Predict faster from now on: by `FastForward` in the configured precision on a GPU that has Triton.

        Elsewhere, and for a grid too large for dense tables of its sites (2^30 cells), norms are folded into
        convolutions, in place, whose channels lie last. Weights must not change later: on a GPU they would not show,
        elsewhere the state is no longer that of a file.
        """
        on_gpu = self.encoder.mean.device.type == "cuda" and sparse_triton.installed()
        if on_gpu and (self.lidar is None or sparse_triton.has_dense_tables(self.lidar.encoder.spatial_shape)):
            dtype = getattr(torch, self.config.precision)
            self.fast = FastForward(self.encoder, self.lidar, self.image, self.head, dtype)
            return
        for part in (self.lidar, self.image, self.head):
            if part is not None:
                fold_norms(part)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def degraded(self, sample: Sample) -> str:
        """What the prediction for this sample, the last, had to do without, "" if nothing: `camera back missing, front
        black; 812 voxels beyond the 160000 that lidar.max_voxels allows`.
        """
        absent = absent_cameras(sample, self.needs.cameras)
        parts = ["camera " + ", ".join(f"{role} {why}" for role, why in absent.items())] if absent else []
        if self._voxels == 0:
            parts.append(f"no point of LiDAR {self.config.lidar.role} in range")
        if self._voxels is not None and (dropped := self._voxels - self.config.lidar.max_voxels) > 0:
            parts.append(f"{dropped} voxels beyond the {self.config.lidar.max_voxels} that lidar.max_voxels allows")
        return "; ".join(parts)

    def encode_targets(self, samples: Sequence[Sample], truths: Sequence[Truth]) -> Supervision:
        """What the outputs for these samples are compared with, on the network's device.

        Raises:
            DataError: a truth has no boxes.
        """
        network_from_ego = [ego_from_network(sample, self.config).inverse() for sample in samples]
        calibration = self.encoder.calibration(samples) if self.image is not None else None
        targets = encode_targets(truths, network_from_ego, calibration, self.config, self.encoder.mean.device)
        return Supervision(targets, calibration)

    def loss(self, outputs: Outputs, supervision: Supervision) -> dict[str, Tensor]:
        """Every weighted term; training minimises their sum."""
        return losses(outputs, supervision.targets, supervision.calibration, self.config)


def _needs(config: SparseFusionConfig) -> Needs:
    return Needs(
        lidar=("intensity",) if config.modality != "camera" else None,
        cameras=config.cameras if config.modality != "lidar" else (),
        sweeps=config.sweeps,
        anchor="camera" if config.modality == "camera" else "lidar",
    )
