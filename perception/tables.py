"""Scores, findings and timings as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from perception.bench import BenchRow, CityRate
from perception.doctor import Finding
from perception.evaluation.detection import DetectionScore
from perception.evaluation.localization import LocalizationScore
from perception.evaluation.occupancy import OccupancyScore
from perception.inspection import Row
from perception.weights_conversion import ConversionReport

_STYLE = {"ok": "green", "off": "dim", "warn": "yellow", "fail": "bold red"}


def findings_table(findings: Sequence[Finding]) -> Table:
    """What `doctor` found, the fix under each problem."""
    table = Table("", "part", "found", box=None, pad_edge=False)
    for finding in findings:
        style = _STYLE[finding.status]
        table.add_row(f"[{style}]{finding.status}[/]", finding.name, escape(finding.detail))
        if finding.fix:
            table.add_row("", "", f"[{style}]-> {escape(finding.fix)}[/]")
    return table


def rows_table(rows: Sequence[Row]) -> Table:
    """What `inspect` says of a sample."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(row.name, escape(row.facts) + (f" [yellow]{escape(row.warning)}[/]" if row.warning else ""))
    return table


def conversion_table(report: ConversionReport) -> Table:
    """What became of an official checkpoint's tensors; the dropped ones by reason."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    changed = report.config.model_dump_json(exclude_unset=True)
    table.add_row("", f"{report.source.note}, sha256 {report.source.sha256}")
    table.add_row("", escape(f"configuration: the released one with {changed}; sparse kernels as of {report.layout}"))
    table.add_row(str(len(report.mapped)), "tensors mapped")
    for reason, keys in report.dropped_by_reason().items():
        table.add_row(str(len(keys)), escape(f"dropped, {keys[0]} for one: {reason}"))
    return table


def score_table(score: DetectionScore | OccupancyScore | LocalizationScore) -> Table:
    """The benchmark's numbers, the summary first."""
    if isinstance(score, DetectionScore):
        return _detection(score)
    if isinstance(score, OccupancyScore):
        table = Table(title=f"{score.benchmark}, {score.frames:,} frames", title_justify="left")
        table.add_column("")
        table.add_column("%", justify="right")
        for name, value in score.rows():
            table.add_row(name, _number(100 * value, 2))
        return table
    return _localization(score)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _detection(score: DetectionScore) -> Table:
    title = f"NDS {score.nds:.4f}, mAP {score.mean_ap:.4f}, {score.samples:,} samples"
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for column in ("AP", "ATE m", "ASE", "AOE rad", "AVE m/s", "AAE", "truths", "boxes"):
        table.add_column(column, justify="right")
    for name, ap, errors, truths, predictions in score.rows():
        values = (ap, errors.translation_m, errors.scale, errors.orientation_rad, errors.velocity_mps, errors.attribute)
        table.add_row(name, *(_number(v, 3) for v in values), f"{truths:,}", f"{predictions:,}")
    for part in score.ranges:
        table.add_section()
        name = f"{part.min_m:g} to {part.max_m:g} m, classes present"
        table.add_row(name, _number(part.mean_ap_present, 3))
    return table


def _localization(score: LocalizationScore) -> Table:
    title = f"{score.fixes:,} fixes in {score.frames:,} frames, mean NEES {score.mean_nees:.2f} (6 is honest)"
    table = Table(title=title, title_justify="left")
    table.add_column("error")
    for column in ("median", "mean", "p95", "p99", "max"):
        table.add_column(column, justify="right")
    for name, summary in score.rows():
        values = (summary.median, summary.mean, summary.p95, summary.p99, summary.max)
        table.add_row(name, *(_number(v, 3) for v in values))
    table.add_section()
    for name, value in score.metrics().items():
        if "/" not in name or name.startswith("recall"):
            table.add_row(name, _number(value, 3))
    return table


def bench_table(rows: Sequence[BenchRow]) -> Table:
    """Timings."""
    table = Table(title=rows[0].device if rows else "", title_justify="left")
    for column, justify in (
        ("what", "left"),
        ("size", "right"),
        ("p50 ms", "right"),
        ("p95 ms", "right"),
        ("MiB", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        memory = "" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f}"
        table.add_row(row.name, row.size, f"{row.p50_ms:.2f}", f"{row.p95_ms:.2f}", memory)
    return table


def rates_table(rates: Sequence[CityRate]) -> Table:
    """Samples a second of the city's stream."""
    table = Table("what", "sample", title=rates[0].device if rates else "", title_justify="left")
    table.add_column("samples/s", justify="right")
    for rate in rates:
        table.add_row(rate.name, rate.size, f"{rate.samples_per_s:.1f}")
    return table
