"""`fluxion trace`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fluxion_core.config.command_options import JsonOption, JsonPath
from fluxion_core.config.commands import Command, within


@dataclass(frozen=True, kw_only=True)
class TraceSteps(JsonOption, Command):
    """Record a decode node's next steps, for ui.perfetto.dev: CPU workers, GPU, PCIe, hand-offs."""

    address: str
    """HOST:PORT of a decode node's metrics_listen."""
    steps: Annotated[int, within(1)] = 20
    """Decode steps to record."""
    seconds: Annotated[float, within(0.1, 60)] = 10.0
    """At most for so long, s."""
    out: Path = Path("trace.json")
    """Takes the trace, as JSON."""
    png: Path | None = None
    """Draw it into this PNG or SVG file as well."""
    json: JsonPath = None
    """Write {steps, wanted_steps, ended_by, milliseconds, tracks: [{name, spans, busy_milliseconds,
    share}]} to this file; - is standard output."""

    def __call__(self) -> None:
        """Write the trace, and a summary."""
        from services.cli.trace import run_trace

        run_trace(self)
