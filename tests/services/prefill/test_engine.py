"""The prefill engine without gRPC: whose turn it is, who waits, and how each prompt ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fluxion_core.errors import CapacityError, DrainingError, RequestCancelledError
from fluxion_core.generation.sampling import SamplingParams, sample
from fluxion_core.geometry import KvGeometry
from fluxion_core.kvstream.handoff import Frame, Trailer
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.weights import load_model
from services.prefill.engine import PrefillEngine
from services.prefill.prompt import Prompt

CHUNK_TOKENS = 16
GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=16)


@pytest.fixture(scope="session")
def decoder(toy_model_path: Path) -> Decoder:
    return load_model(toy_model_path, device=torch.device("cpu"), dtype=torch.float32).decoder


@pytest.fixture
def make_engine(decoder: Decoder) -> Callable[..., PrefillEngine]:
    def make(**limits: int) -> PrefillEngine:
        defaults = {
            "chunk_tokens": CHUNK_TOKENS,
            "max_running": 8,
            "max_waiting": 8,
            "running_kv_bytes": 1 << 30,
            "outgoing_bytes": 1 << 20,
        }
        return PrefillEngine(decoder, GEOMETRY, **(defaults | limits))

    return make


@contextmanager
def running(engine: PrefillEngine) -> Iterator[None]:
    engine.start()
    try:
        yield
    finally:
        engine.stop()


class Receiver:
    """A prompt, and what became of it. All is taken at once, but while there is no room."""

    def __init__(self, num_tokens: int, log: list[tuple[Receiver, Frame]] | None = None) -> None:
        self.room = threading.Event()
        self.room.set()
        self.frames: list[Frame] = []
        self.ends: queue.Queue[Trailer | BaseException] = queue.Queue()
        self._log = log if log is not None else []
        self.prompt = Prompt(
            request_id="r",
            token_ids=[(7 * i) % 256 for i in range(num_tokens)],
            kv_from_token=0,
            sampling=SamplingParams(),
            on_frame=self.take,
            on_end=self.ends.put,
            outgoing_bytes=lambda: 0 if self.room.is_set() else 1 << 20,
        )

    def take(self, frame: Frame) -> None:
        self.frames.append(frame)
        self._log.append((self, frame))

    def end(self) -> Trailer | BaseException:
        return self.ends.get(timeout=60)


def submit_amid(long: Receiver, short: Receiver, engine: PrefillEngine) -> None:
    """Submit a prompt once another has begun, as if both had come at once."""

    def take(frame: Frame) -> None:
        long.take(frame)
        if len(long.frames) == 1:
            engine.submit(short.prompt)

    # By the clock it would depend on how long a chunk takes.
    short.prompt.submitted = long.prompt.submitted
    long.prompt.on_frame = take
    engine.submit(long.prompt)


def alone(engine: PrefillEngine, num_tokens: int) -> tuple[list[Frame], Trailer | BaseException]:
    """Compute a prompt while the engine has no other."""
    receiver = Receiver(num_tokens)
    with running(engine):
        engine.submit(receiver.prompt)
        end = receiver.end()
    return receiver.frames, end


def test_a_short_prompt_leaves_before_the_rest_of_a_long_one_and_both_are_as_if_alone(
    make_engine: Callable[..., PrefillEngine],
):
    log: list[tuple[Receiver, Frame]] = []
    long, short = Receiver(5 * CHUNK_TOKENS, log), Receiver(2 * CHUNK_TOKENS, log)
    engine = make_engine()
    submit_amid(long, short, engine)
    with running(engine):
        ends = [long.end(), short.end()]
    turns = [(receiver, frame.first_token) for receiver, frame in log if frame.layer == 0]
    assert turns == [(long, 0), (short, 0), (short, 16), *((long, 16 * i) for i in range(1, 5))]
    for receiver, end, chunks in ((long, ends[0], 5), (short, ends[1], 2)):
        frames, end_alone = alone(make_engine(), chunks * CHUNK_TOKENS)
        assert receiver.frames == frames
        assert isinstance(end, Trailer)
        assert isinstance(end_alone, Trailer)
        assert end.first_token_id == end_alone.first_token_id


def test_a_prompt_cancelled_while_another_has_the_turn_is_gone_before_the_next_chunk(
    make_engine: Callable[..., PrefillEngine],
):
    log: list[tuple[Receiver, Frame]] = []
    long, short = Receiver(5 * CHUNK_TOKENS, log), Receiver(2 * CHUNK_TOKENS, log)
    engine = make_engine()
    held = []

    def take(frame: Frame) -> None:
        short.take(frame)
        if len(short.frames) == 1:
            held.append(long.prompt.computation)
            engine.cancel(long.prompt)
        held.append(long.prompt.computation)

    short.prompt.on_frame = take
    submit_amid(long, short, engine)
    with running(engine):
        assert isinstance(long.end(), RequestCancelledError)
        assert isinstance(short.end(), Trailer)
    assert [receiver for receiver, _ in log] == [long, long, short, short, short, short]
    # By hand: as the short one's first chunk leaves, what the long one holds is there; then not.
    assert [computation is not None for computation in held] == [True, True, True, False, False]
    assert long.ends.empty()
    load = engine.load()
    assert (load.running_prompts, load.waiting_prompts, load.pending_tokens) == (0, 0, 0)


def test_who_fails_amid_a_long_prompt_leaves_it_whole(make_engine: Callable[..., PrefillEngine]):
    def fail(frame: Frame) -> None:
        raise ZeroDivisionError

    long, short = Receiver(5 * CHUNK_TOKENS), Receiver(2 * CHUNK_TOKENS)
    short.prompt.on_frame = fail
    engine = make_engine()
    submit_amid(long, short, engine)
    with running(engine):
        assert isinstance(short.end(), ZeroDivisionError)
        assert isinstance(long.end(), Trailer)
    assert short.prompt.computation is None
    assert long.frames == alone(make_engine(), 5 * CHUNK_TOKENS)[0]


def test_stopping_leaves_nothing_of_prompts_that_have_begun(
    make_engine: Callable[..., PrefillEngine],
):
    long, short = Receiver(5 * CHUNK_TOKENS), Receiver(2 * CHUNK_TOKENS)
    engine = make_engine()
    has_begun = threading.Event()

    def take(frame: Frame) -> None:
        for receiver in (long, short):
            receiver.room.clear()
        has_begun.set()

    short.prompt.on_frame = take
    submit_amid(long, short, engine)
    with running(engine):
        assert has_begun.wait(60)
    for receiver in (long, short):
        assert isinstance(receiver.end(), DrainingError)
        assert receiver.prompt.computation is None
    assert engine.load().pending_tokens == 0


@pytest.mark.parametrize("what", ["on_frame", "on_end"])
def test_what_cannot_be_delivered_is_nobody_elses(
    make_engine: Callable[..., PrefillEngine], what: str
):
    def gone(_: object) -> None:
        raise ConnectionError("gone")

    deaf, others = Receiver(2 * CHUNK_TOKENS), [Receiver(3 * CHUNK_TOKENS) for _ in range(2)]
    setattr(deaf.prompt, what, gone)
    last = Receiver(3 * CHUNK_TOKENS)
    engine = make_engine()
    for receiver in (others[0], deaf, others[1], last):
        engine.submit(receiver.prompt)
    with running(engine):
        ends = [receiver.end() for receiver in (*others, last)]
        if what == "on_frame":
            assert isinstance(deaf.end(), ConnectionError)
    assert all(isinstance(end, Trailer) for end in ends)
    assert len({end.first_token_id for end in ends}) == 1
    assert engine.load().running_prompts == 0


def test_a_prompt_without_room_waits_and_the_others_go_on(
    make_engine: Callable[..., PrefillEngine],
):
    blocked, other = Receiver(3 * CHUNK_TOKENS), Receiver(3 * CHUNK_TOKENS)
    blocked.room.clear()
    engine = make_engine()
    with running(engine):
        engine.submit(blocked.prompt)
        engine.submit(other.prompt)
        assert isinstance(other.end(), Trailer)
        assert blocked.frames == []
        blocked.room.set()
        engine.wake()
        assert isinstance(blocked.end(), Trailer)
    assert blocked.frames == other.frames


def test_a_cancelled_prompt_computes_no_further_layer(make_engine: Callable[..., PrefillEngine]):
    receiver = Receiver(3 * CHUNK_TOKENS)
    engine = make_engine()

    def cancel_at_once(frame: Frame) -> None:
        receiver.take(frame)
        engine.cancel(receiver.prompt)

    receiver.prompt.on_frame = cancel_at_once
    with running(engine):
        engine.submit(receiver.prompt)
        assert isinstance(receiver.end(), RequestCancelledError)
        assert engine.load().running_prompts == 0
    assert [(frame.layer, frame.first_token) for frame in receiver.frames] == [(0, 0)]
    assert receiver.prompt.computation is None


def test_a_prompt_that_pauses_gives_its_place_to_others_and_has_it_again(
    make_engine: Callable[..., PrefillEngine],
):
    blocked = [Receiver(3 * CHUNK_TOKENS) for _ in range(3)]
    honest = Receiver(3 * CHUNK_TOKENS)
    engine = make_engine(max_running=1)
    with running(engine):
        for receiver in blocked:
            receiver.room.clear()
            engine.submit(receiver.prompt)
        engine.submit(honest.prompt)
        assert isinstance(honest.end(), Trailer)
        load = engine.load()
        assert (load.running_prompts, load.paused_prompts, load.waiting_prompts) == (0, 3, 0)
        for receiver in blocked:
            receiver.room.set()
        engine.wake()
        assert all(isinstance(receiver.end(), Trailer) for receiver in blocked)


def test_what_waits_for_a_receiver_is_bounded_whatever_a_chunk_is(
    make_engine: Callable[..., PrefillEngine],
):
    limit = 6 * 16 * GEOMETRY.token_bytes
    # Two chunks of 3 blocks each have their KV within it.
    engine = make_engine(chunk_tokens=1024, outgoing_bytes=limit)
    assert engine.chunk_tokens == 48
    assert make_engine(chunk_tokens=1024, outgoing_bytes=0).chunk_tokens == 16
    receiver = Receiver(1000)
    waiting: list[int] = [0]
    most, has_paused = 0, threading.Event()

    def put(frame: Frame) -> None:
        nonlocal most
        receiver.take(frame)
        waiting[0] += len(frame.payload)
        most = max(most, waiting[0])

    def outgoing_bytes() -> int:
        if waiting[0] == limit:
            has_paused.set()
        return waiting[0]

    receiver.prompt.on_frame, receiver.prompt.outgoing_bytes = put, outgoing_bytes
    with running(engine):
        engine.submit(receiver.prompt)
        # By hand: 1,000 tokens are ten times the limit's 96 and 40 more.
        for _ in range(10):
            assert has_paused.wait(60)
            has_paused.clear()
            waiting[0] = 0
            engine.wake()
        assert isinstance(receiver.end(), Trailer)
    assert most == limit


def test_what_is_computed_and_not_taken_counts_until_it_is(
    make_engine: Callable[..., PrefillEngine],
):
    chunk_bytes = CHUNK_TOKENS * GEOMETRY.token_bytes
    first, second, third = Receiver(16), Receiver(16), Receiver(16)
    engine = make_engine(running_kv_bytes=2 * chunk_bytes)
    first.prompt.outgoing_bytes = lambda: len(first.frames) and 2 * chunk_bytes
    with running(engine):
        engine.submit(first.prompt)
        assert isinstance(first.end(), Trailer)
        engine.submit(second.prompt)
        assert engine.load().waiting_prompts == 1
        first.prompt.outgoing_bytes = lambda: 0
        engine.wake()
        assert isinstance(second.end(), Trailer)
        # Nor does it count when its receiver is gone.
        second.prompt.outgoing_bytes = lambda: 2 * chunk_bytes
        engine.submit(third.prompt)
        engine.cancel(second.prompt)
        assert isinstance(third.end(), Trailer)


def test_a_cancelled_prompt_gives_its_waiting_place_back_at_once(
    make_engine: Callable[..., PrefillEngine],
):
    engine = make_engine(max_running=1, max_waiting=1)
    first, waiting, late = Receiver(16), Receiver(16), Receiver(16)
    # Not started: one prompt for the free place, one that waits.
    engine.submit(first.prompt)
    engine.submit(waiting.prompt)
    engine.cancel(waiting.prompt)
    assert isinstance(waiting.end(), RequestCancelledError)
    engine.submit(late.prompt)
    assert engine.load().pending_tokens == 32
    with running(engine):
        assert isinstance(late.end(), Trailer)
    assert waiting.frames == []
    assert waiting.ends.empty()


def test_a_full_queue_refuses_and_says_so(make_engine: Callable[..., PrefillEngine]):
    engine = make_engine(max_running=1, max_waiting=1)
    # Not started: one prompt for the free place, one that waits.
    engine.submit(Receiver(16).prompt)
    engine.submit(Receiver(16).prompt)
    with pytest.raises(CapacityError, match="prefill queue"):
        engine.submit(Receiver(16).prompt)


def test_a_failure_ends_its_own_prompt_and_no_other(make_engine: Callable[..., PrefillEngine]):
    failing, other = Receiver(16), Receiver(64)

    def fail(frame: Frame) -> None:
        raise ZeroDivisionError

    failing.prompt.on_frame = fail
    engine = make_engine()
    engine.submit(failing.prompt)
    engine.submit(other.prompt)
    with running(engine):
        assert isinstance(failing.end(), ZeroDivisionError)
        assert isinstance(other.end(), Trailer)


def test_stopping_ends_every_prompt_once_and_takes_no_more(
    make_engine: Callable[..., PrefillEngine],
):
    engine = make_engine(max_running=1)
    receivers = [Receiver(16), Receiver(16)]
    for receiver in receivers:
        receiver.room.clear()
        engine.submit(receiver.prompt)
    with running(engine):
        pass
    for receiver in receivers:
        assert isinstance(receiver.end(), DrainingError)
        assert receiver.ends.empty()
    with pytest.raises(DrainingError):
        engine.submit(Receiver(16).prompt)
    engine.stop()


def test_the_trailer_counts_what_left_and_samples_the_last_position_as_asked(
    make_engine: Callable[..., PrefillEngine], decoder: Decoder, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    original = Decoder.logits

    def logits(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(original(self, hidden))
        return seen[-1]

    monkeypatch.setattr(Decoder, "logits", logits)
    params = SamplingParams(temperature=5.0, repetition_penalty=1.2, seed=11)
    receiver = Receiver(40)
    receiver.prompt.sampling = params
    engine = make_engine()
    with running(engine):
        engine.submit(receiver.prompt)
        trailer = receiver.end()
    assert isinstance(trailer, Trailer)
    assert trailer.num_chunks == len(receiver.frames) == 2 * 3
    assert trailer.payload_bytes == sum(len(frame.payload) for frame in receiver.frames)
    (rows,) = seen
    assert rows.shape == (1, 256)
    expected = sample(rows[0], params, receiver.prompt.token_ids, [], position=0)
    assert trailer.first_token_id == expected
