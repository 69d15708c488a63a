"""`fluxion eval`: quality of policies on benchmarks; work in fluxion_core/lab/evaluation."""

from __future__ import annotations

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.evaluate import evaluate
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.work import Answer


def run_evaluation(options: EvaluationOptions, console: Console, progress_console: Console) -> None:
    """Run with a progress bar, then print the report.

    Args:
        options: of the run.
        console: where the report goes.
        progress_console: where progress goes.

    Raises:
        FluxionError: something that is asked for is not there or cannot be used.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=progress_console, transient=True) as progress:
        bar = progress.add_task("loading the model", total=None)

        def show(done: int, total: int, answer: Answer) -> None:
            what = f"{answer.case_name}, {answer.way}"
            progress.update(bar, completed=done, total=total, description=what)

        text = evaluate(options, show)
    console.print(Markdown(text) if console.is_terminal else text, highlight=False, soft_wrap=True)


def split_policies(text: str) -> tuple[str, ...]:
    """Policies separated by commas; commas within brackets are a policy's own."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts if part.strip())


def split_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    Raises:
        ConfigError: something is none.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"lengths {text!r}: whole numbers, separated by commas") from None
