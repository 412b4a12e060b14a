"""The tables of `perception bench ros`."""

from __future__ import annotations

from rich.table import Table

from perception_ros.bench import RosBench


def ros_tables(result: RosBench) -> list[Table]:
    """Delivery by topic, milliseconds by stage."""
    delivery = Table("topic", title="delivered", title_justify="left")
    for column in ("sent", "received", "share"):
        delivery.add_column(column, justify="right")
    for topic, sent in result.sent.items():
        received = result.received.get(topic, 0)
        delivery.add_row(topic, f"{sent:,}", f"{received:,}", f"{100 * received / sent:.1f} %")
    stages = Table("stage", title=f"added to a frame; {result.cores:.2f} cores", title_justify="left")
    for column in ("p50 ms", "p95 ms"):
        stages.add_column(column, justify="right")
    for name, (p50, p95) in result.stages_ms.items():
        stages.add_row(name, f"{p50:.1f}", f"{p95:.1f}")
    fates = Table("sweeps", title="what became of them", title_justify="left")
    fates.add_column("count", justify="right")
    for reason, count in result.fates.items():
        fates.add_row(reason, f"{count:,}")
    return [delivery, stages, fates]
