"""`fluxion bench serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fluxion_core.config.addresses import DEFAULT_DECODE_ADDRESS
from fluxion_core.config.command_options import JsonOption, JsonPath
from fluxion_core.config.commands import Command, within
from services.cli.commands.connection_options import ConnectionOptions

if TYPE_CHECKING:
    from fluxion_core.lab.benchmark.serve import Length, Load, Objectives


@dataclass(frozen=True, kw_only=True)
class BenchServe(JsonOption, Command):
    """Load a decode node: latencies by percentile, throughput, goodput."""

    address: str = DEFAULT_DECODE_ADDRESS
    """HOST:PORT of the decode node."""
    rate: Annotated[tuple[float, ...], within(0.001)] = ()
    """Open loop: requests a second; may be repeated."""
    concurrency: Annotated[tuple[int, ...], within(1)] = ()
    """Closed loop: clients with a request each; may be repeated. 4 where there is no load."""
    prompt: tuple[str, ...] = ("200=2", "2000=1")
    """Length of prompts, TOKENS or TOKENS=WEIGHT; may be repeated."""
    requests: Annotated[int, within(1)] = 64
    """Requests of each load."""
    new_tokens: Annotated[int, within(1)] = 32
    """Made by every request."""
    shared_tokens: Annotated[int, within(0)] = 0
    """First tokens that are the same in all prompts."""
    policy: str | None = None
    """What is read; the node's default if not given."""
    deadline_seconds: Annotated[float | None, within(0.001)] = None
    """Deadline of every request, s."""
    good_first_token_seconds: Annotated[float | None, within(0.001)] = None
    """Goodput: first token at the latest, s."""
    good_token_seconds: Annotated[float | None, within(0.0001)] = None
    """Goodput: mean time between tokens, s."""
    seed: Annotated[int, within(0)] = 2026
    """Makes the workload."""
    connection: ConnectionOptions = field(default_factory=ConnectionOptions)
    """How the node is reached."""
    json: JsonPath = None
    """Keep {machine, model, device, policy, options, figures: [...]} in this file, a figure for
    each load; - is standard output."""
    plot: Path | None = None
    """Draw the figures into this PNG or SVG file."""

    @property
    def lengths(self) -> tuple[Length, ...]:
        """Lengths of prompts.

        Raises:
            ConfigError: a text is none.
        """
        from fluxion_core.lab.benchmark.serve import Length

        return tuple(map(Length.parse, self.prompt))

    @property
    def loads(self) -> tuple[Load, ...]:
        """Loads, one after the other."""
        from fluxion_core.lab.benchmark.serve import Load

        open_loops = [Load(rate=one) for one in self.rate]
        closed_loops = [Load(concurrency=one) for one in self.concurrency]
        return (*open_loops, *closed_loops) or (Load(concurrency=4),)

    @property
    def objectives(self) -> Objectives:
        """Limits of a good answer."""
        from fluxion_core.lab.benchmark.serve import Objectives

        return Objectives(self.good_first_token_seconds, self.good_token_seconds)

    def __call__(self) -> None:
        """Print a table; keep and draw the figures."""
        import asyncio

        from fluxion_core.lab.plots.serve import draw_loads
        from services.cli.serve_bench import bench_serve

        report, figures = asyncio.run(bench_serve(self.console(), self))
        self.write(report)
        if self.plot is not None:
            draw_loads(self.plot, figures)
