"""Occupancy metrics against plain loops over voxels, hand-counted grids and properties."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.datasets import occ3d, omnihd_occupancy, openoccupancy, semantickitti_voxels, surroundocc
from perception.errors import DataError
from perception.evaluation.occupancy import (
    BENCHMARKS,
    OCC3D,
    OCC3D_LIDAR,
    OMNIHD,
    OPENOCCUPANCY,
    SEMANTICKITTI,
    SURROUNDOCC,
    ConfusionMatrix,
    OccupancyBenchmark,
    OccupancyEvaluator,
    score_confusion,
)
from perception.types import IGNORE_LABEL, OccupancyGrid3D, Pose, VoxelGrid


def names(benchmark: OccupancyBenchmark) -> tuple[str, ...]:
    return tuple(f"class{c}" for c in range(benchmark.num_classes))


def occupancy(label, benchmark, observed=None, voxel_m=0.5, ego_from_grid=None):
    label = np.asarray(label, np.uint8)
    grid = VoxelGrid((0.0, 0.0, 0.0), (voxel_m,) * 3, label.shape, ego_from_grid or Pose.identity())
    return OccupancyGrid3D(grid, label, names(benchmark), benchmark.free_label, 0, observed=observed or {})


def line(*labels):
    """A grid of one row of voxels."""
    return np.array(labels, np.uint8).reshape(-1, 1, 1)


def evaluate(benchmark, *frames):
    evaluator = OccupancyEvaluator(benchmark)
    for prediction, truth, *observed in frames:
        evaluator.update(
            occupancy(prediction, benchmark), occupancy(truth, benchmark, observed[0] if observed else None)
        )
    return evaluator.score()


# The independent implementation: sets of voxels, one class at a time, as the papers define the metrics.


def plain_score(frames, scored, free, empty_union):
    """(class IoU, mIoU, SC IoU, precision, recall) of frames [(prediction, truth, counted)] of nested voxel lists."""
    predicted, true = {}, {}
    for f, (prediction, truth, counted) in enumerate(frames):
        for x, y, z in np.ndindex(*truth.shape):
            if truth[x, y, z] == 255 or not counted[x, y, z]:
                continue
            predicted.setdefault(int(prediction[x, y, z]), set()).add((f, x, y, z))
            true.setdefault(int(truth[x, y, z]), set()).add((f, x, y, z))

    def over(a, b):
        return len(a) / len(b) if b else empty_union

    iou = []
    for c in scored:
        p, t = predicted.get(c, set()), true.get(c, set())
        iou.append(over(p & t, p | t))
    claimed = set().union(*(v for c, v in predicted.items() if c != free))
    occupied = set().union(*(v for c, v in true.items() if c != free))
    present = [v for v in iou if not math.isnan(v)]
    return (
        iou,
        sum(present) / len(present) if present else math.nan,
        over(claimed & occupied, claimed | occupied),
        over(claimed & occupied, claimed),
        over(claimed & occupied, occupied),
    )


PLAIN_RULES = {  # name: scored labels, free label, mask, IoU of an absent class
    "semantickitti": (range(1, 20), 0, None, 0.0),
    "openoccupancy": (range(1, 17), 0, None, math.nan),
    "surroundocc": (range(1, 17), 0, None, math.nan),
    "occ3d": (range(17), 17, "camera", math.nan),
    "occ3d_lidar": (range(17), 17, "lidar", math.nan),
    "omnihd": (range(1, 12), 0, None, math.nan),
}


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("variety", [3, 100], ids=["few classes", "all classes"])
def test_agrees_with_plain_sets(name, variety):
    benchmark = BENCHMARKS[name]
    scored, free, mask, empty_union = PLAIN_RULES[name]
    rng = np.random.default_rng(7)
    labels = np.unique([free, *list(scored)[: variety - 1]])
    evaluator, frames = OccupancyEvaluator(benchmark), []
    for _ in range(3):
        truth = rng.choice(labels, (5, 6, 4)).astype(np.uint8)
        prediction = np.where(rng.random(truth.shape) < 0.6, truth, rng.choice(labels, truth.shape)).astype(np.uint8)
        truth[rng.random(truth.shape) < 0.1] = IGNORE_LABEL
        masks = {kind: rng.random(truth.shape) < 0.5 for kind in ("lidar", "camera")}
        evaluator.update(occupancy(prediction, benchmark), occupancy(truth, benchmark, masks))
        frames.append((prediction, truth, masks[mask] if mask else np.ones(truth.shape, bool)))
    iou, miou, sc_iou, precision, recall = plain_score(frames, scored, free, empty_union)
    score = evaluator.score()
    np.testing.assert_allclose(score.iou, iou, rtol=1e-12, equal_nan=True)
    np.testing.assert_allclose(
        [score.miou, score.sc_iou, score.sc_precision, score.sc_recall], [miou, sc_iou, precision, recall], rtol=1e-12
    )
    assert score.frames == 3
    assert score.voxels == sum(int((counted & (truth != 255)).sum()) for _, truth, counted in frames)
    assert len(score.classes) == len(scored) == len(score.iou)


def test_semantickitti_by_hand():
    # truth:      1 1 1 0 2 ignored; prediction: 1 2 0 1 2 5
    score = evaluate(SEMANTICKITTI, (line(1, 2, 0, 1, 2, 5), line(1, 1, 1, 0, 2, IGNORE_LABEL)))
    assert score.iou[0] == pytest.approx(1 / 4)  # one hit of three true and two claimed
    assert score.iou[1] == pytest.approx(1 / 2)
    assert score.miou == pytest.approx((1 / 4 + 1 / 2) / 19)  # the 17 absent classes count as zero
    assert score.sc_iou == pytest.approx(3 / 5)  # both occupied: voxels 0, 1, 4; either: 0, 1, 2, 3, 4
    assert score.sc_precision == pytest.approx(3 / 4)
    assert score.sc_recall == pytest.approx(3 / 4)
    assert (score.frames, score.voxels) == (1, 5)


@pytest.mark.parametrize("benchmark", [OPENOCCUPANCY, SURROUNDOCC, OMNIHD])
def test_absent_classes_are_left_out_of_the_mean(benchmark):
    score = evaluate(benchmark, (line(1, 2, 0, 1, 2, 5), line(1, 1, 1, 0, 2, IGNORE_LABEL)))
    assert score.miou == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert math.isnan(score.iou[2])


def test_occ3d_masks_and_its_free_label():
    truth, prediction = line(0, 17, 3, 3), line(0, 0, 3, 17)
    masks = {"camera": line(1, 0, 1, 1).astype(bool), "lidar": line(1, 1, 0, 0).astype(bool)}
    camera = evaluate(OCC3D, (prediction, truth, masks))
    assert camera.iou[0] == 1.0  # `others` is a class of its own; the false one lies outside the mask
    assert camera.iou[3] == pytest.approx(1 / 2)
    assert (camera.miou, camera.sc_iou, camera.voxels) == (pytest.approx(3 / 4), pytest.approx(2 / 3), 3)
    lidar = evaluate(OCC3D_LIDAR, (prediction, truth, masks))
    assert (lidar.iou[0], lidar.miou, lidar.voxels) == (pytest.approx(1 / 2), pytest.approx(1 / 2), 2)


def test_frames_are_summed_before_dividing():
    score = evaluate(OMNIHD, (line(1, 1, 1, 1), line(1, 1, 1, 1)), (line(0, 0, 0, 0), line(1, 0, 0, 0)))
    assert score.iou[0] == pytest.approx(4 / 5)  # and not the mean of 1 and 0


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda b: b.name)
def test_truth_against_itself_is_perfect(benchmark):
    label = np.arange(3 * benchmark.num_classes).reshape(3, -1, 1) % benchmark.num_classes
    everywhere = np.ones(label.shape, bool)
    score = evaluate(benchmark, (label, label, {"lidar": everywhere, "camera": everywhere}))
    assert set(score.iou) == {1.0}
    assert (score.miou, score.sc_iou, score.sc_precision, score.sc_recall) == (1.0, 1.0, 1.0, 1.0)
    assert dict(score.rows())["mIoU"] == 1.0


@pytest.mark.parametrize(
    ("benchmark", "layout"),
    [
        (SEMANTICKITTI, semantickitti_voxels),
        (OPENOCCUPANCY, openoccupancy),
        (SURROUNDOCC, surroundocc),
        (OCC3D, occ3d),
        (OMNIHD, omnihd_occupancy),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_rules_fit_the_truths_that_are_read(benchmark, layout):
    label = np.arange(len(layout.CLASSES), dtype=np.uint8).reshape(-1, 1, 1)
    grid = VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), label.shape, Pose.identity())
    seen = {"camera": label >= 0}
    truth = OccupancyGrid3D(grid, label, layout.CLASSES, layout.FREE_LABEL, 0, observed=seen)
    evaluator = OccupancyEvaluator(benchmark)
    evaluator.update(truth, truth)
    assert evaluator.score().miou == 1.0
    assert set(layout.CLASSES) - set(evaluator.score().classes) == {"free"}


labels = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11) | st.just(255)), min_size=1, max_size=40)


@settings(max_examples=60)
@given(labels, st.randoms())
def test_order_of_voxels_does_not_matter_and_scores_are_fractions(pairs, rng: random.Random):
    prediction, truth = zip(*pairs, strict=True)
    shuffled = rng.sample(pairs, len(pairs))
    score = evaluate(OMNIHD, (line(*prediction), line(*truth)))
    again = evaluate(OMNIHD, (line(*(p for p, _ in shuffled)), line(*(t for _, t in shuffled))))
    np.testing.assert_array_equal(list(score.metrics().values()), list(again.metrics().values()))
    finite = [v for v in score.metrics().values() if not math.isnan(v)]
    assert all(0 <= v <= 1 for v in finite)
    if not math.isnan(score.sc_iou):
        assert score.sc_iou <= min(score.sc_precision, score.sc_recall) + 1e-12 or score.sc_iou == 0


@settings(max_examples=30)
@given(st.lists(labels, min_size=3, max_size=3))
def test_merging_workers_is_associative_and_equals_one_worker(frames):
    def worker(*some):
        evaluator = OccupancyEvaluator(OMNIHD)
        for pairs in some:
            prediction, truth = zip(*pairs, strict=True)
            evaluator.update(occupancy(line(*prediction), OMNIHD), occupancy(line(*truth), OMNIHD))
        return evaluator

    a, b, c = (worker(f) for f in frames)
    together = worker(*frames).matrix
    for merged in ((a + b) + c, a + (b + c), c + a + b, OccupancyEvaluator(OMNIHD) + a + b + c):
        assert torch.equal(merged.matrix.counts, together.counts)
        assert merged.matrix.frames == 3
        merged.score()


def test_numpy_and_torch_of_any_integer_type_agree():
    rng = np.random.default_rng(0)
    prediction, truth = rng.integers(0, 4, (2, 9, 8, 7)).astype(np.uint8)
    truth[0, 0] = IGNORE_LABEL
    counted = rng.random(truth.shape) < 0.7
    first, second = ConfusionMatrix(4), ConfusionMatrix(4)
    first.update(prediction, truth, counted)
    second.update(torch.from_numpy(prediction).int(), torch.from_numpy(truth), torch.from_numpy(counted))
    assert first.counts.dtype == torch.int64
    assert torch.equal(first.counts, second.counts)
    assert int(first.counts[2, 3]) == int(((truth == 2) & (prediction == 3) & counted).sum())


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    rng = np.random.default_rng(0)
    prediction, truth = rng.integers(0, 17, (2, 512, 512, 40)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.05] = IGNORE_LABEL
    cpu, cuda = ConfusionMatrix(17), ConfusionMatrix(17, "cuda")
    cpu.update(prediction, truth)
    cuda.update(torch.from_numpy(prediction).cuda(), truth)
    assert torch.equal(cpu.counts, cuda.counts.cpu())
    assert torch.equal((cuda + cpu).counts.cpu(), 2 * cpu.counts)
    classes = names(OPENOCCUPANCY)
    assert score_confusion(cpu, OPENOCCUPANCY, classes) == score_confusion(cuda, OPENOCCUPANCY, classes)


def test_a_real_occ3d_truth_scores_perfectly_against_itself(shared_data):
    with np.load(shared_data / "occ3d_nuscenes" / "labels.npz", allow_pickle=False) as arrays:
        label = arrays["semantics"]
        masks = {kind: arrays[f"mask_{kind}"].astype(bool) for kind in ("lidar", "camera")}
    score = evaluate(OCC3D, (label, label, masks))
    assert (score.miou, score.sc_iou, score.voxels) == (1.0, 1.0, 43_355)
    assert evaluate(OCC3D_LIDAR, (label, label, masks)).voxels == 56_601


def test_another_resolution_is_an_error():
    small = np.zeros((4, 4, 2), np.uint8)
    with pytest.raises(
        DataError, match=r"prediction has \(4, 4, 2\) voxels of .*, the truth \(8, 8, 4\)(?s:.)*truth's grid"
    ):
        evaluate(OMNIHD, (small, np.zeros((8, 8, 4), np.uint8)))


@pytest.mark.parametrize(
    "grid",
    [{"voxel_m": 0.4}, {"ego_from_grid": Pose.from_yaw(0.0, (0.0, 0.0, 1.84))}, {"ego_from_grid": Pose.from_yaw(0.3)}],
)
def test_a_grid_elsewhere_is_an_error(grid):
    label = np.zeros((4, 4, 2), np.uint8)
    with pytest.raises(DataError, match=r"away from the truth's at a corner(?s:.)*ego_from_grid"):
        OccupancyEvaluator(OMNIHD).update(occupancy(label, OMNIHD, **grid), occupancy(label, OMNIHD))


def test_a_grid_next_to_the_truths_is_the_same():
    label = np.zeros((4, 4, 2), np.uint8)
    near = occupancy(label, OMNIHD, ego_from_grid=Pose.from_yaw(1e-4, (0.01, 0.0, 0.0)))
    OccupancyEvaluator(OMNIHD).update(near, occupancy(label, OMNIHD))


def test_wrong_inputs_are_named():
    label = np.zeros((2, 2, 2), np.uint8)
    with pytest.raises(DataError, match="semantickitti: expected a truth of 20 classes with free = 0, got 12"):
        OccupancyEvaluator(SEMANTICKITTI).update(occupancy(label, OMNIHD), occupancy(label, OMNIHD))
    with pytest.raises(DataError, match="the prediction's classes"):
        OccupancyEvaluator(OMNIHD).update(occupancy(label, SEMANTICKITTI), occupancy(label, OMNIHD))
    with pytest.raises(DataError, match=r"occ3d: scores the voxels that the camera observed, .* \(none\)"):
        evaluate(OCC3D, (label, label))
    with pytest.raises(DataError, match="prediction: label 255 in 8 voxels that count, for 12 classes"):
        evaluate(OMNIHD, (label + IGNORE_LABEL, label))
    with pytest.raises(DataError, match="truth: label 12 in 1 voxels"):
        ConfusionMatrix(12).update(line(0), line(12))
    with pytest.raises(DataError, match=r"prediction has \(1, 1, 1\) voxels, the truth \(2, 1, 1\)"):
        ConfusionMatrix(12).update(line(0), line(0, 0))
    with pytest.raises(DataError, match="omnihd: no frame was scored"):
        OccupancyEvaluator(OMNIHD).score()
    with pytest.raises(ValueError, match="12 and 20 classes cannot be added"):
        ConfusionMatrix(12) + ConfusionMatrix(20)
    with pytest.raises(ValueError, match="omnihd and occ3d cannot be added"):
        OccupancyEvaluator(OMNIHD) + OccupancyEvaluator(OCC3D)
    with pytest.raises(ValueError, match="omnihd: 12 classes, got a matrix of 20"):
        score_confusion(ConfusionMatrix(20), OMNIHD, names(SEMANTICKITTI))


def test_an_ignored_prediction_does_no_harm_where_nothing_counts():
    score = evaluate(OMNIHD, (line(1, IGNORE_LABEL), line(1, IGNORE_LABEL)))
    assert (score.miou, score.voxels) == (1.0, 1)
