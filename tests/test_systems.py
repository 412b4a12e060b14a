"""The systems' file: which part of the vehicle each sees, and the mistakes that it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import builders
import numpy as np
import pytest
import yaml

from perception.errors import ConfigError
from perception.evaluation.result import WeightsProvenance
from perception.predictor import TruthEchoConfig
from perception.systems import StackConfig, SystemConfig, above_threshold, load_stack, load_systems, vehicle_for
from perception.types import IGNORE_LABEL, Needs, OccupancyGrid3D, Pose, VoxelGrid
from perception.vehicle import VehicleConfig

SHIPPED = Path(__file__).resolve().parents[1] / "configs" / "vehicle.yaml"
VEHICLE = VehicleConfig.model_validate(
    {
        "sensors": {
            "lidars": {"top": {"topic": "/points", "needed": ["ring"]}},
            "radars": {"front": {"topic": "/radar"}},
            "cameras": {"front": {"topic": "/front/image_raw"}, "back": {"topic": "/back/image_raw"}},
        },
        "wait_s": 0.1,
    }
)


def seen(needs: Needs, **keys) -> VehicleConfig:
    return vehicle_for(VEHICLE, SystemConfig(predictor=TruthEchoConfig(), **keys), needs, "systems.a")


def test_a_system_sees_what_its_predictor_needs():
    found = seen(Needs(lidar=("x", "y", "z", "intensity", "time_lag"), cameras=("back",), sweeps=10))
    assert list(found.sensors.channels) == ["lidar_top", "cam_back"]
    assert found.sensors.lidars["top"].needed == ("ring", "intensity")
    assert (found.sweeps, found.sync.anchor, found.wait_s) == (10, "lidar_top", 0.1)
    assert (found.imu_topic, found.odometry_topic, found.gnss_topic) == (None, None, None)
    assert seen(Needs(lidar=(), motion=True)).imu_topic == "/imu"
    assert seen(Needs(radar=("rcs",), anchor="radar"), wait_s=0.0).sync.anchor == "radar_front"
    assert list(seen(Needs(cameras=("front",), anchor="camera")).sensors.channels) == ["cam_front"]
    assert list(seen(Needs(), anchor="cam_back").sensors.channels) == ["cam_back"]  # the anchor, even if not read


@pytest.mark.parametrize(
    ("vehicle", "needs", "keys", "message"),
    [
        (
            VEHICLE,
            Needs(cameras=("left",)),
            {},
            r"systems.a: the predictor needs camera 'left'.*front, back\n.*left.topic",
        ),
        (VehicleConfig(), Needs(lidar=()), {}, r"needs lidars, the vehicle has none\n.*sensors.lidars"),
        (VehicleConfig(), Needs(), {}, r"samples are made by a lidar, the vehicle has none"),
        (
            VEHICLE,
            Needs(),
            {"anchor": "cam_left"},
            r"systems.a.anchor: 'cam_left' is none of .*\n.*cam_front, cam_back",
        ),
    ],
)
def test_what_the_vehicle_does_not_have_is_named(vehicle, needs, keys, message):
    with pytest.raises(ConfigError, match=message):
        vehicle_for(vehicle, SystemConfig(predictor=TruthEchoConfig(), **keys), needs, "systems.a")


def test_the_shipped_file_loads_and_any_of_its_systems_alone():
    stack = load_stack(SHIPPED)
    assert list(stack.systems) == ["detection", "occupancy", "localization"] and stack.truths == "demo_drive"
    assert len(stack.sensors.cameras) == 6 and len(stack.sensors.radars) == 5
    assert list(load_stack(SHIPPED, ["occupancy"]).systems) == ["occupancy"]
    assert load_stack(SHIPPED, overrides=["systems.detection.device=cuda"]).systems["detection"].device == "cuda"
    assert not isinstance(stack.vehicle, StackConfig) and stack.vehicle.sensors == stack.sensors
    with pytest.raises(ConfigError, match=r"vehicle.yaml: no system 'detektion'\n.*detection, occupancy, localization"):
        load_stack(SHIPPED, ["detektion"])


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ({}, "systems: .*at least 1 item"),
        ({"a": {"predictor": {"name": "truth_ecko"}}}, r"systems.a: predictor.name: 'truth_ecko' is not known"),
        ({"a": {}}, "systems.a.predictor is missing"),
        (
            {"a": {"predictor": {"name": "truth_echo"}, "max_rate": 5}},
            r"'systems.a.max_rate'\n.*did you mean 'max_rate_hz'",
        ),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, systems, message):
    path = tmp_path / "car.yaml"
    path.write_text(yaml.safe_dump({"systems": systems}))
    with pytest.raises(ConfigError, match=message):
        load_stack(path)


def test_random_weights_are_refused(monkeypatch):
    class Untrained:
        needs, output, degraded, weights = Needs(), "boxes", "", WeightsProvenance.random()

    monkeypatch.setattr("perception.systems.load_predictor", lambda *_: Untrained())
    stack = StackConfig(sensors=VEHICLE.sensors, systems={"a": SystemConfig(predictor=TruthEchoConfig())})
    with pytest.raises(ConfigError, match=r"systems.a: its weights are random.*\n.*systems.a.predictor.weights"):
        load_systems(stack)


def test_the_threshold_leaves_out_boxes_and_makes_voxels_unknown():
    boxes = replace(builders.boxes(), score=np.linspace(0, 0.9, 10))
    assert above_threshold(boxes, 0.5).score.tolist() == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert above_threshold(boxes, 0.0) is boxes
    grid = VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1, 1, 2), Pose.identity())
    label, score = np.array([[[0, 1]]], np.uint8), np.array([[[0.4, 0.6]]], np.float32)
    voxels = OccupancyGrid3D(grid, label, ("free", "car"), 0, 7, score)
    assert above_threshold(voxels, 0.5).label.tolist() == [[[IGNORE_LABEL, 1]]]
    assert above_threshold(replace(voxels, score=None), 0.5).label.tolist() == [[[0, 1]]]
