"""Costs of computing a prompt, here and on a prefill node: estimates that follow measurements.

Here: a chunk reads all weights, for 16 rows at a time, and each of its rows all KV before it; a
chunk's time is what it reads over one rate. Where a GPU gathers what is stored, a chunk reads it
once, and weights in the GPU's own memory. There: the whole prompt anew, whose operations grow
with the square of its length, over one rate, after what the node computes before it, by its own
estimate: not all that it has to do, for a short prompt goes before the rest of long ones; then the
KV that is missing over the link. All three rates are means of what was seen last.

Seconds. Pure arithmetic; learnt from on any thread, asked on the event loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fluxion_core.geometry import KvGeometry
from fluxion_core.models.config import ModelConfig
from services.decode.engine import EngineLoad, most_chunk_tokens
from services.decode.prefill_nodes import NodeLoad

NEW_SHARE = 0.3
"""What the last measurement weighs in a mean."""

FIRST_BYTES_PER_SECOND = 4e9
"""That each thread of this node is thought to read, before its first chunk."""

MOST_FIRST_THREADS = 16
"""More threads are not thought to read more, before that."""

FIRST_LINK_BYTES_PER_SECOND = 2e10
"""That a GPU is thought to gather, before its first chunk."""

OTHERS_SHARE = 0.1
"""What a second that one stream waits for our chunks weighs, beside a second that we wait."""

_ROWS_OF_A_READING = 16

_GATHERED_ROWS_OF_A_READING = 128
"""So many rows are computed in the time that a GPU reads the weights in, or little more."""

_WEIGHT_SHARE = 1 / 50
"""What a byte in the GPU's own memory costs, beside one over the link."""

_ROWS_OF_A_PROFILE = 8
"""A profile takes about half as long as the attention of its 16 queries in a chunk."""


@dataclass(frozen=True)
class ModelCosts:
    """Costs of computing a prompt's tokens by a model's shape, all layers together."""

    num_layers: int
    weight_bytes: int
    """Read for every 16 rows of a chunk on this node."""
    kv_token_bytes: int
    """K and V of a token."""
    dense_operations: int
    """Of a token."""
    attention_operations: int
    """Of a token for each one before it."""

    @staticmethod
    def of(config: ModelConfig, geometry: KvGeometry, weight_item_bytes: int) -> ModelCosts:
        """The costs of a model whose weights take so many bytes each."""
        return ModelCosts(
            num_layers=config.num_layers,
            weight_bytes=config.matrix_weights * weight_item_bytes,
            kv_token_bytes=geometry.token_bytes,
            dense_operations=2 * config.matrix_weights,
            attention_operations=config.attention_operations,
        )

    def chunk_bytes(self, tokens: float, stored: float) -> float:
        """Bytes that a chunk of so many tokens behind so many reads."""
        readings = math.ceil(tokens / _ROWS_OF_A_READING)
        return readings * self.weight_bytes + tokens * (stored + tokens / 2) * self.kv_token_bytes

    def gathered_bytes(self, tokens: float, stored: float) -> float:
        """Bytes over the link that a chunk costs as much as, where it gathers."""
        readings = math.ceil(tokens / _GATHERED_ROWS_OF_A_READING)
        weights = readings * self.weight_bytes * _WEIGHT_SHARE
        return weights + (stored + tokens) * self.kv_token_bytes

    def operations(self, tokens: int) -> float:
        """Operations of a prompt of which nothing is there."""
        return tokens * (self.dense_operations + tokens / 2 * self.attention_operations)


@dataclass(frozen=True)
class PromptCosts:
    """Both estimates."""

    here: LocalCosts
    there: HandoffCosts
    kv_token_bytes: int

    @staticmethod
    def of(model: ModelCosts, threads: int, *, gathers: bool) -> PromptCosts:
        """Make the estimates of a model on a node; see `LocalCosts`."""
        here = LocalCosts(model, threads, gathers=gathers)
        return PromptCosts(here, HandoffCosts(model), model.kv_token_bytes)


