"""`fluxion bench handoff`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fluxion_core.config.command_options import JsonOption, JsonPath, Numbers, Texts
from fluxion_core.config.commands import Command, within


@dataclass(frozen=True, kw_only=True)
class BenchHandoff(JsonOption, Command):
    """KV from one process to another by every way, beside raw sockets, on this machine."""

    ways: Texts = ("stream", "grpc", "sockets", "tls", "shared_memory")
    """Compared with raw sockets: stream, a bare gRPC stream; grpc, the hand-off over it; and the
    hand-off beside the call by sockets, tls, which is encrypted sockets, or shared_memory."""
    connections: Numbers = (1, 2, 4, 8)
    """Of raw sockets and of what goes beside the call."""
    shapes: Texts = ()
    """Models, as llama-3.1-8b; all if not given."""
    tokens: Annotated[int | None, within(1)] = None
    """Of the prompt; 7,000 of SmolLM2-135M and 4,096 of Llama-3.1-8B if not given."""
    threads: Annotated[int | None, within(1, 64)] = None
    """Native threads on both sides; as many as nodes have by default if not given."""
    repeats: Annotated[int, within(1, 100)] = 5
    """Runs of each way; medians are shown."""
    commit: str = ""
    """Of the code, where it does not lie in a repository."""
    json: JsonPath = None
    """Keep {about, machine, results: [...]} in this file, a result for each shape; - is standard
    output."""

    def __call__(self) -> None:
        """Print a table; keep the figures."""
        from fluxion_core.errors import ConfigError
        from fluxion_core.lab.benchmark.handoff import (
            HandoffPlan,
            run_handoff_bench,
            shapes_named,
        )
        from services.cli.handoff_bench import sending_with

        if not self.connections or not all(1 <= one <= 16 for one in self.connections):
            raise ConfigError("--connections: whole numbers from 1 to 16")
        plan = HandoffPlan(
            ways=self.ways,
            connections=self.connections,
            repeats=self.repeats,
            shapes=shapes_named(self.shapes, self.tokens),
            commit=self.commit,
        )
        self.write(run_handoff_bench(self.console(), sending_with(self.threads), plan))
