"""The decode engine: one thread that runs batched steps over all live sequences.

Life of a sequence: `submit` (its prompt's KV is whole in the store, its first token is
known), then one new token a step, each given to `on_token`, until that says stop,
`cancel` is called, or the engine fails. Then `on_end` is called once, and from then on the engine
does not touch the sequence's memory: the submitter may free it.

`on_token` and `on_end` run on the engine's thread and must not block. The engine knows tokens, not
text, requests or gRPC.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import torch

from fluxion_core.device_usage import DeviceUsage
from fluxion_core.errors import FluxionError
from fluxion_core.generation.sampling import SamplingParams, sample
from fluxion_core.hybrid_attention import HybridAttention
from fluxion_core.kvstore.store import SequenceKv
from fluxion_core.models.decoder import Decoder
from fluxion_core.selector.planner import PlannerState
from fluxion_core.selector.policy import Policy
from fluxion_core.telemetry import event
from services.decode.read_totals import ReadTotals

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class DecodeSequence:
    """One sequence in the engine. Owned by the engine between `submit` and `on_end`."""

    request_id: str
    kv: SequenceKv
    """Committed: the store holds every prompt token."""
    policy: Policy
    """What its steps read."""
    planner_state: PlannerState | None
    """For policies that need head profiles."""
    prompt_token_ids: list[int]
    generated_token_ids: list[int]
    """Begins with the first token, which the prefill node sampled."""
    sampling: SamplingParams
    on_token: Callable[[int], bool]
    """Takes a new token; returns whether to go on."""
    on_end: Callable[[BaseException | None], None]
    """Called once, with what went wrong, if anything did."""
    is_cancelled: bool = False
    reads: ReadTotals = field(default_factory=ReadTotals)
    """What its steps have read."""
    decode_seconds: float = 0.0
    """Time in steps that this sequence was part of."""
    steps: int = 0


@dataclass
class EngineStatistics:
    """Counters since start. Seconds are of the engine's thread."""

    steps: int = 0
    tokens: int = 0
    busy_seconds: float = 0.0
    idle_seconds: float = 0.0
    reads: ReadTotals = field(default_factory=ReadTotals)
    """What all steps have read of retrieval regions."""
    device: DeviceUsage | None = None
    """Of the GPU; None where there is none."""


class DecodeEngine:
    """Runs steps on a thread of its own while there are sequences.

    Args:
        decoder: the model.
        attention: port over the host KV store.
    """

    def __init__(self, decoder: Decoder, attention: HybridAttention) -> None:
        self._decoder = decoder
        self._attention = attention
        self._device = decoder.embedding.device
        self._changed = threading.Condition()
        self._joining: list[DecodeSequence] = []
        self._stopping = False
        self._idle_since: float | None = None
        self._statistics = EngineStatistics()
        self._thread = threading.Thread(target=self._run, name="decode-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; sequences still running end with an error. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, sequence: DecodeSequence) -> None:
        """Hand a sequence over; it joins at the next step."""
        with self._changed:
            if self._stopping:
                raise FluxionError("the decode engine has stopped")
            self._joining.append(sequence)
            self._changed.notify()

    @staticmethod
    def cancel(sequence: DecodeSequence) -> None:
        """Ask for a sequence's end; `on_end` follows within a step."""
        sequence.is_cancelled = True

    def statistics(self) -> EngineStatistics:
        """A copy of the counters; a rest that still goes on counts up to now."""
        # No lock: the engine's thread must not wait for whoever reads.
        since = self._idle_since
        copy = deepcopy(self._statistics)
        if since is not None and since == self._idle_since:
            copy.idle_seconds += time.perf_counter() - since
        return copy

    def _run(self) -> None:
        running: list[DecodeSequence] = []
        while self._wait_for_work(running):
            running = self._without_cancelled(running)
            if not running:
                continue
            started = time.perf_counter()
            try:
                finished = self._step(running)
            except Exception as error:
                _log.exception(event("decode step failed", sequences=len(running)))
                for sequence in running:
                    sequence.on_end(error)
                running = []
                continue
            seconds = time.perf_counter() - started
            self._statistics.busy_seconds += seconds
            for sequence in running:
                sequence.decode_seconds += seconds
            for sequence in finished:
                sequence.on_end(None)
            running = [sequence for sequence in running if sequence not in finished]
        for sequence in running:
            sequence.on_end(FluxionError("the decode engine has stopped"))

    def _wait_for_work(self, running: list[DecodeSequence]) -> bool:
        """Add new sequences to `running`; sleep while there are none. False: stop."""
        with self._changed:
            started = self._idle_since = time.perf_counter()
            while not (running or self._joining or self._stopping):
                self._changed.wait()
            running += self._joining
            self._joining = []
            self._statistics.idle_seconds += time.perf_counter() - started
            self._idle_since = None
            return not self._stopping

    @staticmethod
    def _without_cancelled(running: list[DecodeSequence]) -> list[DecodeSequence]:
        kept = []
        for sequence in running:
            if sequence.is_cancelled:
                sequence.on_end(None)
            else:
                kept.append(sequence)
        return kept

    @torch.inference_mode()
    def _step(self, batch: list[DecodeSequence]) -> list[DecodeSequence]:
        """One token for every sequence of the batch; returns those that are finished."""
        token_ids = torch.tensor([s.generated_token_ids[-1] for s in batch], device=self._device)
        positions = torch.tensor([s.kv.num_tokens for s in batch], device=self._device)
        self._attention.begin_step(
            [s.kv for s in batch], [s.policy for s in batch], [s.planner_state for s in batch]
        )
        hidden = self._decoder(token_ids, positions, self._attention)
        reads = self._attention.end_step()
        logits = self._decoder.logits(hidden).cpu()
        finished = []
        for row, sequence in enumerate(batch):
            token = sample(
                logits[row],
                sequence.sampling,
                sequence.prompt_token_ids,
                sequence.generated_token_ids,
                position=len(sequence.generated_token_ids),
            )
            sequence.generated_token_ids.append(token)
            sequence.reads.add(reads[row])
            self._statistics.reads.add(reads[row])
            sequence.steps += 1
            if not sequence.on_token(token):
                finished.append(sequence)
        self._statistics.steps += 1
        self._statistics.tokens += len(batch)
        return finished
