"""The decode engine: one thread that runs batched steps over all live sequences.

Life of a sequence: `submit` (its prompt's KV is whole in the store, its first token is
known; or the prompt has begun, and what is not stored of it is computed here, a chunk or a part of
one between two steps of the others, which gives the first token, and then its profile, if its
policy needs one, a slice between two steps), then one new token a step, each given to `on_token`,
until that says stop, `cancel` is called, or the engine fails. Then `on_end` is called once, and
from then on the engine does not touch the sequence's memory: the submitter may free it.

What goes wrong with one sequence ends that one: it finds no slot or has no room for a token, a
chunk of its prompt fails, no token can be drawn from its logits, its token or its end cannot be
delivered. The others of the same step go on with the same bits. A step that fails as a whole ends
its sequences, and the engine goes on. A device that fails (DeviceError) ends everything: the engine
takes no sequence any more and says so to `on_failure`, once.

`on_token`, `on_end`, `on_failure` and `on_head_errors` run on the engine's thread and must not
block. The engine knows tokens, not text, requests, gRPC or devices.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from fluxion_core.decode.profiling import PromptProfiling
from fluxion_core.decode.step import DecodeStep, HeadErrorSample, StepReads, StepRow
from fluxion_core.errors import DeviceError, FluxionError, NonFiniteLogitsError
from fluxion_core.generation.sampling import SamplingParams, TokenSampler, sample_rows
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.machine.threads import start
from fluxion_core.observe.device_usage import DeviceUsage, UsageClock
from fluxion_core.observe.log import event
from fluxion_core.observe.trace import ENGINE_TRACK, TraceRecorder
from fluxion_core.planning.planner import Planner, PlannerState
from fluxion_core.planning.policy import Policy
from services.decode.read_totals import ReadTotals

_log = logging.getLogger(__name__)


class ChunkSize(NamedTuple):
    """Size of a chunk of a prompt that is computed here."""

    tokens: int
    full_context: int
    """A row reads all that is stored: where that is more than this, chunks have fewer of them."""

    def at(self, num_stored: int) -> int:
        """Tokens of a chunk behind so many."""
        return max(1, min(self.tokens, self.tokens * self.full_context // (num_stored + 1)))


CHUNK_ALONE = ChunkSize(32, 8192)
"""While nobody waits for tokens."""

CHUNK_BESIDE_STREAMS = ChunkSize(16, 4096)
"""While others wait for their next token, which a chunk delays by one or two steps."""

GATHERED_CHUNK_TOKENS = 512
"""Where all tokens of a chunk read what is stored at once: few of them would cost as much. Streams
wait for a part of it that takes about as long as a step."""

FILL_SECONDS = 0.01
"""Between two looks at prompts on their way, while there is nothing else to do: a device fetches
half a GiB in that time."""

_NEW_SHARE = 0.3
"""What the last step's time weighs in the mean."""


def most_chunk_tokens(num_stored: int, *, gathers: bool, has_streams: bool) -> int:
    """Tokens that a chunk should have.

    Args:
        num_stored: tokens before it.
        gathers: see `DecodeStep.gathers_prompts`.
        has_streams: whether others wait for tokens.
    """
    if gathers:
        return GATHERED_CHUNK_TOKENS
    return (CHUNK_BESIDE_STREAMS if has_streams else CHUNK_ALONE).at(num_stored)


@dataclass(frozen=True)
class ProfileRequest:
    """Request for a profile, from which a prompt computed here gets its planner's state."""

    planner: Planner
    window: WindowSpec
    """The default window, which the profile is of."""


@dataclass(eq=False)
class DecodeSequence:
    """One sequence in the engine. Owned by the engine between `submit` and `on_end`."""

    request_id: str
    kv: SequenceKv
    """Committed: the store holds every prompt token. Or the prompt has begun."""
    policy: Policy
    """What its steps read."""
    planner_state: PlannerState | None
    """For policies that need head profiles."""
    prompt_token_ids: list[int]
    generated_token_ids: list[int]
    """Begins with the first token, which the prefill node sampled; empty if the prompt is computed
    here."""
    sampling: SamplingParams
    on_token: Callable[[int], bool]
    """Takes a new token; returns whether to go on."""
    on_end: Callable[[BaseException | None], None]
    """Called once, with what went wrong, if anything did."""
    profile_request: ProfileRequest | None = None
    """If the prompt is computed here, for policies that need head profiles."""
    profiling: PromptProfiling | None = None
    """The profile that it waits for, between its first token and its first step."""
    slot: int | None = None
    """In the step's window, while it takes part in steps."""
    is_cancelled: bool = False
    has_ended: bool = False
    """`on_end` was called."""
    reads: ReadTotals = field(default_factory=ReadTotals)
    """What its steps have read."""
    decode_seconds: float = 0.0
    """Time in steps that this sequence was part of."""
    steps: int = 0
    submitted: float = 0.0
    queue_seconds: float = 0.0
    """From `submit` to the first chunk of its prompt, if that is computed here."""
    sampler: TokenSampler = field(init=False)
    """Of `sampling`; knows all tokens so far."""
    prefill_seconds: float = 0.0
    """Time in chunks of its prompt, and in slices of its profile."""
    chunk_seconds: float = 0.0
    """Of that, in a chunk that has begun and is not whole."""

    def __post_init__(self) -> None:
        self.sampler = TokenSampler(self.sampling, self.prompt_token_ids, self.generated_token_ids)

    @property
    def is_whole(self) -> bool:
        """Whether its prompt is: its first token is known."""
        return bool(self.generated_token_ids)

    @property
    def is_decoding(self) -> bool:
        """Whether it takes part in steps."""
        return self.is_whole and self.profiling is None


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


