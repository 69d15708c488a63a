"""Decode steps of a known text, many at once: what each head would have seen, read and lost.

A document's exact KV is computed once. Any of its positions is then a decode step: the query of
that token over everything before it. Each step starts from exact KV: errors of earlier steps are
not carried over, which is stated wherever a figure comes from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES, WindowSpec
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.layer_step import LayerStep

COARSEST = BLOCK_SIZES[-1]


@dataclass(frozen=True)
class DocumentKv:
    """Exact KV of a text. bfloat16 values held as float32."""

    token_ids: Tensor
    """[tokens] int64, a multiple of 128 of them."""
    keys: Tensor
    """[layers, kv_heads, tokens, head_dim], rotary applied."""
    values: Tensor
    """Like keys."""


class _Capture:
    """Attention port that keeps KV of the whole text and attends causally."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.first = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort."""
        end = self.first + key.shape[0]
        self.keys[layer, :, self.first : end] = key.transpose(0, 1).bfloat16().float()
        self.values[layer, :, self.first : end] = value.transpose(0, 1).bfloat16().float()
        rows = torch.arange(self.first, end, device=query.device)
        mask = torch.arange(end, device=query.device)[None] <= rows[:, None]
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            self.keys[layer, None, :, :end],
            self.values[layer, None, :, :end],
            attn_mask=mask,
            enable_gqa=True,
        )
        return output[0].transpose(0, 1)


@torch.no_grad()
def prefill(decoder: Decoder, token_ids: Sequence[int], *, chunk_tokens: int = 1024) -> DocumentKv:
    """Exact KV of a text; what is beyond a multiple of 128 tokens is cut off."""
    config = decoder.config
    count = len(token_ids) // COARSEST * COARSEST
    device = decoder.embedding.device
    ids = torch.tensor(token_ids[:count], device=device)
    shape = (config.num_layers, config.num_kv_heads, count, config.head_dim)
    capture = _Capture(torch.empty(shape, device=device), torch.empty(shape, device=device))
    for first in range(0, count, chunk_tokens):
        capture.first = first
        chunk = ids[first : first + chunk_tokens]
        decoder(chunk, torch.arange(first, first + len(chunk), device=device), capture)
    return DocumentKv(ids, capture.keys, capture.values)


class ReplayPort:
    """Attention port of decode steps at known positions of a document.

    Args:
        kv: of the document.
        positions: [rows] int64: of the rows' tokens.
        window: the default window.
        attend: gets the layer and its LayerStep, returns the output [rows, heads, head_dim].
    """

    def __init__(
        self,
        kv: DocumentKv,
        positions: Tensor,
        window: WindowSpec,
        attend: Callable[[int, LayerStep], Tensor],
    ) -> None:
        self._kv, self._positions, self._window, self._attend = kv, positions, window, attend

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort."""
        own_key, own_value = key.bfloat16().float(), value.bfloat16().float()
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        step = LayerStep(
            keys, values, query.float(), own_key, own_value, self._positions, self._window
        )
        return self._attend(layer, step)


def replay(
    decoder: Decoder,
    kv: DocumentKv,
    positions: Tensor,
    window: WindowSpec,
    attend: Callable[[int, LayerStep], Tensor],
) -> Tensor:
    """Decode the tokens at these positions; returns hidden states [rows, hidden_size]."""
    port = ReplayPort(kv, positions, window, attend)
    hidden: Tensor = decoder(kv.token_ids[positions], positions, port)
    return hidden
