"""How fast the parts run on this machine: medians over repeated runs, on inputs that the caller gives."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perception.device import usable_device
from perception.networks.layers.sparse import Backend
from perception.networks.sparsefusion.config import LidarConfig
from perception.networks.sparsefusion.lidar import POINT_CHANNELS, SparseEncoder
from perception.synthetic.city import CityConfig
from perception.synthetic.stream import Augment, Pair, Replay, fresh
from perception.types import Array, Pose, Sample, VoxelGrid
from perception.voxelize import mean_voxels


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One thing measured.

    Attributes:
        name: what ran, with the backend and type that tell it from its neighbours.
        device: where, in words.
        size: how large the input was, in words.
        p50_ms: median run time.
        p95_ms: 95th percentile.
        runs: how many runs these are of.
        peak_memory_mib: most memory allocated on the GPU at a time; None on the CPU.
    """

    name: str
    device: str
    size: str
    p50_ms: float
    p95_ms: float
    runs: int
    peak_memory_mib: float | None


def measure(name: str, size: str, run: Callable[[], object], device: torch.device, runs: int, warm_up: int) -> BenchRow:
    """Time `run` by itself, `runs` times after `warm_up` more: CUDA events on a GPU, the monotonic clock on the CPU."""
    for _ in range(warm_up):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    times_ms = [_time_ms(run, device) for _ in range(runs)]
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    p50, p95 = np.percentile(times_ms, (50, 95))
    return BenchRow(name, _in_words(device), size, float(p50), float(p95), runs, peak)


def _in_words(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _time_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        begin.record()
        run()
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end))


NUSCENES_GRID = VoxelGrid((-54.0, -54.0, -5.0), (0.075, 0.075, 0.2), (1440, 1440, 40), Pose.identity())
"""The voxels of SparseFusion on nuScenes, in the LiDAR's frame."""


def bench_sparse(
    points: Array,
    device: torch.device | str = "cpu",
    *,
    backends: Sequence[Backend] = ("torch",),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16),
    train: bool = False,
    runs: int = 20,
    warm_up: int = 3,
) -> list[BenchRow]:
    """The sparse encoder of SECOND over the voxels of one cloud, kernel maps included, on each backend and type.

    Args:
        points: (N, 3 to 5) float32 in the LiDAR's frame, metres; x, y, z first. Voxelised once, not timed.
        train: time a forward and backward pass in training mode, else a forward pass for inference.

    Raises PerceptionError where a backend cannot be used (see `SparseTensor`).
    """
    device = usable_device(device)
    voxels = mean_voxels(points, NUSCENES_GRID)
    indices = np.concatenate([np.zeros((len(voxels.index), 1), np.int32), voxels.index[:, ::-1].astype(np.int32)], 1)
    sites = torch.from_numpy(indices).to(device)
    rows = []
    for dtype in dtypes:
        features = F.pad(torch.from_numpy(voxels.features).to(device, dtype), (0, POINT_CHANNELS - points.shape[1]))
        network = SparseEncoder(LidarConfig()).to(device, dtype).train(train)
        for backend in backends:

            def run(features: Tensor = features, network: SparseEncoder = network, backend: Backend = backend) -> None:
                network.backend = backend
                with torch.set_grad_enabled(train):
                    out = network(features, sites, 1)
                    if train:
                        out.float().square().mean().backward()

            kind = "training step" if train else "inference"
            name = f"sparse encoder, {kind}, {backend}, {str(dtype).removeprefix('torch.')}"
            rows.append(measure(name, f"{len(sites):,} voxels", run, device, runs, warm_up))
    return rows


@dataclass(frozen=True, slots=True)
class CityRate:
    """How many training samples a second the city gives.

    Attributes:
        name: `fresh`, each one simulated, or `replayed` from a pool in memory.
        device: that simulates, and by how many processes, in words.
        size: what a sample holds, in words.
        samples: how many were timed.
        samples_per_s: taken as they come, augmentation included.
    """

    name: str
    device: str
    size: str
    samples: int
    samples_per_s: float


def bench_city(
    city: CityConfig, workers: int = 0, together: int = 1, samples: int = 100, augment: Augment | None = None
) -> list[CityRate]:
    """The rates of `perception.synthetic.stream`: fresh, and replayed from a pool of as many.

    The first samples, up to those that waited for their turn while all workers built their first scenes, are not
    timed; the scenes built later are.

    Raises:
        ConfigError: the machine lacks the city's device.
    """
    device = usable_device(city.device)
    stream = fresh(city, workers, together)
    sample, _ = next(stream)
    for _ in range(max(1, workers) * 3 * together):
        next(stream)

    def rate(name: str, pairs: Iterator[Pair], change: Augment | None) -> CityRate:
        start = time.perf_counter()
        for pair in itertools.islice(pairs, samples):
            if change is not None:
                change(*pair)
        took_s = time.perf_counter() - start
        return CityRate(name, where, _sample_size(sample, city), samples, samples / took_s)

    where = (
        f"{_in_words(device)}, {max(1, workers)} process{'es' if workers > 1 else ''}, {together} key frames at once"
    )
    first = rate("fresh", stream, augment)
    with Replay(stream, min(samples, 64), augment, refresh=False) as pool:
        next(pool)
        return [first, rate("replayed", pool, None)]


def _sample_size(sample: Sample, city: CityConfig) -> str:
    parts = [f"{sum(len(cloud) for cloud in sample.lidars.values()):,} LiDAR points of {city.sweeps} sweeps"]
    if sample.cameras:
        height, width = next(iter(sample.cameras.values())).rgb.shape[:2]
        parts.append(f"{len(sample.cameras)} images of {width}x{height}")
    if sample.radars:
        parts.append(f"{len(sample.radars)} radars")
    if city.occupancy is not None:
        parts.append("occupancy of " + "x".join(map(str, city.occupancy.shape)))
    return ", ".join(parts)