@dataclass(frozen=True)
class EngineLoad:
    """Work before the engine."""

    streams: int = 0
    """Sequences that take part in steps."""
    pending_tokens: int = 0
    """Of prompts that are computed here, not stored yet."""
    step_seconds: float = 0.0
    """Of a step; a mean of the last ones, 0 before the first."""


@dataclass(frozen=True)
class CurrentStep:
    """A step that has begun and not ended."""

    number: int
    began: float
    """time.perf_counter() then."""
    request_ids: tuple[str, ...]


class DecodeEngine:
    """Runs steps on a thread of its own while there are sequences.

    Args:
        step: runs them, and computes what is not stored of prompts. Its pool samples the rows of a
            step beside each other; the pool's rounds are this engine's alone.
        on_failure: told when the device has failed for good.
        on_chunk: told after each chunk of a prompt: its tokens, those before it, and the seconds
            that it took.
        on_head_errors: told what a policy's plans lost, where a step has measured it.
        trace: records steps when it is asked to.
    """

    def __init__(
        self,
        step: DecodeStep,
        *,
        on_failure: Callable[[DeviceError], None] = lambda _: None,
        on_chunk: Callable[[int, int, float], None] = lambda *_: None,
        on_head_errors: Callable[[Policy, Sequence[HeadErrorSample]], None] = lambda *_: None,
        trace: TraceRecorder | None = None,
    ) -> None:
        self._step = step
        self._trace = trace or TraceRecorder()
        self._on_failure = on_failure
        self._on_chunk = on_chunk
        self._on_head_errors = on_head_errors
        self._load = EngineLoad()
        self._changed = threading.Condition()
        self._joining: list[DecodeSequence] = []
        self._arriving: dict[SequenceKv, None] = {}
        self._stopping = False
        self._failure: DeviceError | None = None
        self._idle_since: float | None = None
        self._current: CurrentStep | None = None
        self._clock = UsageClock(step.usage)
        self._statistics = EngineStatistics(device=step.usage)
        self._thread = threading.Thread(target=self._run, name="decode-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        start(self._thread)

    def stop(self) -> None:
        """End the thread; sequences still running end with an error. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, sequence: DecodeSequence) -> None:
        """Hand a sequence over; it joins at the next step.

        Raises:
            DeviceError: the device has failed.
            FluxionError: the engine has stopped.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._stopping:
                raise FluxionError("the decode engine has stopped")
            sequence.submitted = time.perf_counter()
            self._joining.append(sequence)
            self._changed.notify()

    @contextmanager
    def arriving(self, kv: SequenceKv) -> Iterator[None]:
        """A prompt's KV comes from elsewhere as long as one is in here: a device may fetch what is
        whole of it before the sequence is submitted. From any thread, which may commit it in here.
        """
        if not self._step.fills_ahead:
            yield
            return
        with self._changed:
            self._arriving[kv] = None
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                del self._arriving[kv]

    @staticmethod
    def cancel(sequence: DecodeSequence) -> None:
        """Ask for a sequence's end; `on_end` follows within a step."""
        sequence.is_cancelled = True

    def current_step(self) -> CurrentStep | None:
        """The step that runs now, if one does. From any thread."""
        return self._current

    def load(self) -> EngineLoad:
        """Work before the engine, with what was submitted just now. From any thread."""
        with self._changed:
            return _with_prompts(self._load, self._joining)

    def statistics(self) -> EngineStatistics:
        """A copy of the counters; a rest that still goes on counts up to now."""
        # No lock: the engine's thread must not wait for whoever reads.
        since = self._idle_since
        copy = deepcopy(self._statistics)
        if since is not None and since == self._idle_since:
            resting = time.perf_counter() - since
            copy.idle_seconds += resting
            if copy.device is not None:
                copy.device.idle_seconds["no_work"] += resting
        return copy

    def _run(self) -> None:
        running: list[DecodeSequence] = []
        self._clock.start()
        while self._wait_for_work(running):
            self._see_load(running)
            for sequence in running:
                if sequence.is_cancelled:
                    self._end(sequence, None)
            self._fill_ahead(_not_ended(running))
            self._advance_prompts(_not_ended(running))
            self._advance_streams(_not_ended(running))
            running = _not_ended(running)
            self._see_load(running)
        reason = self._failure or FluxionError("the decode engine has stopped")
        for sequence in running + self._joining:
            self._end(sequence, reason)

    def _see_load(self, running: list[DecodeSequence]) -> None:
        self._load = _with_prompts(EngineLoad(step_seconds=self._load.step_seconds), running)

    def _wait_for_work(self, running: list[DecodeSequence]) -> bool:
        """Add new sequences to `running`; sleep while there are none, or for a while if some are on
        their way. False: stop."""
        with self._changed:
            started = self._idle_since = time.perf_counter()
            while not (running or self._joining or self._stopping or self._failure):
                self._changed.wait(FILL_SECONDS if self._arriving else None)
                if self._arriving:
                    break
            if self._stopping or self._failure:
                return False
            running += self._joining
            self._joining = []
            self._statistics.idle_seconds += time.perf_counter() - started
            self._idle_since = None
        self._clock.account("no_work")
        return True

    def _fill_ahead(self, running: list[DecodeSequence]) -> None:
        """Let the device fetch what is whole of prompts that do not decode yet."""
        if not self._step.fills_ahead:
            return
        with self._changed:
            prompts = list(self._arriving)
        prompts += [one.kv for one in running if not one.is_decoding]
        has_streams = any(one.is_decoding for one in running)
        try:
            self._step.fill_ahead(prompts, has_streams=has_streams)
        except Exception as error:
            _log.exception(event("prompts not copied ahead", prompts=len(prompts)))
            if isinstance(error, DeviceError):
                self._fail(error)

    def _fail(self, error: DeviceError) -> None:
        if self._failure is not None:
            return
        with self._changed:
            self._failure = error
        self._on_failure(error)

    def _end(self, sequence: DecodeSequence, error: BaseException | None) -> None:
        sequence.has_ended = True
        if sequence.slot is not None:
            self._step.leave(sequence.slot)
            sequence.slot = None
        try:
            sequence.on_end(error)
        except Exception:
            _log.exception(event("end of a sequence not taken", request_id=sequence.request_id))

    @contextmanager
    def _alone(self, sequence: DecodeSequence, what: str) -> Iterator[None]:
        """What goes wrong in here ends this sequence only; a device that fails is everybody's."""
        try:
            yield
        except Exception as error:
            _log.exception(event(f"{what} failed", request_id=sequence.request_id))
            if isinstance(error, DeviceError):
                self._fail(error)
            self._end(sequence, error)

    def _advance_prompts(self, running: list[DecodeSequence]) -> None:
        """A chunk of the oldest prompt that is not whole, and a slice of the oldest profile.

        Where nobody waits for tokens, what is older is done first.
        """
        waiting = [one for one in running if not one.is_decoding]
        has_streams = len(waiting) < len(running)
        if not has_streams:
            waiting = waiting[:1]
        profiled = next((one for one in waiting if one.is_whole), None)
        prompt = next((one for one in waiting if not one.is_whole), None)
        if profiled is not None:
            with self._preparing(profiled, "slice of a prompt's profile"):
                self._advance_profile(profiled)
        if prompt is not None:
            if not prompt.prefill_seconds:
                prompt.queue_seconds = time.perf_counter() - prompt.submitted
            goes_on = True
            with self._preparing(prompt, "chunk of a prompt"):
                goes_on = self._compute_chunk(prompt, has_streams=has_streams)
            if not goes_on:
                self._end(prompt, None)

    @contextmanager
    def _preparing(self, sequence: DecodeSequence, what: str) -> Iterator[None]:
        """Work for one sequence that is not decoding yet: its time counts, its failure ends it."""
        started = time.perf_counter()
        self._current = CurrentStep(self._statistics.steps + 1, started, (sequence.request_id,))
        with self._alone(sequence, what), self._trace.span(ENGINE_TRACK, what):
            yield
        self._current = None
        seconds = time.perf_counter() - started
        self._statistics.busy_seconds += seconds
        sequence.prefill_seconds += seconds

    def _advance_profile(self, sequence: DecodeSequence) -> None:
        assert sequence.profiling is not None
        assert sequence.profile_request is not None
        profiles = self._step.advance_profile(sequence.profiling)
        if profiles is not None:
            sequence.planner_state = sequence.profile_request.planner.new_state(profiles)
            sequence.profiling = None

    def _compute_chunk(self, sequence: DecodeSequence, *, has_streams: bool) -> bool:
        """The next tokens of a prompt, and after its last the first new one; whether to go on."""
        prompt, request = sequence.prompt_token_ids, sequence.profile_request
        first = sequence.kv.num_tokens
        most = most_chunk_tokens(first, gathers=self._step.gathers_prompts, has_streams=has_streams)
        started = time.perf_counter()
        end = self._step.compute_chunk(
            sequence.kv,
            prompt[first : first + most],
            None if request is None else request.window,
            seconds=self._load.step_seconds if has_streams else None,
        )
        sequence.chunk_seconds += time.perf_counter() - started
        if sequence.kv.num_tokens > first:
            self._on_chunk(sequence.kv.num_tokens - first, first, sequence.chunk_seconds)
            sequence.chunk_seconds = 0.0
        if end is None:
            return True
        sequence.profiling = end.profiling
        token = sequence.sampler.sample(end.logits)
        sequence.generated_token_ids.append(token)
        return sequence.on_token(token)

    def _advance_streams(self, running: list[DecodeSequence]) -> None:
        """A step of every sequence that has all it needs and can take part."""
        rows: dict[DecodeSequence, StepRow] = {}
        for sequence in running:
            if sequence.is_decoding:
                with self._alone(sequence, "joining a step"):
                    rows[sequence] = self._row(sequence)
        if not rows or self._failure is not None:
            return
        started = time.perf_counter()
        self._current = CurrentStep(
            self._statistics.steps + 1, started, tuple(s.request_id for s in rows)
        )
        try:
            with self._trace.step(len(rows)):
                finished = self._run_step(rows)
        except Exception as error:
            _log.exception(event("decode step failed", sequences=len(rows)))
            if isinstance(error, DeviceError):
                self._fail(error)
            for sequence in _not_ended(rows):
                self._end(sequence, error)
            return
        finally:
            self._current = None
        seconds = time.perf_counter() - started
        mean = self._load.step_seconds or seconds
        self._load = replace(self._load, step_seconds=mean + _NEW_SHARE * (seconds - mean))
        self._statistics.busy_seconds += seconds
        for sequence in rows:
            sequence.decode_seconds += seconds
        for sequence in finished:
            self._end(sequence, None)
        self._clock.account("host_step")

    @torch.inference_mode()
    def _run_step(self, rows: dict[DecodeSequence, StepRow]) -> list[DecodeSequence]:
        """One token for every sequence of the step; returns those that are finished."""
        with self._trace.span(ENGINE_TRACK, "forward"):
            logits, reads = self._step.run(list(rows.values()))
        with self._trace.span(ENGINE_TRACK, "sample"):
            tokens = sample_rows(logits, [sequence.sampler for sequence in rows], self._step.pool)
        finished = []
        for sequence, token, read in zip(rows, tokens, reads, strict=True):
            self._statistics.reads.add(read)
            if read.head_errors:
                self._on_head_errors(sequence.policy, read.head_errors)
            with self._alone(sequence, "a token"):
                if not self._take_token(sequence, token, read):
                    finished.append(sequence)
        self._statistics.steps += 1
        return finished

    def _take_token(
        self, sequence: DecodeSequence, token: int | NonFiniteLogitsError, reads: StepReads
    ) -> bool:
        """Deliver a sequence's next token, unless none could be drawn; whether to go on."""
        if sequence.kv.damage is not None:
            raise sequence.kv.damage
        if isinstance(token, NonFiniteLogitsError):
            raise token
        sequence.generated_token_ids.append(token)
        sequence.reads.add(reads)
        sequence.steps += 1
        self._statistics.tokens += 1
        return sequence.on_token(token)

    def _row(self, sequence: DecodeSequence) -> StepRow:
        if sequence.slot is None:
            sequence.slot = self._step.join(sequence.kv)
        row = StepRow(
            sequence.kv,
            sequence.slot,
            sequence.generated_token_ids[-1],
            sequence.policy,
            sequence.planner_state,
        )
        self._step.check(row)
        return row


def _with_prompts(load: EngineLoad, sequences: Sequence[DecodeSequence]) -> EngineLoad:
    """A load and that of more sequences."""
    missing = (
        len(one.prompt_token_ids) - one.kv.num_tokens for one in sequences if not one.is_whole
    )
    return replace(
        load,
        streams=load.streams + sum(one.is_decoding for one in sequences),
        pending_tokens=load.pending_tokens + sum(missing),
    )


def _not_ended(sequences: Iterable[DecodeSequence]) -> list[DecodeSequence]:
    return [sequence for sequence in sequences if not sequence.has_ended]
