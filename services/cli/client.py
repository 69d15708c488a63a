"""A client of the decode node: one request out, text deltas in, and the figures at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from fluxion_core.config.settings import ClientSettings
from fluxion_core.errors import StreamTruncatedError
from fluxion_core.wire.status import error_from_rpc
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from services.cli.connection import connect

Clock = Callable[[], float]
"""Monotonic seconds."""


@dataclass(frozen=True)
class GenerationOptions:
    """One request. None leaves a value to the node's default."""

    prompt: str
    """The prompt, or the user's message when `chat`."""
    chat: bool = True
    """Through the model's chat template."""
    system: str | None = None
    """System message, with `chat`."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep this much probability."""
    min_p: float | None = None
    """Drop tokens below this share of the likeliest one's probability."""
    repetition_penalty: float | None = None
    """1 is none."""
    presence_penalty: float | None = None
    """0 is none."""
    frequency_penalty: float | None = None
    """0 is none."""
    seed: int | None = None
    """The same seed gives the same text."""
    stop_strings: tuple[str, ...] = ()
    """Stop before any of these."""
    ignore_eos: bool = False
    """Go on past the end-of-text token."""
    quality: str | None = None
    """Name of a quality level: EXACT, ACCURATE, BALANCED or FAST."""
    policy: str | None = None
    """In its place: exact, fixed(16, 5 %), threshold(0.1) or marginal(0.001)."""
    priority: str | None = None
    """LOW, NORMAL or HIGH, among the requests that wait for room."""
    deadline_seconds: float | None = None
    """Fail if the whole takes longer."""


@dataclass(frozen=True)
class Generation:
    """What came back, and when, as seen from this side of the wire."""

    text: str
    """All deltas joined."""
    token_ids: tuple[int, ...]
    """Generated tokens."""
    finish_reason: str
    """stop, length, cancelled or error."""
    usage: generate_pb2.Usage
    """The node's own account."""
    first_token_seconds: float
    """From the call to the first generated token."""
    total_seconds: float
    """From the call to the end of the stream."""
    seconds_per_token: float | None
    """Mean time between tokens after the first; None for fewer than two."""


def build_request(options: GenerationOptions) -> generate_pb2.GenerateRequest:
    """The message for these options; what is None stays unset, so that the node decides."""
    request = generate_pb2.GenerateRequest(
        max_new_tokens=options.max_new_tokens,
        stop_strings=options.stop_strings,
        ignore_eos=options.ignore_eos,
    )
    if options.chat:
        if options.system is not None:
            request.chat.messages.add(role="system", content=options.system)
        request.chat.messages.add(role="user", content=options.prompt)
    else:
        request.text = options.prompt
    for name in (
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
        *("presence_penalty", "frequency_penalty", "seed"),
    ):
        value = getattr(options, name)
        if value is not None:
            setattr(request.sampling, name, value)
    if options.quality is not None:
        request.quality = generate_pb2.QualityLevel.Value(f"QUALITY_LEVEL_{options.quality}")
    if options.policy is not None:
        request.policy = options.policy
    if options.priority is not None:
        request.priority = generate_pb2.Priority.Value(f"PRIORITY_{options.priority}")
    return request


async def stream_generation(
    options: GenerationOptions,
    address: str,
    client: ClientSettings,
    on_text: Callable[[str], None],
    *,
    on_progress: Callable[[generate_pb2.PromptProgress], None] | None = None,
    clock: Clock = time.perf_counter,
) -> Generation:
    """Run one request; hand each text delta to `on_text` as it arrives.

    With `on_progress` the node is asked to say how far the prompt is, until there is text.

    Cancelling the calling task cancels the request on the node.

    Raises:
        FluxionError: whatever the node refused or failed with, or that it cannot be reached.
    """
    request = build_request(options)
    request.report_progress = on_progress is not None
    pieces: list[str] = []
    token_ids: list[int] = []
    arrivals: list[float] = []
    last: generate_pb2.GenerateResponse | None = None
    async with connect(address, client) as channel:
        stub = generate_pb2_grpc.GenerationStub(channel)
        started = clock()
        try:
            async for response in stub.Generate(request, timeout=options.deadline_seconds):
                if on_progress is not None and response.HasField("progress"):
                    on_progress(response.progress)
                if response.token_ids:
                    arrivals.append(clock())
                    token_ids.extend(response.token_ids)
                if response.text:
                    pieces.append(response.text)
                    on_text(response.text)
                last = response
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        ended = clock()
    if last is None or not last.finish_reason:
        raise StreamTruncatedError(
            "the node ended the stream without a finish reason; the answer may be cut short"
        )
    return Generation(
        text="".join(pieces),
        token_ids=tuple(token_ids),
        finish_reason=_finish_reason_name(last.finish_reason),
        usage=last.usage,
        first_token_seconds=(arrivals[0] if arrivals else ended) - started,
        total_seconds=ended - started,
        seconds_per_token=(
            (arrivals[-1] - arrivals[0]) / (len(token_ids) - 1) if len(token_ids) > 1 else None
        ),
    )


def progress_text(progress: generate_pb2.PromptProgress) -> str:
    """How far a prompt is, in words."""
    if progress.state == generate_pb2.PROMPT_STATE_PREFILL:
        return f"prefill {progress.prompt_tokens_done:,} of {progress.prompt_tokens:,} tokens"
    if progress.prompt_tokens:
        return f"{progress.prompt_tokens:,} tokens wait for room, or for a prefill node"
    return "the node reads the request"


def _finish_reason_name(reason: int) -> str:
    name: str = generate_pb2.FinishReason.Name(reason)
    return name.removeprefix("FINISH_REASON_").lower()
