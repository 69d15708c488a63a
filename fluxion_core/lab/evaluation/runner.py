"""Many cases, several policies each: a prompt is prefilled once, and every policy branches from it.

Two threads. One prefills, case after case, and puts sequences into the host KV store until that is
full; the caller's thread decodes a batch of them, a token a step, and fills places that become
free at once. Branches of a case share the full slabs of its prompt.

Steps are those of a decode node: the same `DecodeStep`, the same sampler. Through the host's body
an answer does not depend on what else runs, and differences between policies are theirs alone; a
device's products may sum in another order for another number of rows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.decode.step import DecodeStep, StepReads, StepRow
from fluxion_core.errors import (
    CapacityError,
    ConfigError,
    ContextLengthError,
    NonFiniteLogitsError,
)
from fluxion_core.generation.sampling import sample_rows
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.evaluation.case import Case
from fluxion_core.lab.evaluation.turns import Turns
from fluxion_core.lab.evaluation.work import (
    EXACT,
    Answer,
    Branch,
    CaseJob,
    Method,
    TeacherTokens,
    check_ways,
)
from fluxion_core.lab.held_prompt import HeldPrompt, PromptMaker
from fluxion_core.models.config import ModelConfig
from fluxion_core.planning.planner import Planner, PlannerState
from fluxion_core.planning.prompt_profile import PromptProfile

DEFAULT_BATCH = 16


@dataclass
class RunStatistics:
    """Times of a run. Prefill and decoding overlap."""

    steps: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    prefills: int = 0
    prefill_seconds: float = 0.0


class Runner:
    """A model, a store and threads to answer cases with.

    Args:
        step: runs steps over the store; closed by whoever made it.
        store: that holds the branches, and nothing else.
        prompts: computes prompts of the same model.
        tokenizer: of the model.
        config: of the model.
        batch: sequences decoded together, at most; as many as the step takes.
        planner: of the step, for policies that need head profiles.
        window: the default window, of the step too.

    Where the step has a GPU, prompts and steps take turns: both may be on the same one.
    """

    def __init__(
        self,
        step: DecodeStep,
        store: HostKvStore,
        prompts: PromptMaker,
        tokenizer: Tokenizer,
        config: ModelConfig,
        *,
        batch: int = DEFAULT_BATCH,
        planner: Planner | None = None,
        window: WindowSpec | None = None,
    ) -> None:
        self._decode_step, self._store, self._prompts = step, store, prompts
        turns = Turns()
        self._turn: Callable[[], AbstractContextManager[None]] = (
            turns.take if step.usage is not None else nullcontext
        )
        self._tokenizer = tokenizer
        self._context_tokens = config.context_tokens
        self._stops = frozenset(tokenizer.eos_token_ids) | frozenset(config.eos_token_ids)
        self._window = window or WindowSpec()
        self._batch = batch
        self._planner = planner
        self.statistics = RunStatistics()
        self._changed = threading.Condition()
        self._ready: deque[Branch] = deque()
        self._num_held = 0
        self._num_releases = 0
        self._is_done = False
        self._is_stopping = False
        self._failure: BaseException | None = None

    def run(self, work: Iterable[CaseJob], on_answer: Callable[[Answer], None]) -> None:
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

    def _prefill_all(self, work: Iterator[CaseJob]) -> None:
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

    def _prefill(self, work: CaseJob) -> None:
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
        needs_profiles = any(way.policy.needs_profile for way in work.ways)
        with self._turn():
            prompt = self._prompts.make(
                case.prompt_token_ids, profile_window=self._window if needs_profiles else None
            )
        self.statistics.prefills += 1
        self.statistics.prefill_seconds += time.perf_counter() - started
        known = work.exact_token_ids
        teacher = None if known is None else TeacherTokens(list(known), is_ended=True)
        # The exact way first: forced ones follow its tokens as it makes them.
        for way in sorted(work.ways, key=lambda way: (way.is_forced, way.name != EXACT)):
            kv = self._store_when_there_is_room(prompt, case)
            if kv is None:
                return
            token_ids = [prompt.first_token_id]
            if way.name == EXACT and not way.is_forced:
                teacher = TeacherTokens(token_ids, is_ended=False)
            state = self._new_state(way, prompt.profiles)
            branch = Branch(work, way, kv, state, token_ids, teacher)
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
                with self._turn():
                    kv = prompt.store_into(self._store, case.prompt_token_ids, case.max_new_tokens)
            except CapacityError:
                if not self._wait_for_release(releases):
                    raise
                continue
            with self._changed:
                self._num_held += 1
            return kv

    def _new_state(self, way: Method, profiles: Sequence[PromptProfile]) -> PlannerState | None:
        if not way.policy.needs_profile:
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

    def _step(self, live: list[Branch]) -> list[Branch]:
        """One token for each branch that has one to go on from; returns those that are finished."""
        finished = [branch for branch in live if self._is_finished(branch)]
        rows = {
            branch: self._row(branch, token_id)
            for branch in live
            if branch not in finished and (token_id := branch.next_input) is not None
        }
        if not rows:
            return finished
        started = time.perf_counter()
        with self._turn():
            logits, reads = self._decode_step.run(list(rows.values()))
        samplers = [branch.sampler for branch in rows]
        chosen = sample_rows(logits, samplers, self._decode_step.pool)
        for branch, token, own, read in zip(rows, chosen, logits, reads, strict=True):
            if branch.kv.damage is not None:
                raise branch.kv.damage
            if isinstance(token, NonFiniteLogitsError):
                raise token
            if branch.work.is_compared:
                _compare(branch, own)
            branch.token_ids.append(token)
            _count(branch, read)
        self.statistics.steps += 1
        self.statistics.tokens += len(rows)
        self.statistics.step_seconds += time.perf_counter() - started
        return finished + [branch for branch in rows if self._is_finished(branch)]

    def _row(self, branch: Branch, token_id: int) -> StepRow:
        if branch.slot is None:
            branch.slot = self._decode_step.join(branch.kv)
        row = StepRow(branch.kv, branch.slot, token_id, branch.way.policy, branch.state)
        self._decode_step.check(row)
        return row

    def _is_finished(self, branch: Branch) -> bool:
        case, ids = branch.work.case, branch.token_ids
        if branch.way.is_forced and branch.teacher:
            return branch.teacher.is_ended and len(ids) >= len(branch.teacher.token_ids)
        return (
            len(ids) >= case.max_new_tokens
            or ids[-1] in self._stops
            or case.cannot_change(self._text(branch))
        )

    def _text(self, branch: Branch) -> str:
        ids = branch.token_ids
        return self._tokenizer.decode(ids[:-1] if ids[-1] in self._stops else ids)

    def _release(self, branch: Branch) -> None:
        if branch.slot is not None:
            self._decode_step.leave(branch.slot)
            branch.slot = None
        branch.kv.release()
        if branch.teacher and not branch.way.is_forced:
            branch.teacher.is_ended = True
        with self._changed:
            self._num_held -= 1
            self._num_releases += 1
            self._changed.notify_all()

    def _answer(self, branch: Branch) -> Answer:
        case = branch.work.case
        text = case.answer_of(self._text(branch))
        value = None if branch.way.is_forced else case.score_of(text)
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
            divergences=tuple(branch.divergences),
        )


def _count(branch: Branch, read: StepReads) -> None:
    branch.steps += 1
    branch.scanned_bytes += read.scanned_bytes
    branch.attended_bytes += read.attended_bytes
    branch.region_bytes += read.region_bytes
    branch.streaming_heads += read.streaming_heads
    branch.planned_heads += read.planned_heads


def _compare(branch: Branch, logits: Tensor) -> None:
    """Hold a step's distribution against that of `exact`, or keep it for the others."""
    assert branch.teacher is not None
    own = torch.log_softmax(logits, -1)
    kept = branch.teacher.log_probabilities
    if branch.is_reference:
        kept.append(own)
    exact = kept[branch.steps]
    branch.divergences.append(max(0.0, float((exact.exp() * (exact - own)).sum())))
