"""The city's sensors and truths agree with each other, and its sweeps resemble a real one."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from perception.datasets.nuscenes_layout import DETECTION_CLASSES
from perception.geometry import bev_iou, points_in_boxes, project_to_image
from perception.synthetic.city import City, CityConfig
from perception.synthetic.faults import Fault
from perception.synthetic.labels import Label
from perception.synthetic.traffic import rectangles_touch
from perception.types import Boxes3D, Dataset, Sample, VoxelGrid

RANGE_M = dict.fromkeys(("car", "truck", "construction_vehicle", "bus", "trailer"), 50.0) | {
    "pedestrian": 40.0, "motorcycle": 40.0, "bicycle": 40.0, "traffic_cone": 30.0, "barrier": 30.0,
}  # fmt: skip
SMALL = CityConfig(seed=3, scenes=1, key_frames=6, image_size=(320, 180))
FAULTY = SMALL.model_copy(
    update={"cameras": ("front", "back"), "image_size": (160, 90), "radars": (), "occupancy": None}
)


@pytest.fixture(scope="module")
def city() -> City:
    torch.set_num_threads(1)
    return City(SMALL)


@pytest.fixture(scope="module")
def sample(city: City) -> Sample:
    return city[3]


@pytest.fixture(scope="module")
def clean() -> Sample:
    return City(FAULTY)[1]


def equal(a: Sample, b: Sample) -> bool:
    return all(np.array_equal(a.lidars[r].xyz, b.lidars[r].xyz) for r in a.lidars) and all(
        np.array_equal(a.cameras[r].rgb, b.cameras[r].rgb) for r in a.cameras
    )


def test_is_a_dataset_with_the_rig_s_sensors(city, sample):
    assert isinstance(city, Dataset)
    assert len(city) == 6
    assert set(sample.cameras) == {"front", "front_left", "front_right", "back", "back_left", "back_right"}
    assert set(sample.radars) == {"front", "front_left", "front_right", "back_left", "back_right"}
    assert sample.cameras["front"].rgb.shape == (180, 320, 3)
    assert sample.token == city.tokens[3]
    assert len(sample.imu.stamp_ns) == 50
    assert 8 < np.median(sample.imu.linear_acceleration[:, 2]) < 12
    # A camera exposes when the LiDAR looks its way: within the sweep that ends at the sample's stamp.
    lag = {role: (sample.stamp_ns - c.stamp_ns) * 1e-6 for role, c in sample.cameras.items()}
    assert all(0 < x < 50 for x in lag.values())
    assert lag["front_left"] > lag["front"] > lag["front_right"] > lag["back_right"] > lag["back"] > lag["back_left"]


def test_points_in_a_box_are_its_count(city, sample):
    boxes = city.truth(3).boxes
    assert np.array_equal(points_in_boxes(sample.lidars["top"].xyz_ego(), boxes).sum(1), boxes.num_points)
    assert (boxes.num_points > 5).sum() >= 10


def test_points_on_an_agent_lie_in_its_box(city, sample):
    boxes, truth = city.truth(3).boxes, city.truth(3).point_label["top"]
    inside = points_in_boxes(sample.lidars["top"].xyz_ego(), boxes)
    still = np.hypot(*boxes.velocity.T) < 0.2  # what moves is smeared over the sweep
    shares = []
    for m in np.flatnonzero(still):
        own = truth.instance == int(boxes.track_id[m].split("-")[1]) + 1
        if own.sum() > 20:
            shares.append(inside[m][own].mean())
    assert len(shares) > 3
    assert np.mean(shares) > 0.97  # range noise puts a few points before the face


def test_static_points_have_no_compensated_doppler(city, sample):
    speeds = []
    for radar in sample.radars.values():
        assert (radar.field("radial_velocity") - radar.field("radial_velocity_comp")).std() > 0.3, "ego must move"
        speeds.append(radar.field("radial_velocity_comp")[radar.field("valid") > 0])
    speeds = np.abs(np.concatenate(speeds))
    assert np.median(speeds) < 0.3
    ahead = sample.radars["front"]
    closing = np.median(ahead.field("radial_velocity")[np.abs(ahead.field("radial_velocity_comp")) < 0.5])
    assert closing < -3, "standing things ahead close in: negative"


def test_point_labels_are_the_occupancy_s(city, sample):
    truth = city.truth(3)
    grid, label = truth.occupancy.grid, truth.point_label["top"].label
    index, inside = grid.index(sample.lidars["top"].xyz_ego().astype(np.float64))
    inside &= label != 0
    agree = truth.occupancy.label[tuple(index[inside].T)] == label[inside]
    assert inside.sum() > 10_000
    assert agree.mean() > 0.95
    lidar = truth.occupancy.observed["lidar"][tuple(index[inside].T)]
    assert lidar.mean() > 0.97
    assert 0.05 < truth.occupancy.observed["camera"].mean() < 0.6


def test_an_agent_s_points_project_onto_its_pixels(city, sample):
    truth, cloud = city.truth(3), sample.lidars["top"]
    xyz, agent = cloud.xyz_ego(), truth.point_label["top"].instance
    still = np.hypot(*truth.boxes.velocity.T) < 0.2
    parked = {int(t.split("-")[1]) + 1 for t in truth.boxes.track_id[still]}
    right = total = 0
    for role, image in sample.cameras.items():
        pixel, depth, visible = project_to_image(xyz, image)
        seen = truth.depth[role]
        chosen = np.flatnonzero(visible & np.isin(agent, list(parked)))
        u, v = np.round(pixel[chosen]).astype(int).T
        window = np.stack([  # a pixel beside: points lie up to half a pixel from the centre ray, and have noise
            np.pad(truth.image_label[role].instance, 1, mode="edge")[v + i, u + j] for i in range(3) for j in range(3)
        ])  # fmt: skip
        # The LiDAR stands 0.3 m above the cameras: what something nearer hides from the camera does not count.
        free = seen[v, u] > depth[chosen] - 1.0
        right += (window == agent[chosen]).any(0)[free].sum()
        total += free.sum()
    assert total > 300
    assert right / total > 0.98


def test_velocity_is_the_difference_of_neighbouring_key_frames():
    city = City(SMALL.model_copy(update={"cameras": (), "radars": (), "occupancy": None}))
    before, now, after = (city.truth(k).boxes for k in (2, 3, 4))
    poses = [city.truth(k).map_from_ego for k in (2, 3, 4)]
    tracks = set(before.track_id) & set(now.track_id) & set(after.track_id)
    assert len(tracks) > 20
    for track in tracks:
        a, b = (
            pose.apply(boxes.center[boxes.track_id == track])[0]
            for pose, boxes in ((poses[0], before), (poses[2], after))
        )
        expected = poses[1].rotation.T @ np.array([*((b - a)[:2] / 1.0), 0.0])
        np.testing.assert_allclose(now.velocity[now.track_id == track][0], expected[:2], atol=1e-6)


def test_same_seed_same_sample_and_pickled_city_gives_it_too(city, sample):
    small = SMALL.model_copy(update={"cameras": ("front",), "image_size": (160, 90), "occupancy": None})
    first, again = City(small)[1], pickle.loads(pickle.dumps(City(small)))[1]
    assert equal(first, again)
    assert not np.array_equal(first.lidars["top"].xyz[:500], sample.lidars["top"].xyz[:500])


@pytest.mark.parametrize("seed", [3, 4, *(pytest.param(s, marks=pytest.mark.slow) for s in range(5, 13))])
def test_every_scene_holds_all_classes_in_range_and_no_overlap(seed):
    config = CityConfig(seed=seed, scenes=1, key_frames=6, cameras=(), radars=(), occupancy=None)
    city, found = City(config), set()
    for k in range(len(city)):
        boxes = city.truth(k).boxes
        for name, distance, points in zip(
            boxes.label, np.linalg.norm(boxes.center[:, :2], axis=1), boxes.num_points, strict=True
        ):
            if points > 0 and distance < RANGE_M[DETECTION_CLASSES[name]]:
                found.add(DETECTION_CLASSES[name])
    assert found == set(DETECTION_CLASSES)
    iou = bev_iou(boxes, boxes) - np.eye(len(boxes))
    assert iou.max() < 1e-9
    agents = city.simulator(0).scene.agents
    ego = agents[0]
    for agent in agents[1:]:
        middle = ego.xy + 1.35 * np.stack([np.cos(ego.yaw), np.sin(ego.yaw)], -1)
        assert not rectangles_touch(agent.xy - middle, ego.yaw, ego.size, agent.yaw, agent.size).any()


def test_seeds_give_different_streets():
    styles = [City(CityConfig(seed=s, scenes=1, key_frames=1)).simulator(0).scene.style for s in (10, 11)]
    assert styles[0] != styles[1]


def test_periodic_furniture_is_evenly_spaced():
    config = CityConfig(seed=3, scenes=1, key_frames=1, periodic_furniture=True)
    city = City(config)
    poles, main = city.semantic_map(0).poles, city.simulator(0).scene.traffic.roads[0]
    tall = poles[np.isclose(np.ptp(poles[..., 2], axis=1), 7.0)][:, 0, :2]
    line = main.point(np.arange(main.length), np.zeros(int(main.length)))
    across = np.linalg.norm(tall[:, None] - line[None], axis=-1)
    along = across.argmin(1)[across.min(1) < main.half_width + 1.5]
    assert len(along) > 15
    assert np.isin(np.round((along - 4.0) % 16.0), (0, 1, 15, 16)).all()


def test_semantic_map_has_every_kind_on_the_ground(city):
    marks, ground = city.semantic_map(0), city.simulator(0).scene.ground
    for kind in ("poles", "signs", "lights", "lane_lines", "stop_lines", "crossings"):
        assert len(getattr(marks, kind)), kind
    foot = torch.tensor(marks.poles[:, 0])
    assert (ground.height(foot[:, :2]) - foot[:, 2]).abs().max() < 0.2


def test_frames_come_in_stamp_order_and_hold_the_key_frames(city):
    end = city.key_stamps(0)[0] + 120_000_000
    frames = list(itertools.takewhile(lambda f: f.stamp_ns <= end, city.frames(0, cameras=False)))
    stamps = [f.stamp_ns for f in frames]
    assert stamps == sorted(stamps)
    lidar = [f for f in frames if f.lidars]
    assert np.allclose(np.diff([f.stamp_ns for f in lidar]), 50_000_000)
    assert city.key_stamps(0)[0] in {f.stamp_ns for f in lidar}
    key = next(f for f in lidar if f.stamp_ns == city.key_stamps(0)[0])
    expected = city.simulator(0).scan(city.rig.lidars[0], [[key.stamp_ns]], [key.stamp_ns])[0][0].cloud
    assert np.array_equal(key.lidars["top"].xyz, expected.xyz)


def test_frames_come_at_the_rates_asked_for_and_hold_the_key_frames_images():
    slow = City(FAULTY.model_copy(update={"key_frames": 2, "lidar_stride": 2, "camera_hz": 4.0}))
    first_ns, last_ns = slow.key_stamps(0)
    frames = list(slow.frames(0, after_ns=first_ns - 120_000_000))
    lidar = [f.stamp_ns for f in frames if f.lidars]
    assert first_ns in lidar and last_ns in lidar and np.allclose(np.diff(lidar), 100_000_000)
    front = [f for f in frames if "front" in f.cameras]
    assert np.allclose(np.diff([f.stamp_ns for f in front]), 250_000_000)
    key = slow[1].cameras["front"]
    assert front[-1].stamp_ns == key.stamp_ns and np.array_equal(front[-1].cameras["front"].rgb, key.rgb)
    assert np.allclose(front[-1].cameras["front"].ego_from_camera.matrix, slow.rig.cameras[0].ego_from_camera.matrix)


def test_ego_pitches_and_rolls(city):
    pose = city.map_from_ego(0)
    tilt = np.array([pose(s).rotation[2, :2] for s in city.key_stamps(0)])
    assert 1e-4 < np.abs(tilt).max() < 0.15


@pytest.mark.parametrize(
    "name", ["rain", "fog", "night", "dead_camera", "late_sensor", "calibration_error", "clock_offset"]
)
def test_each_fault_changes_the_sample_it_should(name, clean):
    bad = City(FAULTY.model_copy(update={"faults": (Fault(name=name, severity=0.8),)}))[1]
    front, was = bad.cameras.get("front"), clean.cameras["front"]
    if name in ("rain", "fog"):
        assert front.rgb.std() < was.rgb.std(), "less contrast"
        far = [(np.linalg.norm(s.lidars["top"].xyz, axis=1) > 25).sum() for s in (clean, bad)]
        assert far[1] < 0.8 * far[0], "attenuated"
    elif name == "night":
        assert front.rgb.mean() < 0.75 * was.rgb.mean()
    elif name == "dead_camera":
        assert len(bad.cameras) < len(clean.cameras)
    elif name == "late_sensor":
        late = [r for r in bad.cameras if bad.cameras[r].stamp_ns < clean.cameras[r].stamp_ns]
        assert len(late) == 1
        assert clean.cameras[late[0]].stamp_ns - bad.cameras[late[0]].stamp_ns == 400_000_000
    elif name == "calibration_error":
        assert np.array_equal(front.rgb, was.rgb)
        moved = front.ego_from_camera.inverse() @ was.ego_from_camera
        assert np.linalg.norm(moved.translation) == pytest.approx(0.16, abs=1e-6)
    else:
        assert front.stamp_ns - was.stamp_ns == 160_000_000


def test_sweep_resembles_the_real_key_frame(shared_data, sample):
    """Ring structure, ranges and number of points of nuScenes' LIDAR_TOP; a street is not the same street."""
    real = np.fromfile(next((shared_data / "nuscenes_keyframe").glob("*LIDAR_TOP*.bin")), np.float32).reshape(-1, 5)
    cloud = sample.lidars["top"]
    assert 0.8 < len(cloud) / len(real) < 1.05
    ring, real_ring = cloud.field("ring"), real[:, 4].astype(int)

    def elevation(xyz: np.ndarray) -> np.ndarray:
        return np.degrees(np.arcsin(xyz[:, 2] / np.linalg.norm(xyz, axis=1)))

    distance, real_distance = np.linalg.norm(cloud.xyz, axis=1), np.linalg.norm(real[:, :3], axis=1)
    for k in range(4, 32):
        ours, theirs = (ring == k) & (distance > 3), (real_ring == k) & (real_distance > 3)
        assert np.median(elevation(cloud.xyz[ours])) == pytest.approx(np.median(elevation(real[theirs, :3])), abs=0.4)
    far, real_far = distance[distance > 2], real_distance[real_distance > 2]
    assert ks_2samp(far, real_far).statistic < 0.2
    assert ks_2samp(cloud.field("intensity"), real[:, 3]).statistic < 0.35


