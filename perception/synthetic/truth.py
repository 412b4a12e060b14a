"""What is true of a sample: boxes, the labels of points and pixels, occupancy and what of it could be seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from perception.datasets import omnihd_occupancy
from perception.datasets.nuscenes_layout import DETECTION_CLASSES
from perception.datasets.semantickitti_labels import POINT_CLASSES
from perception.synthetic.labels import (
    NUSCENES_CLASSES,
    NUSCENES_LABEL,
    OMNIHD_LABEL,
    SEMANTICKITTI_LABEL,
    Label,
)
from perception.synthetic.primitives import HEXAHEDRON, QUADRIC, Solids
from perception.synthetic.raycast import runs
from perception.synthetic.roads import Ground
from perception.synthetic.sensors import LidarScan, LidarSpec, Simulator
from perception.synthetic.shading import Picture, ground_label
from perception.types import (
    IGNORE_LABEL,
    Array,
    Boxes3D,
    CameraImage,
    OccupancyGrid3D,
    PointCloud,
    Pose,
    Segmentation,
    VoxelGrid,
)

TAXONOMIES: dict[str, tuple[tuple[str, ...], Array, int]] = {
    "nuscenes": (NUSCENES_CLASSES, NUSCENES_LABEL, 17),
    "semantickitti": (POINT_CLASSES, SEMANTICKITTI_LABEL, 0),
    "omnihd": (omnihd_occupancy.CLASSES, OMNIHD_LABEL, 0),
}
"""Name -> classes, Label -> class, and the class of free voxels."""

ANNOTATED_M = 75.0
_VEHICLES = {Label.CAR, Label.TRUCK, Label.CONSTRUCTION_VEHICLE, Label.BUS, Label.TRAILER}


def segmentation(label: Array, agent: Array, taxonomy: str) -> Segmentation:
    """Labels of the city as a benchmark's; IGNORE_LABEL (the sky) stays. Free is no class of points."""
    classes, table, _ = TAXONOMIES[taxonomy]
    lookup = np.full(256, IGNORE_LABEL, np.uint8)
    lookup[: len(table)] = table
    return Segmentation(
        lookup[label], tuple(c for c in classes if c != "free" or taxonomy == "omnihd"), agent.astype(np.uint16)
    )


def boxes(
    sim: Simulator, stamp_ns: int, key_stamps_ns: Sequence[int], clouds: Sequence[PointCloud],
    radars: Sequence[PointCloud], share: Array | None,
) -> Boxes3D:  # fmt: skip
    """All agents within ANNOTATED_M of ego, in ego at the stamp.

    Velocities are differences between neighbouring key frames, as nuScenes' are; a box that only one key frame shows
    has none (NaN). `share` (A + 1,) is the visible part of every agent, None where no camera looked.
    """
    scene, k = sim.scene, key_stamps_ns.index(stamp_ns)
    around = {j: _place(sim, key_stamps_ns[j]) for j in (k - 1, k, k + 1) if 0 <= j < len(key_stamps_ns)}
    center, yaw, near = around[k]
    index = np.flatnonzero(near)
    velocity = np.full((len(index), 2), np.nan)
    for row, a in enumerate(index):
        seen = [j for j, (_, _, shown) in around.items() if shown[a]]
        if len(seen) > 1:
            first, last = min(seen), max(seen)
            span = (key_stamps_ns[last] - key_stamps_ns[first]) * 1e-9
            velocity[row] = (around[last][0][a] - around[first][0][a])[:2] / span
    ego = sim.pose(stamp_ns)
    back = ego.inverse()
    heading = np.stack([np.cos(yaw[index]), np.sin(yaw[index]), np.zeros(len(index))], -1) @ back.rotation.T
    turned = np.concatenate([velocity, np.zeros((len(index), 1))], 1) @ back.rotation.T
    agents = [scene.agents[a] for a in index]
    result = Boxes3D(
        back.apply(center[index]),
        np.array([a.size for a in agents]).reshape(-1, 3),
        np.arctan2(heading[:, 1], heading[:, 0]),
        turned[:, :2],
        np.ones(len(index)),
        np.array([int(a.label) for a in agents], np.int64),
        DETECTION_CLASSES,
        stamp_ns,
        attribute=np.array(
            [_attribute(a.label, a.ridden, v) for a, v in zip(agents, np.hypot(*velocity.T), strict=True)], np.str_
        ),
        track_id=np.array([f"{sim.seed:04d}-{a:04d}" for a in index], np.str_),
        visibility=_levels(share, index),
    )

    reach = np.linalg.norm(result.size, axis=1) / 2 + 0.01

    def count(group: Sequence[PointCloud]) -> Array:
        total = np.zeros(len(result), np.int64)
        for cloud in group:
            xyz = cloud.xyz_ego()
            near = cKDTree(xyz, balanced_tree=False).query_ball_point(result.center, reach)
            box = np.repeat(np.arange(len(result)), [len(i) for i in near])
            offset = xyz[np.array([i for points in near for i in points], np.int64)] - result.center[box]
            c, s = np.cos(result.yaw)[box], np.sin(result.yaw)[box]
            local = [c * offset[:, 0] + s * offset[:, 1], c * offset[:, 1] - s * offset[:, 0], offset[:, 2]]
            inside = (np.abs(np.stack(local, -1)) <= result.size[box] / 2).all(1)
            total += np.bincount(box[inside], minlength=len(result))
        return total

    return Boxes3D(
        result.center, result.size, result.yaw, result.velocity, result.score, result.label, result.classes, stamp_ns,
        result.attribute, result.track_id, count(clouds), count(radars), result.visibility,
    )  # fmt: skip


