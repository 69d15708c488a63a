"""`python -m fluxion_core.lab.evaluation BENCHMARK …`: `fluxion eval` with plain lines as progress.

    python -m fluxion_core.lab.evaluation ruler --lengths 4096,8192 --policies exact,fast

For machines that have what the models need, but neither grpc nor the stubs.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from fluxion_core.config.commands import Command, run_module
from fluxion_core.lab.evaluation.evaluate import evaluate
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.work import Answer

PROGRESS_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Evaluation(EvaluationOptions, Command):
    """Quality of policies: scores and agreement against exact, and what they read for it."""

    def __call__(self) -> None:
        """Print the report; a line of progress now and then on stderr."""
        last = 0.0

        def report(done: int, total: int, answer: Answer) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last > PROGRESS_SECONDS:
                last = now
                print(
                    f"{done}/{total} {answer.case_name} {answer.way}", file=sys.stderr, flush=True
                )

        text = evaluate(self, report)
        print(text, file=sys.stderr if self.is_on_standard_output else sys.stdout)


if __name__ == "__main__":
    sys.exit(run_module(Evaluation))
