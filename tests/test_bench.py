"""Benchmarks measure what they say; how fast it is, no test asks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from perception.bench import bench_sparse, measure


def test_measure_counts_its_runs() -> None:
    calls = []
    row = measure("a", "1 call", lambda: calls.append(1), torch.device("cpu"), runs=5, warm_up=2)
    assert len(calls) == 7
    assert row.runs == 5
    assert 0 < row.p50_ms <= row.p95_ms
    assert row.peak_memory_mib is None


@pytest.mark.parametrize("train", [False, True])
def test_sparse_encoder_is_measured(train: bool) -> None:
    points = np.random.default_rng(0).uniform((-50, -50, -4), (50, 50, 2), (300, 3)).astype(np.float32)
    points = np.concatenate([points, points[:10] + 500])  # out of the grid
    rows = bench_sparse(points, dtypes=(torch.float32, torch.bfloat16), train=train, runs=2, warm_up=0)
    kind = "training step" if train else "inference"
    assert [row.name for row in rows] == [f"sparse encoder, {kind}, torch, {t}" for t in ("float32", "bfloat16")]
    assert all(row.size == "300 voxels" and row.p50_ms > 0 for row in rows)


@pytest.mark.gpu
def test_cuda_memory_is_told() -> None:
    points = np.random.default_rng(0).uniform((-50, -50, -4), (50, 50, 2), (300, 3)).astype(np.float32)
    (row,) = bench_sparse(points, "cuda", dtypes=(torch.float16,), runs=2, warm_up=1)
    assert row.peak_memory_mib is not None
    assert row.peak_memory_mib > 1
    assert row.device == torch.cuda.get_device_name()
