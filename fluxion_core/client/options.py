"""Prompt and options of a request, and the message made of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fluxion_core.errors import InvalidRequestError
from fluxion_proto.v1 import generate_pb2

Quality = Literal["exact", "accurate", "balanced", "fast"]
"""How much of the KV is read, from all to least; what each means on a node: ModelInfo.levels."""

Priority = Literal["low", "normal", "high"]


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation, for the model's chat template."""

    role: str
    """system, user or assistant, as the template knows it."""
    content: str


Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""A text as it stands, token ids, or messages for the model's chat template."""


@dataclass(frozen=True)
class GenerationOptions:
    """Wishes for an answer. None leaves a value to the node's default."""

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
    stop_token_ids: tuple[int, ...] = ()
    """Stop at any of these."""
    ignore_eos: bool = False
    """Go on past the end-of-text token."""
    quality: Quality | None = None
    """A quality level."""
    policy: str | None = None
    """In its place: exact, fixed(16, 5 %), threshold(0.1) or marginal(0.001)."""
    priority: Priority | None = None
    """Among the requests of this client that wait for room."""
    deadline_seconds: float | None = None
    """Fail if the whole takes longer, waits before retries included. The first connection has a
    limit of its own, ClientSettings.connect_seconds."""
    cache_salt: str = ""
    """Only requests of the same salt go on from each other's stored KV."""
    request_id: str = ""
    """For the node's log and traces; the node makes one if it is empty."""
    report_progress: bool = False
    """Tell how far the prompt is, about twice a second until the first token."""


_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed"),
)


def build_request(prompt: Prompt, options: GenerationOptions) -> generate_pb2.GenerateRequest:
    """The message for this prompt; what is None stays unset, so that the node decides.

    Raises:
        InvalidRequestError: the prompt is empty or of no such kind, or a value cannot be sent.
    """
    try:
        return _request(prompt, options)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the request cannot be sent: {error}") from None


def build_tokenize_request(prompt: str | Sequence[ChatMessage]) -> generate_pb2.TokenizeRequest:
    """The message that asks for a prompt's token ids.

    Raises:
        InvalidRequestError: the prompt is empty or of no such kind, or cannot be sent.
    """
    request = generate_pb2.TokenizeRequest()
    try:
        _set_text_or_chat(request, prompt)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the request cannot be sent: {error}") from None
    return request


def _request(prompt: Prompt, options: GenerationOptions) -> generate_pb2.GenerateRequest:
    request = generate_pb2.GenerateRequest(
        request_id=options.request_id,
        max_new_tokens=options.max_new_tokens,
        stop_strings=options.stop_strings,
        stop_token_ids=options.stop_token_ids,
        ignore_eos=options.ignore_eos,
        policy=options.policy,
        report_progress=options.report_progress,
        cache_salt=options.cache_salt,
    )
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], int):
        request.token_ids.ids.extend(prompt)
    else:
        _set_text_or_chat(request, prompt)
    for name in _SAMPLING:
        value = getattr(options, name)
        if value is not None:
            setattr(request.sampling, name, value)
    if options.quality is not None:
        request.quality = generate_pb2.QualityLevel.Value(
            f"QUALITY_LEVEL_{options.quality.upper()}"
        )
    if options.priority is not None:
        request.priority = generate_pb2.Priority.Value(f"PRIORITY_{options.priority.upper()}")
    return request


def _set_text_or_chat(
    request: generate_pb2.GenerateRequest | generate_pb2.TokenizeRequest, prompt: Prompt
) -> None:
    if not prompt:
        raise InvalidRequestError("the prompt is empty; give a text, token ids or chat messages")
    if isinstance(prompt, str):
        request.text = prompt
        return
    for message in prompt:
        if not isinstance(message, ChatMessage):
            raise InvalidRequestError(
                f"a prompt is a text, token ids or ChatMessages; it holds {type(message).__name__}"
            )
        request.chat.messages.add(role=message.role, content=message.content)
