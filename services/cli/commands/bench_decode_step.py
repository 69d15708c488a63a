"""`fluxion bench decode-step`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fluxion_core.config.command_options import JsonOption, JsonPath
from fluxion_core.config.commands import Command, within
from fluxion_core.models.model_options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class BenchDecodeStep(ModelOptions, JsonOption, Command):
    """Time per output token on the CPU, policies and transformers side by side."""

    tokens: Annotated[int, within(1)] = 7500
    """Length of the prompt."""
    steps: Annotated[int, within(1)] = 20
    """Tokens that count."""
    policy: tuple[str, ...] = ("exact", "fixed(16, 5 %)")
    """exact, fixed(BLOCK_SIZE, BUDGET %), threshold(ERROR) or marginal(PRICE); may be repeated."""
    transformers: bool = True
    """Beside transformers with its ordinary cache."""
    digest_bits: int = 16
    """16 or 8."""
    weights: Path | None = None
    """Predictor weights; without, the package's, or none (training-free)."""
    json: JsonPath = None
    """Keep {machine, tokens, steps, sampling, planner, read_gigabytes_per_second, figures: [...],
    tokens_equal, peace_with_torch} in this file; - is standard output."""
    plot: Path | None = None
    """Draw the figures into this PNG or SVG file."""

    def __call__(self) -> None:
        """Print a table; keep and draw the figures."""
        from fluxion_core.lab.benchmark.decode_step import plot
        from services.cli.decode_step_bench import bench_decode_step

        report = bench_decode_step(self.console(), self)
        self.write(report)
        if self.plot is not None:
            plot(report, self.plot)
