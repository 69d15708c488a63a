"""Many cases, several policies each: a prompt is prefilled once, and every policy branches from it.

Two threads. One prefills, case after case, and puts sequences into the host KV store until that is
full; the caller's thread decodes a batch of them, a token a step, and fills places that become
free at once. Branches of a case share the full slabs of its prompt.

Dense products of a step always have the same number of rows, whatever is live: what a branch
answers does not depend on what else runs, and differences between policies are theirs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.step import StepRow
from fluxion_core.errors import CapacityError, ConfigError, ContextLengthError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.evaluation.case import Case
from fluxion_core.lab.evaluation.metrics import score
from fluxion_core.lab.evaluation.work import EXACT, Answer, Branch, Track, Way, Work, check_ways
from fluxion_core.lab.held_prompt import HeldPrompt, PromptMaker
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.planner import Planner, PlannerState
from fluxion_core.planning.policy import PredictedPolicy
from fluxion_core.planning.prompt_profile import PromptProfile
from fluxion_core.pool.cpu_pool import CpuPool

DEFAULT_BATCH = 16


@dataclass
class RunStatistics:
    """Where the time of a run went. Prefill and decoding overlap."""

    steps: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    prefills: int = 0
    prefill_seconds: float = 0.0


class Runner:
    """A model, a store and threads to answer cases with.

    Args:
        decoder: that decodes; float32 on the CPU.
        tokenizer: of the model.
        prefill_decoder: the same model on the device where prompts are computed.
        batch: sequences decoded together.
        host_kv_bytes: of the store.
        pool: attention threads.
        planner: for policies that need head profiles.
        window: the default window.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        prefill_decoder: Decoder,
        host_kv_bytes: int,
        batch: int = DEFAULT_BATCH,
        pool: CpuPool | None = None,
        planner: Planner | None = None,
        window: WindowSpec | None = None,
    ) -> None:
        config = decoder.config
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._context_tokens = config.context_tokens
        self._stops = frozenset(tokenizer.eos_token_ids) | frozenset(config.eos_token_ids)
        self._geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
        self._prompts = PromptMaker(prefill_decoder, self._geometry)
        self._store = HostKvStore(self._geometry, host_kv_bytes, model_key=b"evaluation")
        self._window = window or WindowSpec()
        self._batch = batch
        self._planner = planner
        self._attention = HostAttention(
            self._store,
            self._window,
            num_heads=config.num_heads,
            pool=pool or CpuPool(),
            planner=planner,
        )
        self.statistics = RunStatistics()
        self._changed = threading.Condition()
        self._ready: deque[Branch] = deque()
        self._num_held = 0
        self._num_releases = 0
        self._is_done = False
        self._is_stopping = False
        self._failure: BaseException | None = None

    def run(self, work: Iterable[Work], on_answer: Callable[[Answer], None]) -> None:
        """Answer all cases; answers come as they are finished, on this thread.

        Raises:
            FluxionError: a case does not fit the context or the store.
        """
        self._is_done, self._is_stopping, self._failure = False, False, None
        thread = threading.Thread(
            target=self._prefill_all, args=(iter(work),), name="prefill", daemon=True
        )
        thread.start()
        live: list[Branch] = []
        try:
            while True:
                self._refill(live)
                if not live:
                    break
                for branch in self._step(live):
                    live.remove(branch)
                    self._release(branch)
                    on_answer(self._answer(branch))
        finally:
            with self._changed:
                self._is_stopping = True
                self._changed.notify_all()
            thread.join()
            for branch in [*live, *self._ready]:
                self._release(branch)
            self._ready.clear()
        if self._failure is not None:
            raise self._failure

    # ---- prefill thread

    def _prefill_all(self, work: Iterator[Work]) -> None:
        try:
            for item in work:
                if self._is_stopping:
                    return
                self._prefill(item)
        except BaseException as error:
            self._failure = error
        finally:
            with self._changed:
                self._is_done = True
                self._changed.notify_all()

    def _prefill(self, work: Work) -> None:
        check_ways(work)
        case = work.case
        tokens = len(case.prompt_token_ids)
        if tokens + case.max_new_tokens > self._context_tokens:
            raise ContextLengthError(
                prompt_tokens=tokens,
                max_new_tokens=case.max_new_tokens,
                context_tokens=self._context_tokens,
            )
        started = time.perf_counter()
        needs_profiles = any(isinstance(way.policy, PredictedPolicy) for way in work.ways)
        prompt = self._prompts.make(
            case.prompt_token_ids, profile_window=self._window if needs_profiles else None
        )
        self.statistics.prefills += 1
        self.statistics.prefill_seconds += time.perf_counter() - started
        known = work.exact_token_ids
        track = None if known is None else Track(list(known), is_ended=True)
        # The exact way first: forced ones follow its tokens as it makes them.
        for way in sorted(work.ways, key=lambda way: (way.is_forced, way.name != EXACT)):
            kv = self._store_when_there_is_room(prompt, case)
            if kv is None:
                return
            token_ids = [prompt.first_token_id]
            if way.name == EXACT and not way.is_forced:
                track = Track(token_ids, is_ended=False)
            state = self._new_state(way, prompt.profiles)
            branch = Branch(work, way, kv, state, token_ids, track)
            with self._changed:
                self._ready.append(branch)
                self._changed.notify_all()

    def _store_when_there_is_room(self, prompt: HeldPrompt, case: Case) -> SequenceKv | None:
        """A sequence for one branch; None: the run is stopping."""
        while True:
            with self._changed:
                if self._is_stopping:
                    return None
                releases = self._num_releases
            try:
                kv = prompt.store_into(self._store, case.prompt_token_ids, case.max_new_tokens)
            except CapacityError:
                if not self._wait_for_release(releases):
                    raise
                continue
            with self._changed:
                self._num_held += 1
            return kv

    def _new_state(self, way: Way, profiles: Sequence[PromptProfile]) -> PlannerState | None:
        if not isinstance(way.policy, PredictedPolicy):
            return None
        if self._planner is None:
            raise ConfigError(f"policy {way.policy} needs a planner; this run has none")
        return self._planner.new_state(profiles)

    def _wait_for_release(self, seen: int) -> bool:
        """Until a sequence has been released since `seen` of them; False: none is held."""
        with self._changed:
            if not self._num_held and self._num_releases == seen:
                return False
            self._changed.wait_for(lambda: self._is_stopping or self._num_releases > seen)
            return True

    # ---- decode thread

    def _refill(self, live: list[Branch]) -> None:
        """Fill the batch; wait only if it would be empty."""
        with self._changed:
            while True:
                while self._ready and len(live) < self._batch:
                    live.append(self._ready.popleft())
                if live or (self._is_done and not self._ready):
                    return
                self._changed.wait()

    @torch.inference_mode()
    def _step(self, live: list[Branch]) -> list[Branch]:
        """One token for each branch that has one to go on from; returns those that are finished."""
        finished = [branch for branch in live if self._is_finished(branch)]
        inputs = {branch: branch.next_input for branch in live if branch not in finished}
        going = [branch for branch, token_id in inputs.items() if token_id is not None]
        if not going:
            return finished
        started = time.perf_counter()
        places = [branch.kv.num_tokens for branch in going]
        spare = [0] * (self._batch - len(going))
        token_ids = torch.tensor([*(inputs[branch] for branch in going), *spare])
        positions = torch.tensor([*places, *spare])
        self._attention.begin_step(
            [
                StepRow(branch.kv, 0, token_id, branch.way.policy, branch.state)
                for branch, token_id in inputs.items()
                if token_id is not None
            ]
        )
        hidden = self._decoder(token_ids, positions, _PaddedAttention(self._attention, len(going)))
        reads = self._attention.end_step()
        chosen = self._decoder.logits(hidden).argmax(-1)[: len(going)].tolist()
        for branch, token_id, read in zip(going, chosen, reads, strict=True):
            branch.token_ids.append(token_id)
            branch.steps += 1
            branch.scanned_bytes += read.scanned_bytes
            branch.attended_bytes += read.attended_bytes
            branch.region_bytes += read.region_bytes
            branch.streaming_heads += read.streaming_heads
            branch.planned_heads += read.planned_heads
        self.statistics.steps += 1
        self.statistics.tokens += len(going)
        self.statistics.step_seconds += time.perf_counter() - started
        return finished + [branch for branch in going if self._is_finished(branch)]

    def _is_finished(self, branch: Branch) -> bool:
        case, ids = branch.work.case, branch.token_ids
        if branch.way.is_forced and branch.track:
            return branch.track.is_ended and len(ids) >= len(branch.track.token_ids)
        return (
            len(ids) >= case.max_new_tokens
            or ids[-1] in self._stops
            or case.cannot_change(self._text(branch))
        )

    def _text(self, branch: Branch) -> str:
        ids = branch.token_ids
        return self._tokenizer.decode(ids[:-1] if ids[-1] in self._stops else ids)

    def _release(self, branch: Branch) -> None:
        branch.kv.release()
        if branch.track and not branch.way.is_forced:
            branch.track.is_ended = True
        with self._changed:
            self._num_held -= 1
            self._num_releases += 1
            self._changed.notify_all()

    def _answer(self, branch: Branch) -> Answer:
        case = branch.work.case
        text = case.answer_of(self._text(branch))
        value = None
        if case.metric is not None and not branch.way.is_forced:
            value = score(case.metric, text, case.answers, case.classes)
        return Answer(
            case_name=case.name,
            task=case.task,
            length=case.length,
            way=branch.way.key,
            token_ids=tuple(branch.token_ids),
            text=text,
            score=value,
            steps=branch.steps,
            scanned_bytes=branch.scanned_bytes,
            attended_bytes=branch.attended_bytes,
            region_bytes=branch.region_bytes,
            streaming_share=branch.streaming_heads / max(1, branch.planned_heads),
        )


class _PaddedAttention:
    """Attention of the first rows of a step; the others are there for their number alone."""

    def __init__(self, attention: HostAttention, rows: int) -> None:
        self._attention, self._rows = attention, rows

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort."""
        rows = self._rows
        output = torch.zeros_like(query)
        output[:rows] = self._attention.attend(layer, query[:rows], key[:rows], value[:rows])
        return output
