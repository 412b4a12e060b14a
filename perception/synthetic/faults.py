"""What goes wrong, on request: each fault has a name, a severity in [0, 1] and a seed.

Rain, fog and night change the measurements themselves (`weather_of`); the others change a finished sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from perception.config import Config
from perception.synthetic.sensors import Weather
from perception.types import CameraImage, Pose, Sample

FaultName = Literal["rain", "fog", "night", "dead_camera", "late_sensor", "calibration_error", "clock_offset"]


class Fault(Config):
    """One fault. `sensor`: the role of the camera concerned; None draws one by the seed.

    Severity 1 means: rain, fog (visibility about 30 m), night: as bad as it gets; dead_camera: all cameras (below:
    that share of them, at least one); late_sensor: an image 0.5 s old; calibration_error: 3 degrees and 0.2 m on all
    cameras; clock_offset: cameras stamped 0.2 s late.
    """

    name: FaultName
    severity: float = Field(0.5, ge=0, le=1)
    seed: int = 0
    sensor: str | None = None


def weather_of(faults: tuple[Fault, ...]) -> Weather:
    """The weather that the faults ask for."""
    return Weather(**{f.name: f.severity for f in faults if f.name in ("rain", "fog", "night")})


def degrade(sample: Sample, fault: Fault, late_image: Callable[[str, float], CameraImage]) -> Sample:
    """The sample with a fault of its sensors; `late_image(role, lag_s)` gives an older image of a camera."""
    roles = sorted(sample.cameras)
    if fault.severity == 0 or not roles:
        return sample
    rng = np.random.default_rng([fault.seed, sum(fault.name.encode())])
    order = [fault.sensor] if fault.sensor is not None else [roles[i] for i in rng.permutation(len(roles))]
    if fault.name == "dead_camera":
        dead = set(order[: max(1, round(fault.severity * len(roles)))])
        return replace(sample, cameras={r: c for r, c in sample.cameras.items() if r not in dead})
    if fault.name == "late_sensor":
        return replace(sample, cameras={**sample.cameras, order[0]: late_image(order[0], 0.5 * fault.severity)})
    if fault.name == "calibration_error":
        chosen = order if fault.sensor is not None else roles
        moved = {r: _misplaced(sample.cameras[r], fault.severity, rng) for r in chosen}
        return replace(sample, cameras={**sample.cameras, **moved})
    if fault.name == "clock_offset":
        offset = round(0.2e9 * fault.severity)
        return replace(sample, cameras={r: replace(c, stamp_ns=c.stamp_ns + offset) for r, c in sample.cameras.items()})
    return sample


def _misplaced(image: CameraImage, severity: float, rng: np.random.Generator) -> CameraImage:
    """A camera that is not where its calibration says."""
    axis = rng.normal(size=3)
    half = np.radians(3.0 * severity) / 2 * axis / np.linalg.norm(axis)
    shift = rng.normal(size=3)
    error = Pose.from_quaternion(
        [*np.sin(half), np.cos(np.linalg.norm(half))], 0.2 * severity * shift / np.linalg.norm(shift)
    )
    return replace(image, ego_from_camera=image.ego_from_camera @ error)
