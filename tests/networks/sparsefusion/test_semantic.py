from __future__ import annotations

import math

import pytest
import torch
from networks.sparsefusion.rig import VIEWS, ring, small_config

from perception.networks.sparsefusion.head import Head
from perception.networks.sparsefusion.pyramid import inverse_3x3, inverse_sigmoid, pyramid
from perception.networks.sparsefusion.semantic import cells_in_view, count_visible, look, sample, scatter

CONFIG = small_config()
CANVAS = CONFIG.image.canvas_px
ROWS, COLUMNS = CONFIG.lidar.bev_shape


def heights(row: int, column: int, z_m: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One cell holds points, half a metre below and above z."""
    low = torch.full((1, ROWS, COLUMNS), 100.0, dtype=torch.float64)
    high = torch.full((1, ROWS, COLUMNS), -200.0, dtype=torch.float64)
    low[0, row, column], high[0, row, column] = z_m - 0.5, z_m + 0.5
    return low, high


def test_a_cell_is_seen_where_the_pinhole_puts_it():
    """Ahead at (x, y), 0.5 m nearer to the camera: u and v by similar triangles."""
    row, column, z_m = 20, COLUMNS // 2, -1.5
    x_m = (column + 0.5) * CONFIG.lidar.cell_m + CONFIG.lidar.range_m[0]
    y_m = (row + 0.5) * CONFIG.lidar.cell_m + CONFIG.lidar.range_m[1]
    sight = look(*heights(row, column, z_m), ring(1, CANVAS), CONFIG.lidar, CANVAS)
    cell = row * COLUMNS + column
    assert sight.visible.sum() == 1 and sight.visible[0, 0, cell]
    depth_m = y_m - 0.5
    assert sight.depth[0, 0, cell] == pytest.approx(depth_m)
    u_px = CANVAS[0] / 2 + 0.8 * CANVAS[0] * x_m / depth_m
    v_px = CANVAS[1] / 2 + 0.8 * CANVAS[0] * -z_m / depth_m
    assert sight.reference[0, 0, cell].tolist() == pytest.approx([u_px / CANVAS[0], v_px / CANVAS[1]])


def test_visibility_ends_where_the_image_does_and_is_none_of_a_missing_camera():
    calibration = ring(1, CANVAS)
    filled = heights(0, 0, 0)[0].new_full((1, ROWS, COLUMNS), -1.0)
    everywhere = look(filled, filled, calibration, CONFIG.lidar, CANVAS)
    in_front = everywhere.depth > 1e-4
    within = ((everywhere.reference >= 0) & (everywhere.reference < 1)).all(-1)
    assert (everywhere.visible == (in_front & within)).all()
    assert everywhere.visible.any(1).float().mean() > 0.95  # the ring looks all around
    half = calibration._replace(visible_px=calibration.visible_px / 2)
    seen = look(filled, filled, half, CONFIG.lidar, CANVAS)
    assert (seen.visible == (in_front & within & (everywhere.reference < 0.5).all(-1))).all()
    present = calibration.present.clone()
    present[0, 4] = False
    seen = look(filled, filled, calibration._replace(present=present), CONFIG.lidar, CANVAS)
    assert not seen.visible[0, 4].any() and (seen.visible[0, 3] == everywhere.visible[0, 3]).all()
    assert count_visible(seen) % 256 == 0 and count_visible(seen) >= seen.visible.sum(-1).max()


def test_cells_in_view_are_in_order_and_padded():
    visible = torch.tensor([[[0, 1, 0, 1, 1], [0, 0, 0, 0, 0]]], dtype=torch.bool)
    cell, valid = cells_in_view(visible, 4)
    assert cell.tolist() == [[1, 3, 4, 5], [5, 5, 5, 5]]
    assert valid.tolist() == [[True, True, True, False], [False] * 4]
    assert cells_in_view(visible, 3)[0].tolist() == [[1, 3, 4], [5, 5, 5]]
    fewer, valid = cells_in_view(visible, 2)
    assert fewer[0, 0] == 1 and fewer[0, 1] in (3, 4) and valid[0].all()


def test_scatter_takes_the_maximum_over_views_and_keeps_what_is_not_seen():
    projected = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]])  # (1, 3, 2)
    seen = torch.tensor([[[-5.0, 9.0], [7.0, 7.0]], [[-4.0, 8.0], [0.0, 0.0]]])  # two views
    cell = torch.tensor([[1, 3], [1, 2]])  # 3 is padding
    out = scatter(seen, cell, projected)
    assert out.tolist() == [[[1, -4, 0], [1, 9, 0], [0, 1, 1]]]


def test_samples_beyond_the_border_are_the_border():
    level = torch.arange(12.0).view(1, 1, 3, 4)
    reference = torch.tensor([[[0.125, 1 / 6], [0.25, 1 / 6], [-3.0, 0.5], [2.0, 2.0]]])
    torch.testing.assert_close(sample(level, reference)[0, :, 0], torch.tensor([0.0, 0.5, 4.0, 11.0]))


def test_cells_seen_by_no_camera_keep_their_lidar_feature():
    """With all cameras missing the map is that of the LiDAR alone, its flag 0 everywhere."""
    head = Head(CONFIG).double().eval()
    calibration = ring(1, CANVAS)
    calibration = calibration._replace(present=torch.zeros_like(calibration.present))
    levels = [torch.randn(VIEWS, 32, CANVAS[1] // 4 // 2**i, CANVAS[0] // 4 // 2**i).double() for i in range(4)]
    filled = torch.zeros(1, ROWS, COLUMNS).double()
    bev = torch.randn(1, 32, ROWS, COLUMNS).double()
    sight = head.look(filled, filled, calibration)
    out = head.semantic(bev, pyramid(levels, calibration), sight, count_visible(sight))
    projected = head.semantic.lidar_projection(bev.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(bev)
    torch.testing.assert_close(out, head.semantic.reduce(torch.cat((projected, torch.zeros_like(bev[:, :1])), 1)))


def test_tokens_beyond_the_image_are_not_valid():
    """796 of 800 px wide: 199, 99, 49 and 24 columns of 200, 100, 50 and 25 are left."""
    calibration = ring(1, (800, 448))
    calibration = calibration._replace(valid_px=torch.tensor([796.0, 448.0]).expand(1, VIEWS, 2))
    shapes = [(112, 200), (56, 100), (28, 50), (14, 25)]
    images = pyramid([torch.empty(VIEWS, 1, *shape) for shape in shapes], calibration)
    start = 0
    for height, width in shapes:
        part = images.valid[0, 0, start : start + height * width].view(height, width)
        assert part[:, :-1].all() and not part[:, -1].any()
        start += height * width
    torch.testing.assert_close(images.position[0], torch.tensor([0.5 / 200, 0.5 / 112]).double())
    torch.testing.assert_close(images.position[-1], torch.tensor([24.5 / 25, 13.5 / 14]).double())


def test_inverses():
    matrix = torch.randn(4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(inverse_3x3(matrix), torch.linalg.inv(matrix))
    share = torch.tensor([-0.5, 0.0, 0.25, 0.5, 1.0, 3.0], dtype=torch.float64)
    most = math.log(1 / 1e-5)
    expected = torch.tensor([-most, -most, -math.log(3), 0, most, most], dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(share), expected)
