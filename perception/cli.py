"""The `perception` command. Thin: each command reads its arguments, calls the core and prints."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, track

from perception.datasets import dataset_config, open_dataset
from perception.errors import DataError, PerceptionError
from perception.types import Dataset, PointCloud

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(bench_app, name="bench")
weights_app = typer.Typer(no_args_is_help=True, help="Convert the authors' checkpoints, look into weights files.")
app.add_typer(weights_app, name="weights")
out = Console()
err = Console(stderr=True)

SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a configuration key, a.b=value. Repeatable.")
]
RrdOption = Annotated[bool, typer.Option("--rrd", help="Also write sample.rrd for the rerun viewer (extra: rerun).")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:1")]


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. Accepted anywhere.")] = False,
) -> None:
    """LiDAR, camera and radar in; 3D boxes, semantic occupancy and a localized pose out."""


@app.command()
def doctor() -> None:
    """Check this machine: versions, GPU and spconv build, ROS Python, shared memory; each problem with its fix."""
    from perception.doctor import examine
    from perception.tables import findings_table

    findings = examine()
    out.print(findings_table(findings))
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


@app.command()
def inspect(
    source: Annotated[
        Path | None,
        typer.Argument(help="A data set's root, or a configuration (.yaml). Without: a small one is written first."),
    ] = None,
    index: Annotated[int, typer.Option(help="Which sample.")] = 0,
    token: Annotated[str | None, typer.Option(help="Which sample, by its token.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the pictures go.")] = Path("out/inspect"),
    rrd: RrdOption = False,
    open3d: Annotated[bool, typer.Option("--open3d", help="Open an interactive 3D view (extra: viz).")] = False,
    set_: SetOption = None,
) -> None:
    """Look at a sample: counts, ranges, warnings; bird's-eye view, cameras with boxes and points, occupancy as PNG."""
    from perception.inspection import describe
    from perception.tables import rows_table
    from perception.visualize import write_pictures

    dataset = _open(source, set_ or [])
    i = _find(dataset.tokens, index, token)
    sample, truth = dataset[i], dataset.truth(i)
    out.print(f"{type(dataset).__name__}: {len(dataset):,} samples")
    out.print(f"sample {i}, token {sample.token}, stamp {sample.stamp_ns} ns", highlight=False)
    out.print(rows_table(describe(sample, truth)))
    for path in write_pictures(folder, sample, truth):
        out.print(f"wrote {path}", soft_wrap=True, highlight=False)
    if rrd:
        from perception.recording import write_rrd

        out.print(f"wrote {write_rrd(folder / 'sample.rrd', sample, truth)}", soft_wrap=True, highlight=False)
    if open3d:
        from perception.view3d import show

        show(sample, truth)


