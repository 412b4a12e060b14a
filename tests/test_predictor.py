"""Predictors by name; the truth echo repeats what is true and says when there is nothing to repeat."""

from __future__ import annotations

from dataclasses import replace

import builders
import numpy as np
import pytest

from perception.errors import ConfigError, DataError
from perception.predictor import TruthEchoConfig, load_predictor, predictor_config
from perception.types import OccupancyGrid3D, Pose, Sample, Truth, VoxelGrid


class OneSample:
    tokens = ("a",)

    def __init__(self, truth):
        self._truth = truth

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return Sample(7, token="a")

    def truth(self, i):
        return self._truth

    def scene_name(self, i):
        return ""


def test_an_unknown_predictor_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"run.yaml: predictor.name: 'truth_ecko' is not known\n.*truth_echo"):
        predictor_config({"name": "truth_ecko"}, "run.yaml")


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"run.yaml: unknown key 'predictor.outptu'\n.*did you mean 'output'"):
        predictor_config({"name": "truth_echo", "outptu": "boxes"}, "run.yaml")


def test_the_echo_is_the_truth_and_ignored_voxels_are_free():
    label = np.array([[[0, 1, 255]]], np.uint8)
    grid = VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1, 1, 3), Pose.identity())
    truth = Truth(builders.boxes(7), OccupancyGrid3D(grid, label, ("free", "car"), 0, 7), Pose.from_yaw(1.0, (3, 4, 0)))
    dataset = OneSample(truth)

    def echo(output):
        return load_predictor(TruthEchoConfig(output=output), truths=dataset).predict(dataset[0])

    assert (echo("boxes").center == truth.boxes.center).all()
    unseen = replace(truth.boxes, num_points=np.arange(10) % 2)
    dataset._truth = replace(truth, boxes=unseen)
    assert echo("boxes").label.tolist() == [1, 3, 5, 7, 9]
    assert echo("occupancy").label.tolist() == [[[0, 1, 0]]]
    assert echo("pose").map_from_ego is truth.map_from_ego and echo("pose").stamp_ns == 7


def test_nothing_to_repeat_is_an_error():
    with pytest.raises(ConfigError, match="no data set to repeat"):
        load_predictor(TruthEchoConfig())
    echo = load_predictor(TruthEchoConfig(), truths=OneSample(Truth()))
    with pytest.raises(DataError, match="sample 'a' has no true boxes"):
        echo.predict(Sample(7, token="a"))
    with pytest.raises(DataError, match="sample 'b' has no true boxes"):
        echo.predict(Sample(7, token="b"))
