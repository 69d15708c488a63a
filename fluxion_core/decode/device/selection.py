"""Selection on the device: a step's graph chooses what is read, and reads what is resident.

Per layer: scores of the blocks' digests, the exact top-k of each head, and a split of what a group
chose into blocks that are in device memory (tier.py) and blocks that are in host memory alone. The
first are attended to in the graph at once; lists of the others go to the host, which attends to
them in place. A group without any does not concern the host, and a layer without any is not waited
for. What is chosen does not depend on where it lies.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fluxion_core.decode.device.board import HostListArrays
from fluxion_core.decode.device.digests import (
    SPARE_SHARE,
    DeviceDigests,
    coarse_digest_bytes,
)
from fluxion_core.decode.device.selected_layers import SelectedLayers
from fluxion_core.decode.device.tier import DeviceTier
from fluxion_core.decode.device.tier_board import TierBoard
from fluxion_core.decode.device.tier_size import tier_bytes as size_of_tier
from fluxion_core.decode.device.window_copies import WindowCopies
from fluxion_core.decode.device.windows import DeviceWindows
from fluxion_core.decode.step import StepReads, StepRow
from fluxion_core.decode.work import StepWork
from fluxion_core.errors import CapacityError, ConfigError
from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS
from fluxion_core.kernels.sparse_attention.lane import MAX_CHOICE_BLOCKS
from fluxion_core.kernels.tier.attention import ResidentAttention
from fluxion_core.kernels.tier.constants import RESIDENT, SELECTED
from fluxion_core.kernels.tier.gather import ResidentUnits
from fluxion_core.kernels.tier.merge import TierMerge
from fluxion_core.kernels.tier.selection import GroupSelection, ScoresHook, TierTables
from fluxion_core.kernels.tier.upkeep_launch import MAX_TABLE_ENTRIES
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.observe.device_usage import DeviceUsage, TierUsage
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)

LISTED_BYTES = 8
"""Of a missing block, in the lists that go to the host: which it is, and who reads it."""


@dataclass(frozen=True)
class MissingBlocks:
    """Blocks of a step that were in host memory alone."""

    groups: npt.NDArray[np.int64]
    """[layers]: groups that the host had to attend to something of. Where there are any, the device
    waited for their answers."""
    units: int
    """Blocks of 16 tokens of a layer and KV head."""


class DeviceSelection:
    """Selects for the steps of one body, and keeps its tier.

    Args:
        store: whose memory the device can address.
        windows: of the sequences, on the device.
        num_heads: query heads of the model.
        capacity: rows of a step.
        max_region_tokens: of a sequence.
        max_slabs: likewise.
        digests: by which blocks are chosen.
        tier_bytes: K and V that the tier has room for.
        step: [1] int32 on the device: number of the last step.
        stream: of the steps.
        is_float32: whether the model is.
        scores_hook: for measurements.

    Raises:
        CapacityError: the tier holds not even one block.
        ShapeError: no kernel takes these shapes.
    """

    def __init__(
        self,
        store: HostKvStore,
        windows: DeviceWindows,
        num_heads: int,
        *,
        capacity: int,
        max_region_tokens: int,
        max_slabs: int,
        digests: DeviceDigests,
        tier_bytes: int,
        step: Tensor,
        stream: torch.cuda.Stream,
        is_float32: bool = False,
        scores_hook: ScoresHook | None = None,
    ) -> None:
        geometry, device = store.geometry, step.device
        self.geometry, self._window = geometry, windows.window
        self.scores_hook = scores_hook
        """Of the graphs that are made."""
        self.step = step
        """[1] int32 on the device: number of the last step."""
        self._digests = digests
        self.kernels = GroupSelection(
            geometry, num_heads, max_region_tokens, max_slabs, digests.placed, is_float32
        )
        self.attention = ResidentAttention(
            num_heads, geometry.num_kv_heads, geometry.head_dim, is_float32=is_float32
        )
        self.merge = TierMerge(num_heads, geometry.num_kv_heads, geometry.head_dim)
        self.board = TierBoard(geometry, num_heads, capacity, self.kernels.stride, device)
        self.lists = self.kernels.make_lists(capacity, device)
        self.scratch = self.kernels.make_scratch(capacity, device)
        self.tier = DeviceTier(store, tier_bytes, step, stream, WindowCopies(windows, capacity))
        self._radii = np.ones((capacity, len(BLOCK_SIZES)), np.float32)
        self._link_bytes = 0
        self.usage = TierUsage(
            capacity_bytes=self.tier.statistics().capacity_bytes,
            digest_capacity_bytes=digests.capacity_bytes,
        )

    @staticmethod
    def memory_bytes(
        store: HostKvStore, num_heads: int, capacity: int, max_region_tokens: int
    ) -> int:
        """Device memory that selection takes beside the tier's K and V, about."""
        geometry = store.geometry
        units = store.num_slabs * geometry.kv_bytes // geometry.block_bytes
        of_row = 5 * num_heads + 16 * geometry.num_kv_heads
        lists = capacity * of_row * max_region_tokens // BLOCK_TOKENS
        return 4 * units + lists + WindowCopies.memory_bytes(geometry, capacity)

    @property
    def tables(self) -> TierTables:
        """Tables that the split of a layer looks up, and asks by."""
        tier = self.tier
        return TierTables(tier.table, tier.stamps, tier.requests, tier.request_count)

    @property
    def host_lists(self) -> HostListArrays:
        """Lists as the host's side of a step sees them."""
        board, lists = self.board, self.lists
        return (
            board.listed.numpy(),
            board.missing_counts.numpy(),
            board.missing_units.numpy(),
            board.missing_masks.numpy(),
            lists.missing_units.data_ptr(),
            lists.missing_masks.data_ptr(),
        )

    def residents(self, sequence: SequenceKv) -> ResidentUnits:
        """Units that may be read on the device, of a sequence, up to the next step. On the steps'
        stream."""
        self.tier.refresh(sequence)
        return ResidentUnits(self.tier.table, self.tier.kv_address)

    def arrive(self, sequences: Sequence[SequenceKv]) -> None:
        """Take note of prompts that are on their way, all of them; see DeviceTier."""
        self.tier.arrive(
            {one: self._window.retrieval_region(one.num_prompt_tokens) for one in sequences}
        )

    def join(self, slot: int, sequence: SequenceKv) -> None:
        """Take note of a committed sequence in a window slot."""
        self.tier.join(slot, sequence, self._window.retrieval_region(sequence.num_tokens))

    def leave(self, slot: int) -> None:
        """Forget a slot's sequence; its digests have been left."""
        self.tier.leave(slot)
        self._count_digests()

    def begin_step(self, rows: Sequence[StepRow], regions: Sequence[range], work: StepWork) -> None:
        """Hand a step's rows and plans to the graph, and enter what has come into the tier.

        On the steps' stream, before the graph.
        """
        board = self.board
        for row, region in zip(rows, regions, strict=True):
            self.tier.follow(row.slot, row.sequence, region.stop)
        work.tasks.write_given_plans(
            board.given_levels.numpy(), board.given_budgets.numpy(), self._radii
        )
        board.write_rows(rows, regions, self._radii)
        self.tier.before_step()

    def end_step(self, rows: Sequence[StepRow], work: StepWork) -> MissingBlocks:
        """Count what a step that has ended selected, and begin to fetch what it lacked."""
        counts = self.board.host_counts.numpy()[:, : len(rows)]
        work.tasks.count_selected(self.board.host_counts.numpy())
        missing = counts[..., SELECTED.value] - counts[..., RESIDENT.value]
        self.tier.after_step(has_requests=bool(missing.any()))
        return MissingBlocks(np.count_nonzero(missing, axis=(1, 2)), int(missing.sum()))

    def count(
        self, usage: DeviceUsage, rows: Sequence[StepRow], reads: Sequence[StepReads]
    ) -> None:
        """Add a step's hits and misses, what filled the tier, and digests that were read in the
        store, about, to a device's usage."""
        tier, statistics = self.usage, self.tier.statistics()
        for row, read in zip(rows, reads, strict=True):
            tier.hit_bytes[row.policy.kind] += read.resident_bytes
            tier.missed_bytes[row.policy.kind] += read.attended_bytes - read.resident_bytes
        tier.held_bytes = statistics.held_bytes
        tier.filled_bytes, tier.evicted_bytes = statistics.filled_bytes, statistics.evicted_bytes
        usage.pcie_bytes["host_to_device", "tier_fill"] += statistics.link_bytes - self._link_bytes
        self._link_bytes = statistics.link_bytes
        self._count_digests()
        usage.pcie_bytes["host_to_device", "digests"] += sum(
            int(
                (read.scanned_bytes - read.device_scanned_bytes)
                * self._digests.share_in_store(row.slot)
            )
            for row, read in zip(rows, reads, strict=True)
        )

    def _count_digests(self) -> None:
        on_device, in_store = self._digests.running_bytes
        of = self.usage.digest_bytes
        of["device"], of["host"] = on_device, in_store

    @property
    def lengths(self) -> tuple[bool, ...]:
        """Values of `is_short` that steps may have."""
        return (True,) if self.kernels.is_short(self.kernels.max_region_tokens) else (True, False)

    def is_short(self, regions: Sequence[range]) -> bool:
        """Whether the regions of a step's rows are all short, see GroupSelection.is_short."""
        return self.kernels.is_short(max(map(len, regions), default=0))

    def new_layers(self, size: int, *, is_short: bool) -> SelectedLayers:
        """Launches of a graph for `size` rows."""
        return SelectedLayers(self, size, is_short=is_short)

    def close(self) -> None:
        """Wait until nothing reads the store any more."""
        self.tier.close()


