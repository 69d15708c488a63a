"""Prompts that the decode engine computes itself: chunks between steps, and their ends."""

from __future__ import annotations

import queue
from types import SimpleNamespace

import torch

from fluxion_core.decode.chunk import PromptEnd
from fluxion_core.errors import FluxionError
from fluxion_core.geometry import WindowSpec
from fluxion_core.planning.policy import ExactPolicy, ThresholdPolicy
from services.decode.engine import (
    CHUNK_ALONE,
    CHUNK_BESIDE_STREAMS,
    GATHERED_CHUNK_TOKENS,
    DecodeEngine,
    DecodeSequence,
    EngineLoad,
    ProfileRequest,
)
from tests.services.decode.test_engine import FakeStep, sequence_of


class FakePrompts:
    """Stores what it is given; the token after a prompt is 1. Prompts of 13s are not computed.

    A profile takes so many slices; one of a prompt of 7s fails in its last. A chunk takes so many
    calls.
    """

    def __init__(self, step: FakeStep, num_slices: int = 1, parts: int = 1) -> None:
        self.step = step
        self.num_slices = num_slices
        self.parts = parts
        self.seconds: list[float | None] = []
        """That others could wait, of each call."""
        self.slices: list[int] = []
        """Steps before each slice of a profile."""
        self.ran: list[tuple[int, int, WindowSpec | None]] = []
        """Tokens of each chunk, steps before it, and the window of the profile."""

    def compute_chunk(self, sequence, token_ids, profile_window, *, seconds):
        if token_ids[0] == 13:
            raise ValueError("boom")
        self.seconds.append(seconds)
        if len(self.seconds) % self.parts:
            return None
        self.ran.append((len(token_ids), len(self.step.ran), profile_window))
        sequence.num_tokens += len(token_ids)
        if sequence.num_tokens < sequence.num_prompt_tokens:
            return None
        profiling = SimpleNamespace(left=self.num_slices, is_bad=token_ids[0] == 7)
        return PromptEnd(torch.tensor([0.0, 1.0]), profiling if profile_window else None)

    def advance_profile(self, profiling):
        self.slices.append(len(self.step.ran))
        profiling.left -= 1
        if profiling.left:
            return None
        if profiling.is_bad:
            raise FluxionError("not finite")
        return ["profile"]


def prompt_of(
    length: int, num_tokens: int, ends: queue.Queue, *, stored: int = 0, token: int = 0, **options
) -> DecodeSequence:
    sequence = sequence_of(ExactPolicy(), None, num_tokens + 1, ends)
    sequence.prompt_token_ids = [token] * length
    sequence.generated_token_ids = []
    sequence.kv = SimpleNamespace(num_tokens=stored, num_prompt_tokens=length, damage=None)
    for name, value in options.items():
        setattr(sequence, name, value)
    return sequence


def step_with(step: FakeStep, prompts: FakePrompts) -> FakeStep:
    """The step, whose prompts these are."""
    step.compute_chunk = prompts.compute_chunk
    step.advance_profile = prompts.advance_profile
    return step


def run(step: FakeStep, prompts: FakePrompts, sequences, ends: queue.Queue) -> list:
    engine = DecodeEngine(step_with(step, prompts))
    for sequence in sequences:
        engine.submit(sequence)
    engine.start()
    outcomes = [ends.get(timeout=60) for _ in sequences]
    engine.stop()
    assert step.slots == set()
    return outcomes


def test_what_is_not_stored_is_computed_in_chunks_and_then_decoded():
    step, ends = FakeStep(), queue.Queue()
    prompts = FakePrompts(step)
    sequence = prompt_of(30 + CHUNK_ALONE.tokens + 5, 2, ends, stored=30)
    assert run(step, prompts, [sequence], ends) == [None]
    assert prompts.ran == [(CHUNK_ALONE.tokens, 0, None), (5, 0, None)]
    assert sequence.generated_token_ids == [1, 1, 1]
    assert (len(step.ran), sequence.steps) == (2, 2)
    assert sequence.queue_seconds > 0
    assert sequence.prefill_seconds > 0


def test_streams_make_a_step_between_two_chunks_which_are_small_then():
    step, ends = FakeStep(), queue.Queue()
    prompts = FakePrompts(step)
    stream = sequence_of(ExactPolicy(), None, 12, ends)
    later, last = (prompt_of(3 * CHUNK_BESIDE_STREAMS.tokens, 1, ends) for _ in range(2))
    assert run(step, prompts, [stream, later, last], ends) == [None] * 3
    # By hand: a chunk, a step, a chunk…; one prompt after the other; who is ready joins at once.
    assert prompts.ran == [(CHUNK_BESIDE_STREAMS.tokens, steps, None) for steps in range(6)]
    assert [len(rows) for rows in step.ran[:7]] == [1, 1, 2, 1, 1, 2, 1]


