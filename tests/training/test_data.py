from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import boxes, camera, cloud

sys.path.insert(0, str(Path(__file__).parent))
from stand_in import Shapes

from perception.augment import AugmentConfig
from perception.errors import DataError
from perception.synthetic.city import CityConfig
from perception.training.config import StreamConfig, TrainingConfig
from perception.training.data import CityStream, Order, Packed, batches, class_groups, trimmed
from perception.training.distributed import Place
from perception.types import Needs, Sample, Truth

ALONE = Place(0, 1, torch.device("cpu"))
NEEDS = Needs(lidar=("intensity",), cameras=("front",))


def draws(size, groups=None, seed=0, place=ALONE, first=0, count=20):
    return list(itertools.islice(Order(size, groups, seed, place, first), count))


def test_every_epoch_is_a_new_permutation():
    order = [i for i, _ in draws(10)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert draws(10) == draws(10) != draws(10, seed=1)
    assert [n for _, n in draws(10)] == list(range(20))  # each draw is augmented by its own number


def test_an_order_taken_up_later_goes_on():
    assert draws(7, first=13, count=5) == draws(7, count=18)[13:]


def test_processes_share_an_epoch_without_a_sample_in_common():
    parts = [draws(10, place=Place(rank, 2, torch.device("cpu")), count=5) for rank in range(2)]
    assert sorted(i for part in parts for i, _ in part) == list(range(10))
    assert draws(10, place=Place(1, 2, torch.device("cpu")), first=3, count=2) == parts[1][3:]


def test_class_balance_draws_every_class_equally_often():
    groups = class_groups(Shapes(12))
    assert groups == [list(range(12)), [3]]  # car in all, traffic_cone in one
    order = [i for i, _ in draws(12, groups, count=13)]
    assert order.count(3) >= 6  # half of the 13 draws are of the one sample with a cone
    assert set(order) <= set(range(12))


def test_classes_count_only_where_a_point_shows_them():
    class Unseen(Shapes):
        def truth(self, i):
            truth = super().truth(i)
            return Truth(replace(truth.boxes, num_points=np.where(truth.boxes.label == 9, 0, 5)))

    assert class_groups(Unseen(5)) == [list(range(5))]


def test_only_the_networks_classes_are_balanced():
    common, rare = boxes().classes[0], boxes().classes[9]
    assert len(class_groups(Shapes(5))) == 2
    assert class_groups(Shapes(5), [rare, "unheard of"]) == [[3]]
    drawn = next(batches(config(class_balanced=True), Shapes(5), NEEDS, ALONE, 0, [rare]))
    assert [sample.token for sample, _ in drawn] == ["s3"] * 3
    assert class_groups(Shapes(3), [common, rare]) == [[0, 1, 2]]
    with pytest.raises(DataError, match="has a box of unheard of"):
        class_groups(Shapes(5), ["unheard of"])


def test_a_packed_pair_comes_out_as_it_went_in():
    sample = Sample(5, {"top": cloud(points=33)}, {}, {"front": camera(31, 7)}, token="t")
    opened, truth = Packed((sample, Truth(boxes()))).open()
    np.testing.assert_array_equal(opened.lidars["top"].xyz, sample.lidars["top"].xyz)
    np.testing.assert_array_equal(opened.cameras["front"].rgb, sample.cameras["front"].rgb)
    np.testing.assert_array_equal(truth.boxes.center, boxes().center)
    assert opened.token == "t" and opened.cameras["front"].rgb.flags.aligned
    assert truth.boxes.center.flags.aligned and truth.boxes.center.dtype == np.float64


def test_only_what_is_needed_travels():
    sample = Sample(5, {"top": cloud()}, {"front": cloud()}, {"front": camera(), "back": camera()})
    kept, truth = trimmed(sample, Truth(boxes(), depth={"front": np.zeros((9, 16), np.float32)}), NEEDS)
    assert set(kept.lidars["top"].fields) == {"intensity"} and set(kept.cameras) == {"front"}
    assert len(kept.radars["front"]) == 0 and not truth.depth
    blind, _ = trimmed(sample, Truth(boxes()), Needs(cameras=("front",)))
    assert len(blind.lidars["top"]) == 0  # its place stays: the pivot of the augmentation
    np.testing.assert_array_equal(blind.lidars["top"].ego_from_sensor.matrix, cloud().ego_from_sensor.matrix)


def config(**keys) -> TrainingConfig:
    return TrainingConfig.model_validate({"data": CityConfig(), "steps": 4, "batch_size": 3, "workers": 0, **keys})


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_the_step_alone(workers):
    start = list(itertools.islice(batches(config(workers=workers), Shapes(), NEEDS, ALONE, 0), 4))
    later = list(itertools.islice(batches(config(), Shapes(), NEEDS, ALONE, 2), 2))
    for a, b in zip(itertools.chain(*start[2:]), itertools.chain(*later), strict=True):
        assert a[0].token == b[0].token
        np.testing.assert_array_equal(a[0].lidars["top"].xyz, b[0].lidars["top"].xyz)
        np.testing.assert_array_equal(a[0].cameras["front"].rgb, b[0].cameras["front"].rgb)
        np.testing.assert_array_equal(a[1].boxes.center, b[1].boxes.center)
    assert not np.array_equal(start[0][0][1].boxes.center, Shapes().truth(0).boxes.center)  # augmented


def test_workers_end_without_a_word(capfd):
    """Broken off while they hand over samples of some megabytes."""
    for count in (1, 3):
        stream = batches(config(workers=2), Shapes(points=200_000), NEEDS, ALONE, 0)
        for _ in range(count):
            next(stream)
        stream.close()
    assert "terminate called" not in (said := capfd.readouterr().err) and "Aborted" not in said


def test_a_sample_without_truth_is_an_error():
    class Test(Shapes):
        def truth(self, i):
            return None

    with pytest.raises(DataError, match=r"sample 's\d+'|sample s\d+ has no truth to learn from"):
        next(batches(config(), Test(), NEEDS, ALONE, 0))
    with pytest.raises(DataError, match="no sample of the data set has a box"):
        next(batches(config(class_balanced=True), Test(), NEEDS, ALONE, 0))


SMALL = CityConfig(scenes=3, key_frames=3, cameras=("front",), radars=(), occupancy=None, image_size=(64, 32))


def stream(place=ALONE, **keys):
    settings = StreamConfig(**{"pool": 2, "reuse": 2, "per_scene": 2, "together": 1, **keys})
    return CityStream(SMALL, NEEDS, settings, AugmentConfig(), 0, place)


@pytest.mark.slow
def test_the_city_is_drawn_again_and_augmented_anew():
    pairs = [p.open() for p in itertools.islice(stream(refresh=False), 8)]
    again = [p.open() for p in itertools.islice(stream(refresh=False), 8)]
    tokens = [sample.token for sample, _ in pairs]
    assert len(set(tokens)) <= 2 and tokens[0] == tokens[1]  # a pool of two, filled one by one
    assert len({float(truth.boxes.center.sum()) for _, truth in pairs}) == 8
    for (a, _), (b, _) in zip(pairs, again, strict=True):
        np.testing.assert_array_equal(a.lidars["top"].xyz, b.lidars["top"].xyz)


@pytest.mark.slow
def test_processes_simulate_different_streets():
    first, second = (next(iter(stream(Place(rank, 2, torch.device("cpu"))))).open()[0].token for rank in range(2))
    assert first.split("-")[:2] != second.split("-")[:2]


def test_trainings_that_share_a_folder_share_its_streets(tmp_path):
    def tokens(place, needs):
        city = CityStream(
            SMALL, needs, StreamConfig(pool=2, per_scene=1, together=1, folder=tmp_path), AugmentConfig(), 0, place
        )
        return [p.open()[0] for p in itertools.islice(city, 4)]

    seen = tokens(ALONE, NEEDS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    blind = tokens(Place(1, 2, torch.device("cpu")), Needs(cameras=("front",)))  # nothing is simulated again
    assert {s.token for s in blind} <= {s.token for s in seen} | {p.stem for p in tmp_path.glob("*.safetensors")}
    assert all(len(s.lidars["top"]) for s in seen) and not any(len(s.lidars["top"]) for s in blind)