def selection_if_it_fits(
    store: HostKvStore,
    windows: DeviceWindows,
    num_heads: int,
    digests: DeviceDigests | None,
    device_kv_bytes: int | None,
    *,
    capacity: int,
    max_context_tokens: int,
    step: Tensor,
    stream: torch.cuda.Stream,
    is_float32: bool = False,
    scores_hook: ScoresHook | None = None,
) -> DeviceSelection | None:
    """Selection on the device, if digests and plans are there, and room for a tier.

    Args:
        store: whose memory the device can address.
        windows: of the sequences, on the device.
        num_heads: query heads of the model.
        digests: by which blocks are chosen; None where the CPUs make plans.
        device_kv_bytes: of the tier; None takes what is free, 0 makes none.
        capacity: rows of a step.
        max_context_tokens: of a sequence.
        step, stream, is_float32, scores_hook: as of DeviceSelection.

    Raises:
        ConfigError: a size that was asked for holds not even one block, or the context or the store
            is larger than a tier takes.
        CapacityError: there is no room for a size that was asked for.
    """
    if device_kv_bytes == 0:
        return None
    region = max(BLOCK_TOKENS, len(windows.window.retrieval_region(max_context_tokens + 1)))
    if limit := _exceeded_limit(store, region):
        _refuse_limit(limit, device_kv_bytes)
        return None
    if digests is None:
        if device_kv_bytes is None:
            return None
        raise _no_digests(store, step.device)
    beside = DeviceSelection.memory_bytes(store, num_heads, capacity, region)
    size = _free_for_tier(store, device_kv_bytes, step.device, beside)
    if not size:
        return None
    return DeviceSelection(
        store,
        windows,
        num_heads,
        capacity=capacity,
        max_region_tokens=region,
        max_slabs=store.geometry.slabs_for(max_context_tokens + 1),
        digests=digests,
        tier_bytes=size,
        step=step,
        stream=stream,
        is_float32=is_float32,
        scores_hook=scores_hook,
    )


