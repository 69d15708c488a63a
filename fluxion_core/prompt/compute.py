"""A prompt through the model, a chunk at a time: what comes of it beside the KV that leaves.

Services, evaluation, training and benchmarks all compute prompts here, through the one attention
port of `capture.py`. Where the KV goes is up to whoever takes its frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstream.handoff import Frame
from fluxion_core.machine.stopwatch import Stopwatch
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.prompt_profile import PromptProfile
from fluxion_core.prompt.capture import KvCapture, Outbox

CHUNK_TOKENS = 1024
"""Of a prompt that nobody else waits behind."""


@dataclass(frozen=True)
class ComputedPrompt:
    """Result of a prompt's last chunk."""

    logits: Tensor
    """[vocab_size] float32 on the CPU, after the last token."""
    profiles: list[PromptProfile]
    """Of each layer, on the model's device; empty unless they were asked for."""
    kv: Tensor
    """[layers, 2, kv_heads, tokens, head_dim] bfloat16 on the model's device, rotary applied."""


class PromptComputation:
    """One prompt on its way through a model. One thread at a time.

    Args:
        decoder: the model.
        token_ids: of the prompt, at least one.
        capture: its attention port, made for this prompt.
    """

    def __init__(self, decoder: Decoder, token_ids: Sequence[int], capture: KvCapture) -> None:
        self._decoder = decoder
        self._token_ids = token_ids
        self._capture = capture
        self._device = decoder.embedding.device
        self.num_computed = 0
        """Tokens that are through all layers."""
        self.device_seconds = 0.0
        """The model's device was at the last chunk for so long."""

    @property
    def profile_seconds(self) -> float:
        """Spent on profiles."""
        return self._capture.profile_seconds

    @torch.inference_mode()
    def advance(self, num_tokens: int) -> ComputedPrompt | None:
        """Compute the next tokens, and hand their KV out; what comes of the prompt, at its end.

        Args:
            num_tokens: at most; a multiple of 16.

        Raises:
            RequestCancelledError: the receiver went away.
        """
        on_device = Stopwatch(self._device)
        first = self.num_computed
        piece = self._token_ids[first : first + num_tokens]
        token_ids = torch.tensor(piece, device=self._device)
        positions = torch.arange(first, first + len(piece), device=self._device)
        self._capture.begin_chunk(first)
        hidden = self._decoder(token_ids, positions, self._capture)
        self.num_computed += len(piece)
        is_last = self.num_computed == len(self._token_ids)
        logits = self._decoder.logits(hidden[-1:])[0] if is_last else None
        on_device.stop()
        # Before anything waits for the device: KV leaves as it arrives, not when all is computed.
        self._capture.finish_chunk()
        self.device_seconds = on_device.seconds
        if logits is None:
            return None
        return ComputedPrompt(logits.cpu(), self._capture.profiles, self._capture.kv)


def compute_prompt(
    decoder: Decoder,
    geometry: KvGeometry,
    token_ids: Sequence[int],
    *,
    emit: Callable[[Frame], None] | None = None,
    outbox: Outbox | None = None,
    profile_window: WindowSpec | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> ComputedPrompt:
    """Compute a whole prompt, for whoever has nothing else to do meanwhile.

    Args:
        decoder: the model.
        geometry: of its KV.
        token_ids: of the prompt, at least one.
        emit: takes each CHUNK frame, in order; None for no frames.
        outbox: that frames leave through; on a GPU only.
        profile_window: the default window that a profile of the prompt is wanted for, if one is.
        chunk_tokens: computed at a time; a multiple of 16.
    """
    capture = KvCapture(
        geometry,
        num_tokens=len(token_ids),
        kv_from_token=len(token_ids) if emit is None else 0,
        emit=emit or (lambda _: None),
        is_cancelled=lambda: False,
        device=decoder.embedding.device,
        outbox=outbox,
        profile_window=profile_window,
    )
    computation = PromptComputation(decoder, token_ids, capture)
    while (computed := computation.advance(chunk_tokens)) is None:
        pass
    return computed
