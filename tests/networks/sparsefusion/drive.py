"""A data set that the tiny network trains on, and the process that does so: alone, or one of several under torchrun."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import builders
import numpy as np
import torch
from builders import EGO_FROM_LIDAR, tiny_sparsefusion

from perception.networks.sparsefusion import SparseFusion
from perception.synthetic.city import CityConfig
from perception.training.config import OptimiserConfig, TrainingConfig
from perception.training.data import batches
from perception.training.distributed import Place, joined
from perception.training.log import Progress
from perception.training.loop import Training
from perception.types import PointCloud, Pose, Sample, Truth


class Drive:
    """Samples of a cloud and two noisy images, each with the boxes of `builders`."""

    def __init__(self, size: int = 6) -> None:
        self.tokens = [str(i) for i in range(size)]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Sample:
        rng = np.random.default_rng(i)
        xyz = rng.uniform((-25, -25, -2), (25, 25, 2), (400, 3)).astype(np.float32)
        cloud = PointCloud(xyz, {"intensity": rng.uniform(0, 255, 400).astype(np.float32)}, EGO_FROM_LIDAR, i)
        front, back = (
            replace(builders.camera(stamp_ns=i), rgb=rng.integers(0, 256, (90, 160, 3), np.uint8)) for _ in range(2)
        )
        turned = Pose(Pose.from_yaw(np.pi).rotation @ back.ego_from_camera.rotation, np.array([-0.5, 0.0, 1.5]))
        return Sample(i, {"top": cloud}, {}, {"front": front, "back": replace(back, ego_from_camera=turned)})

    def truth(self, i: int) -> Truth:
        return Truth(boxes=builders.boxes(stamp_ns=i))

    def scene_name(self, i: int) -> str:
        return "only"


def config(**keys: object) -> TrainingConfig:
    settings = {"data": CityConfig(), "steps": 4, "batch_size": 2, "workers": 0, "log_every": 1, "tensorboard": False}
    return TrainingConfig.model_validate({**settings, "optimiser": OptimiserConfig(lr=1e-3), **keys})


def training(
    settings: TrainingConfig, place: Place, folder: Path, resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Training:  # fmt: skip
    torch.manual_seed(0)
    network = SparseFusion(tiny_sparsefusion(class_prior=0.05))
    return Training(network, settings, place, folder, resume=resume, report=report)


def run(started: Training) -> None:
    started.run(batches(started.config, Drive(), started.network.needs, started.place, started.step))


if __name__ == "__main__":
    with joined("cpu") as place:
        folder = Path(sys.argv[1])
        started = training(config(steps=2, batch_size=1), place, folder)
        run(started)
        torch.save(started.weights, folder / f"{place.rank}.pt")
