"""`fluxion train`: fit predictor weights to a model; work in fluxion_core/lab/training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from fluxion_core.errors import ConfigError
from fluxion_core.lab.plots.training import write_plots
from fluxion_core.lab.training import corpus
from fluxion_core.lab.training.options import DEFAULT_LEVELS, TrainRun
from fluxion_core.lab.training.pipeline import Training, TrainOptions
from fluxion_core.lab.training.report import write_card
from services.cli.commands.train import Train


def train(command: Train) -> Path:
    """Train as the command asks; progress goes to stderr.

    Returns:
        The weights' path.

    Raises:
        FluxionError: something that is needed is not there.
    """
    run = {field.name: getattr(command, field.name) for field in fields(TrainRun)}
    levels = parse_levels(command.level) if command.level else DEFAULT_LEVELS
    options = TrainOptions(model=command.locate(), levels=levels, **run)
    return run_training(options, Console(stderr=True), plots=command.plots)


def run_training(options: TrainOptions, console: Console, *, plots: bool) -> Path:
    """Gather documents if there are none, train, and write weights, card and plots.

    Args:
        options: of the run.
        console: where progress goes.
        plots: draw too; needs matplotlib.

    Returns:
        The weights' path.

    Raises:
        FluxionError: something that is needed is not there.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        if not (options.documents / "manifest.json").is_file():
            bar = progress.add_task("gathering documents", total=None)
            corpus.gather(options.documents, lambda _: progress.advance(bar))
            progress.remove_task(bar)
        bars: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done, total=total)

        path = Training(options, show).run()
    write_card(options.output)
    if plots:
        write_plots(options.output)
    return path


def parse_levels(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """NAME=POLICY pairs.

    Raises:
        ConfigError: a text is none.
    """
    pairs = []
    for text in texts:
        name, separator, policy = text.partition("=")
        if not separator:
            raise ConfigError(f"level {text!r}; write NAME=POLICY, as ACCURATE=marginal(0.1)")
        pairs.append((name.strip().upper(), policy.strip()))
    return tuple(pairs)
