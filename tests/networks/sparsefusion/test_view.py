from __future__ import annotations

import torch
from networks.sparsefusion.rig import VIEWS, ring, small_config

from perception.networks.sparsefusion.decoders import of_view, unproject
from perception.networks.sparsefusion.tensors import ImagePrediction
from perception.networks.sparsefusion.view import box_vector, camera_vector, monocular_box

CONFIG = small_config()
CANVAS = CONFIG.image.canvas_px


def seen_boxes(queries: int = 40) -> tuple[ImagePrediction, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes as their cameras see them; their centers (m), yaw and velocity in the LiDAR's frame."""
    calibration = ring(2, CANVAS)
    view = torch.randint(VIEWS, (2, queries))
    rotation, translation = of_view(calibration.rotation, view), of_view(calibration.translation, view)
    in_camera = torch.rand(2, queries, 3, dtype=torch.float64) * torch.tensor([4.0, 3, 30]) + torch.tensor(
        [-2.0, -1.5, 5]
    )
    center = (rotation.transpose(2, 3) @ (in_camera - translation)[..., None])[..., 0]
    yaw = (torch.rand(2, queries, dtype=torch.float64) * 2 - 1) * torch.pi
    velocity = torch.randn(2, queries, 3, dtype=torch.float64) * torch.tensor([3.0, 3, 0])
    heading = (rotation @ torch.stack((yaw.cos(), yaw.sin(), torch.zeros_like(yaw)), -1)[..., None])[..., 0]
    seen_velocity = (rotation @ velocity[..., None])[..., 0]
    rotation_y = -torch.atan2(heading[..., 2], heading[..., 0])
    pixels = (of_view(calibration.intrinsic, view) @ in_camera[..., None])[..., 0]
    shares = pixels[..., :2] / pixels[..., 2:] / torch.tensor(CANVAS)
    unprojected = unproject(shares, pixels[..., 2:], of_view(calibration.intrinsic, view), CANVAS)
    torch.testing.assert_close(unprojected, in_camera)
    prediction = ImagePrediction(
        shares.transpose(1, 2),
        pixels[..., 2][:, None],
        torch.zeros(2, 3, queries),
        torch.stack((rotation_y.sin(), rotation_y.cos()), 1),
        seen_velocity[..., ::2].transpose(1, 2),
        torch.zeros(2, 10, queries),
        unprojected.transpose(1, 2),
        view,
    )
    return prediction, center, yaw, velocity


def test_image_boxes_are_where_they_were_seen():
    prediction, center, yaw, velocity = seen_boxes()
    box = monocular_box(prediction, ring(2, CANVAS), CONFIG)
    low = torch.tensor(CONFIG.lidar.range_m[:2], dtype=torch.float64)
    torch.testing.assert_close(box.center * CONFIG.lidar.cell_m + low, center[..., :2])
    torch.testing.assert_close(box.height, center[..., 2:])
    torch.testing.assert_close(box.vel, velocity[..., :2])
    theta = -yaw - torch.pi / 2
    torch.testing.assert_close(box.rot, torch.stack((theta.sin(), theta.cos()), -1))


def test_box_vector_has_the_released_constants():
    """Of the released grid: (x + 12) / 204 and (z + 10) / 20."""
    config = CONFIG.model_copy(update={"lidar": type(CONFIG.lidar)()})
    prediction, *_ = seen_boxes()
    box = monocular_box(prediction, ring(2, CANVAS), config)
    logit_center = torch.randn(2, 40, 2, dtype=torch.float64)
    vector = box_vector(box, logit_center, config)
    shares = torch.stack(
        [(box.center[..., 0] + 12) / 204, (box.center[..., 1] + 12) / 204, (box.height[..., 0] + 10) / 20], -1
    )
    inside = (shares > 0.01) & (shares < 0.99)
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(vector[..., :3][inside], shares[inside].logit())
    torch.testing.assert_close(vector[..., 5:7], box.vel)
    torch.testing.assert_close(vector[..., 7:], logit_center)


def test_camera_vector():
    calibration, view = ring(1, CANVAS), torch.tensor([[2, 0]])
    vector = camera_vector(calibration, view)[0, 0]
    torch.testing.assert_close(vector[:9].view(3, 3), calibration.rotation[0, 2])
    focal = 0.8 * CANVAS[0]
    expected = torch.tensor([0, 0, -0.5, focal, focal, CANVAS[0] / 2, CANVAS[1] / 2], dtype=torch.float64)
    torch.testing.assert_close(vector[9:], expected)
