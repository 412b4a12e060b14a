"""The endless stream: the same by seed, over processes too; replay gives what was made, and says what failed."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace

import builders
import numpy as np
import pytest
import torch

from perception.errors import PerceptionError
from perception.synthetic.city import City, CityConfig
from perception.synthetic.stream import Pair, Replay, fresh
from perception.types import Sample, Truth

TINY = CityConfig(seed=3, scenes=2, key_frames=2, image_size=(64, 36), cameras=("front",), radars=(), occupancy=None)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def same(a: Pair, b: Pair) -> bool:
    return (
        a[0].token == b[0].token
        and np.array_equal(a[0].lidars["top"].xyz, b[0].lidars["top"].xyz)
        and np.array_equal(a[0].cameras["front"].rgb, b[0].cameras["front"].rgb)
        and np.array_equal(a[1].boxes.center, b[1].boxes.center)
        and np.array_equal(a[1].depth["front"], b[1].depth["front"])
    )


def take(stream: Iterator[Pair], count: int) -> list[Pair]:
    return list(itertools.islice(stream, count))


def test_the_stream_is_the_city_in_turn_and_again_for_ever():
    city = City(TINY.model_copy(update={"scenes": 1}))
    pairs = take(fresh(city.config), 5)
    assert sorted(s.token for s, _ in pairs[:2]) == sorted(s.token for s, _ in pairs[2:4]) == city.tokens
    for sample, truth in pairs[1:3]:
        i = city.tokens.index(sample.token)
        assert same((sample, truth), (city[i], city.truth(i)))


def test_key_frames_measured_together_are_those_measured_one_by_one():
    config = TINY.model_copy(update={"radars": None, "sweeps": 2})
    together, alone = take(fresh(config, together=2), 2), take(fresh(config), 2)
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    for (a, _), (b, _) in zip(together, alone, strict=True):
        assert all(np.array_equal(a.radars[r].xyz, b.radars[r].xyz) for r in a.radars)


def test_other_seeds_are_other_streets():
    a, b = (next(fresh(TINY.model_copy(update={"seed": seed}))) for seed in (3, 4))
    assert len(a[0].lidars["top"]) != len(b[0].lidars["top"])


def test_workers_give_the_same_stream_with_their_scenes_interleaved():
    config = TINY.model_copy(update={"cameras": ()})
    city, pairs = City(config), take(fresh(config, workers=2), 6)
    assert [s.token[:9] for s, _ in pairs] == ["city-0003", "city-0004"] * 3
    assert not multiprocessing.active_children(), "the workers ended with the stream"
    for sample, truth in pairs[:4]:
        i = city.tokens.index(sample.token)
        assert np.array_equal(sample.lidars["top"].xyz, city[i].lidars["top"].xyz)
        assert np.array_equal(truth.point_label["top"].label, city.truth(i).point_label["top"].label)


def made(count: int) -> Iterator[Pair]:
    for n in range(count):
        yield Sample(n, token=str(n)), Truth()


def endless() -> Iterator[Pair]:
    for n in itertools.count():
        yield Sample(n, token=str(n)), Truth()


def test_replay_draws_all_it_holds_in_turn_augmented():
    def later(sample: Sample, truth: Truth) -> Pair:
        return replace(sample, stamp_ns=sample.stamp_ns + 1000), truth

    stream = endless()
    with Replay(stream, size=5, augment=later, seed=1, refresh=False) as pool:
        drawn = [next(pool)[0] for _ in range(20)]
    assert all(s.stamp_ns == int(s.token) + 1000 for s in drawn)
    rounds = [[s.token for s in drawn[k : k + 5]] for k in range(0, 20, 5)]
    assert all(sorted(r) == list("01234") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1, "shuffled anew"
    with Replay(endless(), size=5, seed=1, refresh=False) as again:
        assert [next(again)[0].token for _ in range(20)] == [s.token for s in drawn]
    assert next(stream, None) is None, "generated once: the stream is closed"


def test_replay_is_refreshed_within_its_bound():
    taken = []

    def counted() -> Iterator[Pair]:
        for pair in endless():
            taken.append(pair[0].token)
            yield pair

    with Replay(counted(), size=3) as pool:
        seen = set()
        while len(seen) < 12:
            seen.add(next(pool)[0].token)
            assert len(pool._pool) == 3
    assert len(taken) >= 12


def test_a_stream_that_fails_is_an_error_when_drawn():
    def failing() -> Iterator[Pair]:
        yield from made(2)
        raise PerceptionError("city: no room for a street", "ask for another seed")

    with pytest.raises(PerceptionError, match="2 of 3 samples: city: no room for a street"), Replay(failing(), 3) as r:
        next(r)
    with pytest.raises(PerceptionError, match="1 of 2 samples: the stream ended"), Replay(made(1), 2) as r:
        next(r)
    with pytest.raises(ValueError, match="got 0"):
        Replay(made(1), 0)


@pytest.mark.parametrize(
    ("seed", "message"), [(0, "worker 0 failed: no street at seed 0"), (1, "worker 0 ended unexpectedly, exit code 7")]
)
def test_a_worker_that_fails_is_an_error_with_its_message(seed, message):
    stream = fresh(builders.BrokenCityConfig(**{**TINY.model_dump(), "seed": seed}), workers=1)
    with pytest.raises(PerceptionError, match=message):
        next(stream)


@pytest.mark.gpu
def test_cuda_key_frames_together_are_those_one_by_one():
    config = TINY.model_copy(update={"device": "cuda", "radars": None, "sweeps": 2, "cameras": None})
    together, alone = take(fresh(config, together=2), 2), take(fresh(config), 2)
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
