"""The hand-off's nouns: the layout both nodes must share, and frames.

The bytes of a frame are specified in protos/README.md and made in wire/codec.py; what order frames
may come in is kvstream/assembler.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import IntEnum

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import LayoutMismatchError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, ceil_div

FRAME_PAYLOAD_BYTES = 1 << 20
"""What a KV frame aims at: large enough that Python's cost per message is small (64 KiB
messages move 0.65 GB/s, 1 MiB 1.0), small enough that flow control still has a grip."""


class FrameKind(IntEnum):
    """Kind of a frame's payload."""

    HEADER = 1
    """HandoffHeader message; first frame of a stream, once."""
    CHUNK = 2
    """KV of one layer for a run of tokens."""
    TRAILER = 3
    """HandoffTrailer message; last frame of a stream, once."""


@dataclass(frozen=True)
class Frame:
    """One frame, its checksum already verified."""

    kind: FrameKind
    payload: bytes | memoryview
    layer: int = 0
    """CHUNK only."""
    first_token: int = 0
    """CHUNK only: absolute position, a multiple of 16."""
    num_tokens: int = 0
    """CHUNK only: a multiple of 16, but for the prompt's last tokens."""


@dataclass(frozen=True)
class KvLayout:
    """Meaning of KV: the model that made it and how it lies. Both nodes share it."""

    model_name: str
    """For people; not compared."""
    revision_hash: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    tokenizer_fingerprint: str
    kv_dtype: str = "bfloat16"
    block_tokens: int = BLOCK_TOKENS

    def check_compatible(self, peer: KvLayout) -> None:
        """Raise LayoutMismatchError naming the first field in which `peer` differs."""
        for name in (each.name for each in fields(self)):
            if name == "model_name":
                continue
            ours, theirs = getattr(self, name), getattr(peer, name)
            if ours != theirs:
                raise LayoutMismatchError(name, expected=ours, found=theirs)

    def payload_bytes(self, num_tokens: int) -> int:
        """Bytes of a CHUNK of `num_tokens` tokens: whole blocks, the last one zero padded."""
        block_bytes = 2 * BLOCK_TOKENS * self.head_dim * 2
        return self.num_kv_heads * ceil_div(num_tokens, BLOCK_TOKENS) * block_bytes


@dataclass(frozen=True)
class Endpoint:
    """The place where a hand-off's KV is fetched beside its call, and what is shown there."""

    way: Carrier
    """Any but GRPC."""
    call_id: bytes
    """16 bytes; names the call."""
    secret: bytes = field(repr=False)
    """32 bytes; proves that who connects has had the HEADER."""
    connections: int
    """That the receiver makes."""
    port: int = 0
    """SOCKETS: TCP port, of the host that was called."""
    unix_name: str = ""
    """SHARED_MEMORY: abstract name, without the zero byte before it."""
    tls: bool = False
    """SOCKETS: connections are TLS 1.3, with the secret as pre-shared key."""


@dataclass(frozen=True)
class Header:
    """Announcement of a stream, before its first byte of KV."""

    layout: KvLayout
    num_tokens: int
    """Of the prompt."""
    kv_from_token: int
    """First token whose KV follows; the receiver holds what comes before."""
    endpoint: Endpoint | None = None
    """Where CHUNKs are fetched; None: they come with the call itself."""

    @property
    def way(self) -> Carrier:
        """The way that CHUNKs come."""
        return Carrier.GRPC if self.endpoint is None else self.endpoint.way


@dataclass(frozen=True)
class Trailer:
    """Last word of a stream, once all KV is out."""

    first_token_id: int
    """Sampled from the logits of the prompt's last token."""
    queue_seconds: float
    prefill_seconds: float
    num_chunks: int
    payload_bytes: int
    """Of all CHUNK frames."""
    prompt_profile: bytes = b""
    """What prefill says of the prompt's heads, packed; empty if it was not asked for."""


def frame_tokens(geometry: KvGeometry) -> int:
    """Tokens of one layer in a frame of about FRAME_PAYLOAD_BYTES; a multiple of 16."""
    blocks = FRAME_PAYLOAD_BYTES // (geometry.num_kv_heads * geometry.block_bytes)
    return max(1, blocks) * BLOCK_TOKENS


def max_frame_payload_bytes(geometry: KvGeometry) -> int:
    """Largest CHUNK payload that this layout allows; frames above it are refused."""
    return max(FRAME_PAYLOAD_BYTES, geometry.num_kv_heads * geometry.block_bytes)
