"""A thread in the place of a GPU's graph, and a lane whose kernels are torch.

For tests of the host's side of a step.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxion_core.decode.plans import StepPlans
from fluxion_core.decode.work import StepWork
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kernels import _native, lane_task
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kvstore.digest_index import gather_kv
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.planning.planner import PlannerState
from fluxion_core.planning.policy import Policy
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.rows import rows_of
from tests.fluxion_core.planning.random_planner import make_planner, random_network, random_profile

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_dim=32, slab_tokens=128)
WINDOW = WindowSpec(sink_tokens=32, recent_tokens=128)
HEADS = 6
LENGTHS = (100, 400, 900)
TIMEOUT_NS = 20_000_000_000

Lists = dict[tuple[int, int, int], list[tuple[int, int]]]
"""By layer, row and KV head: units, each with a mask of the heads that read it."""

LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def filled_store() -> tuple[HostKvStore, list[SequenceKv]]:
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


class Machine:
    """A board in ordinary memory, a thread that plays the GPU's graph, and a lane of one runner."""

    def __init__(
        self,
        sequences: list[SequenceKv],
        *,
        answers: Callable[[], int],
        rates: tuple[float, float] = (1e-3, 1e-3),
        is_late: bool = False,
        timeout_ns: int = TIMEOUT_NS,
        lists: Lists | None = None,
    ) -> None:
        """rates: what the lane believes of GPU and CPUs. is_late: a task of the lane ends when all
        others of its layer have. lists: the GPU lists these."""
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
        self.lists = lists
        room = 64
        self.listed = torch.zeros(layers, batch, kv_heads, dtype=torch.int32)
        self.list_counts = torch.zeros(layers, batch, kv_heads, dtype=torch.int32)
        self.list_units = torch.zeros(batch, kv_heads, room, dtype=torch.int32)
        self.list_masks = torch.zeros(batch, kv_heads, room, dtype=torch.int32)
        self.told = torch.full((layers, batch, HEADS, 2), torch.nan)
        self.received: list[tuple[Tensor, Tensor] | None] = []
        self.descriptor = torch.zeros(lane_task.NUM_WORDS.value, dtype=torch.int64)
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
            tier=None if self.lists is None else self._tier(),
        )

    def _tier(self) -> tuple[Any, ...]:
        arrays = (self.listed, self.list_counts, self.list_units, self.list_masks)
        on_device = (self.list_units.data_ptr(), self.list_masks.data_ptr())
        return (*(array.numpy() for array in arrays), *on_device)

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
        graph = threading.Thread(target=self.play_graph, args=(number,), daemon=True)
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

    def play_graph(self, number: int) -> None:
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
            is_missing = self._list(layer, number)
            if self.skip[layer] or not is_missing:
                self.received.append(None)
                continue
            while int(self.answered[layer]) != number:
                if self.has_failed.is_set():
                    return
            self.received.append((self.output.clone(), self.lse.clone()))

    def _list(self, layer: int, number: int) -> bool:
        """List what the host is to read of a layer; whether that is anything."""
        if self.lists is None:
            return True
        # Of one buffer for all layers nothing is left of the layer before.
        self.list_units.fill_(-1)
        for row, sequence in enumerate(self.sequences):
            if not WINDOW.retrieval_region(sequence.num_tokens + 1):
                continue
            for head in range(GEOMETRY.num_kv_heads):
                units = self.lists.get((layer, row, head), [])
                for place, (unit, mask) in enumerate(units):
                    self.list_units[row, head, place] = unit
                    self.list_masks[row, head, place] = mask
                self.list_counts[layer, row, head] = len(units)
                self.listed[layer, row, head] = number
        return bool(self.list_counts[layer].any())

    def _run_task(self, graph: int, stream: int) -> int:
        """What the lane's kernels do, for tasks that read everything or a list."""
        del graph, stream
        if code := self._answers():
            self.has_failed.set()
            return code
        words = self.descriptor.tolist()
        assert words[lane_task.LEVEL.value] == (0 if words[lane_task.LISTED_UNITS.value] else -1)
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
        layer, head = divmod(
            words[lane_task.KV_OFFSET.value] // GEOMETRY.head_kv_bytes, GEOMETRY.num_kv_heads
        )
        sequence = next(s for s in self.sequences if s.slab_table.data_ptr() == words[0])
        keys, values = gather_kv(sequence, layer, head)
        if words[lane_task.LISTED_UNITS.value]:
            chosen = self._chosen(words)
        else:
            chosen = torch.zeros(group, len(keys), dtype=torch.bool)
            chosen[:, words[lane_task.REGION_BEGIN.value] : words[lane_task.REGION_END.value]] = (
                True
            )
        query = _floats(words[lane_task.QUERY.value], group * dim).view(group, dim)
        output, lse = attention_of(query, keys, values, chosen)
        _floats(words[lane_task.OUTPUT.value], group * dim).copy_(output.flatten())
        _floats(words[lane_task.LSE.value], group).copy_(lse)
        read_bytes = int(chosen.any(0).sum()) * 2 * dim * 2
        self.statistics[:2] = torch.tensor([0, read_bytes])
        self.done[0] = words[lane_task.TICKET.value]

    def _chosen(self, words: list[int]) -> Tensor:
        """[group, tokens] bool of a task with a list."""
        names = (lane_task.LISTED_UNITS, lane_task.LISTED_MASKS)
        count = words[lane_task.NUM_BLOCKS.value]
        units, masks = ((ctypes.c_int32 * count).from_address(words[name.value]) for name in names)
        sequence = next(s for s in self.sequences if s.slab_table.data_ptr() == words[0])
        return chosen_of(list(zip(units, masks, strict=True)), sequence.num_tokens)


