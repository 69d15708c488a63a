"""`fluxion bench first-token`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fluxion_core.config.command_options import JsonOption, JsonPath, Texts
from fluxion_core.config.commands import Command, flag, within

if TYPE_CHECKING:
    from fluxion_core.lab.benchmark.first_token import Prompts


@dataclass(frozen=True, kw_only=True)
class BenchFirstToken(JsonOption, Command):
    """Time to the first token over what computing takes, through both nodes, for each way of KV.

    Starts both nodes, once for each way, on a model shape with random weights. Other settings of
    the nodes are taken from FLUXION_* variables, as FLUXION_HANDOFF__CONNECTIONS=8.
    """

    shape: str = "llama-3.1-8b"
    """Model shape: llama-3.1-8b, qwen2.5-7b, qwen2.5-1.5b, smollm2-135m or tiny."""
    layers: Annotated[int | None, within(1)] = None
    """Of the model; the shape's own if not given."""
    ways: Texts = ("shared_memory", "sockets", "grpc")
    """Of KV, one after the other."""
    tls: Annotated[bool, flag()] = False
    """Encrypt what goes between the nodes, with a certificate made for it."""
    prompt: Texts = ("1024=5", "8192=5", "32768=3", "130816=1")
    """Single prompts, TOKENS=REPEATS; medians are shown. An empty text is none."""
    crowd: Annotated[int, within(0, 64)] = 4
    """Long prompts at once; 0 for none."""
    crowd_tokens: Annotated[int, within(1)] = 130_816
    """Of each long prompt."""
    short: Annotated[int, within(0)] = 3
    """Short prompts behind the long ones, one after the other."""
    short_tokens: Annotated[int, within(1)] = 1024
    """Of each short prompt."""
    stream_tokens: Annotated[int, within(1)] = 8192
    """Prompt of the stream that runs beside the crowd."""
    quiet_steps: Annotated[int, within(2)] = 200
    """Tokens of the stream before the crowd comes."""
    policy: str = "exact"
    """What requests read."""
    prefill_device: str | None = None
    """cpu, cuda or cuda:N; if not given, the first GPU, or the CPU where there is none."""
    decode_device: str | None = None
    """The same; if not given, the second GPU, or the prefill node's device where there is none."""
    host_kv: str | None = None
    """The decode node's host memory for KV, as 80GiB; what the prompts need if not given."""
    device_kv: str | None = None
    """The decode node's tier in device memory; if not given, 0 where both share a GPU, or auto."""
    ready_seconds: Annotated[float, within(1)] = 300.0
    """Time for both nodes to get ready, s."""
    logs: Annotated[bool, flag()] = False
    """Print all that the nodes log; if not, warnings and errors."""
    commit: str = ""
    """Of the code, where it does not lie in a repository."""
    json: JsonPath = None
    """Keep {about, machine, options, computing_seconds, ways: [...]} in this file; - is standard
    output."""

    @property
    def prompts(self) -> tuple[Prompts, ...]:
        """Single prompts.

        Raises:
            ConfigError: a text is none.
        """
        from fluxion_core.lab.benchmark.first_token import Prompts

        return tuple(map(Prompts.parse, self.prompt))

    def __call__(self) -> None:
        """Print tables; keep the figures."""
        import asyncio

        from services.cli.first_token_bench import bench_first_token

        self.write(asyncio.run(bench_first_token(self, self.console(width=180))))
