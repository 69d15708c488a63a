"""The device tier: copies of the store's units in device memory, as many as there is room for.

A unit is a 16-token block of one layer and KV head. A table has of each unit of the arena, whoever
holds it, where its copy is; the kernels of a step look it up, read what is there, stamp it with the
step's number, and ask for what is not (kernels/tier). Nothing depends on the tier but time: the
store keeps everything.

Between steps the tier goes around:

    IDLE      nothing is on its way
    CLOSED    after a step: what was asked for, and units that came into regions, are a batch; slots
              that are free are taken for it, and those of the least recently selected
    FILLING   the batch is copied on a stream of its own, beside the next steps; what they ask for
              waits
    IDLE      before the first step after its end it is entered into the table; and if anything
              waits, the next batch is closed at once

Steps ask at any time, and nothing here waits for a batch. All that changes the table is ordered on
the steps' stream, so that nothing leaves while a step that listed it runs. Requests never take the
slot of what the last step has selected, nor units that came into regions that of what has been
selected lately: both are given up when there is no slot for them, and come when they are asked for.

Slabs are told apart by their generation: when a sequence joins, and when its region grows into a
slab, copies of what that slab held before are dropped before the next step. So is what was asked
for or is on its way, which may have been read before the slab changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import torch
from torch import Tensor

from fluxion_core.decode.device.graph import StepGraph
from fluxion_core.decode.device.window_copies import BlockRange, WindowCopies
from fluxion_core.errors import CapacityError, FluxionError
from fluxion_core.geometry import BLOCK_TOKENS
from fluxion_core.kernels.tier.upkeep import (
    EVICTED_UNITS,
    FILLED_UNITS,
    HELD_UNITS,
    LINK_UNITS,
    RANGES_CUT,
    WINDOW_UNITS,
)
from fluxion_core.kernels.tier.upkeep_launch import (
    MAX_RANGES,
    HostMemory,
    TierUpkeep,
)
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore

BATCH_BYTES = 1 << 30
"""A batch at most: about 20 ms of PCIe. A step whose selection is new misses gigabytes."""

BATCH_SHARE = 8
"""A batch takes at most the tier's bytes divided by this."""


class TierState(Enum):
    """Stage of the tier's round; see the head of this file."""

    IDLE = auto()
    CLOSED = auto()
    FILLING = auto()


@dataclass(frozen=True)
class TierStatistics:
    """Counters of a tier, as of its last batch. Filled and evicted since start."""

    capacity_bytes: int
    held_bytes: int
    """In slots that are not free, those of the batch included."""
    filled_bytes: int
    """Came, or were to come and were dropped as their slabs changed."""
    window_bytes: int
    """Of these, those that came from windows, on the device."""
    link_bytes: int
    """Of these, those that came over PCIe. Both as of the last batch that is being filled."""
    evicted_bytes: int
    """Left so that others could come; those of slabs with new content do not count."""


@dataclass
class _Row:
    """A sequence, in a window slot or on its way: how far its region is known, and what of it is to
    come."""

    end: int
    """Of the region, in tokens."""
    ranges: deque[BlockRange] = field(default_factory=deque)
    num_rewrites: int = 0
    """Of the sequence before its commit, up to now."""
    has_left: bool = False
    """What is to come of it is waited for no more."""


