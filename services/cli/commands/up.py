"""`fluxion up`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fluxion_core.config.commands import Command, LogLevel, flag, within
from fluxion_core.models.model_options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class Up(ModelOptions, Command):
    """Run a prefill node and a decode node on this machine until Ctrl-C."""

    log_level: LogLevel | None = None
    """Lowest level of log lines on stderr; for the nodes, what their settings say if not given."""
    decode_listen: str | None = None
    """HOST:PORT of the decode node; port 0 takes a free one. Without it, 127.0.0.1:7420 if that is
    free."""
    prefill_listen: str = "127.0.0.1:0"
    """HOST:PORT of the prefill node; port 0 takes a free one."""
    decode_config: Path | None = None
    """TOML file with more of the decode node's settings."""
    prefill_config: Path | None = None
    """TOML file with more of the prefill node's settings."""
    device: str | None = None
    """Of both nodes: auto, cpu, cuda or cuda:N. auto takes a GPU if it can; what their settings say
    if not given."""
    lanes: str | None = None
    """Who attends to host KV: auto, cpu, gpu or both; what the settings say if not given."""
    gateway: Annotated[bool, flag()] = False
    """Start the gateway smg too: the OpenAI API."""
    gateway_listen: str | None = None
    """HOST:PORT of the gateway, which it turns on; port 0 takes a free one. Without it,
    127.0.0.1:7480 if that is free."""
    ready_seconds: Annotated[float, within(1)] = 300.0
    """Time for both nodes to get ready, and then for the gateway, s."""

    @property
    def has_gateway(self) -> bool:
        """Either flag turns it on."""
        return self.gateway or self.gateway_listen is not None

    def __call__(self) -> None:
        """Until a signal."""
        import asyncio

        from services.cli.up import run_up

        asyncio.run(run_up(self))
