"""Samples, truth and predictions as pictures: drawing primitives in ego first, then PNG, headless.

The primitives are what RViz markers are made of, too, so that a box has one colour everywhere. Imports neither torch
nor a window toolkit.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from perception.errors import DataError
from perception.geometry import BOX_EDGES, box_corners, project, project_to_image
from perception.types import Array, Boxes3D, CameraImage, OccupancyGrid3D, PointCloud, Pose, Prediction, Sample, Truth

PALETTE: dict[str, tuple[int, int, int]] = {
    "car": (255, 158, 0),
    "truck": (255, 99, 71),
    "large_vehicle": (255, 99, 71),
    "construction_vehicle": (233, 150, 70),
    "bus": (255, 69, 0),
    "trailer": (255, 140, 0),
    "barrier": (112, 128, 144),
    "traffic_fence": (112, 128, 144),
    "motorcycle": (255, 61, 99),
    "bicycle": (220, 20, 60),
    "cycle": (220, 20, 60),
    "rider": (255, 61, 99),
    "pedestrian": (70, 130, 240),
    "person": (70, 130, 240),
    "traffic_cone": (47, 200, 160),
    "road_obstacle": (47, 200, 160),
    "driveable_surface": (96, 96, 112),
    "road": (96, 96, 112),
    "other_flat": (139, 121, 94),
    "sidewalk": (150, 110, 140),
    "terrain": (140, 180, 90),
    "manmade": (190, 170, 150),
    "building": (190, 170, 150),
    "vegetation": (40, 140, 60),
    "pole": (230, 220, 120),
    "traffic_sign": (240, 200, 40),
}
"""Class name -> RGB; the vehicles' colours are nuScenes' own. A name not listed gets a colour from its hash."""

_RING = ("front_left", "front", "front_right", "back_left", "back", "back_right")


def color_of(name: str) -> tuple[int, int, int]:
    """The RGB colour of a class, the same in every picture, marker and run."""
    if name in PALETTE:
        return PALETTE[name]
    r, g, b = colorsys.hsv_to_rgb((zlib.crc32(name.encode()) % 360) / 360, 0.6, 0.85)
    return int(255 * r), int(255 * g), int(255 * b)


def label_colors(classes: Sequence[str], label: Array) -> Array:
    """(..., 3) uint8 colours of labels; ignored ones are dark grey."""
    table = np.full((256, 3), 60, np.uint8)
    table[: len(classes)] = [color_of(name) for name in classes]
    return table[label]


def ramp(values: Array, low: float, high: float) -> Array:
    """(N,) values -> (N, 3) uint8 RGB on the turbo colour map between `low` and `high`."""
    scaled = np.clip((np.asarray(values, np.float64) - low) / max(high - low, 1e-9) * 255, 0, 255).astype(np.uint8)
    table = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO)[:, 0, ::-1]
    return table[scaled]


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """`xyz` (N, 3) in ego with `color` (N, 3) uint8."""

    xyz: Array
    color: Array


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """`ends` (S, 2, 3) in ego with `color` (S, 3) uint8."""

    ends: Array
    color: Array


@dataclass(frozen=True, slots=True, eq=False)
class Voxels:
    """Cubes: `center` (V, 3) and `size` (3,) in the grid's frame, `color` (V, 3) uint8, `ego_from_grid`."""

    center: Array
    size: tuple[float, float, float]
    color: Array
    ego_from_grid: Pose


def draw_points(cloud: PointCloud) -> Points:
    """A cloud coloured by height in ego: dark blue at -1 m, red at 4 m."""
    xyz = cloud.xyz_ego()
    return Points(xyz, ramp(xyz[:, 2], -1.0, 4.0))


def draw_boxes(boxes: Boxes3D) -> Segments:
    """Twelve edges a box and a heading line from its centre past its front face."""
    corners = box_corners(boxes)
    edges = corners[:, np.array(BOX_EDGES)]  # (M, 12, 2, 3)
    front = corners[:, [0, 3, 4, 7]].mean(1)
    heading = np.stack([front, front + 0.35 * (front - boxes.center)], 1)[:, None]
    ends = np.concatenate([edges, heading], 1)  # (M, 13, 2, 3)
    color = np.repeat(label_colors(boxes.classes, boxes.label)[:, None], 13, 1)
    return Segments(ends.reshape(-1, 2, 3), color.reshape(-1, 3))


