"""The decoder of `decoder.py` for a decode node without a GPU: native, on the attention's own pool.

A token's hidden states, its KV and its logits are the same bits whatever other tokens are computed
with it, a step's or a chunk's, and however many threads there are. torch's products promise no such
thing: their sums have another order for one row, for a few and for many.

Weights lie in panels (kernels/packed_weight.py) on huge pages, in the decoder's dtype; activations
are float32. A tied head is stored once, and embeddings are read from its panels. What a layer does
between two calls of attention is one call into native code (kernels/native/dense/dense_layers.h).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fluxion_core.kernels import _native
from fluxion_core.kernels.packed_weight import (
    PANEL_COLUMNS,
    pack,
    packed_rows,
    padded,
    padded_vector,
)
from fluxion_core.kvstore.arena import Arena
from fluxion_core.models.attention_port import AttentionPort
from fluxion_core.models.decoder import Decoder, Layer
from fluxion_core.models.rope import inverse_frequencies
from fluxion_core.pool.cpu_pool import WAKE_BYTES, CpuPool


class HostDecoder:
    """Token ids in, hidden states and logits out. One thread only.

    Args:
        decoder: on the CPU, in float32 or bfloat16. Its weights are taken, piece by piece, so that
            they are never there twice; it cannot be used any more.
        pool: threads that do the work, with the calling one.

    Raises:
        CapacityError: the memory for the weights is not there.
    """

    def __init__(self, decoder: Decoder, pool: CpuPool) -> None:
        self.config = config = decoder.config
        self._pool = pool
        layers = list(cast(Iterable[Layer], decoder.layers))
        self._packing = packing = _Packing(decoder, layers)
        norms, products = [], []
        for layer in layers:
            norms.append([padded_vector(layer.input_norm), padded_vector(layer.post_norm)])
            products.append(
                [
                    packing.product(layer.qkv, layer.qkv_bias),
                    packing.product(layer.output),
                    packing.product(layer.gate_up, parts=2),
                    packing.product(layer.down),
                ]
            )
        self._embedding = None if config.tie_word_embeddings else decoder.embedding
        head = packing.product(decoder.head)
        self._head_panels = packing.panels
        frequencies = inverse_frequencies(config.rope, config.head_dim)
        self._native = _native.DenseLayers(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.rms_norm_eps,
            frequencies.float().numpy(),
            norms,
            products,
            padded_vector(decoder.final_norm),
            head,
        )

    def __call__(self, token_ids: Tensor, positions: Tensor, attention: AttentionPort) -> Tensor:
        """Hidden states after the final norm; see `Decoder.forward`.

        Args:
            token_ids: [tokens] int64.
            positions: [tokens] int64, of each token within its sequence.
            attention: called once per layer, with tensors that hold for that call.

        Returns:
            [tokens, hidden_size] float32.
        """
        config, native, pool = self.config, self._native, self._pool.native
        rows, heads, kv_heads = len(token_ids), config.num_heads, config.num_kv_heads
        embedded = self._embedded(token_ids)
        qkv = torch.empty(rows, native.qkv_width)
        next_qkv = qkv.numpy()
        native.begin(pool, embedded.numpy(), positions.numpy(), next_qkv, WAKE_BYTES)
        hidden = torch.empty(rows, native.hidden_width)
        last = hidden.numpy()
        in_heads = qkv[:, : (heads + 2 * kv_heads) * config.head_dim].view(
            rows, heads + 2 * kv_heads, config.head_dim
        )
        query, key = in_heads[:, :heads], in_heads[:, heads : heads + kv_heads]
        value = in_heads[:, heads + kv_heads :]
        for layer in range(config.num_layers):
            attended = attention.attend(layer, query, key, value).contiguous()
            to = next_qkv if layer + 1 < config.num_layers else last
            native.advance(pool, layer, attended.numpy(), to, WAKE_BYTES)
        return hidden[:, : config.hidden_size]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocab_size] float32 for [rows, hidden_size] as a call gave them."""
        native, rows = self._native, len(hidden)
        if hidden.stride() != (native.hidden_width, 1):
            wide = torch.zeros(rows, native.hidden_width)
            wide[:, : self.config.hidden_size] = hidden
            hidden = wide[:, : self.config.hidden_size]
        logits = torch.empty(rows, native.logits_width)
        native.logits(self._pool.native, hidden.numpy(), logits.numpy(), WAKE_BYTES)
        return logits[:, : self.config.vocab_size]

    def _embedded(self, token_ids: Tensor) -> Tensor:
        if self._embedding is not None:
            return F.embedding(token_ids, self._embedding).float()
        return packed_rows(self._head_panels, token_ids).float()


Product = tuple[Tensor, Tensor]
"""Panels [panels, inputs, 16] of a matrix, and its bias [outputs] float32."""


class _Packing:
    """Memory of all packed weights, filled one after the other."""

    def __init__(self, decoder: Decoder, layers: list[Layer]) -> None:
        weights = [
            *(w for layer in layers for w in (layer.qkv, layer.output, layer.down)),
            *(half for layer in layers for half in layer.gate_up.chunk(2)),
            decoder.head,
        ]
        count = sum(padded(weight.shape[0]) * weight.shape[1] for weight in weights)
        dtype = decoder.head.dtype
        self._weights = Arena(count * dtype.itemsize).bytes.view(dtype)
        self._used = 0
        self.panels = torch.empty(0)
        """Of the last product."""

    def product(self, weight: Tensor, bias: Tensor | None = None, *, parts: int = 1) -> Product:
        """Pack a matrix and free it; returns its panels and its bias, filled with zeros.

        Args:
            weight: [outputs, inputs]; empty afterwards.
            bias: [outputs].
            parts: of so many equal parts of the outputs, panels take turns.
        """
        outputs, inputs = weight.shape
        width = padded(outputs // parts) * parts
        place = self._weights[self._used : self._used + width * inputs]
        self._used += width * inputs
        self.panels = place.view(width // PANEL_COLUMNS, inputs, PANEL_COLUMNS)
        for turn, part in enumerate(weight.chunk(parts)):
            pack(part, self.panels[turn::parts])
        weight.data = weight.new_empty(0)
        zeros = torch.zeros(width) if bias is None else bias
        return self.panels, padded_vector(zeros)
