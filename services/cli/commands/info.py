"""`fluxion info`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fluxion_core.config.addresses import DEFAULT_DECODE_ADDRESS
from fluxion_core.config.command_options import JsonOption, JsonPath
from fluxion_core.config.commands import Command
from services.cli.commands.connection_options import ConnectionOptions


@dataclass(frozen=True, kw_only=True)
class Info(JsonOption, Command):
    """Say what a decode node serves, and how full it is: model, levels, requests, memory."""

    address: str = field(default=DEFAULT_DECODE_ADDRESS, kw_only=False)
    """HOST:PORT of the decode node."""
    json: JsonPath = None
    """Write {model, load} to this file; - is standard output. Their keys are those of ModelInfo and
    NodeLoad: fluxion_core/client/answers.py."""
    connection: ConnectionOptions = field(default_factory=ConnectionOptions)
    """How the node is reached."""

    def __call__(self) -> None:
        """Print a table."""
        import asyncio

        from services.cli.info import run_info

        asyncio.run(run_info(self))
