"""The attention port of prefill: causal attention over the prompt so far, and its KV as frames.

K and V are rounded to bfloat16 before anything attends to them, so that the decode node, which gets
the rounded values, continues from exactly what prefill saw.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fluxion_core.errors import RequestCancelledError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kernels.dense_attention import cpu as dense_attention
from fluxion_core.kvstream.handoff import Frame, FrameKind, frame_tokens


class KvCapture:
    """Holds one prompt's KV and hands each layer's new KV out as soon as it is computed.

    Args:
        geometry: of the model's KV.
        num_tokens: of the prompt.
        kv_from_token: first token whose KV the receiver wants; a multiple of 16.
        emit: takes each CHUNK frame, in order.
        is_cancelled: asked before every layer.
        device: of the model.
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
    ) -> None:
        self._geometry = geometry
        self._kv_from_token = kv_from_token
        self._emit = emit
        self._is_cancelled = is_cancelled
        self._first_token = 0
        self._frame_tokens = frame_tokens(geometry)
        shape = (geometry.num_layers, 2, geometry.num_kv_heads, num_tokens, geometry.head_dim)
        self._kv = torch.empty(shape, dtype=torch.bfloat16, device=device)

    def begin_chunk(self, first_token: int) -> None:
        """The next calls of `attend` are for tokens from this one on; a multiple of 16."""
        self._first_token = first_token

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort; the tokens are the prompt's next ones.

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
        so_far = kv[:, :, :end].float()
        return dense_attention.attend_chunk(query.float(), so_far[0], so_far[1]).to(query.dtype)

    def _emit_frames(self, layer: int, first: int, end: int) -> None:
        while first < end:
            count = min(self._frame_tokens, end - first)
            payload = self._payload(layer, first, count)
            self._emit(Frame(FrameKind.CHUNK, payload, layer, first, count))
            first += count

    def _payload(self, layer: int, first: int, count: int) -> bytes:
        """`[kv_head][block][K 16 x D | V 16 x D]`, the last block zero padded."""
        geometry = self._geometry
        blocks = ceil_div(count, BLOCK_TOKENS)
        kv = self._kv[layer, :, :, first : first + count]
        if count % BLOCK_TOKENS:
            kv = torch.nn.functional.pad(kv, (0, 0, 0, blocks * BLOCK_TOKENS - count))
        blocked = kv.view(2, geometry.num_kv_heads, blocks, BLOCK_TOKENS, geometry.head_dim)
        ordered = blocked.permute(1, 2, 0, 3, 4).contiguous()
        return ordered.view(torch.uint8).cpu().numpy().tobytes()
