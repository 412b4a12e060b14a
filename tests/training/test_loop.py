from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from stand_in import Centroid, Overflowing, Shapes

from perception.config import Config
from perception.errors import ConfigError, DataError, PerceptionError
from perception.synthetic.city import CityConfig
from perception.training.config import OptimiserConfig, TrainingConfig
from perception.training.data import batches
from perception.training.distributed import Place
from perception.training.loop import Training

ALONE = Place(0, 1, torch.device("cpu"))
HERE = Path(__file__).parent


def config(steps=30, **keys) -> TrainingConfig:
    settings = {
        "data": CityConfig(),
        "steps": steps,
        "batch_size": 3,
        "workers": 0,
        "log_every": 1,
        "tensorboard": False,
    }
    return TrainingConfig.model_validate({**settings, "optimiser": OptimiserConfig(lr=3e-3, clip_norm=10), **keys})


def start(folder: Path, settings: TrainingConfig, resume=False, report=lambda p: None, **network) -> Training:
    torch.manual_seed(1 if not resume else 99)
    return Training(Centroid(**network), settings, ALONE, folder, resume=resume, report=report)


def run(training: Training, **keys) -> bool:
    return training.run(batches(training.config, Shapes(), Centroid.needs, ALONE, training.step), **keys)


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line)["losses"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_training_learns(tmp_path):
    assert run(start(tmp_path, config(300, augment=None, optimiser=OptimiserConfig(lr=1e-2, clip_norm=100))))
    curve = [sum(line.values()) for line in losses(tmp_path)]
    assert len(curve) == 300
    assert sum(curve[-20:]) < 0.1 * sum(curve[:20])


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_resumed_training_follows_the_same_curve_to_the_bit(tmp_path, average):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = start(whole, config(average=average))
    run(first)
    settings = config(average=average, checkpoint_every=11)
    broken = start(parts, settings)
    stream = batches(settings, Shapes(), Centroid.needs, ALONE, 0)
    with pytest.raises(PerceptionError, match="the data ended"):
        broken.run(itertools.islice(stream, 17))  # the last checkpoint is of step 11
    resumed = start(parts, settings, resume=True)
    assert resumed.step == 11
    assert run(resumed)
    assert losses(parts)[:17] == losses(whole)[:17]
    assert losses(parts)[17:] == losses(whole)[11:]
    for name, value in first.weights.items():
        torch.testing.assert_close(resumed.weights[name], value, rtol=0, atol=0)


def test_the_moving_average_is_what_is_saved(tmp_path):
    seen = []
    training = start(
        tmp_path, config(4, average=0.75), report=lambda p: seen.append(training.network.head.bias.detach().clone())
    )
    run(training)
    expected = seen[0]
    for bias in seen[1:]:
        expected = 0.75 * expected + 0.25 * bias
    torch.testing.assert_close(training.weights["head.bias"], expected)
    assert not torch.equal(training.weights["head.bias"], training.network.head.bias)


def test_what_is_frozen_stays(tmp_path):
    training = start(tmp_path, config(5, freeze=("stem", "norm")))
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    run(training)
    after = training.network.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head.weight", "head.bias", "norm.num_batches_tracked"}


def test_a_limit_of_time_stops_with_a_checkpoint(tmp_path):
    training = start(tmp_path, config(10_000))
    assert not run(training, minutes=0.01)
    assert 0 < training.step < 10_000
    assert start(tmp_path, config(10_000), resume=True).step == training.step


def test_a_schedule_that_runs_out_of_time_ends_with_the_smallest_rate(tmp_path):
    seen = []
    training = start(tmp_path, config(10_000, minutes=0.03), report=lambda p: seen.append(p.lr_factor))
    assert run(training)
    assert max(seen) > 7 and seen[-1] < 0.5 and training.step < 10_000


def test_bfloat16_learns_in_float32_weights(tmp_path):
    training = start(tmp_path, config(precision="bfloat16"))
    assert run(training)
    assert training.network.head.weight.dtype == torch.float32


@pytest.mark.parametrize("what", ["gradient", "statistics"])
def test_a_step_that_overflows_leaves_no_trace_but_its_count(tmp_path, what):
    seen, states = [], []

    def report(progress):
        seen.append(progress.overflows)
        own, average = training.network.state_dict(), training.average.state_dict()
        states.append({n: v.clone() for n, v in {**own, **average}.items() if not n.endswith("num_batches_tracked")})

    training = Training(Overflowing(what), config(3, average=0.9), ALONE, tmp_path, report=report)
    assert run(training)
    assert seen == [0, 1, 1]
    first, second, third = states
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert not torch.equal(second[name], third[name]) and torch.isfinite(third[name]).all(), name


def test_failures_say_what_and_where(tmp_path):
    run(start(tmp_path, config(3)))
    other = config(3, batch_size=4, optimiser=OptimiserConfig(lr=1e-3, clip_norm=10))
    with pytest.raises(ConfigError, match=r"pt: of another configuration, by training.batch_size, training.opti\w+.lr"):
        start(tmp_path, other, resume=True)
    start(tmp_path, config(3, log_every=2), resume=True)  # how often to write may differ
    with pytest.raises(DataError, match=r"checkpoint.pt does not fit the network: .* unexpected: norm.weight"):
        start(tmp_path, config(3), resume=True, normalised=False)
    with pytest.raises(DataError, match=r"nowhere.checkpoint.pt: No such file.*\n.*without --resume, or .* --out"):
        start(tmp_path / "nowhere", config(3), resume=True)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError) as raised:
        start(tmp_path, config(3), resume=True)
    assert raised.value.what == f"{path}: no checkpoint of a training, or cut short", "without torch's text"

    class Endless(Centroid):
        def loss(self, outputs, targets):
            return {"x": outputs.sum() * float("nan")}

    with pytest.raises(PerceptionError, match=r"step 1: x is not finite\n.*lower training.optimiser.lr"):
        run(Training(Endless(), config(3), ALONE, tmp_path / "endless"))


