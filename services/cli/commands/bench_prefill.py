"""`fluxion bench prefill`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fluxion_core.config.command_options import JsonOption, JsonPath
from fluxion_core.config.commands import Command, within


@dataclass(frozen=True, kw_only=True)
class BenchPrefill(JsonOption, Command):
    """Prefill on a GPU: what it costs that KV leaves while the prompt is computed."""

    shape: str = "llama-3.1-8b"
    """Model shape with random weights."""
    tokens: Annotated[tuple[int, ...], within(16)] = (8192, 32768)
    """Length of a prompt; may be repeated."""
    chunk_tokens: Annotated[int, within(16)] = 4096
    """Tokens computed at a time."""
    repeats: Annotated[int, within(1, 100)] = 5
    """Prompts of each kind."""
    json: JsonPath = None
    """Keep {machine, shape, chunk_tokens, repeats, rows: [...]} in this file; - is standard
    output."""

    def __call__(self) -> None:
        """Print a table; keep the figures."""
        from services.cli.prefill_bench import bench_prefill

        self.write(
            bench_prefill(
                self.console(),
                self.shape,
                self.tokens,
                chunk_tokens=self.chunk_tokens,
                repeats=self.repeats,
            )
        )
