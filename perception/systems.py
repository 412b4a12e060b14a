"""The systems that run on a vehicle: one file names its sensors and what is predicted from them.

The ROS node and `perception predict` read the same file, so that a bag is predicted offline as it is on the road. Each
system sees the vehicle through its predictor's `Needs`: the sensors, fields and sweeps that it reads, its own anchor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, SerializeAsAny

from perception.config import Config, read_yaml, validate
from perception.datasets import dataset_config, open_dataset
from perception.errors import ConfigError
from perception.predictor import Predictor, load_predictor, predictor_config
from perception.types import (
    IGNORE_LABEL,
    Boxes3D,
    CameraImage,
    Dataset,
    Needs,
    OccupancyGrid3D,
    PointCloud,
    Pose,
    Prediction,
    Sample,
)
from perception.vehicle import CloudSensor, Sensors, VehicleConfig

_FROM_ACCUMULATION = ("x", "y", "z", "time_lag", "sweep")  # no driver has to send these
_KINDS = {"lidar": "lidars", "radar": "radars", "camera": "cameras"}
_WARM_UP_POINTS = 20_000
_WARM_UP_PIXELS = (900, 1600)


class SystemConfig(Config):
    """One predictor on the vehicle."""

    predictor: SerializeAsAny[Config]
    """Its own configuration, with `name`."""
    device: str = "cpu"
    anchor: str | None = None
    """The channel whose messages make samples; None: the first of the kind that the predictor asks for."""
    wait_s: float | None = Field(None, ge=0)
    """Longest wait for the other sensors; None: the vehicle's."""
    max_rate_hz: float | None = Field(None, gt=0)
    """Most predictions a second, by the samples' stamps."""
    latency_budget_s: float | None = Field(None, gt=0)
    """From the anchor's stamp to the published message; more is a warning, always more an error."""
    score_threshold: float = Field(0.0, ge=0, le=1)
    """Boxes of a lower score are left out; voxels of a lower score are unknown."""
    overlay: bool = False
    """Offer camera images with LiDAR points and boxes drawn in."""
    broadcast_tf: bool = False
    """Publish map -> odom on /tf, for a system that gives a pose; nothing else on the vehicle may."""


class StackConfig(VehicleConfig):
    """A vehicle and the systems that run on it."""

    systems: dict[str, SystemConfig] = Field(min_length=1)
    truths: Literal["demo_drive"] | SerializeAsAny[Config] | None = None
    """The `dataset` whose truth `truth_echo` repeats, or the synthetic drive that is played without a bag."""
    transform_wait_s: float = Field(0.2, ge=0)
    """How long the live node waits for transforms that reach a sample's stamps."""

    @property
    def vehicle(self) -> VehicleConfig:
        """Without the systems."""
        return VehicleConfig(**{name: getattr(self, name) for name in VehicleConfig.model_fields})


def load_stack(path: Path, systems: Sequence[str] = (), overrides: Sequence[str] = ()) -> StackConfig:
    """The vehicle and systems of a YAML file; of `systems` only those named, all of them without.

    Raises:
        ConfigError: a missing file, an unknown key, a system that it does not have.
    """
    data = read_yaml(path, overrides)
    found = data.get("systems")
    if isinstance(found, dict):
        if unknown := [name for name in systems if name not in found]:
            raise ConfigError(f"{path}: no system {unknown[0]!r}", f"there are: {', '.join(found) or 'none'}")
        data["systems"] = {
            name: _with_predictor(system, f"{path}: systems.{name}")
            for name, system in found.items()
            if not systems or name in systems
        }
    if isinstance(data.get("truths"), dict):
        data["truths"] = dataset_config(data["truths"], f"{path}: truths")
    return validate(StackConfig, data, str(path))


def _with_predictor(system: Any, where: str) -> Any:
    if not isinstance(system, dict) or not isinstance(system.get("predictor"), dict):
        return system  # validation says what is wrong with it
    return {**system, "predictor": predictor_config(system["predictor"], where)}


@dataclass(frozen=True, slots=True, eq=False)
class System:
    """A system, loaded.

    Attributes:
        name: in the configuration.
        config: its own.
        predictor: ready to predict.
        vehicle: the part of the vehicle that it reads.
        watched: the same, and what its overlay draws.
    """

    name: str
    config: SystemConfig
    predictor: Predictor
    vehicle: VehicleConfig
    watched: VehicleConfig


def load_systems(stack: StackConfig) -> list[System]:
    """All systems of a configuration, their weights loaded.

    Raises:
        ConfigError: a predictor that needs what the vehicle does not have, or one whose weights are random.
    """
    truths = _open_truths(stack.truths)
    systems = []
    for name, config in stack.systems.items():
        predictor = load_predictor(config.predictor, config.device, truths)
        if predictor.weights.kind == "random":
            raise ConfigError(
                f"systems.{name}: its weights are random, so nothing that it predicts means anything",
                f"set systems.{name}.predictor.weights to a trained file",
            )
        narrow = vehicle_for(stack.vehicle, config, predictor.needs, f"systems.{name}")
        systems.append(
            System(name, config, predictor, narrow, _with_overlay(stack, narrow) if config.overlay else narrow)
        )
    return systems


def _open_truths(truths: Literal["demo_drive"] | Config | None) -> Dataset | None:
    if truths == "demo_drive":
        from perception.synthetic.demo import demo_bag

        truths = dataset_config({"name": "rosbag", "root": demo_bag()}, "the demo drive")
    return open_dataset(truths) if truths is not None else None