def _exceeded_limit(store: HostKvStore, region_tokens: int) -> str:
    """What there is more of than the tier's kernels take; empty if nothing."""
    if region_tokens > MAX_CHOICE_BLOCKS * BLOCK_TOKENS:
        return (
            f"regions of {region_tokens} tokens are more than the {MAX_CHOICE_BLOCKS} blocks of "
            f"{BLOCK_TOKENS} among which a GPU selects"
        )
    units = store.num_slabs * store.geometry.kv_bytes // store.geometry.block_bytes
    if units > MAX_TABLE_ENTRIES:
        return f"a store of {units} blocks is more than the {MAX_TABLE_ENTRIES} that its table has"
    return ""


def _refuse_limit(limit: str, device_kv_bytes: int | None) -> None:
    if device_kv_bytes is not None:
        raise ConfigError(f"store.device_kv_bytes is {device_kv_bytes}, and {limit}; use auto or 0")
    _log.info(event("no device tier", because=limit))


def _no_digests(store: HostKvStore, device: torch.device) -> CapacityError:
    return CapacityError(
        f"device memory for digests of 128-token blocks, by which plans are made on a GPU with a "
        f"tier, in {SPARE_SHARE:.0%} of what is free",
        needed=coarse_digest_bytes(store),
        free=int(torch.cuda.mem_get_info(device)[0] * SPARE_SHARE),
        unit="B",
        remedy="lower store.host_kv_bytes, or set store.device_kv_bytes to 0",
    )


def _free_for_tier(
    store: HostKvStore, device_kv_bytes: int | None, device: torch.device, beside_bytes: int
) -> int:
    free, total = torch.cuda.mem_get_info(device)
    size = size_of_tier(
        device_kv_bytes,
        block_bytes=store.geometry.block_bytes,
        store_kv_bytes=store.num_slabs * store.geometry.kv_bytes,
        free_bytes=free,
        total_bytes=total,
        later_bytes=beside_bytes,
    )
    _log.info(event("device tier", bytes=size, free_bytes=free))
    return size
