from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.networks.layers.attention import Attention, DeformableAttention, sample_pyramid_torch

SHAPES = ((12, 20), (6, 10), (3, 5), (2, 2))
TOKENS = sum(height * width for height, width in SHAPES)


def test_attention_is_that_of_torch():
    ours, theirs = Attention(32, 4).double(), nn.MultiheadAttention(32, 4, batch_first=True).double()
    ours.load_state_dict(theirs.state_dict())
    query, memory = torch.randn(2, 7, 32).double(), torch.randn(2, 11, 32).double()
    mask = torch.rand(2, 7, 11) > 0.3
    torch.testing.assert_close(ours(query, memory), theirs(query, memory, memory, need_weights=False)[0])
    forbidden = ~mask.repeat_interleave(4, 0)
    masked = theirs(query, memory, memory, attn_mask=forbidden, need_weights=False)[0]
    torch.testing.assert_close(ours(query, memory, mask), masked)


def test_attention_where_nothing_may_be_attended_is_finite_with_finite_gradients():
    attention, query = Attention(16, 2), torch.randn(1, 3, 16, requires_grad=True)
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = True
    out = attention(query, query, mask)
    out.sum().backward()
    assert out.isfinite().all() and query.grad is not None and query.grad.isfinite().all()
    torch.testing.assert_close(out[:, :1], attention(query[:, :1], query[:, 1:2]))


def problem(dtype: torch.dtype = torch.float64, size: int = 8, queries: int = 9, scale: float = 3.0) -> list[Tensor]:
    """value, reference, offsets, weights, view: 2 samples, 3 views, 4 heads, 4 levels, 2 points; some look outside."""
    value = torch.randn(2, 3, TOKENS, 4, size, dtype=dtype)
    reference = torch.rand(2, queries, 2, dtype=torch.float64) * 1.2 - 0.1
    offsets = torch.randn(2, queries, 4, 4, 2, 2, dtype=torch.float64) * scale
    weights = torch.rand(2, queries, 4, 4, 2, dtype=torch.float64)
    return [value, reference, offsets, weights, torch.randint(3, (2, queries))]


def by_hand(value: Tensor, reference: Tensor, offsets: Tensor, weights: Tensor, view: Tensor) -> Tensor:
    """The definition, cell by cell."""
    batch, queries, heads, levels, _ = weights.shape
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=torch.float64)
    starts = [sum(h * w for h, w in SHAPES[:level]) for level in range(levels)]
    for b, q, h, level, p in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
        height, width = SHAPES[level]
        x = float(reference[b, q, 0] * width + offsets[b, q, h, level, p, 0]) - 0.5
        y = float(reference[b, q, 1] * height + offsets[b, q, h, level, p, 1]) - 0.5
        for column in (math.floor(x), math.floor(x) + 1):
            for row in (math.floor(y), math.floor(y) + 1):
                if 0 <= column < width and 0 <= row < height:
                    share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, h, level, p]
                    out[b, q, h] += share * value[b, view[b, q], starts[level] + row * width + column, h]
    return out.flatten(2)


def test_sampling_is_its_definition():
    value, *rest = problem(queries=4)
    expected = by_hand(value, *rest)
    assert expected.abs().max() > 1
    torch.testing.assert_close(sample_pyramid_torch(value, SHAPES, *rest), expected)


def test_deformable_attention_starts_with_one_direction_for_each_head():
    offsets = DeformableAttention(64, 8).sampling_offsets.bias.detach().view(8, 4, 4, 2)
    steps = torch.tensor([[1.0, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
    for point in range(4):
        torch.testing.assert_close(offsets[:, 3, point], steps * (point + 1))


def test_deformable_attention_masks_values_after_their_projection():
    """A token that is not valid counts as zero, not as the projection's bias; levels are shared by all queries."""
    attention = DeformableAttention(32, 4).double()
    nn.init.normal_(attention.value_proj.bias)
    query, reference = torch.randn(1, 5, 32).double(), torch.rand(1, 5, 2).double()
    tokens, valid = torch.randn(1, 1, TOKENS, 32).double(), torch.rand(1, 1, TOKENS) > 0.5
    view = torch.zeros(1, 5, dtype=torch.int64)
    value = attention.value_proj(tokens) * valid[..., None]
    zeroed = DeformableAttention(32, 4).double()
    zeroed.load_state_dict(attention.state_dict())
    zeroed.value_proj = nn.Identity()
    everywhere = torch.ones_like(valid)
    torch.testing.assert_close(
        attention(query, reference, tokens, SHAPES, valid, view),
        zeroed(query, reference, value, SHAPES, everywhere, view),
    )
    none = attention(query, reference, tokens, SHAPES, torch.zeros_like(valid), view)
    torch.testing.assert_close(none, attention.output_proj.bias.expand_as(none))


@pytest.fixture
def kernel():
    """sample_pyramid_triton and a device for it."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device; TRITON_INTERPRET=1 runs the kernel without one")
    from perception.networks.layers.deformable_triton import sample_pyramid_triton

    return sample_pyramid_triton, "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("size", [8, 12])
def test_kernel_gives_the_values_and_gradients_of_torch(kernel, dtype: torch.dtype, tolerance: float, size: int):
    sample_pyramid_triton, device = kernel
    tensors = problem(dtype, size, queries=21)
    tensors[2][0, 0] = 1e6  # far outside
    exact = [x.detach().double().requires_grad_() for x in tensors[:4]]
    ours = [tensors[0].to(device)] + [x.float().to(device) for x in tensors[1:4]]
    ours = [x.detach().requires_grad_() for x in ours]
    expected = sample_pyramid_torch(exact[0], SHAPES, *exact[1:], tensors[4])
    out = sample_pyramid_triton(ours[0], SHAPES, *ours[1:], tensors[4].to(device))
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=1e-4)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    out.backward(gradient.float().to(device))
    for name, a, b in zip(("value", "reference", "offsets", "weights"), ours, exact, strict=True):
        assert a.grad is not None and b.grad is not None and b.grad.abs().max() > 0.1
        torch.testing.assert_close(
            a.grad.cpu().double(), b.grad, rtol=tolerance, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.gpu
def test_deformable_attention_on_cuda_is_that_on_the_cpu():
    torch.backends.cuda.matmul.allow_tf32 = False
    attention = DeformableAttention(128, 8)
    nn.init.normal_(attention.sampling_offsets.weight, std=0.3)
    shapes = ((56, 100), (28, 50), (14, 25), (7, 12))
    query, reference = torch.randn(2, 300, 128), torch.rand(2, 300, 2)
    tokens, view = torch.randn(2, 6, sum(h * w for h, w in shapes), 128), torch.randint(6, (2, 300))
    valid = torch.rand(tokens.shape[:3]) > 0.1
    inputs = (query, reference, tokens, shapes, valid, view)
    expected = attention(*inputs)
    on_cuda = [x.cuda() if isinstance(x, Tensor) else x for x in inputs]
    torch.testing.assert_close(attention.cuda()(*on_cuda).cpu(), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cuda", torch.bfloat16):
        out = attention(*on_cuda)
    assert F.cosine_similarity(out.float().cpu().flatten(), expected.flatten(), dim=0) > 0.999
