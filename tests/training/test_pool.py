from __future__ import annotations

import numpy as np
import pytest
from builders import boxes, camera, cloud

from perception.augment import zoom_image
from perception.errors import DataError
from perception.training.pool import SharedPool, read_pair, write_pair
from perception.types import Sample, Truth


def sample(token: str = "a") -> Sample:
    cameras = {"front": camera(), "back": zoom_image(camera(), 0.8)}
    return Sample(7, {"top": cloud(5)}, {"front": cloud(6)}, cameras, token=token)


def test_a_pair_comes_back_as_it_was(tmp_path):
    given, truth = sample(), Truth(boxes(velocity=(np.nan, 1.0)))
    write_pair(tmp_path / "a.safetensors", given, truth)
    read, read_truth = read_pair(tmp_path / "a.safetensors")
    assert (read.stamp_ns, read.token) == (7, "a")
    for kind in ("lidars", "radars"):
        for role, there in getattr(given, kind).items():
            back = getattr(read, kind)[role]
            np.testing.assert_array_equal(back.xyz, there.xyz)
            assert back.stamp_ns == there.stamp_ns and set(back.fields) == set(there.fields)
            np.testing.assert_array_equal(back.fields["ring"], there.fields["ring"])
            np.testing.assert_array_equal(back.ego_from_sensor.matrix, there.ego_from_sensor.matrix)
    for role, image in given.cameras.items():
        np.testing.assert_array_equal(read.cameras[role].rgb, image.rgb)
        np.testing.assert_array_equal(read.cameras[role].intrinsic, image.intrinsic)
        assert read.cameras[role].valid_size == image.valid_size
    for name in ("center", "size", "yaw", "velocity", "label", "num_points"):
        np.testing.assert_array_equal(getattr(read_truth.boxes, name), getattr(truth.boxes, name))
    assert read_truth.boxes.classes == truth.boxes.classes


def test_a_street_is_claimed_once_and_pairs_are_found_by_others(tmp_path):
    here, there = SharedPool(tmp_path), SharedPool(tmp_path)
    assert here.claim(3) and not there.claim(3) and there.claim(4)
    here.add((sample("a"), Truth(boxes())))
    assert there.refresh() == 1
    here.add((sample("b"), Truth(boxes())))
    rng = np.random.default_rng(0)
    assert {there.draw(rng)[0].token for _ in range(20)} == {"a"}  # as of the last look
    assert there.refresh() == 2
    assert {there.draw(rng)[0].token for _ in range(20)} == {"a", "b"}


def test_a_foreign_or_cut_file_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"a.safetensors: no pair of sample and truth: .*\n  empty the folder"):
        read_pair(path)
    write_pair(path, sample(), Truth(boxes()))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="no pair of sample and truth"):
        read_pair(path)