def test_a_chunk_that_gathers_is_long_and_comes_in_parts_with_a_step_after_each():
    step, ends = FakeStep(), queue.Queue()
    step.gathers_prompts = True
    prompts = FakePrompts(step, parts=3)
    told: list[tuple[int, int]] = []
    engine = DecodeEngine(step_with(step, prompts), on_chunk=lambda *chunk: told.append(chunk[:2]))
    stream = sequence_of(ExactPolicy(), None, 12, ends)
    length = 100_000 + GATHERED_CHUNK_TOKENS + 5
    later = prompt_of(length, 1, ends, stored=100_000)
    for sequence in (stream, later):
        engine.submit(sequence)
    engine.start()
    assert [ends.get(timeout=60) for _ in range(2)] == [None, None]
    engine.stop()
    # By hand: two chunks of three parts, each part between two steps of the stream.
    assert prompts.ran == [(GATHERED_CHUNK_TOKENS, 2, None), (5, 5, None)]
    assert told == [(GATHERED_CHUNK_TOKENS, 100_000), (5, 100_000 + GATHERED_CHUNK_TOKENS)]
    assert [len(rows) for rows in step.ran[:7]] == [1, 1, 1, 1, 1, 2, 1]
    # Before the first step nobody knows how long one is: the least that a part can be.
    assert prompts.seconds[0] == 0
    assert all(seconds is not None and seconds > 0 for seconds in prompts.seconds[1:])


def test_alone_a_chunk_takes_what_it_takes():
    step, ends = FakeStep(), queue.Queue()
    prompts = FakePrompts(step)
    assert run(step, prompts, [prompt_of(5, 1, ends)], ends) == [None]
    assert prompts.seconds == [None]


def test_the_more_is_stored_the_smaller_the_chunks():
    step, ends = FakeStep(), queue.Queue()
    prompts = FakePrompts(step)
    # By hand: 32 rows are meant for 8,192 tokens; over 32,768 it is 7, over a million one.
    stored = (32_768, 1_000_000)
    sequences = [prompt_of(length + 17, 0, ends, stored=length) for length in stored]
    assert run(step, prompts, sequences, ends) == [None, None]
    assert [tokens for tokens, _, _ in prompts.ran] == [7, 7, 3, *[1] * 17]


def test_a_prompts_last_chunk_gives_the_planner_its_profile():
    step, ends = FakeStep(), queue.Queue()
    prompts, window = FakePrompts(step), WindowSpec()
    planner = SimpleNamespace(new_state=lambda profiles: ("state", *profiles))
    sequence = prompt_of(
        CHUNK_ALONE.tokens + 5,
        1,
        ends,
        policy=ThresholdPolicy(0.1),
        profile_request=ProfileRequest(planner, window),
    )
    assert run(step, prompts, [sequence], ends) == [None]
    assert prompts.ran == [(CHUNK_ALONE.tokens, 0, window), (5, 0, window)]
    assert sequence.planner_state == ("state", "profile")
    assert step.ran[0][0].state == ("state", "profile")


PLANNER = SimpleNamespace(new_state=lambda profiles: ("state", *profiles))
PROFILED = {
    "policy": ThresholdPolicy(0.1),
    "profile_request": ProfileRequest(PLANNER, WindowSpec()),
}


def test_streams_make_a_step_between_two_slices_of_a_profile():
    step, ends = FakeStep(), queue.Queue()
    prompts = FakePrompts(step, num_slices=5)
    stream = sequence_of(ExactPolicy(), None, 12, ends)
    given = []
    later = prompt_of(5, 2, ends, **PROFILED)
    take = later.on_token
    later.on_token = lambda token: given.append(len(step.ran)) or take(token)
    assert run(step, prompts, [stream, later], ends) == [None, None]
    # By hand: the chunk, a step, and then a slice before each step. Its first token does not wait
    # for the profile; it joins the step after the last slice.
    assert prompts.slices == [1, 2, 3, 4, 5]
    assert given == [0, 6, 7]
    assert [len(rows) for rows in step.ran[:8]] == [1, 1, 1, 1, 1, 2, 2, 1]
    assert step.ran[5][1].state == ("state", "profile")