@app.command("eval")
def evaluate(
    config: Annotated[Path, typer.Argument(help="A configuration (.yaml) with dataset, predictor and benchmark.")],
    data: Annotated[Path | None, typer.Option(help="The data set's root: --set dataset.root=...")] = None,
    weights: Annotated[Path | None, typer.Option(help="The predictor's weights: --set predictor.weights=...")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Score these files (the benchmark's own format) instead of a predictor.")
    ] = None,
    subset: Annotated[bool, typer.Option("--subset", help="Score only the samples that the predictions have.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")] = None,
    device: DeviceOption = "cpu",
    folder: Annotated[Path, typer.Option("--out", help="Where the result file goes.")] = Path("out/eval"),
    set_: SetOption = None,
) -> None:
    """Score predictions by the benchmark's official rules, and write the numbers with all that made them."""
    from perception.evaluation.result import write_result
    from perception.evaluation.run import evaluate as run
    from perception.evaluation.run import load_run_config
    from perception.tables import score_table

    given = {"dataset.root": data, "predictor.weights": weights}
    sets = [f"{key}={value}" for key, value in given.items() if value is not None] + (set_ or [])
    run_config = load_run_config(config, sets)
    score, result = run(
        run_config, folder, predictions=predictions, subset=subset, limit=limit, device=device, progress=_progress
    )
    path = folder / f"{run_config.benchmark}.json"
    write_result(path, result)
    out.print(score_table(score))
    if result.subset:
        out.print(f"[yellow]a part of the split only: {result.samples} of {result.samples_of_split} samples[/]")
    out.print(f"wrote {path}", soft_wrap=True, highlight=False)


@app.command()
def predict(
    source: Annotated[
        Path | None, typer.Argument(help="A bag, or a data set's root. Without: the configuration's, or a demo.")
    ] = None,
    config: Annotated[
        Path, typer.Option(help="A vehicle with systems (configs/vehicle.yaml), or any .yaml with a predictor.")
    ] = Path("configs/vehicle.yaml"),
    systems: Annotated[list[str] | None, typer.Option("--system", help="Only this one. Repeatable.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the files go.")] = Path("out/predict"),
    json: Annotated[bool, typer.Option("--json/--no-json", help="SYSTEM.json of all predictions.")] = True,
    png: Annotated[bool, typer.Option("--png", help="Also SYSTEM/TOKEN/*.png, pictures of each.")] = False,
    rrd: Annotated[bool, typer.Option("--rrd", help="Also SYSTEM.rrd for the rerun viewer (extra: rerun).")] = False,
    weights: Annotated[Path | None, typer.Option(help="The predictor's weights, of the one system that runs.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1, in place of the configuration's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")] = None,
    set_: SetOption = None,
) -> None:
    """Predict on a bag or a data set as the node would: JSON, pictures, a recording. No annotations are needed."""
    from perception.predict import load_jobs, write

    jobs = load_jobs(config, source, systems=systems or (), overrides=set_ or [], device=device, weights=weights)
    for job in jobs:
        written = write(
            job, folder, str(source or config), json=json, png=png, rrd=rrd, limit=limit, progress=_progress
        )
        out.print(f"{job.name}: {written.predictions:,} predictions")
        for without, count in written.degraded.most_common():
            out.print(f"  {count:,} of them without: {without}", style="yellow")
        for path in written.paths:
            out.print(f"wrote {path}", soft_wrap=True, highlight=False)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A configuration (.yaml) with predictor and training.")],
    folder: Annotated[Path, typer.Option("--out", help="Weights, checkpoint and log go here.")] = Path("out/train"),
    device: DeviceOption = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long, with a checkpoint.")] = None,
    set_: SetOption = None,
) -> None:
    """Train a network; on N GPUs: torchrun --nproc-per-node N -m perception train CONFIG --device cuda."""
    from perception.training.config import load_train_config
    from perception.training.run import train as run

    run(
        load_train_config(config, set_ or []),
        folder,
        device,
        resume=resume,
        minutes=minutes,
        report=lambda line: out.print(str(line), soft_wrap=True, highlight=False, markup=False),
    )


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where the pictures and results go.")] = Path("out/demo"),
    rrd: RrdOption = False,
) -> None:
    """Make a small city, draw a sample with its truth, and score the truth against itself by the official tools."""
    from perception.evaluation.result import write_result
    from perception.evaluation.run import RunConfig
    from perception.evaluation.run import evaluate as run
    from perception.predictor import TruthEchoConfig
    from perception.recording import write_rrd
    from perception.visualize import write_pictures

    source = dataset_config(_demo_city(), "the demo city")
    dataset = open_dataset(source)
    for path in write_pictures(folder, dataset[1], dataset.truth(1)):
        out.print(f"wrote {path}", soft_wrap=True, highlight=False)
    if rrd:
        out.print(f"wrote {write_rrd(folder / 'sample.rrd', dataset[1], dataset.truth(1))}", soft_wrap=True)
    boxes = RunConfig(dataset=source, predictor=TruthEchoConfig(output="boxes"), benchmark="nuscenes_detection")
    voxels = RunConfig(dataset=source, predictor=TruthEchoConfig(output="occupancy"), benchmark="occ3d")
    for config, name in ((boxes, "NDS"), (voxels, "mIoU")):
        _, result = run(config, folder, progress=_progress)
        write_result(folder / f"{config.benchmark}.json", result)
        out.print(f"{config.benchmark}: the truth scores {name} {result.metrics[name]:.4f} on {result.samples} samples")


@app.command()
def synth(
    layout: Annotated[
        Literal["nuscenes", "semantickitti", "omnihd", "rosbag"], typer.Argument(help="rosbag is one MCAP a scene.")
    ],
    root: Annotated[Path, typer.Argument(help="The folder to write; nothing in it is overwritten.")],
    train: Annotated[int, typer.Option(help="Training scenes.")] = 1,
    val: Annotated[int, typer.Option(help="Validation scenes, of other seeds.")] = 1,
    key_frames: Annotated[int, typer.Option(help="Key frames of a scene: 2 Hz (SemanticKITTI 10 Hz).")] = 10,
    seed: Annotated[int, typer.Option(help="Of the first training scene.")] = 0,
    size: Annotated[str, typer.Option(help="Image size, WIDTHxHEIGHT.")] = "800x450",
    sweeps: Annotated[bool, typer.Option("--sweeps", help="Images between key frames, 12 Hz.")] = False,
    device: DeviceOption = "cpu",
    workers: Annotated[int, typer.Option(help="Processes; 0 is one a core.")] = 0,
) -> None:
    """Write a synthetic city, every sensor and every truth, in an official layout."""
    from perception.config import validate
    from perception.synthetic.export import ExportConfig, export

    width, _, height = size.partition("x")
    keys = {
        "layout": layout,
        "train": train,
        "val": val,
        "key_frames": key_frames,
        "seed": seed,
        "image_size": (width, height),
        "sweeps": sweeps,
        "device": device,
        "workers": workers,
    }
    with _bar(f"writing {layout}") as advance:
        export(validate(ExportConfig, keys, "the command line"), root, advance)
    out.print(f"wrote {root}", soft_wrap=True, highlight=False)


