"""A network and a data set that train in milliseconds, with the interfaces of the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from builders import boxes, camera, cloud
from torch import Tensor, nn

from perception.types import Needs, Sample, Truth


class Inputs(NamedTuple):
    means: Tensor
    batch_size: int


class Centroid(nn.Module):
    """Learns the mean of the boxes' centres from the mean of the points."""

    needs = Needs(lidar=("intensity",), cameras=("front",))

    def __init__(self, normalised: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8) if normalised else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 2)

    def encode(self, samples: Sequence[Sample]) -> Inputs:
        rows = [
            [*s.lidars["top"].xyz.mean(0), s.cameras["front"].rgb.mean() / 255 + s.lidars["top"].fields["intensity"][0]]
            for s in samples
        ]
        return Inputs(torch.tensor(np.array(rows), dtype=torch.float32, device=self.head.weight.device), len(samples))

    def forward(self, inputs: Inputs) -> Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.stem(inputs.means)))))

    def encode_targets(self, samples: Sequence[Sample], truths: Sequence[Truth]) -> Tensor:
        rows = np.array([t.boxes.center[:, :2].mean(0) for t in truths])
        return torch.tensor(rows, dtype=torch.float32, device=self.head.weight.device)

    def loss(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        error = outputs - targets
        return {"x": error[:, 0].square().mean(), "y": 0.5 * error[:, 1].square().mean()}


class Overflowing(Centroid):
    """In its second step the gradient overflows, or what its norm takes in of the batch while all else is finite."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.steps = what, 0

    def forward(self, inputs: Inputs) -> Tensor:
        self.steps += 1
        scale = 1e25 if self.steps == 2 and self.what == "statistics" else 1.0  # its square is infinite
        return super().forward(inputs._replace(means=inputs.means * scale))

    def loss(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        terms = super().loss(outputs, targets)
        if self.steps == 2 and self.what == "gradient":  # a finite loss with an infinite slope
            terms["x"] = terms["x"] + (outputs.sum() * 0).abs().sqrt()
        return terms


class Shapes:
    """A Dataset: sample i has its points and boxes around its own place; class 0 is in every sample, class 9 in one."""

    def __init__(self, size: int = 12, points: int = 50) -> None:
        self.tokens, self._points = [f"s{i}" for i in range(size)], points

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Sample:
        points = cloud(points=self._points, seed=i)
        moved = replace(points, xyz=points.xyz * 0.01 + np.array([0.5 * i, 1.0, 0.0], np.float32))
        return Sample(i, {"top": moved}, {}, {"front": camera()}, token=self.tokens[i])

    def truth(self, i: int) -> Truth:
        every = boxes()
        label = np.array([0, 9] if i == 3 else [0])
        chosen = every.select(label)
        return Truth(replace(chosen, center=chosen.center + [0.5 * i, 0.0, 0.0]), map_from_ego=None)

    def scene_name(self, i: int) -> str:
        return "only"
