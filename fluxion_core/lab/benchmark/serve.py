"""Service that users of a decode node get under load: latencies by percentile, and goodput.

Two ways to load a node. Open: requests come at random moments at a given rate, whether the node
keeps up or not, and latency counts from the moment a request was due. Closed: so many clients, each
with one request at a time. Prompts of several lengths are mixed by weight.

Here: the workload, the figures, the table. Their plot: lab/plots/serve.py. Sending needs gRPC:
services/cli/serve_bench.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from fluxion_core.errors import ConfigError

PERCENTILES = (50, 90, 99)
OK = "OK"


@dataclass(frozen=True)
class Length:
    """A length of prompts, and how often it comes."""

    tokens: int
    weight: float

    @staticmethod
    def parse(text: str) -> Length:
        """Read `TOKENS` or `TOKENS=WEIGHT`.

        Raises:
            ConfigError: it is neither, or a number is not above 0.
        """
        tokens, _, weight = text.partition("=")
        try:
            length = Length(int(tokens), float(weight or 1))
        except ValueError:
            raise ConfigError(f"{text!r} is no length; write TOKENS or TOKENS=WEIGHT") from None
        if length.tokens < 1 or not 0 < length.weight < float("inf"):
            raise ConfigError(f"{text!r}: tokens and weight must be above 0")
        return length


@dataclass(frozen=True)
class Load:
    """Load of a node; exactly one of the two is given."""

    rate: float | None = None
    """Open: requests a second."""
    concurrency: int | None = None
    """Closed: clients."""

    def __str__(self) -> str:
        return f"{self.rate:g}/s" if self.rate is not None else f"{self.concurrency} clients"


@dataclass(frozen=True)
class PlannedRequest:
    """One request of a workload."""

    due_seconds: float
    """After the start; 0 in a closed loop."""
    prompt_tokens: int
    seed: int
    """Makes its prompt."""


def plan_requests(
    lengths: Sequence[Length], load: Load, count: int, seed: int
) -> list[PlannedRequest]:
    """A workload that the same seed makes again: Poisson arrivals if open, lengths by weight."""
    generator = np.random.default_rng(seed)
    weights = np.array([length.weight for length in lengths])
    chosen = generator.choice(len(lengths), size=count, p=weights / weights.sum())
    due = np.zeros(count)
    if load.rate is not None:
        due = np.cumsum(generator.exponential(1 / load.rate, size=count))
    seeds = generator.integers(1 << 62, size=count)
    return [
        PlannedRequest(float(when), lengths[index].tokens, int(own))
        for when, index, own in zip(due, chosen, seeds, strict=True)
    ]


@dataclass(frozen=True)
class Outcome:
    """Outcome of one request. Seconds from when it was due."""

    prompt_tokens: int
    status: str
    """Name of its gRPC status; OK is finished."""
    end_seconds: float
    first_token_seconds: float | None = None
    token_gaps: tuple[float, ...] = ()
    """Seconds between its tokens' arrivals."""
    queue_seconds: float = 0.0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Objectives:
    """Limits that a request must keep to count as good; None for no demand."""

    first_token_seconds: float | None = None
    token_seconds: float | None = None
    """Mean time between its tokens."""

    def are_met(self, outcome: Outcome) -> bool:
        """Whether it finished in time."""
        if outcome.status != OK or outcome.first_token_seconds is None:
            return False
        if (
            self.first_token_seconds is not None
            and outcome.first_token_seconds > self.first_token_seconds
        ):
            return False
        gaps = outcome.token_gaps
        return self.token_seconds is None or not gaps or float(np.mean(gaps)) <= self.token_seconds


@dataclass
class LoadFigures:
    """One load's figures."""

    load: str
    requests: int
    seconds: float
    """From the first request's moment to the last one's end."""
    statuses: dict[str, int]
    tokens_per_second: float
    requests_per_second: float
    """Finished ones."""
    goodput: float
    """Requests a second that met the objectives."""
    percentiles: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of first_token, inter_token, end_to_end and queue, seconds, by `p50` and so on."""
    by_length: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """The same for each prompt length."""


def figures_of(
    load: Load, outcomes: Sequence[Outcome], seconds: float, objectives: Objectives
) -> LoadFigures:
    """Sum a load's outcomes up."""
    good = sum(objectives.are_met(outcome) for outcome in outcomes)
    finished = [outcome for outcome in outcomes if outcome.status == OK]
    tokens = sum(len(o.token_gaps) + (o.first_token_seconds is not None) for o in outcomes)
    lengths = sorted({outcome.prompt_tokens for outcome in outcomes})
    return LoadFigures(
        load=str(load),
        requests=len(outcomes),
        seconds=seconds,
        statuses=dict(Counter(outcome.status for outcome in outcomes)),
        tokens_per_second=tokens / seconds,
        requests_per_second=len(finished) / seconds,
        goodput=good / seconds,
        percentiles=_percentiles(finished),
        by_length={
            str(length): _percentiles([o for o in finished if o.prompt_tokens == length])
            for length in lengths
        },
    )


def _percentiles(finished: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Nearest rank: a percentile is something that a request has seen."""
    samples: dict[str, list[float]] = {
        "first_token": [
            o.first_token_seconds for o in finished if o.first_token_seconds is not None
        ],
        "inter_token": [gap for o in finished for gap in o.token_gaps],
        "end_to_end": [o.end_seconds for o in finished],
        "queue": [o.queue_seconds for o in finished],
    }
    return {
        name: {
            f"p{percent}": float(np.percentile(values, percent, method="inverted_cdf"))
            for percent in PERCENTILES
        }
        for name, values in samples.items()
        if values
    }


def print_table(console: Console, figures: Sequence[LoadFigures], objectives: Objectives) -> None:
    """One row a load, and one a prompt length where there are several."""
    wanted = [
        f"first token {objectives.first_token_seconds:g} s"
        if objectives.first_token_seconds is not None
        else "",
        f"{objectives.token_seconds:g} s a token" if objectives.token_seconds is not None else "",
    ]
    title = ", ".join(part for part in wanted if part)
    table = Table(title=f"good: {title or 'finished'}")
    for column in ("load", "prompt", "requests", "tokens/s", "good/s"):
        table.add_column(column)
    for column in ("first token s", "inter-token ms", "end to end s", "queue s"):
        table.add_column(f"{column}\np50 / p90 / p99")
    for one in figures:
        ends = ", ".join(f"{count} {name}" for name, count in sorted(one.statuses.items()))
        rates = (f"{one.tokens_per_second:.1f}", f"{one.goodput:.3f}")
        table.add_row(one.load, "all", ends, *rates, *_cells(one.percentiles))
        if len(one.by_length) > 1:
            for length, percentiles in one.by_length.items():
                table.add_row("", length, "", "", "", *_cells(percentiles))
    console.print(table)


def _cells(percentiles: dict[str, dict[str, float]]) -> list[str]:
    cells = []
    for name in ("first_token", "inter_token", "end_to_end", "queue"):
        scale, digits = (1e3, 0) if name == "inter_token" else (1.0, 2)
        of_name = percentiles.get(name)
        cells.append(
            " / ".join(f"{value * scale:.{digits}f}" for value in of_name.values())
            if of_name
            else "-"
        )
    return cells
