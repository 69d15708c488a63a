"""Cost of a step's sampling: a row on one thread, and the rows of a step on the pool.

    python -m fluxion_core.lab.benchmark.sampling [--vocab 151936] [--prompt 1000000]
    [--rows 1,4,16] [--threads 15] [--repeats 50] [--json out.json]

Logits are like a model's (a few far above the rest), flat (all differ by little, so that top_p
keeps most of them) or equal. A row's time is its thread's CPU time. A step's is the clock's, once
with the pool's threads awake, as after a step without a GPU, and once after a rest in which they
went to sleep. Beside each figure that has one is its limit; those of steps are for 16 cores.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fluxion_core.config.command_options import JsonOption, Numbers
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.generation.sampling import SamplingParams, TokenSampler, sample_rows
from fluxion_core.lab.benchmark.report import describe_machine
from fluxion_core.pool.cpu_pool import CpuPool

ROW_LIMIT_MS = 0.5
"""A row of 152K tokens with a temperature and top_p, on one thread."""

PENALTY_LIMIT_MS = 0.1
"""A token with penalties, chosen greedily, whatever the prompt's length."""

STEP_LIMIT_MS = 2.0
"""16 rows of 152K tokens, on 16 cores."""

STEP_PARAMS = SamplingParams(temperature=0.7, top_p=0.9)
"""What benches of steps sample with, this one and those of whole steps."""

STEP_SAMPLING = f"temperature {STEP_PARAMS.temperature:g}, top_p {STEP_PARAMS.top_p:g}"
"""The same in words."""

_GENERATED = 4000
"""Tokens that a sequence with penalties has behind it."""

_REST_SECONDS = 0.003
"""Longer than the pool's threads look for work."""

_ROWS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(),
    "temperature 0.7": SamplingParams(temperature=0.7),
    STEP_SAMPLING: STEP_PARAMS,
    "temperature 1, top_p 0.95, top_k 50": SamplingParams(temperature=1.0, top_p=0.95, top_k=50),
    "temperature 0.7, min_p 0.05": SamplingParams(temperature=0.7, min_p=0.05),
}

