"""`fluxion bench handoff`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fluxion_core.config.command_options import JsonOption, JsonPath
from fluxion_core.config.commands import Command, within


@dataclass(frozen=True, kw_only=True)
class BenchHandoff(JsonOption, Command):
    """KV hand-off beside a bare gRPC stream and a raw socket, on this machine."""

    repeats: Annotated[int, within(1, 100)] = 5
    """Runs of each way."""
    json: JsonPath = None
    """Keep {machine, results: [...]} in this file, a result for each shape; - is standard
    output."""

    def __call__(self) -> None:
        """Print a table; keep the figures."""
        from fluxion_core.lab.benchmark.handoff import run_handoff_bench
        from services.cli.handoff_bench import sending

        self.write(run_handoff_bench(self.console(), sending, repeats=self.repeats))
