"""`fluxion top`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fluxion_core.config.commands import Command, within


@dataclass(frozen=True, kw_only=True)
class Top(Command):
    """Show what nodes do now, live: requests, tokens, bytes, GPU."""

    addresses: tuple[str, ...] = field(kw_only=False)
    """HOST:PORT of nodes' server.metrics_listen."""
    interval_seconds: Annotated[float, within(0.1)] = 2.0
    """Between looks, s."""
    updates: Annotated[int, within(0)] = 0
    """Stop after so many; 0 for Ctrl-C."""

    def __call__(self) -> None:
        """Until Ctrl-C, or all updates were shown."""
        from rich.console import Console

        from services.cli.top import run_top

        run_top(self, Console())
