"""A decode step whose dense part and default windows are on a CUDA device.

The dense part is one CUDA graph for each size of batch. In each layer it publishes queries, keys
and values in pinned memory, attends to the windows, waits for the host's flag and merges what the
host attended to. The host's side (kernels/native/lane/step_driver.h) appends to the store and has
the retrieval regions attended to by the CPU pool and the GPU lane, which pull from one queue.
Python runs before and after a step, not within. Plans that are predicted are made
in the graph too, behind the windows, and handed to the host with flags of their own.

A layer in which no sequence reads its region is not waited for; its keys and values are appended
while the GPU goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fluxion_core.decode.device.board import Board
from fluxion_core.decode.device.digests import coarse_digests_if_they_fit, digests_if_they_fit
from fluxion_core.decode.device.graph import StepGraph
from fluxion_core.decode.device.lane import GpuLane
from fluxion_core.decode.device.pinned import RegisteredStore
from fluxion_core.decode.device.planner import DevicePlanner, LayerPlans
from fluxion_core.decode.device.spans import DeviceSpans, StepRecord
from fluxion_core.decode.device.times import NO_SPANS, LaneWork, StepTimes, step_times
from fluxion_core.decode.device.windows import DeviceWindows
from fluxion_core.decode.work import (
    StepReads,
    StepRow,
    StepWork,
    check_row,
    check_step_shapes,
    checked_states,
)
from fluxion_core.errors import CapacityError, DeviceError, FluxionError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kernels.dense_attention.triton import WindowAttention
from fluxion_core.kernels.handover.launch import Handover
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.decoder import Decoder
from fluxion_core.observe.device_usage import DeviceUsage
from fluxion_core.observe.log import event
from fluxion_core.planning.planner import Planner
from fluxion_core.pool.cpu_pool import WAKE_BYTES, CpuPool

_log = logging.getLogger(__name__)

Lanes = Literal["cpu", "gpu", "both"]
"""Who attends to retrieval regions."""

STUCK_NS = 10_000_000_000
"""A hand-over that takes longer than this is a fault: the step ends with an error."""


class DeviceStep:
    """Runs steps. One thread only; the device is the decoder's.

    Args:
        decoder: the model, on a CUDA device.
        store: where sequences are held; pinned here, for as long as this lives.
        window: which tokens every head always attends to.
        pool: CPU threads for regions.
        max_rows: sequences of a step; graphs are captured for powers of two up to it, and for it.
        max_context_tokens: of a sequence.
        lanes: who attends to regions.
        planner: for policies that need head profiles.
        device_digests: whether there are copies of digests on the device, as far as they fit: of
            all for the lane, of 128-token blocks for predicted plans, which the CPUs make else.
        goes_on: asked before each piece that is pinned.

    Raises:
        ShapeError: see `check_step_shapes`; or no kernel takes the model's heads.
        CapacityError: the store's memory cannot be pinned.
        RequestCancelledError: `goes_on` said no; nothing is pinned then.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: HostKvStore,
        window: WindowSpec,
        pool: CpuPool,
        *,
        max_rows: int,
        max_context_tokens: int,
        lanes: Lanes = "both",
        planner: Planner | None = None,
        device_digests: bool = True,
        goes_on: Callable[[], bool] = lambda: True,
    ) -> None:
        config, geometry = decoder.config, store.geometry
        check_step_shapes(geometry, window, config.num_heads, planner)
        self._decoder, self._store, self._window = decoder, store, window
        self.pool, self._planner = pool, planner
        self._device = decoder.embedding.device
        self._num_heads = config.num_heads
        self.lanes: Lanes = lanes
        self._registered = RegisteredStore(store, goes_on)
        self.windows = DeviceWindows(geometry, window, max_rows, self._device)
        self.board = Board(geometry, config.num_heads, max_rows, config.vocab_size, self._device)
        self._driver = self.board.native_driver(geometry, config.num_heads, STUCK_NS)
        self._step_number = torch.zeros(1, dtype=torch.int32, device=self._device)
        self._stream = torch.cuda.Stream(self._device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._steps = 0
        self._times: StepTimes | None = None
        self._num_rows = 0
        self.usage = DeviceUsage()
        """What steps did to the device; `host_step` and `no_work` are for whoever runs them."""
        self.usage.pcie_bytes["host_to_device", "weights"] = sum(
            weight.nbytes for weight in decoder.parameters()
        )
        predicts = planner is not None and planner.mode == "network"
        wanted = device_digests and lanes != "cpu"
        coarse = (
            coarse_digests_if_they_fit(store, self._device) if device_digests and predicts else None
        )
        self._digests = digests_if_they_fit(store, self._device) if wanted else None
        self._attention = WindowAttention(
            window, config.num_heads, geometry.num_kv_heads, geometry.head_dim
        )
        self._device_planner = (
            DevicePlanner(
                planner,
                geometry,
                window,
                num_splits=self._attention.num_splits,
                digests=coarse,
                max_context_tokens=max_context_tokens,
                capacity=max_rows,
                device=self._device,
            )
            if planner is not None and coarse is not None
            else None
        )
        sizes = sorted({min(1 << power, max_rows) for power in range(max_rows.bit_length() + 1)})
        self.board.skip.fill_(1)
        self._graphs = {
            (size, plans): self._capture(geometry, size, plans=plans)
            for size in sizes
            for plans in ((False, True) if self._device_planner else (False,))
        }
        self._steps = int(self._step_number.item())
        self._lane = (
            GpuLane(
                geometry,
                config.num_heads,
                max(BLOCK_TOKENS, len(window.retrieval_region(max_context_tokens + 1))),
                self._device,
                num_threads=pool.num_threads,
                digests=self._digests.place if self._digests is not None else None,
            )
            if lanes != "cpu"
            else None
        )

    def join(self, sequence: SequenceKv) -> int:
        """A slot with this committed sequence's window.

        Raises:
            CapacityError: none is free.
            FluxionError: the sequence was reserved before this step's store was pinned.
        """
        if not sequence.slab_table.is_pinned():
            raise FluxionError(
                "the sequence's table of slabs is not in pinned memory: reserve sequences after "
                "the device step has been made"
            )
        with torch.cuda.stream(self._stream):
            slot = self.windows.join(sequence)
            if self._digests is not None:
                region = self._window.retrieval_region(sequence.num_tokens)
                self._digests.join(slot, sequence, region.stop)
        window = min(sequence.num_tokens, self._window.slot_tokens)
        self.usage.pcie_bytes["host_to_device", "window"] += (
            window * self._store.geometry.token_bytes
        )
        return slot

    def leave(self, slot: int) -> None:
        """Give a slot back."""
        self.windows.leave(slot)
        if self._device_planner is not None:
            self._device_planner.leave(slot)

    def check(self, row: StepRow) -> None:
        """See `decode.work.check_row`."""
        check_row(row, self._planner)

    def run(self, rows: Sequence[StepRow]) -> tuple[Tensor, list[StepReads]]:
        """One token of every sequence.

        Returns:
            [rows, vocab_size] float32 logits in pinned memory, valid until the next step; what was
            read for each row.

        Raises:
            CapacityError: more rows than this was made for.
            FluxionError: see `checked_states`.
            DeviceError: the step got stuck or a kernel failed: from then on only `close` may be
                called.
        """
        if len(rows) > self.board.rows.shape[1]:
            raise CapacityError(
                "decode step",
                needed=len(rows),
                free=self.board.rows.shape[1],
                unit="sequences",
                remedy="raise engine.max_running_sequences",
            )
        policies = [row.policy for row in rows]
        states = checked_states(self._planner, policies, [row.state for row in rows])
        told = None
        regions = [self._window.retrieval_region(row.sequence.num_tokens + 1) for row in rows]
        with torch.cuda.stream(self._stream):
            if self._digests is not None:
                for row, region in zip(rows, regions, strict=True):
                    self._digests.follow(row.slot, row.sequence, region.stop)
            if self._device_planner is not None:
                told = self._device_planner.write_input(rows, states, regions)
        work = StepWork(
            [row.sequence for row in rows],
            policies,
            states,
            self._window,
            self._num_heads,
            attends_window=False,
            given=[row.given for row in rows],
            told=told,
        )
        self._num_rows = len(rows)
        size = min(size for size, _ in self._graphs if size >= len(rows))
        graph = self._graphs[size, told is not None]
        self._write_inputs(rows)
        self.board.skip.numpy()[:] = work.needs_nothing()
        self._steps += 1
        self._events[0].record(self._stream)
        graph.launch()
        self._events[1].record(self._stream)
        try:
            self._driver.run(
                self.pool.native,
                work.tasks,
                self._lane.native if self._lane is not None else None,
                self.lanes == "gpu",
                len(rows),
                self._steps,
                *work.append.addresses,
                work.levels.ctypes.data,
                work.budgets.ctypes.data,
                len(work.levels),
                work.sources.ctypes.data,
                WAKE_BYTES,
            )
            # The host's part is over; the device still has the last layer's rest, and logits.
            reads = work.finish()
            lane = LaneWork(self._lane_spans())
            self._count(reads, lane, size, plans=told is not None)
            self._stream.synchronize()
        except RuntimeError as error:
            # torch's errors of the device are RuntimeErrors too.
            raise DeviceError(f"decode step {self._steps}: {error}") from None
        if code := int(self.board.error[0]):
            raise DeviceError(f"decode step {self._steps}: no answer for layer {code - 1} in time")
        self._times = step_times(
            self._events[0].elapsed_time(self._events[1]) / 1e3,
            self.board.stamps,
            self.board.skip,
            lane,
        )
        self.usage.busy_seconds += self._times.busy
        self.usage.idle_seconds["host_attention"] += self._times.waited_idle
        return self.board.logits[: len(rows)], reads

    def times(self) -> StepTimes:
        """Where the last step's time went."""
        assert self._times is not None, "no step has been run"
        return self._times

    @property
    def span_source(self) -> DeviceSpans:
        """For traces of steps."""
        return DeviceSpans(self, self.pool)

    def record(self) -> StepRecord:
        """What the last step has left for a trace."""
        board, head_dim = self.board, self._store.geometry.head_dim
        return StepRecord(
            stamps=board.stamps.numpy().copy(),
            skip=board.skip.numpy().copy(),
            tasks=self._lane_spans(),
            digests_on_device=self.digests_on_device,
            published_bytes=self._num_rows * board.rows[0, 0].nbytes,
            answered_bytes=self._num_rows * self._num_heads * (head_dim + 1) * 4,
        )

    def close(self) -> None:
        """Let go of the device: wait for it, then unpin the store. Idempotent.

        A device that has failed cannot be waited for; what is pinned then goes with the process.
        """
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            _log.warning(event("arena left pinned", error=str(error)))
            return
        self._registered.close()

    def _lane_spans(self) -> npt.NDArray[np.int64]:
        return self._lane.spans() if self._lane is not None else NO_SPANS

    def _count(self, reads: Sequence[StepReads], lane: LaneWork, size: int, *, plans: bool) -> None:
        """Add a step's tasks and bytes to `usage`. Flags and stamps, some bytes a layer, are left
        out."""
        usage, board = self.usage, self.board
        tasks = len(lane.spans)
        groups = sum(sum(read.groups_of_size) + read.groups_everything for read in reads)
        usage.tasks_by_device["gpu"] += tasks
        usage.tasks_by_device["cpu"] += groups - tasks
        batch, layers = len(reads), len(board.skip)
        answered = layers - int(board.skip.count_nonzero())
        state_bytes = self._num_heads * (self._store.geometry.head_dim + 1) * 4
        group_bytes = state_bytes // self._store.geometry.num_kv_heads
        moved = usage.pcie_bytes
        moved["host_to_device", "digests"] += (
            lane.digest_bytes if self._digests is None else self._digests.take_copied_bytes()
        )
        if self._device_planner is not None:
            moved["host_to_device", "digests"] += self._device_planner.take_copied_bytes()
            if plans:
                moved["host_to_device", "attention_states"] += self._device_planner.told_bytes
        moved["host_to_device", "selected_kv"] += lane.kv_bytes
        moved["host_to_device", "attention_states"] += answered * batch * state_bytes
        moved["device_to_host", "attention_states"] += tasks * group_bytes
        moved["device_to_host", "queries"] += layers * batch * board.rows[0, 0].nbytes
        moved["device_to_host", "logits"] += size * board.logits[0].nbytes

    def _write_inputs(self, rows: Sequence[StepRow]) -> None:
        words, ints = self.board.input_words.numpy(), self.board.input_rows.numpy()
        count = len(rows)
        positions = np.array([row.sequence.num_tokens for row in rows])
        words[0, :count] = [row.token_id for row in rows]
        words[1, :count] = positions
        ints[0, :count] = [row.slot for row in rows]
        ints[1, :count] = positions + 1
        words[:, count:] = 0
        ints[:, count:] = 0

    def _capture(self, geometry: KvGeometry, size: int, *, plans: bool) -> StepGraph:
        board, device = self.board, self._device
        words = torch.zeros(2, size, dtype=torch.int64, device=device)
        ints = torch.zeros(2, size, dtype=torch.int32, device=device)
        planner = self._device_planner.new_layers(size) if self._device_planner and plans else None
        port = _GraphAttention(
            self, geometry, size, slots=ints[0], lengths=ints[1], planner=planner
        )

        @torch.inference_mode()
        def body() -> None:
            for index in range(2):
                words[index].copy_(board.input_words[index, :size], non_blocking=True)
                ints[index].copy_(board.input_rows[index, :size], non_blocking=True)
            self._step_number.add_(1)
            if planner is not None:
                planner.begin()
            hidden = self._decoder(words[0], words[1], port)
            board.logits[:size].copy_(self._decoder.logits(hidden), non_blocking=True)
            board.stamps.copy_(port.stamps, non_blocking=True)

        return StepGraph(body, self._stream)

    @property
    def digests_on_device(self) -> bool:
        """Whether there are copies of all digests on the device."""
        return self._digests is not None

    @property
    def plans_on_device(self) -> bool:
        """Whether predicted plans are made on the device."""
        return self._device_planner is not None

    @property
    def step_number(self) -> Tensor:
        """[1] int32 on the device: goes up by one a step."""
        return self._step_number

    @property
    def window_attention(self) -> WindowAttention:
        """Over the default windows."""
        return self._attention

    @property
    def window(self) -> WindowSpec:
        """Which tokens every head always attends to."""
        return self._window


class _GraphAttention:
    """Attention port that only launches: everything the kernels read is where it always is."""

    def __init__(
        self,
        step: DeviceStep,
        geometry: KvGeometry,
        size: int,
        *,
        slots: Tensor,
        lengths: Tensor,
        planner: LayerPlans | None,
    ) -> None:
        device = slots.device
        self._step, self._size = step, size
        self._slots, self._lengths = slots, lengths
        self._planner = planner
        self._attention = step.window_attention
        self._handover = Handover(
            step.window,
            self._attention.num_heads,
            geometry.num_kv_heads,
            geometry.head_dim,
            self._attention.num_splits,
        )
        self._states = self._attention.make_states(size, device)
        self._has_answer = torch.zeros(1, dtype=torch.int32, device=device)
        self.stamps = torch.zeros(geometry.num_layers, 3, dtype=torch.int64, device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort; only launches."""
        step, board, size = self._step, self._step.board, self._size
        window_key, window_value = step.windows.key(layer), step.windows.value(layer)
        self._handover.publish(
            query,
            key,
            value,
            self._lengths,
            self._slots,
            window_key,
            window_value,
            board.device_queries,
            board.rows[layer],
            board.published[layer],
            step.step_number,
            self.stamps[layer, 0:1],
        )
        self._attention.launch(
            query, window_key, window_value, self._slots, self._lengths, self._states
        )
        if self._planner is not None:
            self._planner.launch(
                layer,
                self._slots,
                self._lengths,
                board.device_queries[:size],
                window_key,
                self._states,
                board.plan_levels[layer],
                board.plan_budgets[layer],
                board.planned[layer],
                step.step_number,
            )
        output = torch.empty(size, *query.shape[1:], dtype=query.dtype, device=query.device)
        self._handover.await_and_merge(
            self._states.output,
            self._states.lse,
            board.output,
            board.lse,
            board.answered[layer : layer + 1],
            board.skip[layer : layer + 1],
            step.step_number,
            board.error,
            self.stamps[layer, 1:3],
            self._has_answer,
            output,
            timeout_ns=STUCK_NS,
            error_code=layer + 1,
        )
        return output
