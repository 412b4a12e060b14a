from __future__ import annotations

import threading

import pytest
import torch

from perception.networks.layers.cuda_graphs import CudaGraph

pytestmark = pytest.mark.gpu


def test_replays_with_new_values_and_captures_new_shapes():
    calls = []

    def run(a: torch.Tensor, b: torch.Tensor, power: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(a.shape)
        return a @ b, a.pow(power).sum()

    graph = CudaGraph()
    for size, power in ((4, 2), (4, 2), (4, 3), (7, 3), (7, 3)):
        a, b = torch.randn(size, size, device="cuda"), torch.randn(size, 3, device="cuda")
        product, total = graph(run, a, b, power=power)
        torch.testing.assert_close(product, a @ b)
        torch.testing.assert_close(total, a.pow(power).sum())
    assert len(calls) == 3 * 4  # three to warm up and one to capture, for each kind of call that differs


def test_tensors_among_fixed_arguments_are_read_where_they_are():
    calls = []

    def run(a: torch.Tensor, others: tuple[torch.Tensor, ...]) -> torch.Tensor:
        calls.append(1)
        return a + others[0]

    graph = CudaGraph()
    other = torch.zeros(3, device="cuda")
    ones = torch.ones(3, device="cuda")
    assert graph(run, ones, others=(other,)).tolist() == [1, 1, 1]
    other.fill_(5)
    assert graph(run, ones, others=(other,)).tolist() == [6, 6, 6]
    assert len(calls) == 4
    assert graph(run, ones, others=(torch.full((3,), 7.0, device="cuda"),)).tolist() == [8, 8, 8]
    assert len(calls) == 8


def test_graphs_of_two_threads_are_captured_one_after_the_other():
    wrong = []

    def work(scale: float) -> None:
        graph, stream = CudaGraph(), torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            for size in range(1, 12):
                a = torch.randn(32, size * 8, device="cuda")
                got, want = graph(lambda x: (x @ x.T) * scale, a), (a @ a.T) * scale
                if not torch.allclose(got, want, rtol=1e-3, atol=1e-3):
                    wrong.append((scale, size))

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_a_capture_that_fails_leaves_nothing_behind():
    graph = CudaGraph()
    with pytest.raises(RuntimeError):
        graph(lambda a: a @ torch.ones(5, device="cuda"), torch.ones(4, 4, device="cuda"))
    assert graph(lambda a: a + 1, torch.ones(2, device="cuda")).tolist() == [2, 2]