def _place(sim: Simulator, stamp_ns: int) -> tuple[Array, Array, Array]:
    """Of all agents at a stamp: box centres (A, 3) in the map, yaws (A,), and which are annotated (never the ego)."""
    scene = sim.scene
    rotation, translation = (x[0] for x in scene.agent_poses([sim.clock.seconds(stamp_ns)])[:2])
    height = np.array([a.size[2] for a in scene.agents])
    center = translation[1:] + np.stack([0 * height, 0 * height, height / 2 - 0.01], -1)
    yaw = np.arctan2(rotation[1:, 1, 0], rotation[1:, 0, 0])
    near = np.linalg.norm(center[:, :2] - sim.pose(stamp_ns).translation[:2], axis=1) < ANNOTATED_M
    near[0] = False
    return center, yaw, near


def _attribute(label: Label, ridden: bool, speed: float) -> str:
    moving = bool(speed > 0.3)
    if label in _VEHICLES:
        return "vehicle.moving" if moving else ("vehicle.stopped" if ridden else "vehicle.parked")
    if label in (Label.BICYCLE, Label.MOTORCYCLE):
        return "cycle.with_rider" if ridden else "cycle.without_rider"
    if label == Label.PEDESTRIAN:
        return "pedestrian.moving" if moving else "pedestrian.standing"
    return ""


def _levels(share: Array | None, index: Array) -> Array:
    """nuScenes' visibility levels: 1 below 40 %, 2 below 60 %, 3 below 80 %, 4; 0 unknown."""
    if share is None:
        return np.zeros(len(index), np.int64)
    return (1 + np.searchsorted([0.4, 0.6, 0.8], share[index + 1], side="right")).astype(np.int64)


def visible_share(
    solids: Solids, pictures: Sequence[tuple[CameraImage, Picture]], map_from_ego: Pose, count: int
) -> Array:
    """(count,) part of each agent that the cameras together see: nine points on each of its solids, by instance."""
    device = solids.half.device
    chosen = (solids.agent > 0).nonzero()[:, 0]
    offset = torch.tensor(
        [[x, y, z] for x in (-0.6, 0.0, 0.6) for y in (-0.6, 0.6) for z in (-0.5, 0.5)], device=device
    )
    local = solids.half[chosen, None] * offset
    point = (solids.rotation[0, chosen][:, None] * local[:, :, None]).sum(-1) + solids.center[0, chosen, None]
    point = point.reshape(-1, 3).T.double()
    agent = solids.agent[chosen].repeat_interleave(len(offset))
    seen = torch.zeros_like(agent, dtype=torch.bool)
    for image, picture in pictures:
        index, pixel, _ = _project(point, (map_from_ego @ image.ego_from_camera).inverse(), image)
        seen[index] |= picture.agent.flatten()[pixel] == agent[index]
    total = torch.bincount(agent, minlength=count)
    return (torch.bincount(agent[seen], minlength=count) / total.clamp_min(1)).cpu().numpy()


