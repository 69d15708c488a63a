"""The decode engine without a model: what it hands to attention, and what it counts."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fluxion_core.decode.chunk import PromptEnd
from fluxion_core.decode.step import DecodeStep, HeadErrorSample, StepReads, StepRow
from fluxion_core.errors import CapacityError, DeviceError, FluxionError, NonFiniteLogitsError
from fluxion_core.generation.sampling import SamplingParams, sample
from fluxion_core.observe.device_usage import DeviceUsage
from fluxion_core.planning.policy import ExactPolicy, ThresholdPolicy
from fluxion_core.pool.cpu_pool import CpuPool
from services.decode.engine import DecodeEngine, DecodeSequence
from services.decode.read_totals import ReadTotals

READS = StepReads(
    scanned_bytes=10,
    attended_bytes=20,
    region_bytes=120,
    streaming_heads=3,
    planned_heads=12,
    groups_of_size=(1, 0, 2, 0),
    groups_nothing=1,
    groups_everything=0,
    resident_bytes=15,
)
NO_REGION = StepReads(scanned_bytes=0, attended_bytes=0)


class FakeStep(DecodeStep):
    """Always makes token 1. Every step of a sequence with a policy that chooses reads READS.

    A sequence whose KV has a `fault` cannot `join`, has no `room`, or gets NaN `logits`.
    """

    def __init__(
        self, usage: DeviceUsage | None = None, failure: Exception | None = None, threads: int = 1
    ) -> None:
        self._usage = usage
        self.failure = failure
        self.pool = CpuPool(threads)
        self.ran: list[list[StepRow]] = []
        self.slots: set[int] = set()

    @property
    def usage(self):
        return self._usage

    @property
    def span_source(self):
        raise NotImplementedError

    def compute_chunk(self, sequence, token_ids, profile_window, *, seconds=None):
        raise NotImplementedError

    def advance_profile(self, profiling):
        raise NotImplementedError

    def close(self):
        pass

    def join(self, sequence):
        if fault_of(sequence) == "join":
            raise CapacityError("windows", needed=1, free=0, unit="slots", remedy="wait")
        slot = len(self.slots)
        self.slots.add(slot)
        return slot

    def leave(self, slot):
        self.slots.remove(slot)

    def check(self, row):
        if fault_of(row.sequence) == "room":
            raise FluxionError("the reservation is used up")

    def run(self, rows):
        self.ran.append(list(rows))
        if self.failure is not None:
            raise self.failure
        if self.usage is not None:
            self.usage.busy_seconds += 1e-6
            self.usage.idle_seconds["host_attention"] += 1e-6
        logits = torch.tensor([[0.0, 1.0]]).repeat(len(rows), 1)
        for index, row in enumerate(rows):
            if fault_of(row.sequence) == "logits":
                logits[index] = torch.nan
        return logits, [READS if row.state is not None else NO_REGION for row in rows]


def fault_of(kv) -> str | None:
    return getattr(kv, "fault", None)


def sequence_of(policy, state, num_tokens: int, ends: queue.Queue) -> DecodeSequence:
    left = iter(range(num_tokens - 1, -1, -1))
    return DecodeSequence(
        request_id="r",
        kv=SimpleNamespace(num_tokens=9, damage=None),
        policy=policy,
        planner_state=state,
        prompt_token_ids=[0],
        generated_token_ids=[1],
        sampling=SamplingParams(),
        on_token=lambda _: next(left) > 0,
        on_end=ends.put,
    )


def test_each_sequence_brings_its_policy_and_state_and_gets_what_it_read():
    step, ends = FakeStep(), queue.Queue()
    engine = DecodeEngine(step)
    state = object()
    planned = sequence_of(ThresholdPolicy(0.1), state, 3, ends)
    exact = sequence_of(ExactPolicy(), None, 2, ends)
    engine.submit(planned)
    engine.submit(exact)
    engine.start()
    assert [ends.get(timeout=60) for _ in range(2)] == [None, None]
    engine.stop()
    both = [
        StepRow(planned.kv, 0, 1, ThresholdPolicy(0.1), state),
        StepRow(exact.kv, 1, 1, ExactPolicy(), None),
    ]
    assert step.ran == [both, both, both[:1]]
    assert step.slots == set()
    # By hand: three steps of 10 and 20 bytes out of 120.
    assert (planned.reads.scanned_bytes, planned.reads.attended_bytes) == (30, 60)
    assert planned.reads.share_of_exact == 90 / 360
    assert planned.reads.streaming_share == 9 / 36
    assert planned.reads.groups_of_size == [3, 0, 6, 0]
    assert planned.reads.groups_nothing == 3
    assert planned.reads.resident_bytes == 45
    assert exact.reads == ReadTotals()
    assert (exact.reads.share_of_exact, exact.reads.streaming_share) == (0, 0)
    statistics = engine.statistics()
    assert (statistics.steps, statistics.tokens) == (3, 5)
    assert statistics.reads == planned.reads


class MeasuringStep(FakeStep):
    """Measures what the rows of its second step lost."""

    SAMPLE = HeadErrorSample(0.25, 0.04, 100)

    def run(self, rows):
        logits, reads = super().run(rows)
        samples = (self.SAMPLE,) if len(self.ran) == 2 else ()
        return logits, [replace(read, head_errors=samples) for read in reads]


def test_errors_that_a_step_has_measured_are_told_with_the_rows_policy():
    step, ends, told = MeasuringStep(), queue.Queue(), []
    engine = DecodeEngine(step, on_head_errors=lambda *what: told.append(what))
    engine.submit(sequence_of(ThresholdPolicy(0.1), object(), 3, ends))
    engine.submit(sequence_of(ThresholdPolicy(0.2), object(), 3, ends))
    engine.start()
    assert [ends.get(timeout=60) for _ in range(2)] == [None, None]
    engine.stop()
    samples = (MeasuringStep.SAMPLE,)
    assert told == [(ThresholdPolicy(0.1), samples), (ThresholdPolicy(0.2), samples)]


def test_statistics_are_a_copy():
    engine = DecodeEngine(FakeStep(DeviceUsage()))
    taken = engine.statistics()
    taken.reads.add(READS)
    taken.device.busy_seconds = 1.0
    assert engine.statistics().reads == ReadTotals()
    assert engine.statistics().device == DeviceUsage()


def test_a_rest_counts_while_it_lasts() -> None:
    engine = DecodeEngine(FakeStep())
    engine.start()
    try:
        while not engine.statistics().idle_seconds:
            pass
        first = engine.statistics().idle_seconds
        assert engine.statistics().idle_seconds > first
    finally:
        engine.stop()


def test_all_of_the_devices_time_has_a_cause() -> None:
    usage, ends = DeviceUsage(), queue.Queue()
    engine = DecodeEngine(FakeStep(usage))
    before = time.perf_counter()
    engine.start()
    engine.submit(sequence_of(ExactPolicy(), None, 20, ends))
    assert ends.get(timeout=60) is None
    while engine.statistics().device.idle_seconds["no_work"] < 0.01:
        pass
    device = engine.statistics().device
    between = time.perf_counter() - before
    engine.stop()
    assert device.busy_seconds == pytest.approx(20e-6)
    assert device.idle_seconds["host_attention"] == pytest.approx(20e-6)
    assert device.idle_seconds["host_step"] > 0
    assert 0 < device.accounted_seconds <= between


def test_a_failed_step_ends_its_sequences_and_the_next_ones_run() -> None:
    step, ends, told = FakeStep(failure=ValueError("boom")), queue.Queue(), []
    engine = DecodeEngine(step, on_failure=told.append)
    engine.start()
    try:
        engine.submit(sequence_of(ExactPolicy(), None, 2, ends))
        assert isinstance(ends.get(timeout=60), ValueError)
        step.failure = None
        engine.submit(sequence_of(ExactPolicy(), None, 2, ends))
        assert ends.get(timeout=60) is None
    finally:
        engine.stop()
    assert told == []
    assert step.slots == set()


def test_a_failed_device_ends_everything_and_is_told_once() -> None:
    error = DeviceError("stuck")
    step, ends, told = FakeStep(failure=error), queue.Queue(), queue.Queue()
    engine = DecodeEngine(step, on_failure=told.put)
    engine.start()
    try:
        engine.submit(sequence_of(ExactPolicy(), None, 2, ends))
        assert ends.get(timeout=60) is error
        assert told.get(timeout=60) is error
        with pytest.raises(DeviceError, match="stuck"):
            engine.submit(sequence_of(ExactPolicy(), None, 2, ends))
    finally:
        engine.stop()
    assert (len(step.ran), told.empty(), step.slots) == (1, True, set())


def raises(error: Exception):
    def raising(_):
        raise error

    return raising


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("join", CapacityError),
        ("room", FluxionError),
        ("logits", NonFiniteLogitsError),
        ("delivery", ConnectionError),
    ],
)
def test_what_is_wrong_with_one_sequence_ends_that_one_only(fault, expected) -> None:
    step, ends, theirs = FakeStep(), queue.Queue(), queue.Queue()
    engine = DecodeEngine(step)
    before, faulty, after = (sequence_of(ExactPolicy(), None, 4, ends) for _ in range(3))
    faulty.kv.fault, faulty.on_end = fault, theirs.put
    if fault == "delivery":
        faulty.on_token = raises(ConnectionError("gone"))
    for sequence in (before, faulty, after):
        engine.submit(sequence)
    engine.start()
    assert type(theirs.get(timeout=60)) is expected
    assert [ends.get(timeout=60) for _ in range(2)] == [None, None]
    engine.stop()
    assert (before.generated_token_ids, after.generated_token_ids) == ([1] * 5, [1] * 5)
    in_first_step = 3 if fault in ("logits", "delivery") else 2
    assert [len(rows) for rows in step.ran] == [in_first_step, 2, 2, 2]
    # Of the sequence that could not be sampled there is no token; of the other one that was made.
    assert engine.statistics().tokens == 8 + (fault == "delivery")
    assert step.slots == set()
    assert theirs.empty()


@pytest.mark.parametrize("threads", [1, 2])
def test_sequences_of_a_step_are_sampled_as_each_would_be_alone(threads) -> None:
    step, ends = FakeStep(threads=threads), queue.Queue()
    engine = DecodeEngine(step)
    sequences = []
    for seed in range(5):
        one = sequence_of(ExactPolicy(), None, 8, ends)
        sampling = SamplingParams(
            temperature=1.0, seed=seed, repetition_penalty=1.5, frequency_penalty=0.5
        )
        sequences.append(replace(one, sampling=sampling, generated_token_ids=[1]))
        engine.submit(sequences[-1])
    engine.start()
    assert [ends.get(timeout=60) for _ in sequences] == [None] * 5
    engine.stop()
    logits = torch.tensor([0.0, 1.0])
    for one in sequences:
        expected = [1]
        while len(expected) < 9:
            expected.append(sample(logits, one.sampling, [0], expected, position=len(expected)))
        assert one.generated_token_ids == expected
    assert len({tuple(one.generated_token_ids) for one in sequences}) > 1


class FillingStep(FakeStep):
    """Says which prompts it is to copy ahead, and whether a step follows."""

    fills_ahead = True

    def __init__(self, failures: Sequence[Exception] = ()) -> None:
        super().__init__()
        self.asked: queue.Queue = queue.Queue()
        self.failures = list(failures)

    def fill_ahead(self, prompts, *, has_streams):
        self.asked.put((list(prompts), has_streams))
        if self.failures:
            raise self.failures.pop()

    def await_asked(self, *expected) -> None:
        while self.asked.get(timeout=60) != expected:
            pass


def test_prompts_on_their_way_are_copied_ahead_though_nothing_decodes() -> None:
    # Again and again, as long as they come; one more that comes is not waited for.
    step = FillingStep()
    engine = DecodeEngine(step)
    first, second = object(), object()
    engine.start()
    try:
        with engine.arriving(first):
            for _ in range(3):
                step.await_asked([first], False)
            with engine.arriving(second):
                step.await_asked([first, second], False)
            step.await_asked([first], False)
    finally:
        engine.stop()
    # Not while the engine is at rest.
    assert engine.statistics().steps == 0
    while not step.asked.empty():
        assert step.asked.get() in (([first], False), ([], False))


def test_prompts_that_are_computed_here_are_copied_ahead_and_streams_go_on_with_it() -> None:
    step, ends = FillingStep(), queue.Queue()
    engine = DecodeEngine(step)
    arriving = object()
    here = sequence_of(ExactPolicy(), None, 3, ends)
    here.generated_token_ids = []
    stream = sequence_of(ExactPolicy(), None, 2, ends)
    step.compute_chunk = lambda *_, **__: PromptEnd(torch.tensor([0.0, 1.0]), None)
    engine.submit(stream)
    engine.submit(here)
    with engine.arriving(arriving):
        engine.start()
        try:
            assert [ends.get(timeout=60) for _ in range(2)] == [None, None]
        finally:
            engine.stop()
    assert step.asked.get() == ([arriving, here.kv], True)
    assert step.asked.get() == ([arriving], True)


def test_what_cannot_be_copied_ahead_ends_nobody_and_a_failed_device_everything() -> None:
    step, ends, told = FillingStep([DeviceError("gone"), FluxionError("no")]), queue.Queue(), []
    engine = DecodeEngine(step, on_failure=told.append)
    engine.submit(sequence_of(ExactPolicy(), None, 9, ends))
    engine.start()
    try:
        assert isinstance(ends.get(timeout=60), DeviceError)
    finally:
        engine.stop()
    assert [str(error) for error in told] == ["gone"]
    # The first failure ended nothing.
    assert len(step.ran) == 1


def test_where_nothing_is_copied_ahead_the_engine_rests_while_prompts_come() -> None:
    engine = DecodeEngine(FakeStep())
    with engine.arriving(object()):
        assert engine._arriving == {}


def test_an_end_that_cannot_be_delivered_is_nobody_elses() -> None:
    step, ends = FakeStep(), queue.Queue()
    engine = DecodeEngine(step)
    deaf, other = (sequence_of(ExactPolicy(), None, count, ends) for count in (1, 3))
    deaf.on_end = raises(RuntimeError("the loop is closed"))
    engine.submit(deaf)
    engine.submit(other)
    engine.start()
    assert ends.get(timeout=60) is None
    engine.stop()
    assert other.generated_token_ids == [1] * 4
    assert (deaf.has_ended, step.slots) == (True, set())


def test_a_device_that_fails_while_one_joins_has_failed_for_all() -> None:
    error = DeviceError("lost")
    step, ends, told = FakeStep(), queue.Queue(), queue.Queue()
    step.check = raises(error)
    engine = DecodeEngine(step, on_failure=told.put)
    for _ in range(2):
        engine.submit(sequence_of(ExactPolicy(), None, 2, ends))
    engine.start()
    assert [ends.get(timeout=60) for _ in range(2)] == [error, error]
    assert told.get(timeout=60) is error
    engine.stop()
    assert (step.ran, told.empty()) == ([], True)
