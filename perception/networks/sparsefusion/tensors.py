"""The tensors that SparseFusion's parts hand to each other.

B batch, K cameras (in the order of `SparseFusionConfig.cameras`), V voxels, Q queries, C classes, T tokens of one view
(all levels of the pyramid, first level first, rows before columns), Y, X cells of the BEV map.

The network's frame is the LiDAR's, of nuScenes in the released models: x right, y forward, z up. A box there has its
size in the order width, length, height and the angle theta = -yaw - pi/2, the convention of mmdetection3d before 1.0.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Calibration(NamedTuple):
    """Where the cameras look.

    Attributes:
        rotation: (B, K, 3, 3) camera_from_lidar.
        translation: (B, K, 3) camera_from_lidar, m.
        intrinsic: (B, K, 3, 3) of the image on the network's canvas, px.
        valid_px: (B, K, 2) width and height that the image fills of the canvas; attention does not look beyond.
        visible_px: (B, K, 2) width and height within which a projected point counts as seen: the whole canvas when
            predicting, `valid_px` when training (as the released models do).
        present: (B, K) bool: False for a missing or black camera; nothing is taken from it.
    """

    rotation: Tensor
    translation: Tensor
    intrinsic: Tensor
    valid_px: Tensor
    visible_px: Tensor
    present: Tensor


class Inputs(NamedTuple):
    """What `encode` makes of samples.

    Attributes:
        voxels: (V, 5) means of the points: x, y, z (m), intensity (0 to 255), time lag (s).
        coordinates: (V, 4) int32 batch, z, y, x.
        height_min, height_max: (B, Y, X) m, of the points kept in voxels; +100 and -200 where there are none.
        images: (B, K, 3, H, W) normalised RGB on the canvas, zero beyond the image.
        sparse_depth: (B, K, 2, H/4, W/4) normalised depth of the key sweep's nearest point, and 1 where there is one.
        calibration: of the cameras.
        batch_size: B.

    Without a LiDAR (modality `camera`) the first four are None, without cameras (modality `lidar`) the others.
    """

    voxels: Tensor | None
    coordinates: Tensor | None
    height_min: Tensor | None
    height_max: Tensor | None
    images: Tensor | None
    sparse_depth: Tensor | None
    calibration: Calibration | None
    batch_size: int


class Candidates(NamedTuple):
    """The heatmap's peaks that become queries, best first.

    Attributes:
        label: (B, Q) class.
        location: (B, Q) BEV cell (y * X + x), or token of the view.
        view: (B, Q) camera; None for LiDAR candidates.
        score: (B, C, Q) the suppressed heatmap of every class at the candidate's place.
    """

    label: Tensor
    location: Tensor
    view: Tensor | None
    score: Tensor


class BoxPrediction(NamedTuple):
    """Boxes of a layer in the network's frame.

    Attributes:
        center: (B, 2, Q) x, y in BEV cells from the map's corner.
        height: (B, 1, Q) z of the geometric centre, m.
        dim: (B, 3, Q) log of width, length, height (m).
        rot: (B, 2, Q) sin, cos of theta.
        vel: (B, 2, Q) m/s.
        logit: (B, C, Q) class logits.
    """

    center: Tensor
    height: Tensor
    dim: Tensor
    rot: Tensor
    vel: Tensor
    logit: Tensor


class ImagePrediction(NamedTuple):
    """Boxes of the camera decoder, each in its camera's frame (x right, y down, z forward).

    Attributes:
        center: (B, 2, Q) projected geometric centre as a share of the canvas.
        depth: (B, 1, Q) z of the geometric centre, m.
        dim: (B, 3, Q) log of length, height, width (m).
        rot: (B, 2, Q) sin, cos of rotation_y.
        vel: (B, 2, Q) vx, vz, m/s.
        logit: (B, C, Q) class logits.
        center_camera: (B, 3, Q) the geometric centre, m.
        view: (B, Q) camera of each query.
    """

    center: Tensor
    depth: Tensor
    dim: Tensor
    rot: Tensor
    vel: Tensor
    logit: Tensor
    center_camera: Tensor
    view: Tensor


class Outputs(NamedTuple):
    """What `forward` predicts; None for what a modality lacks.

    Attributes:
        lidar_heatmap: (B, C, Y, X) logits.
        image_heatmap: (B, C, K, T) logits.
        lidar_candidates, image_candidates: the peaks of these.
        point: boxes of the LiDAR candidates after their decoder.
        image: boxes of the camera candidates in the image.
        view: boxes of the camera candidates brought into LiDAR space.
        fusion: boxes of both (LiDAR first, then camera) after fusion; these become the detections.
    """

    lidar_heatmap: Tensor | None
    image_heatmap: Tensor | None
    lidar_candidates: Candidates | None
    image_candidates: Candidates | None
    point: BoxPrediction | None
    image: ImagePrediction | None
    view: BoxPrediction | None
    fusion: BoxPrediction | None