def _project(point: Tensor, camera_from_point: Pose, image: CameraImage) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the points (3, N) float64 lie inside the image: their indices (M,), nearest pixels (row by row), depths.

    The image's frustum is tried first, as few points are in it.
    """
    height, width = image.rgb.shape[:2]
    matrix = image.intrinsic @ camera_from_point.rotation
    (ux, uy, uz), (vx, vy, vz), (x, y, z) = (row.tolist() for row in matrix)
    a, b, c = (image.intrinsic @ camera_from_point.translation).tolist()
    depth = x * point[0] + y * point[1] + z * point[2] + c
    ahead = (depth > 0.1).nonzero()[:, 0]
    point, depth = point.index_select(1, ahead), depth.index_select(0, ahead)
    u = ((ux * point[0] + uy * point[1] + uz * point[2] + a) / depth).round()
    v = ((vx * point[0] + vy * point[1] + vz * point[2] + b) / depth).round()
    inside = ((u >= 0) & (v >= 0) & (u < width) & (v < height)).nonzero()[:, 0]
    return ahead[inside], v[inside].long() * width + u[inside].long(), depth[inside]


# What wins a voxel that several things share: small and thin before large, objects before ground.
_RANK = np.full(25, 40, np.int64)
_RANK[[Label.PEDESTRIAN, Label.TRAFFIC_CONE, Label.BICYCLE, Label.BICYCLIST, Label.MOTORCYCLE, Label.MOTORCYCLIST]] = 10
_RANK[[Label.CAR, Label.TRUCK, Label.BUS, Label.TRAILER, Label.CONSTRUCTION_VEHICLE, Label.BARRIER]] = 12
_RANK[[Label.POLE, Label.SIGN, Label.TRUNK]] = 20
_RANK[[Label.FOLIAGE]] = 45


def occupancy(ground: Ground, solids: Solids, map_from_ego: Pose, grid: VoxelGrid, chunk: int) -> Tensor:
    """(X, Y, Z) uint8 Label of every voxel, 255 free: solids that reach into a voxel, else the ground within it.

    Solids are tested by the separating axes that are their own, a little shrunk so that a voxel is not theirs for a
    brush; the insides of buildings stay free, as no sensor ever fills them.
    """
    device = solids.half.device
    map_from_grid = map_from_ego @ grid.ego_from_grid
    turn = torch.tensor(map_from_grid.rotation, dtype=torch.float32, device=device)
    shift = torch.tensor(map_from_grid.translation, dtype=torch.float32, device=device)
    size, low = (torch.tensor(x, dtype=torch.float32, device=device) for x in (grid.voxel_size, grid.min_corner))
    shape = torch.tensor(grid.shape, device=device)
    rank = torch.tensor(_RANK, device=device)
    best = torch.full((int(np.prod(grid.shape)),), 1 << 20, dtype=torch.int64, device=device)

    rotation = turn.T @ solids.rotation[0]  # (P, 3, 3) grid_from_part
    center = (solids.center[0] - shift) @ turn
    reach = (rotation.abs() * solids.half[:, None]).sum(-1) * 1.15
    first = ((center - reach - low) / size).floor().long().clamp_min(0)
    last = torch.minimum(((center + reach - low) / size).floor().long(), shape - 1)
    span = last - first + 1
    table = torch.cat([rotation[:, 2] * size[2], _limits(solids, rotation, size)], 1).T.contiguous()
    key = (rank[solids.label.long()] << 8) | solids.label.long()
    for kind in (HEXAHEDRON, QUADRIC):
        part = ((span > 0).all(1) & (solids.label != Label.EGO) & (solids.kind == kind)).nonzero()[:, 0]
        for item, place in runs(span[part, 0] * span[part, 1], 1 << 62):  # the columns of voxels of each part
            item = part[item]
            x, y, z = first[item, 0] + place // span[item, 1], first[item, 1] + place % span[item, 1], first[item, 2]
            offset = low + (torch.stack([x, y, z], 1) + 0.5) * size - center[item]
            lowest = (offset[:, :, None] * rotation[item]).sum(1).T.contiguous()  # (3, S) in the part's frame
            voxel = (x * shape[1] + y) * shape[2] + z
            for column, up in runs(span[item, 2], chunk):
                p = item.index_select(0, column)
                row = table.index_select(1, p)
                local = lowest.index_select(1, column) + up * row[:3]
                keep = (_in_hexahedron if kind == HEXAHEDRON else _in_quadric)(local, row[3:]).nonzero()[:, 0]
                found = voxel[column[keep]] + up[keep]
                best.scatter_reduce_(0, found, key[p[keep]], "amin")
    _ground_voxels(best, ground, turn, shift, low, size, shape)
    return torch.where(best < 1 << 20, best & 0xFF, IGNORE_LABEL).to(torch.uint8).view(*grid.shape)


def _limits(solids: Solids, rotation: Tensor, size: Tensor) -> Tensor:
    """(P, 13) of each part: half extents grown by half a voxel's extent along its axes; within which it is hollow (of
    buildings, else negative); half its height; form; and by how much each of three sides leans in per metre up.
    """
    half, form = solids.half, solids.form
    slack = (rotation.abs() * size[:, None]).sum(1) / 2
    grown = half + slack * slack.new_tensor([1.0, 1.0, 0.8])
    building = (solids.label == Label.BUILDING)[:, None]
    hollow = torch.where(building, half - 0.9 * slack - 0.3 * float(size.max()), -1.0)
    lean = form / half[:, 2:] / form.new_tensor([2.0, 2.0, 4.0])
    return torch.cat([grown, hollow, half[:, 2:], form, lean], 1)


def _in_hexahedron(local: Tensor, limits: Tensor) -> Tensor:
    """Does each part reach into the voxel whose centre is `local` (3, N) of it; `limits`: columns of `_limits`."""
    (x, y, z), grown, height, form = local, limits[:3], limits[6], limits[7:10]
    front, back, side = limits[10:13]
    level = torch.minimum(torch.maximum(z, -height), height)
    met = (z.abs() <= grown[2]) & (x + front * level <= grown[0] - form[0] / 2)
    met &= (back * level - x <= grown[0] - form[1] / 2) & (y.abs() + side * level <= grown[1] - form[2] / 4)
    return met & ~(local.abs() < limits[3:6]).all(0)


def _in_quadric(local: Tensor, limits: Tensor) -> Tensor:
    (x, y, z), (e, a, b) = local / limits[:3], limits[7:10]
    met = (z.abs() <= 1) & (x * x + y * y + e * z * z <= (a + b * z) ** 2)
    return met & ~(local.abs() < limits[3:6]).all(0)


def _ground_voxels(
    best: Tensor, ground: Ground, turn: Tensor, shift: Tensor, low: Tensor, size: Tensor, shape: Tensor
) -> None:
    """Lower `best` to the ground's label where the ground passes; a column's middle decides, its rim fills gaps."""
    device = best.device
    column = torch.cartesian_prod(*(torch.arange(int(n), device=device) for n in shape[:2]))
    probes = torch.tensor([[0.5, 0.5], [0.1, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.9]], device=device)
    x, y = (low[:2] + (column + probes[:, None]) * size[:2]).reshape(-1, 2).T  # (5 * columns,)
    z = torch.zeros_like(x)
    for _ in range(3):
        place = turn @ torch.stack([x, y, z]) + shift[:, None]
        z = z + ground.height(place[:2].T) - place[2]
    key = (60 + torch.arange(len(probes), device=device).repeat_interleave(len(column))) << 8
    place = turn @ torch.stack([x, y, z]) + shift[:, None]
    key = key | ground_label(ground, ground.sample(place[:2].T)).long()
    level = ((z - low[2]) / size[2]).floor().long()
    flat = ((column[:, 0] * shape[1] + column[:, 1]) * shape[2]).repeat(len(probes)) + level
    inside = ((level >= 0) & (level < shape[2])).nonzero()[:, 0]
    best.scatter_reduce_(0, flat[inside], key[inside], "amin")


def observed_by_lidar(grid: VoxelGrid, spec: LidarSpec, scan: LidarScan, device: torch.device) -> Tensor:
    """(X, Y, Z) bool: voxels between the LiDAR and what its beams met, by comparison with its range image."""
    (x, y, z), margin = _voxels(grid, scan.cloud.ego_from_sensor, device)
    distance = (x * x + y * y + z * z).sqrt()
    elevation = torch.asin((z / distance.clamp_min(1e-3)).clamp(-1, 1))
    beams = torch.tensor(np.radians(spec.elevation_deg), device=device, dtype=x.dtype)
    row = torch.bucketize(elevation, (beams[1:] + beams[:-1]) / 2)  # the nearest beam
    gap = float((beams[1:] - beams[:-1]).max())
    turned = np.radians(spec.first_azimuth_deg) - torch.atan2(y, x)
    column = torch.remainder(turned / (2 * np.pi) * spec.columns, spec.columns).long() % spec.columns
    met = scan.range_image.flatten().index_select(0, row * spec.columns + column)
    near_beam = (elevation - beams.index_select(0, row)).abs() < (margin / distance).clamp_min(0.55 * gap)
    seen = near_beam & (distance < met + margin) & (distance < spec.reach_m)
    index, inside = grid.index(grid.ego_from_grid.inverse().apply(scan.cloud.xyz_ego().astype(np.float64)))
    hit = np.ravel_multi_index(tuple(index[inside].T), grid.shape)
    seen[torch.from_numpy(hit).to(device)] = True  # at a grazing beam the next one may end well before the voxel
    return seen.view(*grid.shape)


def observed_by_cameras(
    grid: VoxelGrid, pictures: Sequence[tuple[CameraImage, Picture]], device: torch.device
) -> Tensor:
    """(X, Y, Z) bool: voxels in an image and not behind what it shows."""
    seen = torch.zeros(int(np.prod(grid.shape)), dtype=torch.bool, device=device)
    point, margin = _voxels(grid, Pose.identity(), device)
    for image, picture in pictures:
        index, pixel, depth = _project(point, image.ego_from_camera.inverse(), image)
        seen[index] |= depth < picture.distance.flatten().index_select(0, pixel) + margin
    return seen.view(*grid.shape)


def _voxels(grid: VoxelGrid, ego_from_sensor: Pose, device: torch.device) -> tuple[Tensor, float]:
    """Centres (3, X * Y * Z) float64 in a sensor's frame, and half a voxel's diagonal."""
    pose = ego_from_sensor.inverse() @ grid.ego_from_grid
    steps = torch.tensor(pose.rotation * grid.voxel_size, device=device)
    first = torch.tensor(pose.apply(grid.center(np.zeros((1, 3))))[0], device=device)
    x, y, z = (
        torch.arange(n, device=device, dtype=torch.float64) * steps[:, k, None] for k, n in enumerate(grid.shape)
    )
    center = (first[:, None] + x)[:, :, None, None] + (y[:, :, None] + z[:, None])[:, None]
    return center.flatten(1), 0.5 * float(np.linalg.norm(grid.voxel_size))


def occupancy_truth(
    label: Tensor, grid: VoxelGrid, taxonomy: str, stamp_ns: int, observed: Mapping[str, Tensor]
) -> OccupancyGrid3D:
    """A benchmark's occupancy from the city's labels (X, Y, Z)."""
    classes, table, free = TAXONOMIES[taxonomy]
    lookup = torch.full((256,), free, dtype=torch.uint8, device=label.device)
    lookup[: len(table)] = torch.tensor(table, device=label.device)
    mapped = lookup[label.long()]
    if taxonomy == "nuscenes":  # "noise" is no class of voxels
        mapped = torch.where(mapped == 0, free, mapped)
    seen = {name: mask.cpu().numpy() for name, mask in observed.items()}
    return OccupancyGrid3D(grid, mapped.cpu().numpy(), classes, free, stamp_ns, None, seen)
