"""Cost of watching a decode node to its steps: scrapes of its metrics, and traces.

One long stream of tokens; in turns nobody watches, the metrics are scraped once, and some steps are
traced. What steps took longer, and what CPU time the node used more, than steps of the same turn
that nobody watched, is the cost. A trace costs twice: while steps are recorded, and while its file
is made. CPU time is the steadier measure on a machine that others use too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median, stdev
from typing import Literal

from rich.console import Console
from rich.table import Table

from fluxion_core.lab.benchmark.report import describe_machine

SCRAPE_INTERVAL_SECONDS = 5.0
"""What deploy/prometheus.yml sets."""

TRIM = 0.1
"""Of all windows of a kind, at each end: left out of means, as a shared machine's outliers."""

Kind = Literal["unwatched", "scrape", "record", "file"]

NAMES: dict[Kind, str] = {
    "scrape": f"scrape every {SCRAPE_INTERVAL_SECONDS:g} s",
    "record": "recording",
    "file": "making the file",
}


@dataclass(frozen=True)
class Window:
    """Some steps in a row, from one token's arrival to another's."""

    kind: Kind
    steps: int
    seconds: float
    cpu_seconds: float
    """Of the node, all its threads."""


@dataclass(frozen=True)
class Excess:
    """Cost of a window of one kind above the same number of unwatched steps."""

    milliseconds: float
    """Trimmed mean."""
    error_milliseconds: float
    """Its standard error."""
    share: float
    """Of what it is spread over: the steps between two scrapes, or the window's own."""
    error_share: float


@dataclass(frozen=True)
class WatchCost:
    """Cost of one kind of watching."""

    kind: Kind
    windows: int
    steps: float
    """In a window; mean."""
    wall: Excess
    cpu: Excess


def watch_costs(turns: Sequence[Sequence[Window]]) -> list[WatchCost]:
    """Costs that each kind of watching adds.

    Args:
        turns: windows of every kind in each.
    """
    costs = []
    for kind in NAMES:
        of_kind = [(turn, window) for turn in turns for window in turn if window.kind == kind]
        walls, cpus = [], []
        for turn, window in of_kind:
            seconds, cpu_seconds = unwatched_step(turn)
            walls.append((window.seconds, seconds * window.steps))
            cpus.append((window.cpu_seconds, cpu_seconds * window.steps))
        spread = SCRAPE_INTERVAL_SECONDS if kind == "scrape" else None
        step, cpu_step = (median(value) for value in zip(*map(unwatched_step, turns), strict=True))
        costs.append(
            WatchCost(
                kind,
                len(of_kind),
                mean(window.steps for _, window in of_kind),
                _excess(walls, spread),
                _excess(cpus, spread and spread * cpu_step / step),
            )
        )
    return costs


def unwatched_step(turn: Sequence[Window]) -> tuple[float, float]:
    """Seconds and CPU seconds of a step that nobody watched; means of a turn."""
    free = [window for window in turn if window.kind == "unwatched"]
    steps = sum(window.steps for window in free)
    return (
        sum(window.seconds for window in free) / steps,
        sum(window.cpu_seconds for window in free) / steps,
    )


def telemetry_report(
    console: Console, turns: Sequence[Sequence[Window]], *, tokens: int, policy: str
) -> dict[str, object]:
    """Print what watching costs; return it as plain data.

    Args:
        console: where the table goes.
        turns: see watch_costs.
        tokens: of the prompt.
        policy: of the stream.
    """
    machine, costs = describe_machine(), watch_costs(turns)
    steps, cpu_steps = zip(*map(unwatched_step, turns), strict=True)
    usual, cpu_usual = median(steps) * 1e3, median(cpu_steps) * 1e3
    console.print(
        f"[bold]telemetry[/bold], {tokens:,} tokens, {policy}, {len(turns)} turns; a step that "
        f"nobody watches: {usual:.1f} ms, CPU {cpu_usual:.1f} ms; {machine}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("watching", "times", "steps", "ms each", "of steps", "CPU ms each", "of CPU"):
        table.add_column(heading, justify="left" if heading == "watching" else "right")
    for cost in costs:
        cells = [
            cell
            for one in (cost.wall, cost.cpu)
            for cell in (
                f"{one.milliseconds:.2f} +- {one.error_milliseconds:.2f}",
                f"{one.share * 100:.2f} +- {one.error_share * 100:.2f} %",
            )
        ]
        table.add_row(NAMES[cost.kind], str(cost.windows), f"{cost.steps:.1f}", *cells)
    console.print(table)
    return {
        "machine": machine,
        "tokens": tokens,
        "policy": policy,
        "turns": len(turns),
        "step_milliseconds": usual,
        "step_cpu_milliseconds": cpu_usual,
        "costs": [asdict(cost) for cost in costs],
    }


def _excess(pairs: Sequence[tuple[float, float]], spread_seconds: float | None) -> Excess:
    """Of windows' seconds above the seconds expected."""
    cut = int(len(pairs) * TRIM)
    middle = sorted(found - expected for found, expected in pairs)[cut : len(pairs) - cut]
    error = stdev(middle) / len(middle) ** 0.5 if len(middle) > 1 else 0.0
    over = spread_seconds or mean(expected for _, expected in pairs)
    return Excess(mean(middle) * 1e3, error * 1e3, mean(middle) / over, error / over)