REFUSED = "holds the checkpoint of a training\n  --resume goes on from it; another --out starts anew"


def test_a_training_is_not_started_over_another(tmp_path):
    run(start(tmp_path, config(3)))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError) as raised:
        start(tmp_path, config(3))
    assert str(raised.value) == f"{tmp_path}: {REFUSED}"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "checkpoint.pt").unlink()
    assert run(start(tmp_path, config(3))), "a log alone is none"


def test_a_training_of_another_network_is_not_resumed(tmp_path):
    class NetworkConfig(Config):
        dropout: float = 0.1
        weights: Path | None = None

    def begin(resume: bool, **settings) -> Training:
        predictor = NetworkConfig(**settings)
        return Training(
            Centroid(dropout=predictor.dropout), config(3), ALONE, tmp_path, predictor=predictor, resume=resume
        )

    run(begin(resume=False))
    with pytest.raises(ConfigError, match=r"pt: of another configuration, by predictor.dropout\n.*was started with"):
        begin(resume=True, dropout=0.3)
    begin(resume=True, weights=Path("elsewhere"))  # not what a training begins with


def test_tensorboard_gets_every_term(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(start(tmp_path, config(6, log_every=2, tensorboard=True)))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/x")] == [2, 4, 6]
    assert events.Scalars("loss/y")[-1].value == pytest.approx(losses(tmp_path)[-1]["y"])


def launch(processes: int, folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "process.py"), str(folder), *arguments]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_learn_what_one_with_the_whole_batch_does(tmp_path):
    for processes, size in ((1, 4), (2, 2)):
        assert launch(processes, tmp_path / str(processes), "--batch-size", str(size)).wait(120) == 0
    one, two = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in "12")
    assert one["step"] == two["step"] == 8 and len(two["generators"]) == 2
    for name, value in one["network"].items():
        torch.testing.assert_close(two["network"][name], value, rtol=1e-5, atol=1e-6)
    for a, b in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_step_that_overflows_in_one_process_is_left_out_in_all(tmp_path):
    assert launch(2, tmp_path, "--overflow").wait(120) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]  # of the other process
    assert [line["overflows"] for line in lines] == [0, *[1] * 7]
    there = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in there["network"].values())


def test_processes_refuse_alike_where_only_the_leading_one_sees_a_checkpoint(tmp_path):
    """As on hosts with disks of their own: none may wait for another for ever."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "checkpoint.pt").touch()
    told = launch(2, tmp_path, "--own-folder").communicate(timeout=120)[0]
    for rank in range(2):
        assert f"{tmp_path / str(rank)}: {REFUSED}" in told


@pytest.mark.slow
def test_sigterm_stops_both_processes_with_a_checkpoint_that_resumes(tmp_path):
    running = launch(2, tmp_path, "--steps", "100000")
    for line in running.stdout:
        if line.startswith("step 3"):
            running.send_signal(signal.SIGTERM)
            break
    running.communicate(timeout=60)
    there = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 3 <= there["step"] < 100_000
    assert len(losses(tmp_path)) == there["step"]
