"""One process a GPU, as torchrun starts them; alone, one process is all there is.

Batch norms use their own process's samples, as in the official training: eight GPUs of four samples are not one of 32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from perception.device import usable_device


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those that train together.

    Attributes:
        rank: 0 writes files.
        count: processes.
        device: of this one.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any process says so. All must ask."""
        if self.count == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value > 0)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes. All must ask."""
        if self.count == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.count


@contextmanager
def joined(device: str) -> Iterator[Place]:
    """The place that torchrun's environment gives; `cuda` becomes this process's own GPU."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = usable_device(f"cuda:{local}" if device == "cuda" and count > 1 else device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", chosen.index or 0)
        torch.cuda.set_device(chosen)
    if count == 1:
        yield Place(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Place(dist.get_rank(), count, chosen)
    finally:
        dist.destroy_process_group()
