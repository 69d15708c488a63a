"""`fluxion generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fluxion_core.config.addresses import DEFAULT_DECODE_ADDRESS
from fluxion_core.config.command_options import JsonOption, JsonPath
from fluxion_core.config.commands import Command, flag, within
from services.cli.commands.connection_options import ConnectionOptions


@dataclass(frozen=True, kw_only=True)
class Generate(JsonOption, Command):
    """Stream a completion to stdout, token by token; timings go to stderr."""

    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = field(
        default=None, kw_only=False
    )
    """The prompt. Without it and --file, or as -, standard input."""
    file: Annotated[Path | None, Parameter(alias="-f")] = None
    """Read a text from FILE; PROMPT then follows it."""
    chat: Annotated[bool, flag(otherwise="--raw")] = True
    """Through the model's chat template, or as it stands."""
    system: str | None = None
    """System message, with --chat."""
    max_new_tokens: Annotated[int, Parameter(alias="-n"), within(1, 2**31)] = 256
    """Longest answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: Annotated[int | None, within(0, 2**31)] = None
    """Keep the K likeliest tokens."""
    top_p: float | None = None
    """Keep this much probability."""
    min_p: float | None = None
    """Drop tokens below this share of the likeliest's."""
    repetition_penalty: float | None = None
    """1 is none."""
    presence_penalty: float | None = None
    """0 is none."""
    frequency_penalty: float | None = None
    """0 is none."""
    seed: Annotated[int | None, within(0, 2**64 - 1)] = None
    """The same seed gives the same text."""
    stop: tuple[str, ...] = ()
    """Stop before this text; may be repeated."""
    ignore_eos: Annotated[bool, flag()] = False
    """Go on past the end-of-text token."""
    quality: Literal["exact", "accurate", "balanced", "fast"] | None = None
    """How much of the KV is read, best first; the node's default if not given."""
    policy: str | None = None
    """In its place: exact, fixed(16, 5 %), threshold(0.1) or marginal(0.001)."""
    priority: Literal["low", "normal", "high"] | None = None
    """Among your own requests that wait for room."""
    deadline_seconds: Annotated[float | None, within(0.001)] = None
    """Fail if it takes longer, s."""
    timings: bool = True
    """Print timings on stderr."""
    json: JsonPath = None
    """Write {text, token_ids, finish_reason, first_token_seconds, total_seconds, seconds_per_token,
    usage, request_id} to this file; - is standard output, in place of the text. usage is the node's
    account: fluxion_core/client/answers.py."""
    address: str = DEFAULT_DECODE_ADDRESS
    """HOST:PORT of the decode node."""
    connection: ConnectionOptions = field(default_factory=ConnectionOptions)
    """How the node is reached."""

    def __call__(self) -> None:
        """The answer goes to stdout, timings to stderr."""
        import asyncio

        from services.cli.generate import run_generate

        asyncio.run(run_generate(self))