@weights_app.command("convert")
def convert(
    system: Annotated[str, typer.Argument(help="sparsefusion")],
    file: Annotated[Path, typer.Argument(help="The authors' checkpoint (.pth).")],
    path: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("converted.safetensors"),
    config: Annotated[
        Path | None, typer.Option(help="A configuration (.yaml) whose predictor it fits; else the released one.")
    ] = None,
) -> None:
    """Bring an official checkpoint to our names and layouts; every tensor is mapped, or dropped with a reason."""
    from perception.tables import conversion_table
    from perception.weights_conversion import convert_weights

    out.print(conversion_table(convert_weights(system, file, path, config)))
    out.print(f"wrote {path}", soft_wrap=True, highlight=False)


@weights_app.command("show")
def show_weights(file: Annotated[Path, typer.Argument(help="A weights file (.safetensors).")]) -> None:
    """Print what a weights file says of itself: system, configuration, origin."""
    from perception.weights import read_manifest

    out.print_json(read_manifest(file).model_dump_json())


@bench_app.command("sparse")
def bench_sparse(
    points: Annotated[Path | None, typer.Option(help="A nuScenes .pcd.bin. Without: a sample made here.")] = None,
    device: DeviceOption = "cpu",
    backend: Annotated[
        Literal["torch", "spconv", "triton"] | None, typer.Option(help="Without: all that are installed.")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward instead of inference.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs, after three to warm up.")] = 10,
) -> None:
    """Sparse convolution: the encoder of SECOND over one LiDAR cloud, by backend and number type."""
    import numpy as np
    import torch

    from perception.bench import bench_sparse as bench
    from perception.datasets.nuscenes_files import read_lidar
    from perception.tables import bench_table

    if points:
        xyz, fields = read_lidar(points)
        features = np.concatenate([xyz, fields["intensity"][:, None]], 1)
    else:
        cloud = _city_cloud()
        features = np.concatenate([cloud.xyz, cloud.field("intensity")[:, None]], 1)
    on_gpu = device.startswith("cuda")
    backends: list[Literal["torch", "spconv", "triton"]] = [backend] if backend else ["torch"]
    if on_gpu and not backend:
        backends += [name for name in ("spconv", "triton") if find_spec(name) and not (train and name == "triton")]
    dtypes = (torch.float32, torch.float16) if on_gpu else (torch.float32,)
    out.print(bench_table(bench(features, device, backends=backends, dtypes=dtypes, train=train, runs=runs)))


@bench_app.command("city")
def bench_city(
    device: DeviceOption = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that simulate; 0 is this one.")] = 0,
    together: Annotated[int, typer.Option(min=1, help="Key frames measured in one cast: 4 to 8 suit a GPU.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Timed samples.")] = 50,
    rig: Annotated[
        Literal["nuscenes", "nuscenes_4d", "omnihd"],
        typer.Option(help="nuscenes_4d: six 4D radars; omnihd: and 128 beams."),
    ] = "nuscenes_4d",
) -> None:
    """The synthetic city as a stream: ten LiDAR sweeps, six 704x256 images, radars, occupancy; samples a second."""
    from perception.bench import bench_city as bench
    from perception.synthetic.city import CityConfig
    from perception.tables import rates_table

    keys = {"scenes": max(1, 2 * workers), "sweeps": 10, "image_size": (704, 256), "rig": rig, "device": device}
    out.print(rates_table(bench(CityConfig.model_validate(keys), workers, together, samples)))


@app.command()
def up(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[LAUNCH FILE] [NAME:=VALUE]...",
            help="A path, or perception (without one), playback, rviz; then the launch file's arguments.",
        ),
    ] = None,
    show_args: Annotated[bool, typer.Option("--show-args", "-s", help="List the launch file's arguments.")] = False,
) -> None:
    """Start the ROS 2 node by a launch file, as `ros2 launch` does: from a bag, on a vehicle, or with a demo."""
    _run_ros("up", [*(words or []), *(["--show-args"] if show_args else [])])


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def play(context: typer.Context) -> None:
    """Publish a bag as if the vehicle drove: recorded QoS, latched /tf_static, /clock; --help lists the options."""
    _run_ros("play", context.args)


