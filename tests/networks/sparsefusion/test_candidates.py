from __future__ import annotations

import torch
from networks.sparsefusion.rig import VIEWS, ring, small_config

from perception.networks.sparsefusion.candidates import (
    ChannelNorm,
    LabelEmbedding,
    image_candidates,
    lidar_candidates,
    local_maxima,
)
from perception.networks.sparsefusion.pyramid import pyramid

CONFIG = small_config()
LOW = -9.0


def test_local_maxima():
    heat = torch.tensor(
        [[1, 1, 1, 1, 9], [1, 5, 4, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 7, 7], [1, 1, 1, 1, 1]], dtype=torch.float32
    )
    kept = local_maxima(heat[None, None])[0, 0]
    # Not 4 beside 5, nor the 9 in the ring, which still outdoes its neighbours; of a plateau every cell.
    assert kept.nonzero().tolist() == [[1, 1], [3, 1], [3, 3]]
    assert kept[1, 1] == 5 and kept[3, 3] == 7
    assert local_maxima(torch.rand(2, 3, 2, 4)).abs().max() == 0  # all ring


def test_lidar_candidates_are_peaks_but_for_classes_that_keep_all():
    rows, columns = CONFIG.lidar.bev_shape
    logits = torch.full((1, 10, rows, columns), LOW)
    car, pedestrian = CONFIG.classes.index("car"), CONFIG.classes.index("pedestrian")
    logits[0, car, 10, 20:22] = torch.tensor([4.0, 3.0])  # the second is no peak
    logits[0, car, 0, 5] = 6.0  # ring
    logits[0, pedestrian, 20, 25:27] = torch.tensor([2.0, 1.0])
    logits[0, pedestrian, 0, 7] = 3.5  # ring
    found = lidar_candidates(logits, CONFIG)
    assert found.label[0, :4].tolist() == [car, pedestrian, pedestrian, pedestrian]
    assert found.location[0, :4].tolist() == [10 * columns + 20, 7, 20 * columns + 25, 20 * columns + 26]
    assert found.view is None and found.score.shape == (1, 10, 12)
    torch.testing.assert_close(found.score[0, car, 0], torch.tensor(4.0).sigmoid())
    torch.testing.assert_close(found.score[0, pedestrian, 0], torch.tensor(LOW).sigmoid())


def test_image_candidates_are_peaks_of_their_level():
    calibration = ring(1, CONFIG.image.canvas_px)
    images = pyramid([torch.empty(VIEWS, 1, 24 // 2**level, 32 // 2**level) for level in range(4)], calibration)
    tokens = images.valid.shape[-1]
    logits = torch.full((1, 10, VIEWS, tokens), LOW)
    second = 24 * 32  # the first token of the second level
    logits[0, 8, 3, 5 * 32 + 6], logits[0, 8, 3, 5 * 32 + 7] = 3.0, 2.0  # a pedestrian is suppressed here
    logits[0, 1, 4, second + 4 * 16 + 4] = 4.0
    logits[0, 2, 4, second + 15] = 5.0  # ring of its level
    found = image_candidates(logits, images, calibration.present, CONFIG)
    assert found.view is not None
    assert (found.label[0, :2].tolist(), found.view[0, :2].tolist()) == ([1, 8], [4, 3])
    assert found.location[0, :2].tolist() == [second + 4 * 16 + 4, 5 * 32 + 6]
    torch.testing.assert_close(found.score[0, 8, 1], torch.tensor(3.0).sigmoid())
    present = calibration.present.clone()
    present[0, 4] = False
    found = image_candidates(logits, images, present, CONFIG)
    assert found.view is not None and found.view[0, 0] == 3 and not (found.view == 4).any()


def test_label_embedding_is_a_convolution_of_the_one_hot_label():
    embedding, label = LabelEmbedding(10, 32), torch.randint(10, (2, 7))
    one_hot = torch.nn.functional.one_hot(label, 10).float().transpose(1, 2)
    expected = torch.nn.functional.conv1d(one_hot, embedding.weight, embedding.bias).transpose(1, 2)
    torch.testing.assert_close(embedding(label), expected)


def test_channel_norm_is_over_channels_of_a_cell():
    out = ChannelNorm(16)(torch.randn(2, 16, 3, 4) * 5 + 2)
    torch.testing.assert_close(out.mean(1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(1, correction=0), torch.ones(2, 3, 4), atol=1e-4, rtol=0)