def vehicle_for(vehicle: VehicleConfig, config: SystemConfig, needs: Needs, where: str) -> VehicleConfig:
    """The part of a vehicle that a predictor reads: its sensors with the fields it needs, its sweeps and anchor.

    Raises:
        ConfigError: a sensor that the vehicle does not have.
    """
    have = vehicle.sensors
    if missing := [role for role in needs.cameras if role not in have.cameras]:
        raise ConfigError(
            f"{where}: the predictor needs camera {missing[0]!r}, the vehicle has: {', '.join(have.cameras) or 'none'}",
            f"name the topic of that camera: sensors.cameras.{missing[0]}.topic",
        )
    lidars, radars = _asked(have.lidars, needs.lidar), _asked(have.radars, needs.radar)
    cameras = {role: have.cameras[role] for role in needs.cameras}
    for kind, fields, found in (("lidars", needs.lidar, lidars), ("radars", needs.radar, radars)):
        if fields is not None and not found:
            raise ConfigError(f"{where}: the predictor needs {kind}, the vehicle has none", f"add one: sensors.{kind}")
    anchor = config.anchor or vehicle.anchor or _first_channel(have, needs, where)
    if anchor not in have.channels:
        raise ConfigError(
            f"{where}.anchor: {anchor!r} is none of the vehicle's sensors", f"there are: {', '.join(have.channels)}"
        )
    kind, _, role = anchor.partition("_")
    if kind == "lidar":
        lidars.setdefault(role, have.lidars[role])
    elif kind == "radar":
        radars.setdefault(role, have.radars[role])
    else:
        cameras.setdefault(role, have.cameras[role])
    update: dict[str, Any] = {
        "sensors": Sensors(lidars=lidars, radars=radars, cameras=cameras),
        "anchor": anchor,
        "sweeps": needs.sweeps,
        "wait_s": vehicle.wait_s if config.wait_s is None else config.wait_s,
    }
    if not needs.motion:
        update |= {"odometry_topic": None, "imu_topic": None, "gnss_topic": None}
    return vehicle.model_copy(update=update)


def _asked(sensors: Mapping[str, CloudSensor], fields: tuple[str, ...] | None) -> dict[str, CloudSensor]:
    if fields is None:
        return {}
    needed = [name for name in fields if name not in _FROM_ACCUMULATION]
    return {
        role: sensor.model_copy(update={"needed": tuple(dict.fromkeys((*sensor.needed, *needed)))})
        for role, sensor in sensors.items()
    }


def _first_channel(have: Sensors, needs: Needs, where: str) -> str:
    roles = getattr(have, _KINDS[needs.anchor])
    prefix = "cam" if needs.anchor == "camera" else needs.anchor
    if not roles:
        raise ConfigError(
            f"{where}: samples are made by a {needs.anchor}, the vehicle has none",
            f"set {where}.anchor to one of: {', '.join(have.channels) or 'no sensor at all'}",
        )
    return f"{prefix}_{next(iter(roles))}"


def _with_overlay(stack: StackConfig, narrow: VehicleConfig) -> VehicleConfig:
    """With every LiDAR and camera."""
    sensors = narrow.sensors.model_copy(
        update={
            "lidars": {**stack.sensors.lidars, **narrow.sensors.lidars},
            "cameras": {**stack.sensors.cameras, **narrow.sensors.cameras},
        }
    )
    return narrow.model_copy(update={"sensors": sensors})


def warm_up(system: System) -> None:
    """Predict once on noise, so that the first sample of the road does not wait for libraries and kernels.

    A predictor that reads no sensor has nothing to warm.
    """
    needs = system.predictor.needs
    if needs.lidar is None and needs.radar is None and not needs.cameras:
        return
    rng = np.random.default_rng(0)

    def noise(fields: Sequence[str]) -> PointCloud:
        xyz = rng.uniform(-40, 40, (_WARM_UP_POINTS, 3)).astype(np.float32)
        values = {name: rng.uniform(0, 1, len(xyz)).astype(np.float32) for name in fields if name not in "xyz"}
        values["sweep"] = np.zeros(len(xyz), np.int64)
        return PointCloud(xyz, values, Pose.identity(), 0)

    height, width = _WARM_UP_PIXELS
    intrinsic = np.array([[width / 2, 0, width / 2], [0, width / 2, height / 2], [0, 0, 1.0]])
    image = rng.integers(0, 256, (height, width, 3), np.uint8)  # a black one would count as missing
    sensors = system.vehicle.sensors
    system.predictor.predict(
        Sample(
            0,
            {role: noise(needs.lidar) for role in sensors.lidars} if needs.lidar is not None else {},
            {role: noise(needs.radar) for role in sensors.radars} if needs.radar is not None else {},
            {role: CameraImage(image, intrinsic, Pose.identity(), 0) for role in needs.cameras},
            odom_from_ego=Pose.identity(),
        )
    )
    system.predictor.reset()


def is_due(max_rate_hz: float | None, last_ns: int | None, stamp_ns: int) -> bool:
    """Whether a sample is far enough behind the last predicted one.

    A tenth of slack: sensors are not on time to the millisecond.
    """
    return max_rate_hz is None or last_ns is None or stamp_ns - last_ns >= 0.9e9 / max_rate_hz


def above_threshold(prediction: Prediction, score: float) -> Prediction:
    """Without what is less sure than `score`: such boxes are left out, such voxels become unknown."""
    if score <= 0:
        return prediction
    if isinstance(prediction, Boxes3D):
        return prediction.select(prediction.score >= score)
    if isinstance(prediction, OccupancyGrid3D) and prediction.score is not None:
        unsure = prediction.score < score
        return replace(prediction, label=np.where(unsure, np.uint8(IGNORE_LABEL), prediction.label))
    return prediction
