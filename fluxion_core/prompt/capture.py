"""The attention port of prompts: causal attention over the prompt so far, and its KV as frames.

K and V are rounded to bfloat16 before anything attends to them, so that the decode node, which gets
the rounded values, continues from exactly what prefill saw.

On a GPU the KV of a chunk leaves through an outbox while the next layers are computed;
`finish_chunk` waits for the rest of it.

If the receiver wants a profile of the prompt, some of its queries are kept, and each layer's
profile is made once that layer's KV is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fluxion_core.errors import RequestCancelledError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kernels.dense_attention import cpu as dense_attention
from fluxion_core.kvstream.handoff import (
    Frame,
    FrameKind,
    frame_tokens,
    max_frame_payload_bytes,
)
from fluxion_core.machine.stopwatch import Stopwatch
from fluxion_core.planning.profiled_queries import KeptQueries
from fluxion_core.planning.prompt_estimate import PromptEstimator, padded_tokens
from fluxion_core.planning.prompt_profile import PromptProfile

PIECE_BYTES = 8 << 20
"""Of frames that leave a device together: what a copy takes on the thread that launches it, it
takes for all of them. More would keep more pinned memory until the last of them is taken."""


def max_piece_bytes(geometry: KvGeometry) -> int:
    """Largest piece that `KvCapture` gives to its outbox."""
    return _piece_frames(geometry) * max_frame_payload_bytes(geometry)


def _piece_frames(geometry: KvGeometry) -> int:
    return max(1, PIECE_BYTES // max_frame_payload_bytes(geometry))


class Outbox(Protocol):
    """The way out of a device for KV; prompt/outbox.py has it."""

    def put(self, payload: Tensor, take: Callable[[memoryview], None]) -> None:
        """Copy a piece out; `take` gets its bytes, in this or a later call, and may keep them."""

    def drain(self) -> None:
        """Hand on all pieces."""


class KvCapture:
    """Holds one prompt's KV and hands each layer's new KV out as soon as it is computed.

    Args:
        geometry: of the model's KV.
        num_tokens: of the prompt.
        kv_from_token: first token whose KV the receiver wants; a multiple of 16.
        emit: takes each CHUNK frame, in order.
        is_cancelled: asked before every layer.
        device: of the model.
        outbox: that KV leaves through; None on a CPU.
        profile_window: the receiver's default window, if it wants a profile of the prompt.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        *,
        num_tokens: int,
        kv_from_token: int,
        emit: Callable[[Frame], None],
        is_cancelled: Callable[[], bool],
        device: torch.device,
        outbox: Outbox | None = None,
        profile_window: WindowSpec | None = None,
    ) -> None:
        self._geometry = geometry
        self._kv_from_token = kv_from_token
        self._emit = emit
        self._is_cancelled = is_cancelled
        self._outbox = outbox
        self._attend_chunk = _attention_on(device)
        self._first_token = 0
        self._frame_tokens = frame_tokens(geometry)
        self._piece_frames = _piece_frames(geometry)
        self._num_tokens = num_tokens
        room = padded_tokens(num_tokens)
        shape = (geometry.num_layers, 2, geometry.num_kv_heads, room, geometry.head_dim)
        self._kv = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self._kv[:, :, :, num_tokens:] = 0
        self._estimator = (
            None if profile_window is None else PromptEstimator(num_tokens, profile_window)
        )
        self._queries = KeptQueries(num_tokens, geometry.num_layers)
        self.profiles: list[PromptProfile] = []
        """Of each layer, once its last token is through; stays empty if none is wanted."""
        self._profiling: list[Stopwatch] = []

    def begin_chunk(self, first_token: int) -> None:
        """The next calls of `attend` are for tokens from this one on; a multiple of 16."""
        self._first_token = first_token

    def finish_chunk(self) -> None:
        """Hand out what is still under way of the chunk's KV."""
        if self._outbox is not None:
            self._outbox.drain()

    @property
    def kv(self) -> Tensor:
        """[layers, 2, kv_heads, tokens, head_dim] bfloat16, rotary applied: all that is computed.

        Whole when the prompt is.
        """
        return self._kv[:, :, :, : self._num_tokens]

    @property
    def profile_seconds(self) -> float:
        """Spent on profiles."""
        return sum(stopwatch.seconds for stopwatch in self._profiling)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend as AttentionPort says; the tokens are the prompt's next ones.

        Raises:
            RequestCancelledError: the receiver went away.
        """
        if self._is_cancelled():
            raise RequestCancelledError("the receiver ended the hand-off")
        first, end = self._first_token, self._first_token + key.shape[0]
        kv = self._kv[layer]
        kv[0, :, first:end] = key.transpose(0, 1)
        kv[1, :, first:end] = value.transpose(0, 1)
        self._emit_frames(layer, max(first, self._kv_from_token), end)
        wants_profile = self._estimator is not None and end == self._num_tokens
        attended = self._attend_chunk(query, kv[0, :, :end], kv[1, :, :end])
        if self._estimator is not None:
            self._queries.add(layer, self._queries.positions.pick(query, first))
        if wants_profile:
            self._make_profile(layer)
        return attended

    def _make_profile(self, layer: int) -> None:
        stopwatch = Stopwatch(self._kv.device)
        assert self._estimator is not None
        key, value = self._kv[layer, :, :, : padded_tokens(self._num_tokens)].float()
        self.profiles.append(self._estimator.estimate(self._queries.take(layer), key, value))
        stopwatch.stop()
        self._profiling.append(stopwatch)

    def _emit_frames(self, layer: int, first: int, end: int) -> None:
        while first < end:
            count = min(self._frame_tokens, end - first)
            num_frames = min((end - first) // count, self._piece_frames)
            payloads = self._payloads(layer, first, count, num_frames)
            emit = partial(self._emit_chunks, layer, first, count, num_frames)
            if self._outbox is not None:
                self._outbox.put(payloads, emit)
            else:
                emit(payloads.numpy().data)
            first += num_frames * count

    def _emit_chunks(
        self, layer: int, first: int, count: int, num_frames: int, payloads: memoryview
    ) -> None:
        num_bytes = len(payloads) // num_frames
        for number in range(num_frames):
            payload = payloads[number * num_bytes : (number + 1) * num_bytes]
            self._emit(Frame(FrameKind.CHUNK, payload, layer, first + number * count, count))

    def _payloads(self, layer: int, first: int, count: int, num_frames: int) -> Tensor:
        """[bytes] uint8, of each frame `[kv_head][block][K 16 x D | V 16 x D]`, zero padded.

        It may be a view of the prompt's KV, whose tokens do not change once they are there.

        Args:
            layer: of the model.
            first: token of the first frame.
            count: tokens of each frame; a multiple of 16, except of a single one at the end.
            num_frames: one after the other.
        """
        geometry = self._geometry
        blocks = ceil_div(count, BLOCK_TOKENS)
        kv = self._kv[layer, :, :, first : first + num_frames * count]
        if count % BLOCK_TOKENS:
            kv = torch.nn.functional.pad(kv, (0, 0, 0, blocks * BLOCK_TOKENS - count))
        shape = (2, geometry.num_kv_heads, num_frames, blocks, BLOCK_TOKENS, geometry.head_dim)
        ordered = kv.view(shape).permute(2, 1, 3, 0, 4, 5).contiguous()
        return ordered.view(torch.uint8).flatten()


def _attention_on(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of a chunk: [tokens, heads, head_dim] query, [kv_heads, tokens, head_dim] bfloat16
    keys and values; gives what is like the query."""

    def on_cpu(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = dense_attention.attend_chunk(query.float(), key.float(), value.float())
        return attended.to(query.dtype)

    def on_gpu(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from fluxion_core.kernels.dense_attention import cuda

        return cuda.attend_chunk(query, key.to(query.dtype), value.to(query.dtype))

    return on_gpu if device.type == "cuda" else on_cpu
