"""A prompt computed once and stored as often as there are policies to compare.

It is computed as the prefill node computes it (prompt/compute.py); its frames are kept, and written
into a store as a decode node writes those that arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fluxion_core.generation.sampling import SamplingParams, sample
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.kvstream.handoff import Frame
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.prompt_profile import PromptProfile, pack, unpack
from fluxion_core.prompt.capture import max_piece_bytes
from fluxion_core.prompt.compute import compute_prompt
from fluxion_core.prompt.outbox import DeviceOutbox


@dataclass(frozen=True)
class HeldPrompt:
    """KV of one prompt, in host memory, and what comes of it."""

    geometry: KvGeometry
    first_token_id: int
    """The likeliest one after the prompt."""
    profiles: list[PromptProfile]
    """Of each layer, as they come over the wire; empty unless they were asked for."""
    frames: list[Frame]
    """From the prompt's first token on."""

    def store_into(
        self, store: HostKvStore, token_ids: Sequence[int], max_new_tokens: int
    ) -> SequenceKv:
        """A committed sequence with this KV; full slabs that the store has already are shared.

        Args:
            store: of the same geometry.
            token_ids: that the store knows the KV by; as many as the prompt has.
            max_new_tokens: room for those that are generated.

        Raises:
            CapacityError: no room; nothing is held.
        """
        sequence = store.reserve(token_ids, max_new_tokens)
        try:
            for frame in self.frames:
                self._write(sequence, frame)
            sequence.commit()
        except BaseException:
            sequence.release()
            raise
        return sequence

    def _write(self, sequence: SequenceKv, frame: Frame) -> None:
        """What the sequence lacks of a frame, whose payload is `[kv_head][block][K | V]`."""
        first, end = frame.first_token, frame.first_token + frame.num_tokens
        held = sequence.kv_from_token
        if end <= held:
            return
        payload = frame.payload
        if first < held:
            heads = np.frombuffer(payload, np.uint8).reshape(self.geometry.num_kv_heads, -1)
            skipped = (held - first) // BLOCK_TOKENS * self.geometry.block_bytes
            payload, first = heads[:, skipped:].tobytes(), held
        sequence.write_blocks(frame.layer, first, end - first, payload)


class PromptMaker:
    """Computes prompts with one model, on the model's device.

    Args:
        decoder: the model.
        geometry: of its KV.
    """

    def __init__(self, decoder: Decoder, geometry: KvGeometry) -> None:
        self._decoder, self._geometry = decoder, geometry
        device = decoder.embedding.device
        self._outbox = None
        if device.type == "cuda":
            self._outbox = DeviceOutbox(device, max_piece_bytes(geometry))

    def make(
        self, token_ids: Sequence[int], *, profile_window: WindowSpec | None = None
    ) -> HeldPrompt:
        """Compute a prompt.

        Args:
            token_ids: at least one.
            profile_window: the default window that a profile is wanted for, if one is.
        """
        frames: list[Frame] = []
        computed = compute_prompt(
            self._decoder,
            self._geometry,
            token_ids,
            # Held long: not in pinned memory.
            emit=lambda frame: frames.append(replace(frame, payload=bytes(frame.payload))),
            outbox=self._outbox,
            profile_window=profile_window,
        )
        first = sample(computed.logits, SamplingParams(), (), (), position=0)
        return HeldPrompt(self._geometry, first, self._as_sent(computed.profiles), frames)

    def _as_sent(self, profiles: list[PromptProfile]) -> list[PromptProfile]:
        if not profiles:
            return []
        config = self._decoder.config
        return unpack(
            pack(profiles),
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
        )