@bench_app.command(
    "ros", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench_ros(context: typer.Context) -> None:
    """The ROS 2 node: messages delivered, milliseconds added to a frame, CPU; --help lists the options."""
    _run_ros("bench", context.args)


def _run_ros(module: str, words: Sequence[str]) -> None:
    """Go on as a module of perception_ros: the same process, so that signals and the exit code are its own."""
    if find_spec("perception_ros") is None:
        fix = "source the workspace, or: pip install -e '.[ros]' -e ros2_ws/src/perception_ros"
        raise PerceptionError(f"perception_ros is not installed for {sys.executable}", fix)
    os.execv(sys.executable, [sys.executable, "-m", f"perception_ros.{module}", *words])  # noqa: S606


@bench_app.command("sparsefusion")
def bench_sparsefusion(
    config: Annotated[
        Path | None, typer.Argument(help="A configuration (.yaml). Without: the released one with a ResNet-50.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A .safetensors file. Without: the configuration's, or random ones, as fast.")
    ] = None,
    device: DeviceOption = "cpu",
    samples: Annotated[int, typer.Option(min=1, help="Samples of the city that are predicted in turn.")] = 2,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs, after three to warm up.")] = 20,
    set_: SetOption = None,
) -> None:
    """SparseFusion from point array and decoded images to boxes, stage by stage, one sample at a time."""
    from perception.bench_sparsefusion import bench_network, city_samples
    from perception.bench_sparsefusion import bench_sparsefusion as bench
    from perception.device import usable_device
    from perception.tables import bench_table

    usable_device(device)
    network, of_weights = bench_network(config, weights, set_ or [])
    err.print(of_weights)
    out.print(bench_table(bench(network, city_samples(network.config, samples, device), device, runs)))


def _open(source: Path | None, overrides: list[str]) -> Dataset:
    """The data set at a root, of a configuration's `dataset` keys, or the small one that is written here."""
    from perception.config import apply_override, read_yaml
    from perception.datasets import detect_layout

    if source is None:
        data = _demo_city()
    elif source.suffix in (".yaml", ".yml"):
        data = read_yaml(source)
        data = data.get("dataset", data)
    else:
        data = detect_layout(source)
    for override in overrides:
        apply_override(data, override.removeprefix("dataset."))
    return open_dataset(dataset_config(data, str(source or "the demo city")))


def _demo_city() -> dict[str, Any]:
    """The `dataset` keys of a small city, made on first use."""
    from perception.synthetic.demo import demo_city

    with _bar("making a small city") as advance:
        return demo_city(advance)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, where that is a terminal; else a line a step."""
    with Progress(*Progress.get_default_columns(), console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {what}", completed=done, total=total)
            if not err.is_terminal:
                err.print(f"{title}: {done} of {total}, {what}", highlight=False)

        yield advance


def _city_cloud() -> PointCloud:
    """Ten sweeps of the city's LiDAR."""
    from perception.synthetic.city import City, CityConfig

    keys = {"scenes": 1, "key_frames": 1, "cameras": (), "radars": (), "occupancy": None, "sweeps": 10}
    return City(CityConfig.model_validate(keys))[0].lidars["top"]


def _find(tokens: Sequence[str], index: int, token: str | None) -> int:
    if token is not None:
        if token in tokens:
            return list(tokens).index(token)
        near = difflib.get_close_matches(token, tokens, n=3, cutoff=0.3) or tokens[:3]
        raise DataError(f"no sample with token {token!r} among {len(tokens):,}", f"near ones: {', '.join(near)}")
    if not 0 <= index < len(tokens):
        raise DataError(f"--index {index}: there are {len(tokens):,} samples", "count from 0")
    return index


def _progress(indices: Iterable[int], count: int) -> Iterable[int]:
    return track(indices, description="samples", total=count, console=err, disable=not err.is_terminal)


def main() -> None:
    """Run the command line: what the user can mend is one message (exit 2), anything else is exit 1."""
    debug = "--debug" in sys.argv
    # Set before torch is imported: threads that spin at OpenMP's barriers cost tenfold where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(args=[a for a in sys.argv[1:] if a != "--debug"], prog_name="perception")
    except Exception as error:
        if debug:
            raise
        if isinstance(error, PerceptionError):
            err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise SystemExit(2) from None
        err.print(f"[bold red]internal error:[/] {type(error).__name__}: {escape(str(error))}", soft_wrap=True)
        err.print("  run the same command with --debug for the traceback, and please report it")
        raise SystemExit(1) from None
