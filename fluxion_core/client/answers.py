"""Events of a stream, the whole answer, and the figures of a node.

A stream's events are one Progress or more (if they were asked for), one Delta a token, and
Finish, last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, cast

from google.protobuf.message import Message

from fluxion_core.errors import StreamTruncatedError
from fluxion_proto.v1 import generate_pb2

Clock = Callable[[], float]
"""Monotonic seconds."""

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""The end of the text, a stop string or stop token; max_new_tokens; or not by itself."""


@dataclass(frozen=True)
class KvReads:
    """Bytes and blocks that a request read of its retrieval region.

    The region is the text outside the default window.
    Bytes and shares are means over decode steps, all layers; 0 while there is no region.
    """

    policy: str
    """That it was decoded with."""
    scanned_bytes_per_token: float
    """Digests."""
    attended_bytes_per_token: float
    """K and V."""
    share_of_exact: float
    """All bytes / those of exact."""
    share_of_fixed_estimate: float
    """All bytes / those that fixed(16, 5 %) is estimated to read."""
    streaming_share: float
    """Of heads that read nothing of the region."""
    groups_by_block_size: tuple[int, ...]
    """GQA groups that chose blocks of 16, 32, 64 and 128 tokens; a sum over layers and steps."""
    groups_nothing: int
    """That read nothing."""
    groups_everything: int
    """That read all without a choice."""
    resident_bytes_per_token: float = 0.0
    """Of K and V, what lay in the node's device memory; 0 where it holds none there."""

    @property
    def resident_share(self) -> float:
        """Hit rate: resident bytes / K and V; 0 while nothing was read."""
        return self.resident_bytes_per_token / (self.attended_bytes_per_token or 1.0)


@dataclass(frozen=True)
class Usage:
    """The node's own account of a request."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in the host KV store."""
    local_prompt_tokens: int
    """Of the prompt, computed on the decode node; the rest by a prefill node."""
    generated_tokens: int
    queue_seconds: float
    """Waiting for room on the decode node and for its turn on the prefill node."""
    prefill_seconds: float
    """Computing the prompt."""
    handoff_seconds: float
    """From the first KV frame to the commit; overlaps prefill_seconds."""
    decode_seconds: float
    """Steps that this request was part of."""
    time_to_first_token_seconds: float
    handoff_bytes: int
    """KV that crossed the wire."""
    kv_bytes_read_per_token: float
    """Stored KV and digests read per decoded token, mean."""
    kv_bytes_in_host_memory: int
    """Held by this request, digests included."""
    kv_reads: KvReads


@dataclass(frozen=True)
class Progress:
    """State of a prompt that is not computed yet; `str` says it in words."""

    state: Literal["queued", "prefill"]
    """Waits for room or for its turn, or is computed."""
    prompt_tokens: int
    """0 until the node has cut the prompt into tokens."""
    prompt_tokens_done: int
    """Whose KV the decode node holds; falls if another prefill node has to begin again."""

    def __str__(self) -> str:
        if self.state == "prefill":
            return f"prefill {self.prompt_tokens_done:,} of {self.prompt_tokens:,} tokens"
        if self.prompt_tokens:
            return f"{self.prompt_tokens:,} tokens wait for room, or for a prefill node"
        return "the node reads the request"


@dataclass(frozen=True)
class Delta:
    """New tokens, and the text that became final with them."""

    text: str
    """Whole characters, and nothing that may yet turn out to be a stop string; may be empty."""
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Finish:
    """The end of an answer."""

    finish_reason: FinishReason
    usage: Usage


Event = Progress | Delta | Finish


@dataclass(frozen=True)
class Generation:
    """A whole answer, and when it came, as seen from this side of the wire."""

    request_id: str
    """As the node's log has it."""
    text: str
    """All deltas joined."""
    token_ids: tuple[int, ...]
    """Generated tokens."""
    finish_reason: FinishReason
    usage: Usage
    first_token_seconds: float
    """From the first attempt to the first generated token."""
    total_seconds: float
    """From the first attempt to the end of the stream."""
    seconds_per_token: float | None
    """Mean time between tokens after the first; None for fewer than two."""