@pytest.mark.parametrize(("rig", "least", "most"), [("kitti", 70_000, 135_000), ("omnihd", 120_000, 231_000)])
def test_other_rigs(rig, least, most):
    config = CityConfig(
        seed=3,
        scenes=1,
        key_frames=6,
        rig=rig,
        image_size=None,
        cameras=(),
        taxonomy="semantickitti" if rig == "kitti" else "omnihd",
        occupancy=None,
    )
    city = City(config)
    sample, truth = city[0], city.truth(0)
    assert least < len(sample.lidars["top"]) < most
    assert truth.point_label["top"].label.max() < len(truth.point_label["top"].classes)
    if rig == "omnihd":
        radar = sample.radars["back"]
        assert set(sample.radars) == {"front", "front_left", "front_right", "back", "back_left", "back_right"}
        assert len(radar) > 150
        assert np.ptp(radar.xyz[:, 2]) > 1
        assert {"power", "snr", "rcs", "radial_velocity", "radial_velocity_comp"} <= set(radar.fields)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    config = CityConfig(seed=3, scenes=1, key_frames=2, image_size=(320, 180))
    cpu, cuda = City(config), City(config.model_copy(update={"device": "cuda"}))
    a, b = cpu.truth(0), cuda.truth(0)
    for role in a.depth:
        near = (a.depth[role] > 0) & (a.depth[role] < 60)
        assert (np.abs(a.depth[role] - b.depth[role])[near] < 0.05).mean() > 0.995
        assert (a.image_label[role].label == b.image_label[role].label).mean() > 0.995
    assert (a.occupancy.label == b.occupancy.label).mean() > 0.9999
    images = [c[0].cameras["front"].rgb.astype(float) for c in (cpu, cuda)]
    assert np.abs(images[0] - images[1]).mean() < 4  # the sensor noise differs
    assert equal(cuda[0], City(cuda.config)[0])


def test_labels_of_detection_classes_are_the_city_s():
    assert tuple(Label(k).name.lower() for k in range(10)) == DETECTION_CLASSES
    assert isinstance(Boxes3D.empty(DETECTION_CLASSES, 0), Boxes3D)


def test_occupancy_at_another_grid_agrees_with_the_city_s_own(city):
    own = city.truth(3).occupancy
    fine = city.occupancy_at(
        3, VoxelGrid((-40.0, -40.0, -1.0), (0.2, 0.2, 0.2), (400, 400, 32), own.grid.ego_from_grid)
    )
    coarse = fine.occupied.reshape(200, 2, 200, 2, 16, 2).any((1, 3, 5))
    assert own.occupied[coarse].mean() > 0.97  # what a fine voxel holds, the coarse one around it holds
    assert own.label.shape == (200, 200, 16)
