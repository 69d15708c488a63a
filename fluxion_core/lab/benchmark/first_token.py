"""Time to the first token through both nodes, over what computing the prompt alone needs.

Three parts, all of one model shape with random weights and prompts of random tokens:

    computing   the prefill node's model by itself, its KV going nowhere: the limit
    single      a request at a time through both nodes, for each length of prompts
    crowd       long prompts that come at once, short ones that come behind them, and a stream that
                makes tokens before and meanwhile

Here: the values, what is made of them, and the tables. Nodes need gRPC, which only services may
import: services/cli/first_token_bench.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from fluxion_core.errors import ConfigError


@dataclass(frozen=True)
class Prompts:
    """A length of prompts, and how many are measured."""

    tokens: int
    repeats: int

    @staticmethod
    def parse(text: str) -> Prompts:
        """Read `TOKENS` or `TOKENS=REPEATS`.

        Raises:
            ConfigError: it is neither, or a number is not above 0.
        """
        tokens, _, repeats = text.partition("=")
        try:
            prompts = Prompts(int(tokens), int(repeats or 1))
        except ValueError:
            raise ConfigError(f"{text!r} is no length; write TOKENS or TOKENS=REPEATS") from None
        if prompts.tokens < 1 or prompts.repeats < 1:
            raise ConfigError(f"{text!r}: tokens and repeats must be above 0")
        return prompts


@dataclass(frozen=True)
class Answer:
    """One request up to its first token."""

    prompt_tokens: int
    first_token_seconds: float
    """From before it was sent, as the client saw it."""
    queue_seconds: float
    """Of the nodes' own account (client/answers.py), as are the next three."""
    prefill_seconds: float
    handoff_seconds: float
    handoff_bytes: int
    prefill_cpu_seconds: float
    """Processor time of the prefill node from sending to the first token; all of its threads."""
    decode_cpu_seconds: float
    """The same of the decode node."""


@dataclass(frozen=True)
class Crowd:
    """Long prompts that came at once, and what they did to short ones and to a stream."""

    long: tuple[Answer, ...]
    """In order of their first tokens; processor times are of all that went on."""
    short: tuple[Answer, ...]
    """Sent one after the other, the first when the node had read all long ones."""
    quiet_gaps: tuple[float, ...]
    """Seconds between the stream's tokens before the long prompts came."""
    gaps: tuple[float, ...]
    """The same from then on until the last of the long ones had its first token."""


@dataclass(frozen=True)
class WayAnswers:
    """All that was measured with one way of KV."""

    way: str
    ready_seconds: float
    """Until both nodes served."""
    single: tuple[Answer, ...]
    crowd: Crowd | None


Computing = Mapping[int, Sequence[float]]
"""Seconds of computing alone by length of the prompt, one for each repeat."""


def single_rows(computing: Computing, answers: WayAnswers) -> list[dict[str, float]]:
    """Medians of each length, times in s."""
    rows = []
    for tokens in sorted({answer.prompt_tokens for answer in answers.single}):
        same = [answer for answer in answers.single if answer.prompt_tokens == tokens]
        values = {
            name: median(getattr(answer, name) for answer in same)
            for name in Answer.__dataclass_fields__
        }
        gigabytes = values["handoff_bytes"] / 1e9
        rows.append(
            values
            | {
                "repeats": len(same),
                "computing_seconds": median(computing[tokens]),
                "over_computing": values["first_token_seconds"] / median(computing[tokens]),
                "over_prefill": median(
                    one.first_token_seconds / one.prefill_seconds for one in same
                ),
                "handoff_gigabytes_per_second": gigabytes / values["handoff_seconds"],
                "prefill_cpu_seconds_per_gigabyte": values["prefill_cpu_seconds"] / gigabytes,
                "decode_cpu_seconds_per_gigabyte": values["decode_cpu_seconds"] / gigabytes,
            }
        )
    return rows


