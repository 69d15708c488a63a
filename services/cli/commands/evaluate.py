"""`fluxion eval`."""

from __future__ import annotations

from dataclasses import dataclass

from fluxion_core.config.commands import Command
from fluxion_core.lab.evaluation.options import EvaluationOptions


@dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluationOptions, Command):
    """Quality of policies: scores and agreement against exact, and what they read for it."""

    def __call__(self) -> None:
        """Print the report; progress goes to stderr."""
        from services.cli.eval_command import run_evaluation

        run_evaluation(self)
