"""A prompt's KV and profile for benchmarks: prefilled once, stored as often as there are ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kernels.dense_attention import cpu as dense_attention
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.layer_step import LayerStep, profile_prompts
from fluxion_core.planning.prompt_profile import PROFILED_QUERIES, PromptProfile

PREFILL_CHUNK_TOKENS = 512


class PromptKv:
    """Attention port of the prefill: causal, KV rounded to bfloat16 before it is attended to."""

    def __init__(self, geometry: KvGeometry, num_tokens: int) -> None:
        self._geometry = geometry
        shape = (geometry.num_layers, 2, geometry.num_kv_heads, num_tokens, geometry.head_dim)
        self._kv = torch.empty(shape, dtype=torch.bfloat16)
        self._last_queries: list[Tensor] = [torch.empty(0)] * geometry.num_layers
        self._first_token = 0

    @torch.inference_mode()
    def prefill(self, decoder: Decoder, token_ids: Sequence[int]) -> int:
        """Compute the prompt's KV; returns the first token after it, greedily."""
        hidden = torch.empty(0)
        for first in range(0, len(token_ids), PREFILL_CHUNK_TOKENS):
            chunk = torch.tensor(token_ids[first : first + PREFILL_CHUNK_TOKENS])
            self._first_token = first
            hidden = decoder(chunk, torch.arange(first, first + len(chunk)), self)
        return int(decoder.logits(hidden[-1:]).argmax())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort."""
        end = self._first_token + key.shape[0]
        kv = self._kv[layer]
        kv[0, :, self._first_token : end] = key.transpose(0, 1)
        kv[1, :, self._first_token : end] = value.transpose(0, 1)
        before = self._last_queries[layer] if self._first_token else query[:0]
        self._last_queries[layer] = torch.cat((before, query))[-PROFILED_QUERIES:].clone()
        so_far = kv[:, :, :end].float()
        return dense_attention.attend_chunk(query, so_far[0], so_far[1])

    @torch.inference_mode()
    def profiles(self, window: WindowSpec) -> list[PromptProfile]:
        """One for each layer, from the prompt's last queries, as the prefill node makes them."""
        count = self._kv.shape[3]
        found = []
        for layer, query in enumerate(self._last_queries):
            key, value = self._kv[layer].float()
            positions = torch.arange(count - len(query), count)
            own_key, own_value = (part[:, positions].transpose(0, 1) for part in (key, value))
            padding = (0, 0, 0, ceil_div(count, BLOCK_SIZES[-1]) * BLOCK_SIZES[-1] - count)
            keys, values = (torch.nn.functional.pad(part, padding) for part in (key, value))
            step = LayerStep(keys, values, query, own_key, own_value, positions, window)
            of_prompts = profile_prompts(step, 1, key, value, [count])
            found.append(PromptProfile(*(part[0] for part in vars(of_prompts).values())))
        return found

    def store_into(self, store: HostKvStore, token_ids: list[int], new_tokens: int) -> SequenceKv:
        """A committed sequence that holds what was computed."""
        count = len(token_ids)
        sequence = store.reserve(token_ids, new_tokens)
        blocks = ceil_div(count, BLOCK_TOKENS)
        for layer in range(self._geometry.num_layers):
            padding = (0, 0, 0, blocks * BLOCK_TOKENS - count)
            kv = torch.nn.functional.pad(self._kv[layer], padding)
            blocked = torch.unflatten(kv, 2, (blocks, BLOCK_TOKENS)).permute(1, 2, 0, 3, 4)
            sequence.write_blocks(
                layer, 0, count, blocked.contiguous().view(torch.uint8).numpy().tobytes()
            )
        sequence.commit()
        return sequence
