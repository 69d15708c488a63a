"""Decode steps of a known text, many at once: what each head would have seen, read and lost.

A document's exact KV is computed once. Any of its positions is then a decode step: the query of
that token over everything before it. Each step starts from exact KV: errors of earlier steps are
not carried over, which is stated wherever a figure comes from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES, KvGeometry, WindowSpec
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.layer_step import LayerStep
from fluxion_core.prompt.compute import compute_prompt

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


def prefill(decoder: Decoder, token_ids: Sequence[int]) -> DocumentKv:
    """Exact KV of a text, on the model's device; what is beyond a multiple of 128 is cut off."""
    config = decoder.config
    geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
    ids = list(token_ids[: len(token_ids) // COARSEST * COARSEST])
    kv = compute_prompt(decoder, geometry, ids).kv.float()
    return DocumentKv(torch.tensor(ids, device=kv.device), kv[:, 0], kv[:, 1])


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
        """Attend as the replayed steps do; arguments as of AttentionPort."""
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
