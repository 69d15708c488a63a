"""Put a hand-off's frames together, and refuse streams that are not whole.

Rules: one HEADER first; CHUNKs, each layer's in token order without gap or overlap, layers
interleaved at will; one TRAILER, after every layer is whole. A frame that breaks a rule ends the
hand-off: nothing is committed.

Where the HEADER names an endpoint, CHUNKs come over connections beside the call and land natively
(services/decode/data_plane.py), by the same rules. Then the TRAILER may come before they have
landed, and what it counts is compared once both are there.
"""

from __future__ import annotations

from typing import Protocol

from fluxion_core.errors import FrameFormatError, FrameOrderError, StreamTruncatedError
from fluxion_core.geometry import BLOCK_TOKENS
from fluxion_core.kvstream.handoff import Endpoint, Frame, FrameKind, Header, KvLayout, Trailer


class KvSink(Protocol):
    """Taker of KV: the host KV store's reservation for one sequence."""

    def write_blocks(
        self, layer: int, first_token: int, num_tokens: int, payload: bytes | memoryview
    ) -> None:
        """Copy `[kv_head][block][K 16 x D | V 16 x D]` bf16 of one layer into place."""


class HandoffAssembler:
    """Feeds one stream into one sink.

    Args:
        sink: takes the KV; must be ready for tokens `kv_from_token` and later.
        layout: what this node serves.
        num_tokens: of the prompt.
        kv_from_token: first token that the sink does not hold yet.
    """

    def __init__(
        self, sink: KvSink, layout: KvLayout, *, num_tokens: int, kv_from_token: int
    ) -> None:
        self._sink = sink
        self._layout = layout
        self._num_tokens = num_tokens
        self._kv_from_token = kv_from_token
        self._next_token = [kv_from_token] * layout.num_layers
        self._has_header = False
        self.endpoint: Endpoint | None = None
        """Where CHUNKs come from, as the HEADER says; None: they come with the call."""
        self._trailer: Trailer | None = None
        self.num_chunks = 0
        """CHUNK frames taken."""
        self.payload_bytes = 0
        """Their payload."""

    @property
    def tokens_taken(self) -> int:
        """Tokens whose KV the sink holds, from the prompt's first; a layer counts for its share."""
        return sum(self._next_token) // len(self._next_token)

    @property
    def has_trailer(self) -> bool:
        """Whether the stream has ended as it should."""
        return self._trailer is not None

    def take_header(self, header: Header) -> None:
        """Check the announcement against what was asked for.

        Raises:
            FrameFormatError: a second header, or one for another prompt.
            LayoutMismatchError: the peer serves another model or layout.
        """
        if self._has_header:
            raise FrameFormatError("a second HEADER frame; a stream has one, first")
        self._layout.check_compatible(header.layout)
        if (header.num_tokens, header.kv_from_token) != (self._num_tokens, self._kv_from_token):
            raise FrameFormatError(
                f"HEADER announces KV of tokens {header.kv_from_token} to {header.num_tokens}; "
                f"asked for {self._kv_from_token} to {self._num_tokens}"
            )
        self._has_header = True
        self.endpoint = header.endpoint

    def take_chunk(self, frame: Frame) -> None:
        """Write one CHUNK to the sink.

        Raises:
            FrameFormatError: before the header, after the trailer, or of a wrong size.
            FrameOrderError: not the layer's next tokens.
        """
        if frame.kind is not FrameKind.CHUNK:
            raise FrameFormatError(f"expected a CHUNK frame, got {frame.kind.name}")
        if not self._has_header or self._trailer is not None:
            raise FrameFormatError("CHUNK frame outside of HEADER and TRAILER")
        if self.endpoint is not None:
            raise FrameFormatError("CHUNK frame in a call whose KV comes over its connections")
        self._check_extent(frame)
        self._sink.write_blocks(frame.layer, frame.first_token, frame.num_tokens, frame.payload)
        self._next_token[frame.layer] = frame.first_token + frame.num_tokens
        self.num_chunks += 1
        self.payload_bytes += len(frame.payload)

    def take_trailer(self, trailer: Trailer) -> None:
        """Accept the end of the stream.

        Raises:
            FrameFormatError: a second trailer, or counts that differ from what came.
            StreamTruncatedError: a layer is not whole.
        """
        if self._trailer is not None or not self._has_header:
            raise FrameFormatError("TRAILER frame before the HEADER, or a second one")
        self._trailer = trailer
        if self.endpoint is None:
            self._check_whole(trailer)

    def take_landing(self, num_chunks: int, payload_bytes: int) -> None:
        """Accept all KV that was to come beside the call: so many CHUNKs of so many bytes."""
        assert self.endpoint is not None
        self.num_chunks, self.payload_bytes = num_chunks, payload_bytes
        self._next_token = [self._num_tokens] * len(self._next_token)

    def finish(self) -> Trailer:
        """The trailer, once the stream has ended, and all KV has come.

        Raises:
            StreamTruncatedError: the stream ended without one, or a layer is not whole.
            FrameFormatError: the trailer's counts differ from what came beside the call.
        """
        if self._trailer is None:
            whole = sum(next_token == self._num_tokens for next_token in self._next_token)
            raise StreamTruncatedError(
                f"the stream ended before its TRAILER, with {whole} of "
                f"{self._layout.num_layers} layers whole"
            )
        self._check_whole(self._trailer)
        return self._trailer

    def _check_whole(self, trailer: Trailer) -> None:
        for layer, next_token in enumerate(self._next_token):
            if next_token != self._num_tokens:
                raise StreamTruncatedError(
                    f"TRAILER came while layer {layer} holds {next_token} of "
                    f"{self._num_tokens} tokens"
                )
        if (trailer.num_chunks, trailer.payload_bytes) != (self.num_chunks, self.payload_bytes):
            raise FrameFormatError(
                f"TRAILER counts {trailer.num_chunks} chunks of {trailer.payload_bytes} B; "
                f"{self.num_chunks} of {self.payload_bytes} B came"
            )

    def _check_extent(self, frame: Frame) -> None:
        layer, first, count = frame.layer, frame.first_token, frame.num_tokens
        if layer >= self._layout.num_layers:
            raise FrameFormatError(
                f"CHUNK of layer {layer}; the model has layers 0 to {self._layout.num_layers - 1}"
            )
        if first != self._next_token[layer]:
            raise FrameOrderError(
                layer=layer, expected_token=self._next_token[layer], found_token=first
            )
        end = first + count
        if count == 0 or end > self._num_tokens:
            raise FrameFormatError(
                f"CHUNK of tokens {first} to {end}; the prompt has {self._num_tokens}"
            )
        if count % BLOCK_TOKENS and end != self._num_tokens:
            raise FrameFormatError(
                f"CHUNK of {count} tokens at {first}: only the prompt's last may be no multiple "
                f"of {BLOCK_TOKENS}"
            )
        expected = self._layout.payload_bytes(count)
        if len(frame.payload) != expected:
            raise FrameFormatError(
                f"CHUNK of {count} tokens has {len(frame.payload)} B of payload; needs {expected}"
            )