_PENALTIES: dict[str, SamplingParams] = {
    "repetition 1.1": SamplingParams(repetition_penalty=1.1),
    "frequency 0.1": SamplingParams(frequency_penalty=0.1),
    "all three": SamplingParams(
        repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.1
    ),
}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Measurements to make."""

    vocab: Annotated[int, within(1)] = 151_936
    """Tokens of the vocabulary."""
    prompt: Annotated[int, within(0)] = 1_000_000
    """Tokens of the prompt that penalties count."""
    rows: Numbers = (1, 4, 16)
    """Of a step."""
    threads: Annotated[int | None, within(1)] = None
    """Of the pool; as many as a node has if not given."""
    repeats: Annotated[int, within(1)] = 50
    """Runs of each; medians are told."""


@dataclass(frozen=True)
class SamplingFigure:
    """One way to sample. Milliseconds, medians."""

    what: str
    logits: str
    milliseconds: float
    limit_milliseconds: float | None = None


def step_samplers(rows: int) -> list[TokenSampler]:
    """Samplers of sequences that have just begun, each with noise of its own."""
    return [TokenSampler(replace(STEP_PARAMS, seed=row)) for row in range(rows)]


def run_sampling_bench(console: Console, options: SamplingOptions) -> dict[str, object]:
    """Measure; print a table, return everything as plain data."""
    pool = CpuPool(options.threads)
    machine = describe_machine()
    console.print(
        f"[bold]sampling[/bold], {options.vocab:,} tokens in the vocabulary, a prompt of "
        f"{options.prompt:,}, {pool.num_threads} threads; {machine}",
        highlight=False,
    )
    logits = _logits(options.vocab)
    figures = [
        *_row_figures(logits, options),
        *_penalty_figures(logits, options),
        *_step_figures(logits, options, pool),
    ]
    table = Table(box=None, pad_edge=False)
    for column in ("what", "logits", "ms", "limit ms"):
        table.add_column(column, justify="left" if column in ("what", "logits") else "right")
    for figure in figures:
        limit = figure.limit_milliseconds
        table.add_row(
            figure.what,
            figure.logits,
            f"{figure.milliseconds:.3f}",
            "" if limit is None else f"{limit:.1f}",
        )
    console.print(table)
    return {
        "machine": machine,
        "options": asdict(options),
        "threads": pool.num_threads,
        "figures": [asdict(figure) for figure in figures],
    }


def _logits(vocab: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(vocab, generator=generator)
    model = spread * 2.2
    model[torch.randint(0, vocab, (20,), generator=generator)] += torch.linspace(4, 12, 20)
    return {"like a model's": model, "flat": spread * 0.01, "equal": torch.zeros(vocab)}


def _row_figures(logits: dict[str, Tensor], options: SamplingOptions) -> list[SamplingFigure]:
    figures = []
    for name, params in _ROWS.items():
        for kind, row in logits.items():
            sampler = TokenSampler(params)
            milliseconds = _median_ms(
                partial(sampler.sample, row),
                time.thread_time,
                options.repeats,
            )
            limit = ROW_LIMIT_MS if params is STEP_PARAMS else None
            figures.append(SamplingFigure(f"a row: {name}", kind, milliseconds, limit))
    return figures


def _penalty_figures(logits: dict[str, Tensor], options: SamplingOptions) -> list[SamplingFigure]:
    source = random.Random(0)
    prompt = [source.randrange(options.vocab) for _ in range(options.prompt)]
    figures = []
    for name, params in _PENALTIES.items():
        started = time.thread_time()
        sampler = TokenSampler(params, prompt, prompt[:_GENERATED])
        seconds = time.thread_time() - started
        row = logits["like a model's"]
        milliseconds = _median_ms(partial(sampler.sample, row), time.thread_time, options.repeats)
        what = f"a token with penalties: {name}"
        figures.append(SamplingFigure(what, "like a model's", milliseconds, PENALTY_LIMIT_MS))
        figures.append(
            SamplingFigure(f"  once, when its sequence begins: {name}", "", seconds * 1e3)
        )
    return figures


def _step_figures(
    logits: dict[str, Tensor], options: SamplingOptions, pool: CpuPool
) -> list[SamplingFigure]:
    figures = []
    for count in options.rows:
        limit = STEP_LIMIT_MS if count <= 16 else None
        for kind, row in logits.items():
            rows = row.repeat(count, 1)
            samplers = step_samplers(count)
            for name, rest in (("", 0.0), (" after a rest", _REST_SECONDS)):
                milliseconds = _median_ms(
                    partial(sample_rows, rows, samplers, pool),
                    time.perf_counter,
                    options.repeats,
                    rest_seconds=rest,
                )
                what = f"a step of {count} rows: {STEP_SAMPLING}{name}"
                figures.append(SamplingFigure(what, kind, milliseconds, limit))
    return figures


def _median_ms(
    work: Callable[[], object],
    clock: Callable[[], float],
    repeats: int,
    *,
    rest_seconds: float = 0.0,
) -> float:
    seconds = []
    for _ in range(3 + repeats):
        if rest_seconds:
            time.sleep(rest_seconds)
        started = clock()
        work()
        seconds.append(clock() - started)
    return median(seconds[3:]) * 1e3


@dataclass(frozen=True, kw_only=True)
class SamplingBench(JsonOption, Command):
    """Measure what a step's sampling costs."""

    options: SamplingOptions = field(default_factory=SamplingOptions)
    """What is measured."""

    def __call__(self) -> None:
        """Print a table; keep the figures."""
        self.write(run_sampling_bench(self.console(width=160), self.options))


if __name__ == "__main__":
    sys.exit(run_module(SamplingBench))
