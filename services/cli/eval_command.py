"""`fluxion eval`: quality of policies on benchmarks; work in fluxion_core/lab/evaluation."""

from __future__ import annotations

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fluxion_core.lab.evaluation.evaluate import evaluate
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.work import Answer


def run_evaluation(options: EvaluationOptions) -> None:
    """Run with a progress bar on stderr, then print the report.

    Raises:
        FluxionError: something that is asked for is not there or cannot be used.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("loading the model", total=None)

        def show(done: int, total: int, answer: Answer) -> None:
            what = f"{answer.case_name}, {answer.way}"
            progress.update(bar, completed=done, total=total, description=what)

        text = evaluate(options, show)
    console = options.console()
    console.print(Markdown(text) if console.is_terminal else text, highlight=False, soft_wrap=True)
