from __future__ import annotations

import pytest
import torch

from perception.networks.layers.cuda_graphs import CudaGraphs

pytestmark = pytest.mark.gpu


def test_replays_with_new_values_and_captures_new_shapes():
    calls = []

    def run(a: torch.Tensor, b: torch.Tensor, power: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(a.shape)
        return a @ b, a.pow(power).sum()

    graphs = CudaGraphs(run)
    for size in (4, 4, 7, 4):
        a, b = torch.randn(size, size, device="cuda"), torch.randn(size, 3, device="cuda")
        for power in (2, 3):
            product, total = graphs(a, b, power=power)
            torch.testing.assert_close(product, a @ b)
            torch.testing.assert_close(total, a.pow(power).sum())
    assert len(graphs) == 4
    assert len(calls) == 4 * 4  # three to warm up and one to capture, never again


def test_tensors_among_fixed_arguments_are_read_where_they_are():
    graphs = CudaGraphs(lambda a, others: a + others[0])
    other = torch.zeros(3, device="cuda")
    ones = torch.ones(3, device="cuda")
    assert graphs(ones, others=(other,)).tolist() == [1, 1, 1]
    other.fill_(5)
    assert graphs(ones, others=(other,)).tolist() == [6, 6, 6]
    assert len(graphs) == 1


def test_the_one_used_longest_ago_makes_room():
    graphs = CudaGraphs(lambda a: a * 2, capacity=2)
    for size in (1, 2, 1, 3, 1):
        assert graphs(torch.ones(size, device="cuda")).tolist() == [2] * size
    assert len(graphs) == 2