def draw_velocities(boxes: Boxes3D) -> Segments:
    """One line a moving box: where its centre will be in a second."""
    moving = np.linalg.norm(np.nan_to_num(boxes.velocity), axis=1) > 0.3
    boxes = boxes.select(moving)
    ahead = boxes.center + np.concatenate([boxes.velocity, np.zeros((len(boxes), 1))], 1)
    return Segments(np.stack([boxes.center, ahead], 1), np.full((len(boxes), 3), 255, np.uint8))


def draw_occupancy(occupancy: OccupancyGrid3D) -> Voxels:
    """The occupied voxels."""
    index = np.argwhere(occupancy.occupied)
    color = label_colors(occupancy.classes, occupancy.label[tuple(index.T)])
    return Voxels(occupancy.grid.center(index), occupancy.grid.voxel_size, color, occupancy.grid.ego_from_grid)


def render_bev(
    points: Sequence[Points], segments: Sequence[Segments], range_m: float = 55.0, size_px: int = 1100
) -> Array:
    """(size_px, size_px, 3) uint8 RGB seen from above: ego in the middle, x up, y to the left, rings every 10 m."""
    image = np.full((size_px, size_px, 3), 18, np.uint8)
    scale = size_px / (2 * range_m)

    def pixel(xyz: Array) -> Array:
        return np.stack([size_px / 2 - xyz[..., 1] * scale, size_px / 2 - xyz[..., 0] * scale], -1)

    center = (size_px // 2, size_px // 2)
    for radius in range(10, int(range_m * 1.5), 10):
        cv2.circle(image, center, round(radius * scale), (44, 44, 44), 1, cv2.LINE_AA)
        anchor = (center[0] + 3, center[1] - round(radius * scale) - 3)
        cv2.putText(image, f"{radius} m", anchor, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (110, 110, 110), 1, cv2.LINE_AA)
    for cloud in points:
        uv = np.floor(pixel(cloud.xyz)).astype(np.int64)
        order = np.argsort(cloud.xyz[:, 2], kind="stable")  # the highest point of a pixel is drawn last
        uv, color = uv[order], cloud.color[order]
        inside = ((uv >= 1) & (uv < size_px)).all(1)
        for du, dv in ((1, 1), (1, 0), (0, 1), (0, 0)):  # two pixels a point
            image[uv[inside, 1] - dv, uv[inside, 0] - du] = color[inside]
    for lines in segments:
        for (a, b), color in zip(pixel(lines.ends), lines.color, strict=True):
            _line(image, a, b, color, 2)
    cv2.arrowedLine(
        image, center, (center[0], center[1] - round(4 * scale)), (255, 255, 255), 2, cv2.LINE_AA, tipLength=0.3
    )
    return image


def render_camera(image: CameraImage, points: Sequence[Points] = (), segments: Sequence[Segments] = ()) -> Array:
    """(H, W, 3) uint8: the image with points (coloured by depth) and segments drawn where they project."""
    canvas = image.rgb.copy()
    thick = max(1, round(canvas.shape[1] / 600))
    for cloud in points:
        pixel, depth, visible = project_to_image(cloud.xyz, image)
        color = ramp(np.log(depth[visible]), np.log(2.0), np.log(60.0))
        uv = np.rint(pixel[visible]).astype(np.int64)
        for du in range(thick):
            for dv in range(thick):
                canvas[
                    np.minimum(uv[:, 1] + dv, canvas.shape[0] - 1), np.minimum(uv[:, 0] + du, canvas.shape[1] - 1)
                ] = color
    camera_from_ego = image.ego_from_camera.inverse()
    for lines in segments:
        ends, ahead = _clip_near(camera_from_ego.apply(lines.ends.astype(np.float64)), near_m=0.1)
        pixel, _ = project(ends, image.intrinsic)  # (S, 2, 2)
        for (a, b), color in zip(pixel, lines.color[ahead], strict=True):
            _line(canvas, a, b, color, thick + 1)
    return canvas


def render_cameras(
    sample: Sample, points: Sequence[Points], segments: Sequence[Segments], width_px: int = 800
) -> Array:
    """One mosaic of all cameras, three a row, the front row on top; a role that is missing leaves its place dark."""
    roles = [r for r in _RING if r in sample.cameras] + sorted(set(sample.cameras) - set(_RING))
    if not roles:
        raise DataError(f"sample {sample.token!r} has no camera image to draw on", "draw its bird's-eye view instead")
    if len(roles) > 2 and any(r in _RING for r in roles):
        roles = list(_RING) + [r for r in roles if r not in _RING]
    tiles: list[Array | None] = []
    for role in roles:
        if role not in sample.cameras:
            tiles.append(None)
            continue
        picture = render_camera(sample.cameras[role], points, segments)
        height = round(picture.shape[0] * width_px / picture.shape[1])
        picture = cv2.resize(picture, (width_px, height), interpolation=cv2.INTER_AREA)
        cv2.putText(picture, role, (10, 28), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 4, cv2.LINE_AA)
        cv2.putText(picture, role, (10, 28), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2, cv2.LINE_AA)
        tiles.append(picture)
    height = max(t.shape[0] for t in tiles if t is not None)
    columns = min(3, len(tiles))
    rows = -(-len(tiles) // columns)
    mosaic = np.full((rows * height, columns * width_px, 3), 18, np.uint8)
    for i, tile in enumerate(tiles):
        if tile is not None:
            y, x = i // columns * height, i % columns * width_px
            mosaic[y : y + tile.shape[0], x : x + width_px] = tile
    return mosaic


def render_occupancy(
    voxels: Voxels, size_px: tuple[int, int] = (1400, 900), behind_m: float = 38.0, above_m: float = 32.0
) -> Array:
    """(H, W, 3) uint8 perspective picture of voxels, seen from behind and above ego, faces shaded by direction.

    Hidden faces (with an occupied neighbour, or turned away) are left out; the rest is painted far to near.
    """
    width, height = size_px
    image = np.full((height, width, 3), 24, np.uint8)
    if not len(voxels.center):
        return image
    size = np.asarray(voxels.size)
    eye = np.array([-behind_m, 0.0, above_m])
    forward = np.array([12.0, 0.0, 0.0]) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    eye_from_ego = np.stack([right, np.cross(forward, right), forward])
    eye_in_grid = voxels.ego_from_grid.inverse().apply(eye[None])[0]
    quads, shades = _visible_faces(voxels.center, size, eye_in_grid)
    corners = (voxels.ego_from_grid.apply(quads) - eye) @ eye_from_ego.T  # (F, 4, 3)
    ahead = corners[..., 2].min(1) > 1.0
    focal = 0.9 * width
    pixel = corners[ahead, :, :2] / corners[ahead, :, 2:] * focal + (width / 2, height / 2)
    on_screen = ((pixel.max(1) > 0) & (pixel.min(1) < (width, height))).all(1)
    pixel = np.rint(pixel[on_screen]).astype(np.int32)
    owner, shade = shades
    color = (voxels.color[owner[ahead][on_screen]] * shade[ahead][on_screen][:, None]).astype(np.uint8)
    depth = np.linalg.norm(corners[ahead][on_screen].mean(1), axis=1)
    for i in np.argsort(-depth):
        cv2.fillConvexPoly(image, pixel[i], color[i].tolist())
    return image


def _visible_faces(center: Array, size: Array, eye: Array) -> tuple[Array, tuple[Array, Array]]:
    """Faces turned to the eye and not covered by a neighbour: corners (F, 4, 3), (voxel (F,), brightness (F,))."""
    index = np.rint((center - center.min(0)) / size).astype(np.int64)
    shape = index.max(0) + 3
    keys = np.ravel_multi_index(tuple((index + 1).T), tuple(shape))
    quads, owners, shades = [], [], []
    for axis in range(3):
        u, v = np.eye(3)[(axis + 1) % 3] * size / 2, np.eye(3)[(axis + 2) % 3] * size / 2
        for sign, brightness in ((-1, (0.72, 0.62, 0.4)[axis]), (1, (0.66, 0.8, 1.0)[axis])):
            out = sign * np.eye(3)[axis] * size / 2
            neighbour = keys + sign * int(np.prod(shape[axis + 1 :]))
            facing = (eye - center - out)[:, axis] * sign > 0
            shown = facing & ~np.isin(neighbour, keys)
            face = center[shown, None] + out + np.stack([-u - v, u - v, u + v, -u + v])
            quads.append(face)
            owners.append(np.flatnonzero(shown))
            shades.append(np.full(len(face), brightness))
    return np.concatenate(quads), (np.concatenate(owners), np.concatenate(shades))


def _clip_near(ends: Array, near_m: float) -> tuple[Array, Array]:
    """Segments (S, 2, 3) in a camera's frame cut at depth `near_m`: what is left (S', 2, 3), and of which (S,) bool."""
    depth = ends[..., 2]
    ahead = depth.max(1) > near_m
    ends, depth = ends[ahead].copy(), depth[ahead]
    for k in (0, 1):
        behind = depth[:, k] < near_m
        a, b = ends[behind, k], ends[behind, 1 - k]
        t = (near_m - a[:, 2]) / (b[:, 2] - a[:, 2])
        ends[behind, k] = a + t[:, None] * (b - a)
    return ends, ahead


def _line(image: Array, a: Array, b: Array, color: Array, thickness: int) -> None:
    """A line that may leave the image by any distance (cv2 takes 16-bit coordinates only)."""
    height, width = image.shape[:2]
    if np.abs(np.concatenate([a, b])).max() > 1e6:
        return
    inside, p, q = cv2.clipLine(
        (-50, -50, width + 100, height + 100), tuple(int(v) for v in np.rint(a)), tuple(int(v) for v in np.rint(b))
    )
    if inside:
        cv2.line(image, p, q, [int(c) for c in color], thickness, cv2.LINE_AA)


def write_png(path: Path, rgb: Array) -> Path:
    """Write an (H, W, 3) uint8 RGB image; DataError where the file cannot be written."""
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded.tobytes())
    except OSError as error:
        raise DataError(
            f"{path}: the picture could not be written: {error.strerror}", "choose another folder"
        ) from error
    return path


def boxes_and_occupancy(shown: Truth | Prediction | None) -> tuple[Boxes3D | None, OccupancyGrid3D | None]:
    """What of a truth or a prediction can be drawn."""
    if isinstance(shown, Truth):
        return shown.boxes, shown.occupancy
    return shown if isinstance(shown, Boxes3D) else None, shown if isinstance(shown, OccupancyGrid3D) else None


def write_pictures(folder: Path, sample: Sample, shown: Truth | Prediction | None) -> list[Path]:
    """bev.png, cameras.png and occupancy.png of a sample with its truth or a prediction; returns their paths."""
    clouds = [draw_points(cloud) for cloud in sample.lidars.values()]
    radars = [Points(c.xyz_ego(), np.full((len(c), 3), 255, np.uint8)) for c in sample.radars.values()]
    boxes, occupancy = boxes_and_occupancy(shown)
    segments = [draw_boxes(boxes), draw_velocities(boxes)] if boxes is not None else []
    written = [write_png(folder / "bev.png", render_bev(clouds + radars, segments))]
    if sample.cameras:
        key = [key_sweep(cloud) for cloud in sample.lidars.values()]
        written.append(
            write_png(folder / "cameras.png", render_cameras(sample, [draw_points(c) for c in key], segments[:1]))
        )
    if occupancy is not None:
        written.append(write_png(folder / "occupancy.png", render_occupancy(draw_occupancy(occupancy))))
    return written


def key_sweep(cloud: PointCloud) -> PointCloud:
    """The newest sweep of an accumulated cloud: older ones smear moving objects over an image."""
    return cloud.select(cloud.field("sweep") == 0) if "sweep" in cloud.fields else cloud
