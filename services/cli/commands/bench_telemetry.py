"""`fluxion bench telemetry`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fluxion_core.config.command_options import JsonOption, JsonPath
from fluxion_core.config.commands import Command, within
from fluxion_core.models.model_options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class BenchTelemetry(ModelOptions, JsonOption, Command):
    """Cost of scrapes and traces to a node's decode steps, against steps that nobody watches."""

    tokens: Annotated[int, within(1)] = 1500
    """Length of the prompt."""
    turns: Annotated[int, within(1)] = 50
    """Each scrapes once and traces once."""
    steps: Annotated[int, within(1)] = 8
    """Of a trace, and between two looks."""
    policy: str = "exact"
    """What the stream reads."""
    json: JsonPath = None
    """Keep {machine, tokens, policy, turns, step_milliseconds, step_cpu_milliseconds, costs: [...],
    recording} in this file; - is standard output."""

    def __call__(self) -> None:
        """Print tables; keep the figures."""
        import asyncio

        from services.cli.telemetry_bench import bench_telemetry

        self.write(asyncio.run(bench_telemetry(self, self.console())))
