"""`fluxion train`."""

from __future__ import annotations

from dataclasses import dataclass

from fluxion_core.config.commands import Command
from fluxion_core.lab.training.options import TrainRun
from fluxion_core.models.model_options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class Train(TrainRun, ModelOptions, Command):
    """Fit the head predictor to a model: collect, fit, report. Resumes where it was stopped."""

    level: tuple[str, ...] = ()
    """NAME=POLICY of a quality level, as ACCURATE=marginal(0.1); may be repeated."""
    plots: bool = True
    """Draw the report."""

    def __call__(self) -> None:
        """Print where the weights are."""
        from services.cli.train_command import train

        print(train(self))
