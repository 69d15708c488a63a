"""`fluxion bench kernels`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fluxion_core.config.command_options import JsonOption, JsonPath
from fluxion_core.config.commands import Command, within


@dataclass(frozen=True, kw_only=True)
class BenchKernels(JsonOption, Command):
    """CPU kernels beside this machine's read limits."""

    repeats: Annotated[int, within(1, 100)] = 7
    """Runs of each operation."""
    json: JsonPath = None
    """Keep {machine, repeats, results: [...], top_k} in this file; - is standard output."""
    plot: Path | None = None
    """Draw the figures into this PNG or SVG file."""

    def __call__(self) -> None:
        """Print tables; keep and draw the figures."""
        from fluxion_core.lab.benchmark.kernels import plot, run_kernel_bench

        report = run_kernel_bench(self.console(), repeats=self.repeats)
        self.write(report)
        if self.plot is not None:
            plot(report, self.plot)