class DeviceTier:
    """The tier of one store on one device, and its upkeep. One thread only.

    On a CPU the same kernels run in Triton's interpreter, at once.

    Args:
        store: whose memory the device can address.
        capacity_bytes: of the tier; whole units of it are used, at most what the store holds. The
            table takes 4 bytes more for each unit of the store, and the slots 12 each.
        step: [1] int32 on the device: number of the last step, which goes up by one a step.
        stream: of the steps; None on a CPU.
        copies: of blocks that have left windows; None where all come from the store.

    Raises:
        CapacityError: not even one unit fits.
        ShapeError: no kernel takes these shapes.
    """

    def __init__(
        self,
        store: HostKvStore,
        capacity_bytes: int,
        step: Tensor,
        stream: torch.cuda.Stream | None,
        copies: WindowCopies | None = None,
    ) -> None:
        geometry = store.geometry
        self._store, self._geometry = store, geometry
        self._unit_bytes = geometry.block_bytes
        slab_units = geometry.kv_bytes // geometry.block_bytes
        num_slots = min(capacity_bytes // self._unit_bytes, store.num_slabs * slab_units)
        if num_slots < 1:
            raise CapacityError(
                "device tier",
                needed=self._unit_bytes,
                free=capacity_bytes,
                unit="B",
                remedy="raise store.device_kv_bytes, or set it to 0",
            )
        batch_bytes = min(BATCH_BYTES, num_slots * self._unit_bytes // BATCH_SHARE)
        host = HostMemory(store.arena_address, store.slab_stride_bytes, store.num_slabs)
        self._copies = copies
        self._upkeep = TierUpkeep(
            geometry,
            host,
            num_slots,
            max(1, batch_bytes // self._unit_bytes),
            step,
            copies.kv if copies is not None else None,
        )
        self._layer_heads = geometry.num_layers * geometry.num_kv_heads
        self.state = TierState.IDLE
        """Stage of the round."""
        self._rows: dict[int, _Row] = {}
        self._arriving: dict[SequenceKv, _Row] = {}
        self._left: deque[tuple[_Row, BlockRange]] = deque()
        """Blocks that have left windows."""
        self._queued: list[tuple[_Row, BlockRange]] = []
        """Ranges of the batch."""
        self._again: deque[tuple[_Row, BlockRange]] = deque()
        """Ranges of batches that had no room for all that there was."""
        self._has_requests = False
        """Whether a step may have asked for something since the last close."""
        self._generations = [0] * store.num_slabs
        """Of each slab, when it was last looked at; 0: never, and then nothing of it is here."""
        self._stale: set[int] = set()
        self._streams = None if stream is None else _Streams(stream)
        self._launch_close = self._launcher(self._upkeep.close)
        self._launch_fill = self._launcher(self._upkeep.fill, is_fill=True)
        # Captures launch: a batch of nothing is closed, and is entered.
        self._launch_commit = self._launcher(self._upkeep.commit)
        self._launch_invalidate = self._launcher(self._upkeep.invalidate)

    @property
    def num_slots(self) -> int:
        """Units that the tier holds."""
        return self._upkeep.num_slots

    @property
    def kv(self) -> Tensor:
        """[num_slots * block_bytes] uint8: K and V of the units, slot after slot."""
        return self._upkeep.tensors.kv

    @property
    def owner(self) -> Tensor:
        """[num_slots] int32: the arena block that a slot holds; below 0 where it holds none."""
        return self._upkeep.tensors.owner

    def is_current(self, slab: int) -> bool:
        """Whether copies of a slab's units, if there are any, are of what it holds now."""
        return self._generations[slab] in (0, self._store.generation(slab))

    @property
    def kv_address(self) -> int:
        """Address of slot 0 in device memory; the others follow, `block_bytes` each."""
        return self._upkeep.tensors.kv.data_ptr()

    @property
    def table(self) -> Tensor:
        """[units of the store] int32: the slot of each arena block, or ABSENT, or PENDING."""
        return self._upkeep.tensors.table

    @property
    def stamps(self) -> Tensor:
        """[num_slots] int32: a step that selects a slot's unit writes its number here."""
        return self._upkeep.tensors.stamps[: self.num_slots]

    @property
    def requests(self) -> Tensor:
        """[units of a batch] int32: takes the arena blocks that steps ask for."""
        return self._upkeep.tensors.requests

    @property
    def request_count(self) -> Tensor:
        """[1] int32: how many they have asked for; what exceeds `requests` is not listed there."""
        return self._upkeep.tensors.request_count

    def join(self, slot: int, sequence: SequenceKv, region: range) -> None:
        """Take note of a committed sequence in a window slot; its region is to come.

        Args:
            slot: of the device's windows.
            sequence: whose KV is whole up to the region's end, as long as it stays.
            region: in tokens, multiples of 16.
        """
        if (arriving := self._arriving.pop(sequence, None)) is not None:
            # All of it is queued now; what waits of it would outlive the sequence.
            arriving.has_left = True
        self._rows[slot] = _Row(region.start)
        self.follow(slot, sequence, region.stop)

    def follow(self, slot: int, sequence: SequenceKv, region_end: int) -> None:
        """Queue what has come into a sequence's region since: something once in 16 tokens.

        To be called before the step that takes the sequence's next token: what has just left its
        window is copied from there, and that token overwrites it.

        Args:
            slot: that the sequence has.
            sequence: which it was joined with.
            region_end: in tokens, a multiple of 16.
        """
        row = self._rows[slot]
        if region_end <= row.end:
            return
        in_window = region_end
        if self._copies is not None:
            in_window = min(max(row.end, self._copies.held_from(sequence.num_tokens)), region_end)
        slabs = sequence.slabs
        generations = [self._store.generation(slab) for slab in slabs]
        row.ranges.extend(self._ranges(slabs, generations, row.end, in_window))
        for first in range(in_window, region_end, BLOCK_TOKENS):
            [block] = self._ranges(slabs, generations, first, first + BLOCK_TOKENS)
            self._copy(slot, first, block)
            self._left.append((row, block))
        row.end = region_end

    def _ranges(
        self, slabs: Sequence[int], generations: Sequence[int], begin: int, end: int
    ) -> Iterator[BlockRange]:
        """Blocks of some tokens, slab after slab, each of which is looked at."""
        for ordinal, inside, count in self._geometry.split_by_slab(begin, end - begin):
            slab, generation = slabs[ordinal], generations[ordinal]
            self._look_at(slab, generation)
            first = inside // BLOCK_TOKENS
            yield BlockRange(slab, first, first + count // BLOCK_TOKENS, generation)

    def _copy(self, slot: int, first_token: int, block: BlockRange) -> None:
        """Copy a block out of a window, on the steps' stream."""
        assert self._copies is not None
        steps = self._streams.steps if self._streams is not None else None
        with torch.cuda.stream(steps):
            self._copies.copy(slot, first_token, block)

    def arrive(self, regions: Mapping[SequenceKv, range]) -> None:
        """Queue what is whole of prompts that are on their way, slab by slab.

        What waits of those that were named before and are not now is forgotten: they join, which
        queues all of it, or have failed. Another thread may do with them what it likes.

        Args:
            regions: by sequence, what its region will be when it joins: in tokens, multiples of 16.
        """
        for sequence in self._arriving.keys() - regions.keys():
            self._arriving.pop(sequence).has_left = True
        for sequence, region in regions.items():
            row = self._arriving.setdefault(sequence, _Row(region.start))
            num_rewrites = sequence.num_rewrites
            end = self._end_of_slabs(sequence.whole_tokens, region)
            if end < row.end or num_rewrites > row.num_rewrites:
                # It has failed, or is written anew.
                row.has_left = True
                row = _Row(region.start, num_rewrites=num_rewrites)
                self._arriving[sequence] = row
            if end > row.end:
                whole = sequence.whole()
                end = max(row.end, self._end_of_slabs(whole.num_tokens, region))
                row.ranges.extend(self._ranges(whole.slabs, whole.generations, row.end, end))
                row.end = end

    def _end_of_slabs(self, num_tokens: int, region: range) -> int:
        """End of the part of a region that is in whole slabs of so many tokens, or of all of it."""
        slab_tokens = self._geometry.slab_tokens
        if num_tokens >= region.stop:
            return region.stop
        return max(region.start, num_tokens // slab_tokens * slab_tokens)

    def refresh(self, sequence: SequenceKv) -> None:
        """Drop copies of what a sequence's slabs held before; afterwards the table is right."""
        for slab in sequence.slabs:
            self._look_at(slab, self._store.generation(slab))
        if self._stale:
            self._invalidate()

    def leave(self, slot: int) -> None:
        """Forget a slot's sequence. Its units stay for others, as long as nobody needs the room."""
        self._rows.pop(slot).has_left = True

    def before_step(self) -> None:
        """Drop copies of what slabs held before, and enter a batch that has been filled.

        If anything waits for the next batch, that is closed and begun at once.

        Raises:
            DeviceError: CUDA refuses a launch.
            RuntimeError: a kernel has failed, the device with it.
        """
        # First: a range of a slab that was taken anew is of what it holds now, and must not be
        # dropped with the rest.
        if self._stale:
            self._invalidate()
        if self.state is TierState.FILLING and self._has_filled():
            self._launch_commit()
            self.state = TierState.IDLE
            if not self._upkeep.queues.counters[RANGES_CUT.value]:
                self._queued.clear()
            self._close_batch()
        if self.state is TierState.CLOSED:
            self._fill()

    def after_step(self, *, has_requests: bool = True) -> None:
        """Make a batch of what steps asked for, unless there is one; and begin to fill it.

        Args:
            has_requests: False only if the step has missed nothing; there may be no batch then.

        Raises:
            DeviceError: CUDA refuses a launch.
        """
        self._has_requests |= has_requests
        if self.state is TierState.IDLE:
            self._close_batch()
        if self.state is TierState.CLOSED:
            self._fill()

    def advance(self) -> None:
        """Enter a batch that has been filled, and begin the next one, where no step does.

        Raises:
            DeviceError: CUDA refuses a launch.
            RuntimeError: a kernel has failed, the device with it.
        """
        self.before_step()
        self.after_step(has_requests=False)

    def restart(self, capacity_bytes: int) -> None:
        """Forget everything, and hold no more than so much from now on; for measurements.

        Args:
            capacity_bytes: at least a batch's, at most what the tier was made with.

        Raises:
            FluxionError: a batch is under way, or there are sequences.
            ShapeError: the capacity is out of its range.
        """
        if self.state is not TierState.IDLE or self._rows or self._arriving:
            raise FluxionError("a tier begins anew without sequences, and not during a batch")
        if self._streams is not None:
            self._streams.steps.synchronize()
        self._upkeep.restart(capacity_bytes // self._unit_bytes)
        if self._streams is not None:
            torch.cuda.synchronize(self._streams.steps.device)
        self._generations = [0] * len(self._generations)
        self._stale.clear()
        self._left.clear()
        self._again.clear()
        self._queued.clear()
        self._has_requests = False

    def statistics(self) -> TierStatistics:
        """The counters; does not wait for the device."""
        counters, unit = self._upkeep.queues.counters.tolist(), self._unit_bytes
        unusable = self.num_slots - self._upkeep.num_usable
        return TierStatistics(
            capacity_bytes=self._upkeep.num_usable * unit,
            held_bytes=(counters[HELD_UNITS.value] - unusable) * unit,
            filled_bytes=counters[FILLED_UNITS.value] * unit,
            window_bytes=counters[WINDOW_UNITS.value] * unit,
            link_bytes=counters[LINK_UNITS.value] * unit,
            evicted_bytes=counters[EVICTED_UNITS.value] * unit,
        )

    def close(self) -> None:
        """Wait until nothing reads the store any more. Idempotent.

        Raises:
            RuntimeError: the device has failed.
        """
        self._rows.clear()
        self._arriving.clear()
        if self._streams is not None:
            self._streams.fill.synchronize()

    def _launcher(self, body: Callable[[], None], *, is_fill: bool = False) -> Callable[[], None]:
        """Launches of a body: a CUDA graph's, or at once on a CPU."""
        streams = self._streams
        if streams is None:
            return body
        return StepGraph(body, streams.fill if is_fill else streams.steps).launch

    def _look_at(self, slab: int, generation: int) -> None:
        """Take note of a slab's generation, as of just now."""
        if self._generations[slab] not in (0, generation):
            self._stale.add(slab)
        self._generations[slab] = generation

    def _close_batch(self) -> None:
        """Close the next batch, if there may be anything for it."""
        if self._queue_ranges() or self._has_requests:
            self._launch_close()
            self.state = TierState.CLOSED
            self._has_requests = False

    def _queue_ranges(self) -> bool:
        """Hand ranges to the next batch: twice what it can take, since some of it may be there.

        Returns:
            Whether there are any.
        """
        queues = self._upkeep.queues
        if self._copies is not None:
            self._copies.hand_over(queues.window_places, self._is_current)
        self._again.extendleft(reversed(self._queued))
        self._queued = []
        units = 0
        for row, blocks in self._waiting():
            if row.has_left or not self._is_current(blocks):
                continue
            self._queued.append((row, blocks))
            units += self._layer_heads * (blocks.end - blocks.begin)
            if len(self._queued) == MAX_RANGES or units >= 2 * self._upkeep.capacity:
                break
        queues.num_ranges[0] = len(self._queued)
        if self._queued:
            ranges = [blocks[:3] for _, blocks in self._queued]
            queues.ranges.numpy()[: len(ranges), :3] = ranges
        return bool(self._queued)

    def _waiting(self) -> Iterator[tuple[_Row, BlockRange]]:
        """Ranges that are to come, each taken off its list: what has left windows first."""
        for ranges in (self._left, self._again):
            while ranges:
                yield ranges.popleft()
        for row in (*self._rows.values(), *self._arriving.values()):
            while row.ranges:
                yield row, row.ranges.popleft()

    def _is_current(self, blocks: BlockRange) -> bool:
        """Whether a slab holds what it held when these blocks came into a region."""
        return self._store.generation(blocks.slab) == blocks.generation

    def _fill(self) -> None:
        if self._streams is not None:
            self._streams.begin_fill()
        self._launch_fill()
        if self._streams is not None:
            self._streams.end_fill()
        self.state = TierState.FILLING

    def _has_filled(self) -> bool:
        return self._streams is None or self._streams.has_filled()

    def _invalidate(self) -> None:
        queues, slabs = self._upkeep.queues, sorted(self._stale)
        if self._streams is not None:
            # The last list must have been read.
            self._streams.invalidated.synchronize()
        queues.stale_slabs[: len(slabs)] = torch.tensor(slabs, dtype=torch.int32)
        queues.num_stale_slabs[0] = len(slabs)
        self._launch_invalidate()
        if self._streams is not None:
            self._streams.invalidated.record(self._streams.steps)
        self._stale.clear()


class _Streams:
    """The stream of steps, that of fills, and how each waits for the other."""

    def __init__(self, steps: torch.cuda.Stream) -> None:
        self.steps = steps
        self.fill = torch.cuda.Stream(steps.device)
        self.invalidated = torch.cuda.Event()
        self._closed, self._filled = torch.cuda.Event(), torch.cuda.Event()

    def begin_fill(self) -> None:
        """Let what follows on the fill's stream wait for the batch."""
        self._closed.record(self.steps)
        self.fill.wait_event(self._closed)

    def end_fill(self) -> None:
        """Take note of a fill that has been launched."""
        self._filled.record(self.fill)

    def has_filled(self) -> bool:
        """Whether it has ended; then what follows on the steps' stream sees all of it."""
        if not self._filled.query():
            return False
        self.steps.wait_event(self._filled)
        return True