def test_a_profile_does_not_keep_the_next_prompt_from_its_chunks():
    step, ends = FakeStep(), queue.Queue()
    prompts = FakePrompts(step, num_slices=6)
    stream = sequence_of(ExactPolicy(), None, 12, ends)
    first, second = prompt_of(5, 1, ends, **PROFILED), prompt_of(5, 1, ends)
    assert run(step, prompts, [stream, first, second], ends) == [None] * 3
    assert [steps for _, steps, _ in prompts.ran] == [0, 1]
    assert prompts.slices == [1, 2, 3, 4, 5, 6]


def test_where_nobody_waits_for_tokens_the_older_profile_is_done_first():
    step, ends = FakeStep(), queue.Queue()
    prompts = FakePrompts(step, num_slices=6)
    sequences = [prompt_of(5, 1, ends, **PROFILED), prompt_of(5, 1, ends)]
    assert run(step, prompts, sequences, ends) == [None, None]
    assert prompts.slices == [0] * 6
    # The second one's chunk came when the first one had made its step.
    assert [steps for _, steps, _ in prompts.ran] == [0, 1]
    assert len(step.ran[0]) == 1


def test_a_sequence_that_is_given_up_is_profiled_no_further():
    step, ends = FakeStep(), queue.Queue()
    prompts = FakePrompts(step, num_slices=1000)
    sequence = prompt_of(5, 2, ends, **PROFILED)
    advance = prompts.advance_profile

    def give_up(profiling):
        sequence.is_cancelled = True
        return advance(profiling)

    prompts.advance_profile = give_up
    assert run(step, prompts, [sequence], ends) == [None]
    assert (len(prompts.slices), step.ran) == (1, [])


def test_a_profile_that_fails_ends_its_own_sequence_only():
    step, ends = FakeStep(), queue.Queue()
    prompts = FakePrompts(step, num_slices=3)
    broken, sound = prompt_of(5, 2, ends, token=7, **PROFILED), prompt_of(5, 2, ends, **PROFILED)
    outcomes = run(step, prompts, [broken, sound], ends)
    assert [type(outcome) for outcome in outcomes] == [FluxionError, type(None)]
    assert sound.generated_token_ids == [1, 1, 1]


def test_chunks_are_told_and_the_load_says_what_is_left():
    step, ends = FakeStep(), queue.Queue()
    told: list[tuple[int, int]] = []
    loads: list[EngineLoad] = []

    def on_chunk(tokens: int, stored: int, seconds: float) -> None:
        assert seconds > 0
        told.append((tokens, stored))
        loads.append(engine.load())

    engine = DecodeEngine(step_with(step, FakePrompts(step)), on_chunk=on_chunk)
    stream = sequence_of(ExactPolicy(), None, 9, ends)
    engine.submit(stream)
    engine.submit(prompt_of(50, 0, ends, stored=30))
    assert engine.load() == EngineLoad(streams=1, pending_tokens=20)
    engine.start()
    assert [ends.get(timeout=60) for _ in range(2)] == [None, None]
    engine.stop()
    # By hand: 16 tokens, a step, 4 tokens. The load is that of when the turn began.
    assert told == [(16, 30), (4, 46)]
    assert [(load.streams, load.pending_tokens) for load in loads] == [(1, 20), (1, 4)]
    assert loads[0].step_seconds == 0
    assert loads[1].step_seconds > 0
    rest = engine.load()
    assert (rest.streams, rest.pending_tokens) == (0, 0)


def test_a_first_token_may_be_the_last():
    step, ends = FakeStep(), queue.Queue()
    sequence = prompt_of(5, 0, ends)
    assert run(step, FakePrompts(step), [sequence], ends) == [None]
    assert (sequence.generated_token_ids, step.ran) == ([1], [])


def test_a_chunk_that_fails_ends_its_own_sequence_only():
    step, ends = FakeStep(), queue.Queue()
    broken, sound = prompt_of(5, 2, ends, token=13), prompt_of(5, 2, ends)
    outcomes = run(step, FakePrompts(step), [broken, sound], ends)
    assert [type(outcome) for outcome in outcomes] == [ValueError, type(None)]
    assert broken.generated_token_ids == []
    assert sound.generated_token_ids == [1, 1, 1]


def test_a_prompt_that_is_given_up_is_computed_no_further():
    step, ends = FakeStep(), queue.Queue()
    prompts = FakePrompts(step)
    sequence = prompt_of(5, 2, ends, is_cancelled=True)
    assert run(step, prompts, [sequence], ends) == [None]
    assert prompts.ran == []