@dataclass(frozen=True)
class ModelInfo:
    """Model and settings of a node, which do not change while it runs."""

    name: str
    architecture: str
    revision_hash: str
    context_tokens: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_bytes_per_token: int
    has_chat_template: bool
    eos_token_ids: tuple[int, ...]
    tokenizer_fingerprint: str
    device: str
    default_policy: str
    """For requests that name neither quality nor policy."""
    predictor_mode: str
    """network: weights fitted to this model, levels chosen by task quality; or training-free."""
    predictor_fingerprint: str
    """Of the weights, hex; empty if training-free."""
    levels: dict[str, str]
    """Policy of each quality level that this node serves."""


@dataclass(frozen=True)
class NodeLoad:
    """Requests and memory of a node, now."""

    running_requests: int
    waiting_requests: int
    host_kv_capacity_bytes: int
    """Free, reserved, used and cached together."""
    host_kv_free_bytes: int
    host_kv_reserved_bytes: int
    host_kv_used_bytes: int
    host_kv_cached_bytes: int
    """Released, still found by prefix, given up on demand."""
    generated_tokens_total: int
    is_draining: bool
    device_kv_capacity_bytes: int = 0
    """Room in device memory for copies of KV that steps read most; 0 where there is none."""
    device_kv_held_bytes: int = 0
    """Such copies. Requests never wait for room there."""


class AnswerReader:
    """Makes events of a stream's messages, and a Generation of all of them.

    Args:
        clock: for when tokens came.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._started = self._ended = clock()
        self._request_id = ""
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._arrivals: list[float] = []
        self._finished: Finish | None = None

    def take(self, response: generate_pb2.GenerateResponse) -> list[Event]:
        """Take a message, and return the events in it, in order."""
        events: list[Event] = []
        self._request_id = response.request_id or self._request_id
        if response.HasField("progress"):
            events.append(_progress_of(response.progress))
        if response.token_ids or response.text:
            if response.token_ids:
                self._arrivals.append(self._clock())
            events.append(Delta(response.text, tuple(response.token_ids)))
            self._pieces.append(response.text)
            self._token_ids.extend(response.token_ids)
        if response.finish_reason:
            self._ended = self._clock()
            reason = generate_pb2.FinishReason.Name(response.finish_reason)
            self._finished = Finish(
                cast(FinishReason, reason.removeprefix("FINISH_REASON_").lower()),
                usage_of(response.usage),
            )
            events.append(self._finished)
        return events

    def generation(self) -> Generation:
        """The whole answer.

        Raises:
            StreamTruncatedError: the stream ended without Finish.
        """
        if self._finished is None:
            raise StreamTruncatedError(
                "the node ended the stream without a finish reason; the answer may be cut short"
            )
        arrivals, num_tokens = self._arrivals, len(self._token_ids)
        return Generation(
            request_id=self._request_id,
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            finish_reason=self._finished.finish_reason,
            usage=self._finished.usage,
            first_token_seconds=(arrivals[0] if arrivals else self._ended) - self._started,
            total_seconds=self._ended - self._started,
            seconds_per_token=(
                (arrivals[-1] - arrivals[0]) / (num_tokens - 1) if num_tokens > 1 else None
            ),
        )


def usage_of(message: generate_pb2.Usage) -> Usage:
    """The message's account as a value of ours."""
    reads = KvReads(**_values(message.kv_reads, KvReads))
    return Usage(**_values(message, Usage, but=("kv_reads",)), kv_reads=reads)


def model_info_of(message: generate_pb2.GetModelInfoResponse) -> ModelInfo:
    """The message's figures as a value of ours."""
    levels = {
        generate_pb2.QualityLevel.Name(one.level).removeprefix("QUALITY_LEVEL_").lower(): one.policy
        for one in message.level_policies
    }
    return ModelInfo(**_values(message, ModelInfo, but=("levels",)), levels=levels)


def node_load_of(message: generate_pb2.GetLoadResponse) -> NodeLoad:
    """The message's figures as a value of ours."""
    return NodeLoad(**_values(message, NodeLoad))


def _progress_of(message: generate_pb2.PromptProgress) -> Progress:
    is_prefill = message.state == generate_pb2.PROMPT_STATE_PREFILL
    return Progress(
        "prefill" if is_prefill else "queued", message.prompt_tokens, message.prompt_tokens_done
    )


def _values(message: Message, kind: type, *, but: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    """The message's values for a dataclass' fields of the same names."""
    names = {field.name for field in fields(kind)} - set(but)
    repeated = {one.name for one in message.DESCRIPTOR.fields if one.is_repeated}
    values = {name: getattr(message, name) for name in names}
    return {name: tuple(value) if name in repeated else value for name, value in values.items()}
