"""A decode step whose dense part and default windows are on a CUDA device.

The dense part is one CUDA graph for each size of batch (graphs.py). In each layer it publishes
queries, keys and values in pinned memory, attends to the windows, waits for the host's flag and
merges what the host attended to. The host's side (kernels/native/lane/step_driver.h) appends to the
store and has the retrieval regions attended to by the CPU pool and the GPU lane, which pull from
one queue. Python runs before and after a step, not within. Plans that a network makes are made in
the graph too, behind the windows, and handed to the host with flags of their own.

A layer in which no sequence reads its region is not waited for; its keys and values are appended
while the GPU goes on.

Where device memory is left for a tier of the store, the graph also chooses what is read, attends to
what is resident, and asks the host for the rest alone (selection.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fluxion_core.decode.device.board import STUCK_NS, Board
from fluxion_core.decode.device.digests import (
    CoarseDigests,
    DeviceDigests,
    coarse_digests_if_they_fit,
    digests_that_fit,
)
from fluxion_core.decode.device.failures import named_failures
from fluxion_core.decode.device.graphs import StepGraphs
from fluxion_core.decode.device.lane import GpuLane
from fluxion_core.decode.device.pinned import RegisteredStore
from fluxion_core.decode.device.planner import DevicePlanner
from fluxion_core.decode.device.prompts import DevicePromptComputer
from fluxion_core.decode.device.selection import (
    LISTED_BYTES,
    DeviceSelection,
    MissingBlocks,
    selection_if_it_fits,
)
from fluxion_core.decode.device.spans import DeviceSpans, StepRecord
from fluxion_core.decode.device.times import NO_SPANS, LaneWork, StepTimes, step_times
from fluxion_core.decode.device.windows import DeviceWindows
from fluxion_core.decode.plans import StepPlans
from fluxion_core.decode.profiling import PromptProfiling
from fluxion_core.decode.step import DecodeStep, PromptEnd, StepReads, StepRow
from fluxion_core.decode.work import StepWork, check_step_shapes
from fluxion_core.errors import CapacityError, DeviceError, FluxionError
from fluxion_core.geometry import BLOCK_TOKENS, WindowSpec
from fluxion_core.kernels import _native
from fluxion_core.kernels.dense_attention.triton import WindowAttention
from fluxion_core.kernels.tier.gather import ResidentUnits
from fluxion_core.kernels.tier.selection import ScoresHook
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.decoder import Decoder
from fluxion_core.observe.device_usage import DeviceUsage
from fluxion_core.observe.log import event
from fluxion_core.observe.trace import SpanSource
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.prompt_profile import PromptProfile
from fluxion_core.pool.cpu_pool import WAKE_BYTES, CpuPool

_log = logging.getLogger(__name__)

Lanes = Literal["cpu", "gpu", "both"]
"""Who attends to retrieval regions."""


class DeviceStep(DecodeStep):
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
        device_kv_bytes: of the tier; None takes what is free (tier_size.py), 0 makes none.
        max_digest_slabs: slabs of whose digests there are copies for the tier, at most; for
            measurements.
        scores_hook: of the selection on the device, for measurements.
        goes_on: asked before each piece that is pinned.

    Raises:
        ShapeError: see `check_step_shapes`; or no kernel takes the model's heads.
        ConfigError: `device_kv_bytes` is less than a block.
        CapacityError: the store's memory cannot be pinned, or `device_kv_bytes` are not free.
        RequestCancelledError: `goes_on` said no.

    Whatever is raised, nothing is pinned then.
    """

    gathers_prompts = True

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
        device_kv_bytes: int | None = 0,
        max_digest_slabs: int | None = None,
        scores_hook: ScoresHook | None = None,
        goes_on: Callable[[], bool] = lambda: True,
    ) -> None:
        config, geometry = decoder.config, store.geometry
        check_step_shapes(geometry, window, config.num_heads, planner)
        self._store, self._window, self.pool = store, window, pool
        self._device = decoder.embedding.device
        self._is_float32 = decoder.embedding.dtype == torch.float32
        self._num_heads = config.num_heads
        self.lanes: Lanes = lanes
        self._selection: DeviceSelection | None = None
        self._registered = RegisteredStore(store, goes_on)
        try:
            self._prepare(
                decoder,
                planner,
                max_rows=max_rows,
                max_context_tokens=max_context_tokens,
                device_digests=device_digests,
                device_kv_bytes=device_kv_bytes,
                max_digest_slabs=max_digest_slabs,
                scores_hook=scores_hook,
            )
        except BaseException:
            self.close()
            raise

    def _prepare(
        self,
        decoder: Decoder,
        planner: Planner | None,
        *,
        max_rows: int,
        max_context_tokens: int,
        device_digests: bool,
        device_kv_bytes: int | None,
        max_digest_slabs: int | None,
        scores_hook: ScoresHook | None,
    ) -> None:
        """Take the device's memory, and capture the graphs."""
        config, geometry = decoder.config, self._store.geometry
        store, window, lanes = self._store, self._window, self.lanes
        heads = config.num_heads, geometry.num_kv_heads, geometry.head_dim
        self.windows = DeviceWindows(geometry, window, max_rows, self._device)
        self.board = Board(geometry, config.num_heads, max_rows, config.vocab_size, self._device)
        self._stream = torch.cuda.Stream(self._device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._times: StepTimes | None = None
        self._num_rows = 0
        self._answered_bytes = np.zeros(geometry.num_layers, np.int64)
        """[layers] of the last step: states that came back."""
        self._usage = _new_usage(decoder)
        coarse = None
        if device_digests and planner is not None and planner.mode == "network":
            coarse = coarse_digests_if_they_fit(store, self._device)
        makes_plans = planner is None or planner.mode != "network" or coarse is not None
        wants_tier = makes_plans and device_kv_bytes != 0
        self._digests = self._make_digests(wants_tier, max_digest_slabs) if device_digests else None
        step_number = torch.zeros(1, dtype=torch.int32, device=self._device)
        self._selection = selection_if_it_fits(
            store,
            self.windows,
            config.num_heads,
            self._digests if makes_plans else None,
            device_kv_bytes,
            capacity=max_rows,
            max_context_tokens=max_context_tokens,
            step=step_number,
            stream=self._stream,
            is_float32=self._is_float32,
            scores_hook=scores_hook,
        )
        if self._selection is None and (lanes == "cpu" or not self.digests_on_device):
            self._digests = None  # Nobody would scan them.
        self.fills_ahead = self._selection is not None
        self._driver = self._make_driver()
        attention = WindowAttention(window, *heads, is_float32=self._is_float32)
        self._device_planner = self._make_planner(
            planner, coarse, attention.num_splits, max_context_tokens, max_rows
        )
        self._plans = StepPlans(geometry, config.num_heads, planner, self._device_planner)
        self._prompts = DevicePromptComputer(
            decoder, store, self.pool, self._usage, self._residents
        )
        self.board.skip.fill_(1)
        self._graphs = self._make_graphs(decoder, attention, step_number, max_rows)
        self._lane = self._make_lane(max_context_tokens) if lanes != "cpu" else None

    def _make_digests(self, wants_tier: bool, max_slabs: int | None) -> DeviceDigests | None:
        if self.lanes == "cpu" and not wants_tier:
            return None
        # A lane that scans needs all of them.
        return digests_that_fit(
            self._store, self._device, may_lack_some=wants_tier, max_slabs=max_slabs
        )

    def _make_graphs(
        self, decoder: Decoder, attention: WindowAttention, step_number: Tensor, max_rows: int
    ) -> StepGraphs:
        return StepGraphs(
            decoder,
            self.board,
            self.windows,
            attention,
            self._device_planner,
            self._selection,
            step_number=step_number,
            max_rows=max_rows,
            stream=self._stream,
        )

    def _make_driver(self) -> _native.StepDriver:
        selection = self._selection
        self._usage.tier = selection.usage if selection is not None else None
        lists = selection.host_lists if selection is not None else None
        return self.board.native_driver(self._store.geometry, self._num_heads, STUCK_NS, lists)

    def _make_planner(
        self,
        planner: Planner | None,
        coarse: CoarseDigests | None,
        num_splits: int,
        max_context_tokens: int,
        max_rows: int,
    ) -> DevicePlanner | None:
        if planner is None or coarse is None:
            return None
        return DevicePlanner(
            planner,
            self._store.geometry,
            self._window,
            num_splits=num_splits,
            digests=coarse,
            max_context_tokens=max_context_tokens,
            capacity=max_rows,
            device=self._device,
            driver=self._driver,
            is_float32=self._is_float32,
        )

    def _make_lane(self, max_context_tokens: int) -> GpuLane:
        region = self._window.retrieval_region(max_context_tokens + 1)
        return GpuLane(
            self._store.geometry,
            self._num_heads,
            max(BLOCK_TOKENS, len(region)),
            self._device,
            num_threads=self.pool.num_threads,
            digests=self._digests.copies if self._digests else None,
            is_float32=self._is_float32,
        )

    def _residents(self, sequence: SequenceKv) -> ResidentUnits | None:
        return self._selection.residents(sequence) if self._selection is not None else None

    @property
    def usage(self) -> DeviceUsage:
        """Counters of the device; `host_step` and `no_work` are for whoever runs the steps."""
        return self._usage

    @property
    def span_source(self) -> SpanSource:
        """Spans of steps, for traces."""
        return DeviceSpans(self, self.pool)

    def join(self, sequence: SequenceKv) -> int:
        """A slot with this committed sequence's window; see DecodeStep."""
        if not sequence.slab_table.is_pinned():
            raise FluxionError(
                "the sequence's table of slabs is not in pinned memory: reserve sequences after "
                "the device step has been made"
            )
        with named_failures("window", self._device), torch.cuda.stream(self._stream):
            slot = self.windows.join(sequence)
            if self._digests is not None:
                region = self._window.retrieval_region(sequence.num_tokens)
                self._digests.join(slot, sequence, region.stop)
        if self._selection is not None:
            self._selection.join(slot, sequence)
        window = min(sequence.num_tokens, self._window.slot_tokens)
        self._usage.pcie_bytes["host_to_device", "window"] += (
            window * self._store.geometry.token_bytes
        )
        return slot

    def leave(self, slot: int) -> None:
        """Give a slot back."""
        self.windows.leave(slot)
        if self._digests is not None:
            self._digests.leave(slot)
        if self._selection is not None:
            self._selection.leave(slot)
        if self._device_planner is not None:
            self._device_planner.leave(slot)

    def check(self, row: StepRow) -> None:
        """Raise on what would keep a row from taking part in a step; see DecodeStep."""
        self._plans.check(row)

    def run(self, rows: Sequence[StepRow]) -> tuple[Tensor, list[StepReads]]:
        """Run one step; see DecodeStep: logits are in pinned memory."""
        started = time.perf_counter()
        # What ran between steps may have failed: that shows when the next one begins.
        with named_failures(f"decode step {self._graphs.launches + 1}", self._device):
            work, has_plans, is_short = self._begin(rows)
            num_rows = self._graphs.launch(
                len(rows), has_plans=has_plans, is_short=is_short, events=self._events
            )
            self._driver.run(
                self.pool.native,
                work.tasks,
                self._lane.native if self._lane is not None else None,
                self.lanes == "gpu",
                self._graphs.launches,
                *work.append.arrays,
                WAKE_BYTES,
            )
            lane = LaneWork(self._lane_spans())
            if self._selection is None:
                # The host's part is over; the device has the last layer's rest still, and logits.
                reads = work.finish()
                self._count(reads, lane, num_rows, has_plans=has_plans)
                self._stream.synchronize()
            else:
                self._stream.synchronize()
                missing = self._selection.end_step(rows, work)
                reads = work.finish()
                self._selection.count(self._usage, rows, reads)
                self._count(reads, lane, num_rows, has_plans=has_plans, missing=missing)
        if code := int(self.board.error[0]):
            raise DeviceError(
                f"decode step {self._graphs.launches}: no answer for layer {code - 1} in time"
            )
        self._times = step_times(
            self._events[0].elapsed_time(self._events[1]) / 1e3,
            self.board.stamps,
            self.board.skip,
            lane,
        )
        self._usage.busy_seconds += self._times.busy
        self._usage.idle_seconds["host_attention"] += self._times.waited_idle
        self._prompts.step_took(time.perf_counter() - started)
        return self.board.logits[: len(rows)], reads

    def fill_ahead(self, prompts: Sequence[SequenceKv], *, has_streams: bool) -> None:
        """Fill the tier with what is whole of prompts on their way; see DecodeStep."""
        if self._selection is None:
            return
        with named_failures("tier of the KV store", self._device):
            self._selection.arrive(prompts)
            if not has_streams:
                self._selection.tier.advance()

    def compute_chunk(
        self,
        sequence: SequenceKv,
        token_ids: Sequence[int],
        profile_window: WindowSpec | None,
        *,
        seconds: float | None = None,
    ) -> PromptEnd | None:
        """Compute a prompt's next tokens; see DecodeStep."""
        needed_bytes = len(token_ids) * self._store.geometry.token_bytes
        with (
            named_failures("chunk of a prompt", self._device, needed_bytes),
            torch.cuda.stream(self._stream),
        ):
            return self._prompts.compute_chunk(sequence, token_ids, profile_window, seconds=seconds)

    def advance_profile(self, profiling: PromptProfiling) -> list[PromptProfile] | None:
        """Go on with a prompt's profile; see DecodeStep."""
        return self._prompts.advance_profile(profiling)

    def times(self) -> StepTimes:
        """Times of the last step."""
        assert self._times is not None, "no step has been run"
        return self._times

    @property
    def digests_on_device(self) -> bool:
        """Whether there are copies of all digests on the device."""
        return self._digests is not None and self._digests.is_whole

    @property
    def selection(self) -> DeviceSelection | None:
        """Selection on the device and its tier; None where the host selects."""
        return self._selection

    @property
    def plans_on_device(self) -> bool:
        """Whether predicted plans are made on the device."""
        return self._device_planner is not None

    def record(self) -> StepRecord:
        """Record of the last step, for a trace."""
        board = self.board
        return StepRecord(
            stamps=board.stamps.numpy().copy(),
            tasks=self._lane_spans(),
            digests_on_device=self.digests_on_device,
            published_bytes=self._num_rows * board.rows[0, 0].nbytes,
            answered_bytes=self._answered_bytes,
        )

    def close(self) -> None:
        """Let go of the device: wait for it, then unpin the store. Idempotent.

        A device that has failed cannot be waited for; what is pinned then goes with the process.
        """
        try:
            torch.cuda.synchronize(self._device)
            if self._selection is not None:
                self._selection.close()
        except RuntimeError as error:
            _log.warning(event("arena left pinned", error=str(error)))
            return
        self._registered.close()

    def _begin(self, rows: Sequence[StepRow]) -> tuple[StepWork, bool, bool]:
        """What the host is to do of a step, whether the device makes plans for it, and whether it
        selects from short regions alone."""
        if len(rows) > self.board.rows.shape[1]:
            raise CapacityError(
                "decode step",
                needed=len(rows),
                free=self.board.rows.shape[1],
                unit="sequences",
                remedy="raise engine.max_running_sequences",
            )
        regions = [self._window.retrieval_region(row.sequence.num_tokens + 1) for row in rows]
        with torch.cuda.stream(self._stream):
            if self._digests is not None:
                for row, region in zip(rows, regions, strict=True):
                    self._digests.follow(row.slot, row.sequence, region.stop)
                self._digests.place()
            sources = self._plans.sources(rows, regions)
        planner = self._device_planner
        has_plans = planner.write_input() if planner is not None else False
        work = StepWork(rows, regions, sources, self._num_heads, attends_window=False)
        is_short = False
        if self._selection is not None:
            self._selection.begin_step(rows, regions, work)
            is_short = self._selection.is_short(regions)
        self._num_rows = len(rows)
        self._write_inputs(rows)
        self.board.skip.numpy()[:] = work.needs_nothing()
        return work, has_plans, is_short

    def _lane_spans(self) -> npt.NDArray[np.int64]:
        return self._lane.spans() if self._lane is not None else NO_SPANS

    def _count(
        self,
        reads: Sequence[StepReads],
        lane: LaneWork,
        size: int,
        *,
        has_plans: bool,
        missing: MissingBlocks | None = None,
    ) -> None:
        """Add a step's tasks and bytes to `usage`. Flags and stamps, some bytes a layer, are left
        out."""
        usage, board = self._usage, self.board
        tasks = len(lane.spans)
        groups = sum(sum(read.groups_of_size) + read.groups_everything for read in reads)
        of_host = groups if missing is None else int(missing.groups.sum())
        usage.tasks_by_device["cpu"] += of_host - tasks
        usage.tasks_by_device["gpu"] += groups - of_host + tasks
        batch, layers = len(reads), len(board.skip)
        state_bytes = self._num_heads * (self._store.geometry.head_dim + 1) * 4
        group_bytes = state_bytes // self._store.geometry.num_kv_heads
        if missing is None:
            self._answered_bytes = (board.skip.numpy() == 0) * (batch * state_bytes)
        else:
            self._answered_bytes = missing.groups * group_bytes
        moved = usage.pcie_bytes
        moved["host_to_device", "digests"] += (
            lane.digest_bytes if self._digests is None else self._digests.take_copied_bytes()
        )
        if self._device_planner is not None:
            moved["host_to_device", "digests"] += self._device_planner.take_copied_bytes()
            if has_plans and missing is None:
                moved["host_to_device", "attention_states"] += self._device_planner.told_bytes
        if missing is None:
            moved["host_to_device", "selected_kv"] += lane.kv_bytes
        else:
            moved["host_to_device", "missing_kv"] += lane.kv_bytes
            moved["device_to_host", "queries"] += missing.units * LISTED_BYTES
        moved["host_to_device", "attention_states"] += int(self._answered_bytes.sum())
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


def _new_usage(decoder: Decoder) -> DeviceUsage:
    usage = DeviceUsage()
    usage.pcie_bytes["host_to_device", "weights"] = sum(
        weight.nbytes for weight in decoder.parameters()
    )
    return usage
