"""Semantic transfer: image features enter the BEV map that the LiDAR heatmap is made of.

Every cell that holds points is a query: it is projected into the views, at the middle height of its points, attends the
other visible cells of the view and, deformably, the view's pyramid. Cells that several views see take the maximum of
each channel, cells that no view sees keep their LiDAR feature.

The queries of a view are its visible cells in the order of the map, padded to a common number. That number depends on
the data: counting it is the head's one synchronisation with the device, and `fast` gives it room instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.networks.layers.attention import full_precision
from perception.networks.sparsefusion.candidates import NormedConv, pick
from perception.networks.sparsefusion.config import LidarConfig, SparseFusionConfig
from perception.networks.sparsefusion.pyramid import Pyramid, cells, inverse_sigmoid
from perception.networks.sparsefusion.tensors import Calibration
from perception.networks.sparsefusion.transformer import DeformableLayer, Projection

_EMPTY_M = -50.0  # a middle height below says that the cell has no points: empty cells have (100 - 200) / 2
_NEAREST_M = 1e-5
_STEP = 256  # numbers of queries are rounded up to it, so that few different shapes occur


class Sight(NamedTuple):
    """BEV cells in the views.

    Attributes:
        reference: (B, K, N, 2) share of the canvas; N = Y X cells.
        depth: (B, K, N) m, at least `_NEAREST_M`.
        visible: (B, K, N) bool.
    """

    reference: Tensor
    depth: Tensor
    visible: Tensor


class CellQueries(NamedTuple):
    """Visible cells, of each view by itself; M = B K.

    Attributes:
        cell: (M, Q) BEV cell, Y X for padding.
        feature: (M, Q, C).
        position: (M, Q, 3) logits of the reference, log of the depth.
        reference: (M, Q, 2) share of the canvas.
        valid: (M, Q) bool, False for padding.
    """

    cell: Tensor
    feature: Tensor
    position: Tensor
    reference: Tensor
    valid: Tensor


def look(
    height_min: Tensor, height_max: Tensor, calibration: Calibration, config: LidarConfig, canvas_px: tuple[int, int]
) -> Sight:
    """Where the cells, at the middle of height_min and height_max (B, Y, X), are in the views."""
    rows, columns = height_min.shape[1:]
    column, row = cells(rows, columns, height_min.device)
    middle = ((height_min + height_max) / 2).flatten(1).to(calibration.rotation.dtype)  # (B, N)
    x = (column.to(middle.dtype) + 0.5) * config.cell_m + config.range_m[0]
    y = (row.to(middle.dtype) + 0.5) * config.cell_m + config.range_m[1]
    points = torch.stack((x.expand_as(middle), y.expand_as(middle), middle), 1)  # (B, 3, N)
    with torch.autocast(points.device.type, enabled=False):  # half products would move cells by pixels
        in_camera = calibration.rotation @ points[:, None] + calibration.translation[..., None]
        pixels = calibration.intrinsic @ in_camera  # (B, K, 3, N)
    depth = pixels[:, :, 2].clamp(min=_NEAREST_M)
    u, v = pixels[:, :, 0] / depth, pixels[:, :, 1] / depth
    width, height = calibration.visible_px[..., None].unbind(2)
    visible = (u >= 0) & (u < width) & (v >= 0) & (v < height) & (middle > _EMPTY_M)[:, None]
    reference = torch.stack((u / canvas_px[0], v / canvas_px[1]), -1)
    return Sight(reference, depth, visible & calibration.present[..., None])


def most_visible(sight: Sight) -> Tensor:
    """() int64: the most cells that a view sees."""
    return sight.visible.sum(-1).max()


def count_visible(sight: Sight) -> int:
    """`most_visible`, rounded up; waits for the device."""
    return max(1, -(-int(most_visible(sight)) // _STEP)) * _STEP


class SemanticTransfer(nn.Module):
    """Visible cells attend each other and their view's pyramid; see the module."""

    def __init__(self, config: SparseFusionConfig) -> None:
        super().__init__()
        self.lidar_projection = Projection(config.channels)
        self.image_projection = Projection(config.channels)
        self.layer = DeformableLayer(config, position_channels=3)
        self.reduce = NormedConv(config.channels + 1, config.channels)

    def forward(self, lidar_features: Tensor, pyramid: Pyramid, sight: Sight, visible_cells: int) -> Tensor:
        """(B, C, Y, X) features of LiDAR and images.

        Args:
            lidar_features: (B, C, Y, X).
            pyramid: of the images.
            sight: the cells in the views.
            visible_cells: as many as any view sees, or more, see `count_visible`; fewer leave some out.
        """
        shape = lidar_features.shape[-2:]
        projected = self.lidar_projection(lidar_features.flatten(2).transpose(1, 2))  # (B, N, C)
        pyramid = pyramid._replace(tokens=self.image_projection(pyramid.tokens))
        query = self.queries(projected, pyramid, sight, visible_cells)
        seen = self.attend(query, pyramid)
        return self.reduce(scatter(seen, query.cell, projected).unflatten(2, shape))

    def queries(self, projected: Tensor, pyramid: Pyramid, sight: Sight, visible_cells: int) -> CellQueries:
        """The visible cells of each view, with the strongest of what the levels show there added to their feature."""
        cell, valid = cells_in_view(sight.visible, visible_cells)
        index, padding = cell.clamp(max=projected.shape[1] - 1), ~valid
        reference = pick(sight.reference.flatten(0, 1), index).masked_fill(padding[..., None], 0)
        depth = sight.depth.flatten(0, 1).gather(1, index).masked_fill(padding, 1)
        feature = pick(projected, index.reshape(len(projected), -1)).reshape(*index.shape, -1)
        feature = feature.masked_fill(padding[..., None], 0)
        shown = [sample(level, reference) for level in pyramid.maps()]
        position = torch.cat((inverse_sigmoid(reference), depth.log()[..., None]), -1)
        return CellQueries(cell, feature + torch.stack(shown).amax(0), position, reference, valid)

    def attend(self, query: CellQueries, pyramid: Pyramid) -> Tensor:
        """(M, Q, C) features of the visible cells after the decoder layer."""
        one_view = pyramid._replace(
            tokens=pyramid.tokens.flatten(0, 1)[:, None], valid=pyramid.valid.flatten(0, 1)[:, None]
        )
        view = torch.zeros_like(query.cell)
        mask = query.valid[:, None]
        return self.layer(query.feature, query.position, query.reference, mask, one_view, view)


