"""A prompt's KV, computed once on any device, and stored for as many sequences as are wanted.

K and V are rounded to bfloat16 before anything attends to them, as the prefill node does, so that
every policy continues from exactly what prefill saw. The queries of the last tokens are kept: head
profiles are made of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kernels.dense_attention import cpu as dense_attention
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.prompt_estimate import PromptEstimator, padded_tokens
from fluxion_core.planning.prompt_profile import PROFILED_QUERIES, PromptProfile

CHUNK_TOKENS = 1024


class PromptKv:
    """KV of one prompt and what the model says next. Made by `prefill`.

    Attention port while it is being made.
    """

    def __init__(self, geometry: KvGeometry, num_tokens: int, device: torch.device) -> None:
        self._geometry = geometry
        self.num_tokens = num_tokens
        shape = (geometry.num_layers, 2, geometry.num_kv_heads, num_tokens, geometry.head_dim)
        self._kv = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self._first_token = 0
        self._last_queries: list[Tensor] = []
        self.first_new_token = -1
        """The most likely next token."""

    @classmethod
    @torch.inference_mode()
    def prefill(cls, decoder: Decoder, geometry: KvGeometry, token_ids: Sequence[int]) -> PromptKv:
        """Run the prompt through the model, on the model's device."""
        device = decoder.embedding.device
        prompt = cls(geometry, len(token_ids), device)
        ids = torch.tensor(token_ids, device=device)
        hidden = torch.empty(0)
        for first in range(0, len(token_ids), CHUNK_TOKENS):
            chunk = ids[first : first + CHUNK_TOKENS]
            prompt._first_token = first
            positions = torch.arange(first, first + len(chunk), device=device)
            hidden = decoder(chunk, positions, prompt)
        prompt.first_new_token = int(decoder.logits(hidden[-1:]).argmax())
        return prompt

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort; the tokens are the prompt's next ones."""
        first, end = self._first_token, self._first_token + key.shape[0]
        kv = self._kv[layer]
        kv[0, :, first:end] = key.transpose(0, 1)
        kv[1, :, first:end] = value.transpose(0, 1)
        self._keep_last_queries(layer, query)
        so_far = kv[:, :, :end].float()
        attend = dense_attention.attend_chunk if query.device.type == "cpu" else _attend_chunk
        return attend(query.float(), so_far[0], so_far[1]).to(query.dtype)

    @torch.inference_mode()
    def store_into(
        self, store: HostKvStore, token_ids: Sequence[int], max_new_tokens: int
    ) -> SequenceKv:
        """A committed sequence with this KV; full slabs that the store has already are shared.

        Raises:
            CapacityError: no room; nothing is held.
        """
        sequence = store.reserve(token_ids, max_new_tokens)
        try:
            first = sequence.kv_from_token
            for layer in range(self._geometry.num_layers):
                payload = self._payload(layer, first)
                sequence.write_blocks(layer, first, self.num_tokens - first, payload)
            sequence.commit()
        except BaseException:
            sequence.release()
            raise
        return sequence

    @torch.inference_mode()
    def profiles(self, window: WindowSpec) -> list[PromptProfile]:
        """What the prompt's last queries would have needed, per layer, on the CPU."""
        padding = padded_tokens(self.num_tokens) - self.num_tokens
        estimator = PromptEstimator(self.num_tokens, window)
        profiles = []
        for layer, query in enumerate(self._last_queries):
            key, value = F.pad(self._kv[layer].float(), (0, 0, 0, padding))
            profile = estimator.estimate(query, key, value)
            profiles.append(
                PromptProfile(**{name: part.cpu() for name, part in vars(profile).items()})
            )
        return profiles

    def _keep_last_queries(self, layer: int, query: Tensor) -> None:
        last = query[-PROFILED_QUERIES:].float().clone()
        if len(self._last_queries) <= layer:
            self._last_queries.append(last)
            return
        # The prompt's last chunk may be shorter than what is kept.
        both = torch.cat((self._last_queries[layer], last))
        self._last_queries[layer] = both[-PROFILED_QUERIES:]

    def _payload(self, layer: int, first: int) -> memoryview:
        """`[kv_head][block][K 16 x D | V 16 x D]` from a token on, the last block zero padded."""
        count = self.num_tokens - first
        blocks = ceil_div(count, BLOCK_TOKENS)
        kv = F.pad(self._kv[layer, :, :, first:], (0, 0, 0, blocks * BLOCK_TOKENS - count))
        blocked = torch.unflatten(kv, 2, (blocks, BLOCK_TOKENS)).permute(1, 2, 0, 3, 4)
        return blocked.contiguous().view(torch.uint8).cpu().numpy().data.cast("B")


def _attend_chunk(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `dense_attention.attend_chunk`, on a GPU: causal, the queries are the last tokens."""
    tokens, heads, _ = query.shape
    group, total = heads // key.shape[0], key.shape[1]
    places = torch.arange(total, device=query.device)
    mask = places[None] <= places[total - tokens :, None]
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.repeat_interleave(group, 0)[None],
        value.repeat_interleave(group, 0)[None],
        attn_mask=mask,
    )
    return attended[0].transpose(0, 1)
