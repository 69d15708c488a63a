"""`fluxion demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fluxion_core.config.commands import Command, LogLevel, flag, within


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Ask a question about a 7,000-token document, through two processes on this machine."""

    log_level: LogLevel | None = None
    """Lowest level of the nodes' log lines, which --logs shows; info if not given."""
    models_dir: Path | None = None
    """Where pulled models are; the user's data directory if not given."""
    max_new_tokens: Annotated[int, within(1, 1024)] = 64
    """Longest answer."""
    logs: Annotated[bool, flag()] = False
    """Show the nodes' logs as they come, not only when something fails."""

    def __call__(self) -> int:
        """Exit status 1 if the planted fact is not in the answer."""
        import asyncio

        from rich.console import Console

        from services.cli.waiting import WaitingNote

        with WaitingNote(
            Console(stderr=True), "A long document, a question, two processes: loading"
        ):
            from services.cli.demo import run_demo

        return asyncio.run(run_demo(self))
