"""The host's side of a GPU step, with a thread in the GPU's place: flags, tasks, tokens."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.plans import StepPlans
from fluxion_core.decode.work import StepWork
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kvstore.digest_index import gather_kv
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.replayed_policy import ReplayedPolicy
from fluxion_core.planning.constants import READ_ALL, READ_NOTHING
from fluxion_core.planning.planner import PlannerState
from fluxion_core.planning.policy import ExactPolicy, FixedPolicy, MarginalPolicy, Policy
from fluxion_core.pool.cpu_pool import WAKE_BYTES, CpuPool
from tests.fluxion_core.decode.rows import rows_of
from tests.fluxion_core.planning.random_planner import make_planner, random_network, random_profile

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_dim=32, slab_tokens=128)
WINDOW = WindowSpec(sink_tokens=32, recent_tokens=128)
HEADS = 6
LENGTHS = (100, 400, 900)
TIMEOUT_NS = 20_000_000_000

LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
KV_OFFSET, QUERY, OUTPUT, LSE, DONE, TICKET, LEVEL, BEGIN, END, STATISTICS = (
    1,
    3,
    4,
    5,
    6,
    7,
    8,
    11,
    12,
    29,
)


def _filled_store() -> tuple[HostKvStore, list[SequenceKv]]:
    store = HostKvStore(GEOMETRY, 1 << 24, model_key=b"")
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for length in LENGTHS:
        sequence = store.reserve([length, *range(length - 1)], 8)
        shape = (GEOMETRY.num_kv_heads, -(-length // 16), 2, 16, GEOMETRY.head_dim)
        for layer in range(GEOMETRY.num_layers):
            payload = torch.randn(shape, generator=generator).bfloat16()
            if length % 16:
                payload[:, -1, :, length % 16 :] = 0
            sequence.write_blocks(layer, 0, length, payload.view(torch.uint8).numpy().tobytes())
        sequence.commit()
        sequences.append(sequence)
    return store, sequences


def _floats(address: int, count: int) -> Tensor:
    array = (ctypes.c_float * count).from_address(address)
    return torch.frombuffer(array, dtype=torch.float32)


class _Machine:
    """A board in ordinary memory, a thread that plays the GPU's graph, and a lane of one runner."""

    def __init__(
        self,
        sequences: list[SequenceKv],
        *,
        answers: Callable[[], int],
        rates: tuple[float, float] = (1e-3, 1e-3),
        is_late: bool = False,
        timeout_ns: int = TIMEOUT_NS,
    ) -> None:
        """rates: what the lane believes of GPU and CPUs. is_late: a task of the lane ends when all
        others of its layer have."""
        self.sequences = sequences
        layers, batch, dim = GEOMETRY.num_layers, len(sequences), GEOMETRY.head_dim
        floats = (HEADS + 2 * GEOMETRY.num_kv_heads) * dim
        generator = torch.Generator().manual_seed(2)
        self.sent = torch.randn(layers, batch, floats, generator=generator)
        self.published = torch.zeros(layers, batch, dtype=torch.int32)
        self.answered = torch.zeros(layers, dtype=torch.int32)
        self.skip = torch.zeros(layers, dtype=torch.int32)
        self.rows = torch.zeros(layers, batch, floats)
        self.output = torch.zeros(batch, HEADS, dim)
        self.lse = torch.zeros(batch, HEADS)
        self.queries = torch.zeros(batch, HEADS, dim)
        kv_heads = GEOMETRY.num_kv_heads
        self.planned = torch.zeros(layers, batch, kv_heads, dtype=torch.int32)
        self.levels = torch.zeros(layers, batch, kv_heads, dtype=torch.int32)
        self.budgets = torch.zeros(layers, batch, HEADS, dtype=torch.int32)
        self.plans: tuple[Tensor, Tensor] | None = None
        """Levels and budgets of all layers that the GPU makes."""
        self.told = torch.full((layers, batch, HEADS, 2), torch.nan)
        self.received: list[tuple[Tensor, Tensor] | None] = []
        self.descriptor = torch.zeros(32, dtype=torch.int64)
        self.done = torch.zeros(1, dtype=torch.int64)
        self.statistics = torch.zeros(4, dtype=torch.int64)
        self.launched = 0
        self.has_failed = threading.Event()
        self._answers, self._is_late = answers, is_late
        self._launch = LAUNCH(self._run_task)
        self.driver = self.new_driver(timeout_ns)
        address = ctypes.cast(self._launch, ctypes.c_void_p).value
        assert address is not None
        words = [part.numpy() for part in (self.descriptor, self.done, self.statistics)]
        self.lane = _native.GpuLane(address, [(0, 0, *words)], *rates, False)

    def new_driver(self, timeout_ns: int) -> _native.StepDriver:
        return _native.StepDriver(
            native_layout(GEOMETRY),
            HEADS,
            self.published.numpy(),
            self.answered.numpy(),
            self.skip.numpy(),
            self.rows.numpy(),
            self.output.numpy(),
            self.lse.numpy(),
            self.queries.data_ptr(),
            self.planned.numpy(),
            self.levels.numpy(),
            self.budgets.numpy(),
            timeout_ns,
        )

    def step(
        self,
        policy: Policy,
        lane: bool,
        alone: bool,
        *,
        wake_bytes: int = 0,
        states: Sequence[PlannerState | None] | None = None,
    ) -> StepWork:
        number = 1
        planner = None if states is None else next(s.planner for s in states if s is not None)
        plans = StepPlans(GEOMETRY, HEADS, planner, self)
        work = work_of(self.sequences, policy, states, plans)
        graph = threading.Thread(target=self._play_graph, args=(number,), daemon=True)
        graph.start()
        self.driver.run(
            CpuPool(2).native,
            work.tasks,
            self.lane if lane else None,
            alone,
            number,
            *work.append.arrays,
            wake_bytes,
        )
        graph.join()
        return work

    def begin(self, num_rows: int) -> None:
        """See NetworkPlans."""

    def source(self, index, row, state, region, policy) -> _native.PlanSource:
        """See NetworkPlans: the GPU runs the network."""
        del row, region, policy
        told = self.told[:, index].numpy()
        return _native.DevicePlans(self.driver, index, state.planner.native, told)

    def _play_graph(self, number: int) -> None:
        for layer in range(GEOMETRY.num_layers):
            self.rows[layer] = self.sent[layer]
            self.queries.copy_(
                self.sent[layer, :, : HEADS * GEOMETRY.head_dim].view_as(self.queries)
            )
            self.lse.fill_(torch.nan)
            self.published[layer] = number
            if self.plans is not None:
                self.levels[layer], self.budgets[layer] = (part[layer] for part in self.plans)
                self.planned[layer] = number
            if self.skip[layer]:
                self.received.append(None)
                continue
            while int(self.answered[layer]) != number:
                if self.has_failed.is_set():
                    return
            self.received.append((self.output.clone(), self.lse.clone()))

    def _run_task(self, graph: int, stream: int) -> int:
        """What the lane's kernels do, for tasks that read everything."""
        del graph, stream
        if code := self._answers():
            self.has_failed.set()
            return code
        words = self.descriptor.tolist()
        assert words[LEVEL] == -1
        self.launched += 1
        if self._is_late:
            threading.Thread(target=self._do_last, args=(words,), daemon=True).start()
        else:
            self._do_task(words)
        return 0

    def _do_last(self, words: list[int]) -> None:
        while int(self.lse.isnan().sum()) > HEADS // GEOMETRY.num_kv_heads:
            pass
        self._do_task(words)

    def _do_task(self, words: list[int]) -> None:
        group, dim = HEADS // GEOMETRY.num_kv_heads, GEOMETRY.head_dim
        layer, head = divmod(words[KV_OFFSET] // GEOMETRY.head_kv_bytes, GEOMETRY.num_kv_heads)
        sequence = next(s for s in self.sequences if s.slab_table.data_ptr() == words[0])
        keys, values = gather_kv(sequence, layer, head)
        region = slice(words[BEGIN], words[END])
        query = _floats(words[QUERY], group * dim).view(group, dim)
        output, lse = _attention(query, keys[region], values[region])
        _floats(words[OUTPUT], group * dim).copy_(output.flatten())
        _floats(words[LSE], group).copy_(lse)
        tokens = words[END] - words[BEGIN]
        self.statistics[:2] = torch.tensor([0, tokens * 2 * dim * 2])
        self.done[0] = words[TICKET]


def work_of(
    sequences: list[SequenceKv],
    policy: Policy,
    states: Sequence[PlannerState | None] | None,
    plans: StepPlans,
) -> StepWork:
    """A step of all sequences, each under the same policy."""
    rows = rows_of(sequences, [policy] * len(sequences), states)
    regions = [WINDOW.retrieval_region(sequence.num_tokens + 1) for sequence in sequences]
    sources = plans.sources(rows, regions)
    return StepWork(rows, regions, sources, HEADS, attends_window=False)


def _attention(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    scores = query @ keys.float().T * GEOMETRY.head_dim**-0.5
    return scores.softmax(-1) @ values.float(), scores.logsumexp(-1)


def _expected(machine: _Machine, layer: int, row: int) -> tuple[Tensor, Tensor]:
    sequence = machine.sequences[row]
    region = WINDOW.retrieval_region(sequence.num_tokens + 1)
    outputs, lses = [], []
    dim, group = GEOMETRY.head_dim, HEADS // GEOMETRY.num_kv_heads
    queries = machine.sent[layer, row, : HEADS * dim].view(HEADS, dim)
    for head in range(GEOMETRY.num_kv_heads):
        keys, values = gather_kv(sequence, layer, head)
        part = slice(region.start, region.stop)
        output, lse = _attention(
            queries[head * group : (head + 1) * group], keys[part], values[part]
        )
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses)


@pytest.mark.parametrize(("lane", "alone"), [(False, False), (True, False), (True, True)])
def test_every_layer_is_answered_with_attention_over_the_region(lane: bool, alone: bool) -> None:
    _, sequences = _filled_store()
    machine = _Machine(sequences, answers=lambda: 0)
    work = machine.step(ExactPolicy(), lane, alone)
    for layer, received in enumerate(machine.received):
        assert received is not None
        for row, sequence in enumerate(sequences):
            region = WINDOW.retrieval_region(sequence.num_tokens + 1)
            if not region:
                assert torch.all(received[1][row] == -torch.inf)
                continue
            output, lse = _expected(machine, layer, row)
            torch.testing.assert_close(received[0][row], output, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(received[1][row], lse, rtol=1e-4, atol=1e-4)
    reads = work.finish()
    assert [read.attended_bytes for read in reads] == [read.region_bytes for read in reads]
    with_region = sum(bool(region) for region in work.regions)
    if alone:
        assert machine.launched == with_region * GEOMETRY.num_kv_heads * GEOMETRY.num_layers
    if not lane:
        assert machine.launched == 0


def test_what_a_late_gpu_has_not_begun_goes_back_to_the_cpus() -> None:
    # By these rates the lane takes both tasks of the longest sequence, one after the other. The
    # first ends only when all others have: the second is done by the CPUs, or never.
    _, sequences = _filled_store()
    machine = _Machine(sequences, answers=lambda: 0, rates=(1.5e-6, 1.2e-6), is_late=True)
    machine.step(ExactPolicy(), True, False)
    assert machine.launched == GEOMETRY.num_layers
    for layer, received in enumerate(machine.received):
        assert received is not None
        for row in (1, 2):
            output, lse = _expected(machine, layer, row)
            torch.testing.assert_close(received[0][row], output, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(received[1][row], lse, rtol=1e-4, atol=1e-4)


def test_what_was_published_is_appended_in_skipped_layers_too() -> None:
    _, sequences = _filled_store()
    machine = _Machine(sequences, answers=lambda: 0)
    machine.skip[1] = 1
    work = machine.step(ExactPolicy(), True, False)
    assert machine.received[1] is None
    work.finish()
    dim, kv_heads = GEOMETRY.head_dim, GEOMETRY.num_kv_heads
    for layer in range(GEOMETRY.num_layers):
        for row, sequence in enumerate(sequences):
            sent = machine.sent[layer, row, HEADS * dim :].bfloat16().view(2, kv_heads, dim)
            for head in range(kv_heads):
                keys, values = gather_kv(sequence, layer, head)
                assert torch.equal(keys[sequence.num_tokens - 1], sent[0, head])
                assert torch.equal(values[sequence.num_tokens - 1], sent[1, head])


@pytest.mark.parametrize("skipped", [0, 1])
def test_what_was_published_and_is_not_finite_is_its_rows_own(skipped: int) -> None:
    _, sequences = _filled_store()
    machine = _Machine(sequences, answers=lambda: 0)
    machine.skip[1] = skipped
    machine.sent[1, 1, -1] = torch.nan
    lengths = [sequence.num_tokens for sequence in sequences]
    machine.step(ExactPolicy(), True, False).finish()
    damages = [sequence.damage for sequence in sequences]
    assert [damage is not None for damage in damages] == [row == 1 for row in range(len(sequences))]
    assert (damages[1].layer, damages[1].token) == (1, lengths[1])
    counted = [
        sequence.num_tokens - length for sequence, length in zip(sequences, lengths, strict=True)
    ]
    assert counted == [int(row != 1) for row in range(len(sequences))]


def _random_plans() -> tuple[Tensor, Tensor]:
    """Everything, some blocks, or nothing; layers and groups differ."""
    generator = torch.Generator().manual_seed(4)
    layers, batch, kv_heads = GEOMETRY.num_layers, len(LENGTHS), GEOMETRY.num_kv_heads
    choices = torch.tensor([READ_ALL, READ_NOTHING], dtype=torch.int32)
    levels = choices[torch.randint(2, (layers, batch, kv_heads), generator=generator)]
    levels[1, 1:] = 0
    levels[2, 2] = 3
    budgets = torch.full((layers, batch, HEADS), 3, dtype=torch.int32)
    budgets[1, :, 0] = 0
    return levels, budgets


def _planner_states(count: int) -> list[PlannerState | None]:
    layers, kv_heads = GEOMETRY.num_layers, GEOMETRY.num_kv_heads
    planner = make_planner(layers, HEADS, kv_heads, GEOMETRY.head_dim, network=random_network(0))
    profile = random_profile(HEADS, kv_heads, torch.Generator().manual_seed(5))
    return [planner.new_state([profile] * layers) for _ in range(count)]


@pytest.mark.parametrize("lane", [False, True])
def test_plans_of_the_gpu_are_followed_and_what_was_read_is_told(lane: bool) -> None:
    _, sequences = _filled_store()
    machine = _Machine(sequences, answers=lambda: 0)
    machine.plans = levels, budgets = _random_plans()
    # The lane of these tests knows how to read everything, and nothing else.
    if lane:
        levels[1:, 1:] = READ_ALL
    states = _planner_states(len(sequences))
    work = machine.step(MarginalPolicy(1.0), lane, False, states=states)
    group, dim = HEADS // GEOMETRY.num_kv_heads, GEOMETRY.head_dim
    assert machine.told[:, 0].isnan().all()
    for layer, received in enumerate(machine.received):
        assert received is not None
        for row in (1, 2):
            region = work.regions[row]
            output, lse = _expected(machine, layer, row)
            told = machine.told[layer, row]
            assert torch.equal(told[:, 0], received[1][row])
            for head in range(HEADS):
                level = int(levels[layer, row, head // group])
                budget = int(budgets[layer, row, head])
                if level == READ_ALL:
                    torch.testing.assert_close(
                        received[0][row, head], output[head], rtol=1e-4, atol=1e-4
                    )
                    torch.testing.assert_close(told[head, 0], lse[head], rtol=1e-4, atol=1e-4)
                    assert told[head, 1] == 1.0
                elif level == READ_NOTHING or budget == 0:
                    assert told[head].tolist() == [-torch.inf, 0.0]
                else:
                    # Blocks at the region's ends may be cut.
                    share = min(1.0, budget * (16 << level) / len(region))
                    assert share / 2 < told[head, 1] <= share
    reads = work.finish()
    for row in (1, 2):
        assert work.tasks.group_counts(row)[1] == int((levels[:, row] == READ_NOTHING).sum())
        # The coarsest digests: slabs hold one block of 128, a word for each channel.
        blocks = -(-work.regions[row].stop // 128)
        scanned = GEOMETRY.num_layers * GEOMETRY.num_kv_heads * blocks * dim * 4
        assert reads[row].device_scanned_bytes == scanned <= reads[row].scanned_bytes
    assert reads[0].device_scanned_bytes == 0


def test_a_plan_that_is_only_timed_is_awaited_and_not_followed() -> None:
    _, sequences = _filled_store()
    machine = _Machine(sequences, answers=lambda: 0)
    levels, budgets = _random_plans()
    machine.plans = torch.full_like(levels, READ_ALL), budgets
    nothing = torch.full_like(levels[:, 0], READ_NOTHING)
    policy = ReplayedPolicy(nothing, budgets[:, 0], behind=MarginalPolicy(1.0))
    work = machine.step(policy, False, False, states=_planner_states(len(sequences)))
    assert machine.told[:, 1:].isfinite().logical_or(machine.told[:, 1:] == -torch.inf).all()
    assert machine.told[:, 0].isnan().all()
    assert not work.needs_nothing().any()
    assert [read.attended_bytes for read in work.finish()] == [0, 0, 0]


def test_a_gpu_that_makes_no_plan_is_named_stuck() -> None:
    _, sequences = _filled_store()
    machine = _Machine(sequences, answers=lambda: 0, timeout_ns=50_000_000)
    with pytest.raises(RuntimeError, match="stuck: the GPU has not planned layer 0"):
        machine.step(MarginalPolicy(1.0), False, False, states=_planner_states(len(sequences)))
    machine.has_failed.set()


def test_a_launch_that_fails_ends_the_step_with_the_error() -> None:
    _, sequences = _filled_store()
    machine = _Machine(sequences, answers=lambda: 719)
    with pytest.raises(RuntimeError, match=r"could not launch a task: CUDA error 719.*layer 0"):
        machine.step(ExactPolicy(), True, True)


def test_a_gpu_that_publishes_nothing_is_named_stuck() -> None:
    _, sequences = _filled_store()
    machine = _Machine(sequences, answers=lambda: 0)
    driver = machine.new_driver(1_000_000)
    plans = StepPlans(GEOMETRY, HEADS, None)
    work = work_of(sequences, FixedPolicy(16, 0.5), None, plans)
    with pytest.raises(RuntimeError, match="stuck: the GPU has not published layer 0"):
        driver.run(
            CpuPool(1).native,
            work.tasks,
            None,
            False,
            7,
            *work.append.arrays,
            WAKE_BYTES,
        )
