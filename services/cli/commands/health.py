"""`fluxion health`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fluxion_core.config.command_options import JsonOption, JsonPath
from fluxion_core.config.commands import Command
from services.cli.commands.connection_options import ConnectionOptions


@dataclass(frozen=True, kw_only=True)
class Health(JsonOption, Command):
    """Say whether a node is alive and ready; exit status 0 only if it is both."""

    address: str = field(kw_only=False)
    """HOST:PORT of a prefill or decode node."""
    json: JsonPath = None
    """Write {address, healthy, services: {NAME: STATUS}} to this file; - is standard output. The
    node itself is the service ""."""
    connection: ConnectionOptions = field(default_factory=ConnectionOptions)
    """How the node is reached."""

    def __call__(self) -> int:
        """Exit status 1 if it is not healthy."""
        import asyncio

        from services.cli.health import run_health

        return asyncio.run(run_health(self))