def crowd_figures(computing: Computing, crowd: Crowd) -> dict[str, object]:
    """First tokens of a crowd over the sum of what computing takes; a stream's gaps over quiet
    ones.
    """
    last = crowd.long[-1].first_token_seconds
    computed = sum(median(computing[one.prompt_tokens]) for one in crowd.long)
    gaps, quiet = (_gap_figures(one) for one in (crowd.gaps, crowd.quiet_gaps))
    return {
        "long_first_token_seconds": [one.first_token_seconds for one in crowd.long],
        "long_over_computing": last / computed,
        "long_over_prefill": last / sum(one.prefill_seconds for one in crowd.long),
        "short_first_token_seconds": [one.first_token_seconds for one in crowd.short],
        "stream_quiet_seconds": quiet,
        "stream_seconds": gaps,
        "stream_over_quiet": {name: gaps[name] / quiet[name] for name in gaps},
    }


def first_token_report(
    console: Console, computing: Computing, measured: Sequence[WayAnswers]
) -> dict[str, object]:
    """Print the tables; all figures and what they were made of as plain data."""
    ways: list[dict[str, object]] = []
    for answers in measured:
        way: dict[str, object] = {
            "way": answers.way,
            "ready_seconds": answers.ready_seconds,
            "single": single_rows(computing, answers),
            "answers": [asdict(one) for one in answers.single],
        }
        if answers.crowd is not None:
            way["crowd"] = crowd_figures(computing, answers.crowd) | {
                "long": [asdict(one) for one in answers.crowd.long],
                "short": [asdict(one) for one in answers.crowd.short],
            }
        ways.append(way)
    if any(way["single"] for way in ways):
        _print_single(console, ways)
    _print_crowds(console, ways)
    return {
        "computing_seconds": {str(n): list(all_) for n, all_ in computing.items()},
        "ways": ways,
    }


def _gap_figures(gaps: Sequence[float]) -> dict[str, float]:
    p50, p99 = (float(np.percentile(gaps, percent)) for percent in (50, 99))
    return {"p50": p50, "p99": p99}


def _print_single(console: Console, ways: Sequence[Mapping[str, object]]) -> None:
    table = Table(title="one prompt at a time: medians, s", box=None, pad_edge=False)
    for column in (
        *("way", "tokens", "computing", "first token", "x computing", "x prefill"),
        *("queue", "prefill", "hand-off", "GB/s", "CPU s/GB: prefill node", "decode node"),
    ):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in ways:
        rows = way["single"]
        assert isinstance(rows, list)
        for row in rows:
            table.add_row(
                str(way["way"]),
                f"{row['prompt_tokens']:,.0f}",
                *(f"{row[name]:.3f}" for name in ("computing_seconds", "first_token_seconds")),
                *(f"{row[name]:.3f}" for name in ("over_computing", "over_prefill")),
                *(f"{row[f'{name}_seconds']:.3f}" for name in ("queue", "prefill", "handoff")),
                *(f"{row[name]:.2f}" for name in _RATES),
            )
    console.print(table)


_RATES = (
    "handoff_gigabytes_per_second",
    "prefill_cpu_seconds_per_gigabyte",
    "decode_cpu_seconds_per_gigabyte",
)


def _print_crowds(console: Console, ways: Sequence[Mapping[str, object]]) -> None:
    crowds = [(str(way["way"]), way["crowd"]) for way in ways if "crowd" in way]
    if not crowds:
        return
    table = Table(title="long prompts at once", box=None, pad_edge=False)
    for column in (
        *("way", "first tokens, s", "last, x computing", "x prefill", "short ones behind, s"),
        *("stream: quiet p50 / p99, ms", "meanwhile p50 / p99, ms", "x quiet"),
    ):
        table.add_column(column)
    for way, figures in crowds:
        assert isinstance(figures, dict)
        table.add_row(
            way,
            _seconds(figures["long_first_token_seconds"]),
            f"{figures['long_over_computing']:.3f}",
            f"{figures['long_over_prefill']:.3f}",
            _seconds(figures["short_first_token_seconds"]),
            *(_pair(figures[name], 1e3) for name in ("stream_quiet_seconds", "stream_seconds")),
            _pair(figures["stream_over_quiet"], 1),
        )
    console.print(table)


def _seconds(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values) or "-"


def _pair(values: Mapping[str, float], scale: float) -> str:
    return " / ".join(f"{values[name] * scale:.2f}" for name in ("p50", "p99"))