class LocalCosts:
    """Prompts that this node computes.

    Args:
        model: its shape's costs.
        threads: that compute.
        gathers: whether chunks gather what is stored; see `DecodeStep.gathers_prompts`.
    """

    def __init__(self, model: ModelCosts, threads: int, *, gathers: bool = False) -> None:
        self._model, self._gathers = model, gathers
        self._thread_rate = FIRST_BYTES_PER_SECOND * min(threads, MOST_FIRST_THREADS)
        self.bytes_per_second = FIRST_LINK_BYTES_PER_SECOND if gathers else self._thread_rate
        """That chunks are thought to read."""

    def learn(self, tokens: int, stored: int, seconds: float) -> None:
        """Learn that a chunk of so many tokens behind so many took so long."""
        if seconds > 0:
            rate = self._chunk_bytes(tokens, stored) / seconds
            self.bytes_per_second += NEW_SHARE * (rate - self.bytes_per_second)

    def seconds(self, missing: int, stored: int, load: EngineLoad, *, wants_profile: bool) -> float:
        """Seconds until a prompt is decoded, and a share of what others wait for it.

        Args:
            missing: its tokens that are not stored.
            stored: those that are.
            load: what the engine has to do beside.
            wants_profile: whether one is made. Beside streams that is done in slices of a layer of
                a step, with a step after each.
        """
        middle = stored + missing // 2
        has_streams = load.streams > 0
        most = most_chunk_tokens(middle, gathers=self._gathers, has_streams=has_streams)
        rows = min(missing, most)
        chunk = self._chunk_bytes(rows, middle) / self.bytes_per_second
        chunks = math.ceil((missing + load.pending_tokens) / rows)
        between = self._between(chunk, load.step_seconds) if has_streams else 0.0
        seconds = chunks * (chunk + between + OTHERS_SHARE * load.streams * chunk)
        if wants_profile:
            kv_bytes = (stored + missing) * self._model.kv_token_bytes
            rate = self._thread_rate if self._gathers else self.bytes_per_second
            profile = _ROWS_OF_A_PROFILE * kv_bytes / rate
            seconds += profile * (self._model.num_layers if has_streams else 1)
        return seconds

    def _chunk_bytes(self, tokens: float, stored: float) -> float:
        bytes_of = self._model.gathered_bytes if self._gathers else self._model.chunk_bytes
        return bytes_of(tokens, stored)

    def _between(self, chunk_seconds: float, step_seconds: float) -> float:
        """Steps of the others for each chunk: one, or after each part that is as long as one."""
        if not self._gathers or not step_seconds:
            return step_seconds
        return math.ceil(chunk_seconds / step_seconds) * step_seconds


class HandoffCosts:
    """Prompts that prefill nodes compute, all of which are thought to be alike.

    Args:
        model: its shape's costs.
    """

    def __init__(self, model: ModelCosts) -> None:
        self._model = model
        self._operations_per_second: float | None = None
        self._bytes_per_second = 0.0

    def learn(
        self, tokens: int, prefill_seconds: float, payload_bytes: int, handoff_seconds: float
    ) -> None:
        """Learn from a hand-off.

        Args:
            tokens: of the prompt.
            prefill_seconds: that the node computed it.
            payload_bytes: of KV that came.
            handoff_seconds: from the first of it to the last.
        """
        if prefill_seconds > 0:
            rate = self._model.operations(tokens) / prefill_seconds
            before = self._operations_per_second
            new = rate if before is None else before + NEW_SHARE * (rate - before)
            self._operations_per_second = new
        if handoff_seconds > 0:
            # KV comes as it is computed: a hand-off that was slow says nothing of the link.
            rate = payload_bytes / handoff_seconds
            before = self._bytes_per_second
            self._bytes_per_second = max(rate, before + NEW_SHARE * (rate - before))

    def seconds(self, tokens: int, missing_bytes: int, load: NodeLoad) -> float | None:
        """Seconds until a prompt is computed there and its KV here; None before any hand-off.

        Args:
            tokens: of the prompt.
            missing_bytes: of its KV, not stored here.
            load: what the node has to do when the prompt comes.
        """
        if self._operations_per_second is None:
            return None
        computing = self._model.operations(tokens) / self._operations_per_second
        sending = missing_bytes / self._bytes_per_second if self._bytes_per_second else 0.0
        return load.seconds_before + computing * (1 + load.other_tokens / tokens) + sending
