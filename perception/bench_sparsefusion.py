"""How fast SparseFusion predicts: stage by stage, and from the point array and the decoded images to boxes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perception.bench import BenchRow, measure
from perception.config import apply_override, read_yaml, validate
from perception.device import usable_device
from perception.errors import ConfigError
from perception.networks.sparsefusion import SparseFusion, SparseFusionConfig
from perception.networks.sparsefusion.fast import FastForward
from perception.synthetic.city import City, CityConfig
from perception.types import CameraImage, Sample
from perception.weights import load_weights

Stages = dict[str, Callable[[], object]]


def bench_network(path: Path | None, weights: Path | None, overrides: Sequence[str]) -> tuple[SparseFusion, str]:
    """The network of a configuration's `predictor` keys, and in words what weights it has.

    Args:
        path: of the configuration; None for the released one with a ResNet-50.
        weights: a file in place of the configuration's; with neither they are random, which is as fast.
        overrides: `key=value` of the predictor's keys.

    Raises:
        ConfigError: the configuration does not fit, or is another network's.
        DataError: the weights do not fit.
    """
    where = str(path or "the command line")
    keys = {"name": "sparsefusion", **(read_yaml(path).get("predictor", {}) if path else {})}
    for override in overrides:
        apply_override(keys, override.removeprefix("predictor."))
    if keys["name"] != "sparsefusion":
        raise ConfigError(
            f"{where}: predictor.name is {keys['name']!r}", "give a configuration of sparsefusion, or none"
        )
    config = validate(SparseFusionConfig, keys, where, "predictor.")
    network = SparseFusion(config)
    weights = weights or config.weights
    if weights is None:
        return network, "random weights: the times are those of trained ones"
    load_weights(network, weights)
    return network, f"weights: {weights}"


_ENLARGED = 4


def city_samples(config: SparseFusionConfig, number: int, device: str = "cpu") -> list[Sample]:
    """Samples of the city with the sweeps that the network takes, and six images of 1600 x 900 as nuScenes has them.

    Images are simulated at a quarter of that size and enlarged: what they show does not change the time.
    """
    keys = {"scenes": 1, "key_frames": number, "radars": (), "occupancy": None, "image_size": (400, 225)}
    city = City(CityConfig.model_validate(keys | {"sweeps": config.sweeps, "device": device}))
    samples = [city[i] for i in range(number)]
    return [replace(s, cameras={role: _enlarged(image) for role, image in s.cameras.items()}) for s in samples]


def _enlarged(image: CameraImage) -> CameraImage:
    rgb = image.rgb.repeat(_ENLARGED, 0).repeat(_ENLARGED, 1)
    return replace(image, rgb=rgb, intrinsic=np.diag([_ENLARGED, _ENLARGED, 1.0]) @ image.intrinsic)


def bench_sparsefusion(
    network: SparseFusion, samples: Sequence[Sample], device: torch.device | str, runs: int = 20, warm_up: int = 3
) -> list[BenchRow]:
    """Each stage by itself, over and over on the first sample, and all of it, with the samples in turn, one at a time.

    On a GPU stages run as `SparseFusion.accelerate` arranges them; what is done for the images and for the LiDAR runs
    side by side in the whole, which is faster than the stages' sum.
    """
    device = usable_device(device)
    network = network.to(device).eval()
    network.accelerate()
    with torch.inference_mode():
        inputs = network.encode(samples[:1])
        parts = _modules(network, samples[0]) if network.fast is None else _fast(network, network.fast, samples[0])
        turns = itertools.cycle(samples)
        parts["all"] = lambda: network.predict(next(turns))
        size = f"{len(network.needs.cameras)} images"
        if inputs.voxels is not None:
            points = len(samples[0].lidars[network.config.lidar.role])
            size = f"{points:,} points, {len(inputs.voxels):,} voxels, {size}"
        rows = []
        for name, run in parts.items():
            repeats = warm_up * len(samples) if name == "all" else warm_up
            rows.append(measure(name, size, run, device, runs, repeats))
    return rows


def _modules(network: SparseFusion, sample: Sample) -> Stages:
    """The stages of a forward pass by the modules."""
    inputs = network.encode([sample])
    outputs = network(inputs)
    stages: Stages = {"encode: points to voxels, images to the canvas": lambda: network.encode([sample])}
    if network.image is not None and inputs.images is not None:
        image, images = network.image, inputs.images.flatten(0, 1)
        stages["image branch"] = lambda: image(images)
    if network.lidar is not None:
        lidar = network.lidar
        bev = lidar.encoder(inputs.voxels, inputs.coordinates, 1)
        stages["sparse encoder"] = lambda: lidar.encoder(inputs.voxels, inputs.coordinates, 1)
        stages["BEV backbone and pyramid"] = lambda: lidar.neck(lidar.backbone(bev))
    levels = None if inputs.images is None or network.image is None else network.image(inputs.images.flatten(0, 1))
    features = None if network.lidar is None else network.lidar(inputs.voxels, inputs.coordinates, 1)
    maps = inputs.height_min, inputs.height_max
    stages["head"] = lambda: network.head(features, *maps, levels, inputs.sparse_depth, inputs.calibration)
    stages["decode: boxes on the host"] = lambda: network.decode(outputs, [sample])
    return stages


def _fast(network: SparseFusion, fast: FastForward, sample: Sample) -> Stages:
    """The stages of a forward pass by `FastForward`, each with the tensors that those before it gave."""

    def taken_up() -> Tensor:
        images = fast.take_up(sample)
        fast.join()
        return images

    def joined(images: Tensor) -> tuple[Tensor, ...]:
        levels = fast.levels(images)
        fast.join()
        return levels

    detections = fast(sample).detections  # there is room for this sample from now on
    stages: Stages = {}
    points = camera_numbers = levels = lidar = None
    if network.image is not None:
        images, camera_numbers = fast.take_up(sample), network.encoder.camera_numbers([sample])
        levels = fast.levels(images)
        stages["images to the canvas"] = taken_up
        stages["image branch"] = lambda: joined(images)
    if network.lidar is not None:
        points = fast.points(sample)
        lidar = fast.lidar(points, camera_numbers)
        stages["points to the device"] = lambda: fast.points(sample)
        stages["voxels, sparse encoder"] = lambda: fast.lidar(points, camera_numbers)
    stages["BEV backbone and pyramid, head"] = lambda: fast.rest(camera_numbers, levels, lidar)
    stages["boxes on the host"] = lambda: network.boxes(detections, [sample])
    return stages