def chosen_of(units: list[tuple[int, int]], num_tokens: int) -> Tensor:
    """[group, tokens] bool of units with their masks."""
    chosen = torch.zeros(HEADS // GEOMETRY.num_kv_heads, num_tokens, dtype=torch.bool)
    for unit, mask in units:
        for head in range(len(chosen)):
            if mask >> head & 1:
                chosen[head, unit * 16 : unit * 16 + 16] = True
    return chosen


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


def planner_states(count: int) -> list[PlannerState | None]:
    layers, kv_heads = GEOMETRY.num_layers, GEOMETRY.num_kv_heads
    planner = make_planner(layers, HEADS, kv_heads, GEOMETRY.head_dim, network=random_network(0))
    profile = random_profile(HEADS, kv_heads, torch.Generator().manual_seed(5))
    return [planner.new_state([profile] * layers) for _ in range(count)]


def attention_of(
    query: Tensor, keys: Tensor, values: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and lse of the tokens that each head has chosen, zeros and -inf where it has none."""
    scores = query @ keys.float().T * GEOMETRY.head_dim**-0.5
    scores = scores.masked_fill(~chosen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ values.float(), scores.logsumexp(-1)


def expected(
    machine: Machine, layer: int, row: int, lists: Lists | None = None
) -> tuple[Tensor, Tensor]:
    """Output [heads, head_dim] and lse [heads] of a row: of its region, or of what is listed."""
    sequence = machine.sequences[row]
    region = WINDOW.retrieval_region(sequence.num_tokens + 1)
    units = [(unit, -1) for unit in range(region.start // 16, region.stop // 16)]
    outputs, lses = [], []
    dim, group = GEOMETRY.head_dim, HEADS // GEOMETRY.num_kv_heads
    queries = machine.sent[layer, row, : HEADS * dim].view(GEOMETRY.num_kv_heads, group, dim)
    for head in range(GEOMETRY.num_kv_heads):
        keys, values = gather_kv(sequence, layer, head)
        if lists is not None:
            units = lists.get((layer, row, head), [])
        chosen = chosen_of(units, sequence.num_tokens)
        output, lse = attention_of(queries[head], keys, values, chosen)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses)