def cells_in_view(visible: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Cells where visible (B, K, N), in order: (B K, number) padded with N, and (B K, number) bool: not padding.

    Of a view that sees more than `number`, some are left out.
    """
    flat = visible.flatten(0, 1)
    cell = torch.arange(flat.shape[1], device=flat.device).expand_as(flat)
    place = torch.where(flat, flat.cumsum(-1), 0).clamp(max=number)  # the first column takes what is not visible
    chosen = torch.full((flat.shape[0], number + 1), flat.shape[1], device=flat.device).scatter(1, place, cell)
    return chosen[:, 1:], torch.arange(number, device=flat.device) < flat.sum(-1, keepdim=True)


def sample(level: Tensor, reference: Tensor) -> Tensor:
    """(M, Q, C) bilinear samples of level (M, C, H, W) at reference (M, Q, 2); the border goes on outside."""
    grid = (2 * reference - 1)[:, :, None].to(full_precision(level).dtype)
    sampled = F.grid_sample(level.to(grid.dtype), grid, padding_mode="border", align_corners=False)
    return sampled[..., 0].transpose(1, 2)


def scatter(seen: Tensor, cell: Tensor, projected: Tensor) -> Tensor:
    """What the cells hold after semantic transfer, (B, C + 1, N).

    The maximum in each channel of seen (B K, Q, C) at cell (B K, Q), and 1 as the last channel; where nothing is seen,
    projected (B, N, C) and 0.
    """
    batch, size, channels = projected.shape
    index = cell.reshape(batch, -1, 1).expand(-1, -1, channels)
    lowest = torch.full_like(projected, -torch.inf)
    lowest = F.pad(lowest, (0, 0, 0, 1), value=-torch.inf)  # one more row takes the padding
    best = lowest.scatter_reduce(1, index, seen.reshape(batch, -1, channels).to(projected.dtype), "amax")[:, :size]
    flag = best[..., :1] > -torch.inf
    return torch.cat((torch.where(flag, best, projected), flag.to(best.dtype)), -1).transpose(1, 2)
