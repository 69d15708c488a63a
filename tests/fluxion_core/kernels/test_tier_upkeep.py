"""The upkeep of the device tier: what leaves, what comes, and what the tables say of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels.tier import constants, upkeep
from fluxion_core.kernels.tier.upkeep_launch import HostMemory, TierUpkeep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ABSENT, PENDING = constants.ABSENT.value, constants.PENDING.value
NOTHING = upkeep.NOTHING.value
NO_OWNER, NO_STAMP = upkeep.NO_OWNER.value, upkeep.NO_STAMP.value
GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=16, slab_tokens=128)
SLAB_UNITS = 4 * 8
STEP = 1_000_000


class Tier:
    """An upkeep over an arena of random bytes."""

    def __init__(
        self,
        num_slots: int,
        capacity: int,
        *,
        num_slabs: int = 4,
        geometry: KvGeometry = GEOMETRY,
        num_copies: int = 0,
    ) -> None:
        # Slabs are longer than their KV, in a store by their digests.
        stride = geometry.kv_bytes + 4096
        generator = torch.Generator().manual_seed(num_slots)
        arena = torch.randint(0, 256, (num_slabs, stride), dtype=torch.uint8, generator=generator)
        self.arena = arena.pin_memory() if DEVICE.type == "cuda" else arena
        self.step = torch.tensor([STEP], dtype=torch.int32, device=DEVICE)
        host = HostMemory(self.arena.data_ptr(), stride, num_slabs)
        shape = num_copies, geometry.num_layers, geometry.num_kv_heads, 2, 16, geometry.head_dim
        copies = torch.randint(0, 1 << 14, shape, dtype=torch.int16, generator=generator)
        self.copies = copies.view(torch.bfloat16).to(DEVICE)
        self.upkeep = TierUpkeep(geometry, host, num_slots, capacity, self.step, self.copies)
        self.state, self.queues = self.upkeep.tensors, self.upkeep.queues

    def own(self, units: list[int], ages: list[int]) -> None:
        """Let slots 0, 1, … be these units', so old; the others are free."""
        count, slots = len(units), self.upkeep.num_slots
        placed = torch.tensor(units, dtype=torch.int32, device=DEVICE)
        self.state.owner[:count] = placed
        self.state.stamps[:count] = STEP - torch.tensor(ages, dtype=torch.int32, device=DEVICE)
        self.state.table[placed.long()] = torch.arange(count, dtype=torch.int32, device=DEVICE)
        free = torch.arange(slots - 1, count - 1, -1, dtype=torch.int32, device=DEVICE)
        self.state.free[: slots - count] = free
        self.state.words[upkeep.FREE.value] = slots - count

    def ask(self, units: list[int]) -> None:
        """A step's requests, behind those that wait."""
        first = int(self.state.request_count)
        for place, unit in enumerate(units[: self.upkeep.capacity - first]):
            assert self.state.table[unit] == ABSENT
            self.state.table[unit] = PENDING
            self.state.requests[first + place] = unit
        self.state.request_count[0] = first + len(units)

    def queue(self, ranges: list[tuple[int, int, int]]) -> None:
        for place, chosen in enumerate(ranges):
            self.queues.ranges[place, :3] = torch.tensor(chosen, dtype=torch.int32)
        self.queues.num_ranges[0] = len(ranges)

    def drop(self, slabs: list[int]) -> None:
        self.queues.stale_slabs[: len(slabs)] = torch.tensor(slabs, dtype=torch.int32)
        self.queues.num_stale_slabs[0] = len(slabs)
        self.upkeep.invalidate()

    @property
    def batch(self) -> dict[int, int]:
        """Slots by unit."""
        size = int(self.state.words[upkeep.BATCH.value])
        units, slots = self.state.batch[:size].tolist(), self.state.request_slots[:size].tolist()
        assert len({unit for unit in units if unit != NOTHING}) == size - units.count(NOTHING)
        return {u: slot for u, slot in zip(units, slots, strict=True) if u != NOTHING}

    @property
    def pending(self) -> set[int]:
        return {unit for unit, slot in enumerate(self.state.table.tolist()) if slot == PENDING}

    @property
    def free(self) -> list[int]:
        return self.state.free[: int(self.state.words[upkeep.FREE.value])].tolist()

    @property
    def resident(self) -> dict[int, int]:
        """Slots by unit, after a look at both sides of it."""
        table = {unit: s for unit, s in enumerate(self.state.table.tolist()) if s >= 0}
        owner = self.state.owner.tolist()
        assert table == {unit: s for s, unit in enumerate(owner) if unit != NO_OWNER}
        ages = self.state.stamps[: len(owner)] != NO_STAMP
        assert ages.tolist() == [unit != NO_OWNER for unit in owner]
        return table

    def counter(self, word) -> int:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return int(self.queues.counters[word.value])


def blocks_of(slab: int, begin: int, end: int) -> set[int]:
    """Units of a range, all layers and heads."""
    return {
        slab * SLAB_UNITS + head * 8 + block for head in range(4) for block in range(begin, end)
    }


@pytest.mark.parametrize("needed", [1, 7, 40])
def test_the_least_recently_selected_leave_and_no_more_than_must(needed: int) -> None:
    # Of 5000 slots, over two tiles, 6 are free; the ages of the others are of few values.
    generator = torch.Generator().manual_seed(needed)
    tier = Tier(5000, 40, num_slabs=160)
    ages = torch.randint(0, 30, (4994,), generator=generator)
    units = torch.randperm(160 * SLAB_UNITS, generator=generator).tolist()
    tier.own(units[:4994], ages.tolist())
    tier.ask(units[5000 : 5000 + needed])
    tier.upkeep.close()
    gone = set(units[:4994]) - set(tier.resident)
    age_of = dict(zip(units, ages.tolist(), strict=False))
    assert len(gone) == max(0, needed - 6)
    oldest = sorted(ages.tolist(), reverse=True)[: len(gone)]
    assert sorted((age_of[unit] for unit in gone), reverse=True) == oldest
    # Each of the batch has a slot of its own, that nobody owns and that is not free.
    assert set(tier.batch) == set(units[5000 : 5000 + needed])
    everyone = [*tier.batch.values(), *tier.free, *tier.resident.values()]
    assert sorted(everyone) == list(range(5000))


@pytest.mark.parametrize(
    ("ages", "leaving"),
    [
        # To a step below 512.
        ([509, 511, 510, 0], {1}),
        ([511, 512, 0, 3], {1}),
        # To a 64th above: 2^16 and what is a 64th more are told apart.
        ([65536, 65536 + 1024, 0, 65535], {1}),
        # Younger than nothing: stamped by the step that is over.
        ([0, 1, 0, 0], {1}),
    ],
)
def test_one_step_or_a_64th_makes_a_difference(ages: list[int], leaving: set[int]) -> None:
    tier = Tier(4, 1)
    tier.own([10, 11, 12, 13], ages)
    tier.ask([50])
    tier.upkeep.close()
    assert set(range(4)) - set(tier.resident.values()) == leaving
    assert tier.batch == {50: leaving.pop()}
    assert tier.counter(upkeep.EVICTED_UNITS) == 1


def test_whatever_is_older_than_keys_can_tell_leaves_first() -> None:
    tier = Tier(6, 3)
    tier.own(list(range(6)), [STEP, 7, STEP // 2, 9, 200_000, 8])
    tier.ask([50, 51, 52])
    tier.upkeep.close()
    assert set(tier.resident) == {1, 3, 5}


def test_what_was_asked_for_beyond_the_batch_is_left_out() -> None:
    # By hand: five were counted, three have a place.
    tier = Tier(12, 3)
    tier.ask([9, 8, 7, 6, 5])
    tier.upkeep.close()
    assert set(tier.batch) == {9, 8, 7}
    assert int(tier.state.request_count) == 0


def test_ranges_take_what_is_absent_each_unit_once() -> None:
    tier = Tier(90, 80)
    tier.own([1, 9, 33], [0, 0, 0])
    tier.ask([2])
    # The second lies within the first; the third is another slab's.
    tier.queue([(0, 0, 5), (0, 1, 3), (1, 7, 8)])
    tier.upkeep.close()
    wanted = blocks_of(0, 0, 5) | blocks_of(1, 7, 8)
    assert set(tier.batch) == (wanted - {1, 9}) | {2}
    assert Counter(tier.batch.values()).most_common(1)[0][1] == 1
    assert tier.counter(upkeep.RANGES_CUT) == 0
    assert tier.counter(upkeep.FILLED_UNITS) == len(tier.batch)
    assert tier.counter(upkeep.HELD_UNITS) == 3 + len(tier.batch)


@pytest.mark.parametrize(("asked", "taken"), [(1, 1), (3, 3), (4, 4), (5, 4), (8, 4), (11, 4)])
def test_a_batch_takes_no_slot_that_the_last_step_selected(asked: int, taken: int) -> None:
    # By hand: of 12 slots one is free, and three were not selected by the last step.
    tier = Tier(12, 8)
    tier.own(list(range(64, 75)), [0, 0, 1, 0, 0, 70_000, 0, 0, 0, 2, 0])
    tier.ask(list(range(asked)))
    tier.upkeep.close()
    assert set(tier.batch) == tier.pending == set(range(taken))
    gone = set(range(64, 75)) - set(tier.resident)
    assert gone == set([69, 73, 66][: taken - 1])
    assert tier.counter(upkeep.EVICTED_UNITS) == taken - 1
    assert tier.counter(upkeep.HELD_UNITS) == 12
    assert sorted([*tier.batch.values(), *tier.resident.values()]) == list(range(12))


def test_closes_one_after_the_other_count_anew() -> None:
    # By hand: all that is old has left with the first batch; a step later all but two are older.
    tier = Tier(4, 2)
    tier.own([10, 11, 12, 13], [3, 0, 9, 0])
    for asked, resident, batch in (([1, 2], {11, 13}, {1, 2}), ([3], {1, 2, 11, 13}, set())):
        tier.ask(asked)
        tier.upkeep.close()
        tier.upkeep.commit()
        assert set(tier.batch) == batch
        assert set(tier.resident) == resident | batch
    tier.step += 1
    tier.state.stamps[[tier.resident[1], tier.resident[13]]] = STEP + 1
    tier.ask([3])
    tier.upkeep.close()
    assert set(tier.batch) == {3}
    assert len({11, 2} & set(tier.resident)) == 1
    assert tier.pending == {3}


@pytest.mark.parametrize(("age", "leaving"), [(0, 0), (63, 0), (64, 6), (511, 6), (90_000, 6)])
def test_ranges_take_what_is_free_or_has_not_been_selected_for_long(age: int, leaving: int) -> None:
    # By hand: of 12 slots two are free; two blocks of two layers and two heads are eight units.
    tier = Tier(12, 8)
    tier.own(list(range(64, 74)), [0, 1, 62, 63] + [age] * 6)
    tier.queue([(0, 0, 2)])
    tier.upkeep.close()
    assert set(tier.resident) >= set(range(64, 68))
    assert len(tier.resident) == 10 - leaving
    assert len(tier.batch) == 2 + leaving
    assert set(tier.batch) <= blocks_of(0, 0, 2)
    assert tier.counter(upkeep.RANGES_CUT) == 0
    # What has no slot may be asked for.
    assert tier.pending == set(tier.batch)


def test_ranges_have_what_requests_leave_of_old_slots() -> None:
    # By hand: four are old, one is free. Three requests take the free one and two of the old ones.
    tier = Tier(10, 9)
    tier.own(list(range(64, 73)), [0, 5, 70, 5, 80, 90, 5, 100, 5])
    tier.ask([40, 41, 42])
    tier.queue([(0, 0, 2)])
    tier.upkeep.close()
    assert len(tier.batch) == 5
    assert set(tier.batch) > {40, 41, 42}
    assert set(tier.resident) == {64, 65, 67, 70, 72}
    assert tier.counter(upkeep.RANGES_CUT) == 0


def test_ranges_have_nothing_where_requests_take_more_than_what_is_old() -> None:
    tier = Tier(10, 9)
    tier.own(list(range(64, 74)), [0, 5, 70, 5, 80, 5, 5, 5, 5, 5])
    tier.ask([40, 41, 42])
    tier.queue([(0, 0, 2)])
    tier.upkeep.close()
    assert set(tier.batch) == tier.pending == {40, 41, 42}
    assert tier.counter(upkeep.RANGES_CUT) == 0


@pytest.mark.parametrize("asked", [3, 8])
@pytest.mark.parametrize("num_old", [0, 60, 92, 100])
def test_ranges_that_a_batch_has_no_place_for_are_cut(asked: int, num_old: int) -> None:
    # There would be slots for them: free ones, old ones, or both.
    tier = Tier(100, 8, num_slabs=5)
    tier.own(list(range(32, 32 + num_old)), [64] * num_old)
    tier.ask(list(range(140, 140 + asked)))
    tier.queue([(0, 0, 2)])
    tier.upkeep.close()
    assert len(tier.batch) == 8
    assert tier.counter(upkeep.RANGES_CUT) == 1


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_a_filled_slot_holds_its_unit(head_dim: int) -> None:
    geometry = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=head_dim, slab_tokens=128)
    tier = Tier(40, 37, geometry=geometry)
    tier.state.kv.fill_(255)
    units = torch.randperm(4 * SLAB_UNITS)[:37].tolist()
    tier.ask(units)
    tier.upkeep.close()
    tier.upkeep.fill()
    tier.upkeep.commit()
    kv = tier.state.kv.view(40, -1).cpu()
    for unit, slot in tier.resident.items():
        assert torch.equal(kv[slot], unit_of(tier.arena, geometry, unit))
    assert set(tier.resident) == set(units)
    assert len(tier.free) == 3
    assert (kv[tier.free] == 255).all()


@pytest.mark.parametrize("num_copies", [5, 40])
def test_what_has_left_a_window_comes_from_its_copy(num_copies: int) -> None:
    # By hand: the last copy is of the second block of slab 1, another of the eighth of slab 3, and
    # the first of one that nobody wants. A range wants the second to fourth of slab 1, a step one
    # unit of slab 3's block and one beside it: four units and one come from copies.
    tier = Tier(60, 37, num_copies=num_copies)
    for copy, place in ((num_copies - 1, 8 + 1), (2, 3 * 8 + 7), (0, 2 * 8)):
        tier.queues.window_places[copy] = place
    asked = [3 * SLAB_UNITS + 2 * 8 + 7, 3 * SLAB_UNITS + 2 * 8 + 6]
    tier.ask(asked)
    tier.queue([(1, 1, 4)])
    tier.upkeep.close()
    # What is there for the next one does not matter to this batch.
    tier.queues.window_places.fill_(NOTHING)
    tier.upkeep.fill()
    tier.upkeep.commit()
    assert set(tier.resident) == blocks_of(1, 1, 4) | set(asked)
    kv, copies = tier.state.kv.view(60, -1).cpu(), tier.copies.cpu().flatten(1, 2)
    copy_of = {asked[0]: copies[2, 2]}
    copy_of |= {SLAB_UNITS + head * 8 + 1: copies[-1, head] for head in range(4)}
    for unit, slot in tier.resident.items():
        expected = (
            copy_of[unit].contiguous().view(torch.uint8).flatten()
            if (unit in copy_of)
            else unit_of(tier.arena, GEOMETRY, unit)
        )
        assert torch.equal(kv[slot], expected)
    assert tier.counter(upkeep.WINDOW_UNITS) == 5
    assert tier.counter(upkeep.LINK_UNITS) == tier.counter(upkeep.FILLED_UNITS) - 5 == 9


def test_a_copy_of_block_0_is_not_taken_for_what_was_cancelled() -> None:
    tier = Tier(8, 4, num_copies=1)
    tier.queues.window_places[0] = 0
    tier.ask([40, 41, 0])
    tier.drop([1])
    tier.upkeep.close()
    tier.upkeep.fill()
    assert tier.counter(upkeep.WINDOW_UNITS) == 1
    assert tier.counter(upkeep.LINK_UNITS) == 2


def unit_of(arena: Tensor, geometry: KvGeometry, unit: int) -> Tensor:
    slab = arena[unit // SLAB_UNITS, : geometry.kv_bytes]
    return slab.view(SLAB_UNITS, -1)[unit % SLAB_UNITS]


def test_a_batch_is_entered_but_for_what_has_been_invalidated_meanwhile() -> None:
    # By hand: of the batch 40 and 41 are of slab 1, as is 50, which was there before.
    tier = Tier(8, 4)
    tier.own([3, 50], [5, 6])
    tier.ask([40, 41, 100])
    tier.upkeep.close()
    tier.upkeep.fill()
    tier.drop([1])
    assert set(tier.resident) == {3}
    slots = tier.batch
    tier.step += 1
    tier.upkeep.commit()
    assert tier.resident == {3: 0, 100: slots[100]}
    assert int(tier.state.stamps[slots[100]]) == STEP + 1
    assert sorted([*tier.free, *tier.resident.values()]) == list(range(8))
    assert (tier.state.table[SLAB_UNITS : 2 * SLAB_UNITS] == ABSENT).all()


def test_what_is_asked_for_beside_a_fill_is_of_the_next_batch() -> None:
    tier = Tier(8, 4)
    tier.ask([40, 41])
    tier.upkeep.close()
    tier.ask([7, 100, 8])
    assert tier.pending == {40, 41, 7, 100, 8}
    tier.upkeep.fill()
    tier.upkeep.commit()
    assert set(tier.resident) == {40, 41}
    assert tier.pending == {7, 100, 8}
    tier.upkeep.close()
    tier.upkeep.fill()
    tier.upkeep.commit()
    kv = tier.state.kv.view(8, -1).cpu()
    for unit, slot in tier.resident.items():
        assert torch.equal(kv[slot], unit_of(tier.arena, GEOMETRY, unit))
    assert set(tier.resident) == {40, 41, 7, 100, 8}
    assert len(tier.free) == 3


def test_what_is_asked_for_anew_after_its_slab_has_changed_comes_anew() -> None:
    # By hand: 40 and 100 are on their way, and 41 waits. Then slab 1 has something new: 40 and 41
    # are asked for again, and each is in one list alone.
    tier = Tier(8, 4)
    tier.ask([40, 100])
    tier.upkeep.close()
    tier.upkeep.fill()
    tier.ask([41])
    tier.arena[1] = 255 - tier.arena[1]
    tier.drop([1])
    assert tier.pending == {100}
    tier.ask([40, 41])
    assert tier.state.requests[:3].tolist() == [NOTHING, 40, 41]
    tier.upkeep.commit()
    assert set(tier.resident) == {100}
    assert tier.pending == {40, 41}
    assert len(tier.free) == 7
    tier.upkeep.close()
    assert set(tier.batch) == {40, 41}
    tier.upkeep.fill()
    tier.upkeep.commit()
    assert set(tier.resident) == {100, 40, 41}
    kv = tier.state.kv.view(8, -1).cpu()
    for unit, slot in tier.resident.items():
        assert torch.equal(kv[slot], unit_of(tier.arena, GEOMETRY, unit))
    assert sorted([*tier.free, *tier.resident.values()]) == list(range(8))


@pytest.mark.parametrize("num_owned", [0, 7])
def test_what_was_cancelled_is_not_copied_and_gives_its_slot_back(num_owned: int) -> None:
    # By hand: slab 1 has the batch's only unit, and then one of three that wait: the second of
    # them, or that which has no slot. Nobody's entry is written in their place.
    tier = Tier(8, 4)
    guarded = torch.full((1 + len(tier.state.table),), ABSENT, dtype=torch.int32, device=DEVICE)
    guarded[0] = 99
    tier.state = tier.upkeep.tensors = tier.state._replace(table=guarded[1:])
    tier.own(list(range(64, 64 + num_owned)), [0] * num_owned)
    tier.state.kv.fill_(0)
    tier.ask([40])
    tier.upkeep.close()
    tier.ask([3, 41, 4])
    tier.drop([1])
    tier.upkeep.fill()
    assert not tier.state.kv.any()
    tier.upkeep.commit()
    assert len(tier.free) == 8 - num_owned
    tier.upkeep.close()
    comes = {3} if num_owned else {3, 4}
    assert set(tier.batch) == tier.pending == comes
    tier.upkeep.fill()
    tier.upkeep.commit()
    assert set(tier.resident) == comes | set(range(64, 64 + num_owned))
    assert sorted([*tier.free, *tier.resident.values()]) == list(range(8))
    written = tier.state.kv.view(8, -1).any(dim=1).cpu().nonzero().flatten().tolist()
    assert written == sorted(tier.resident[unit] for unit in comes)
    assert guarded[0] == 99


def test_invalid_slabs_leave_whole_and_others_stay() -> None:
    tier = Tier(4 * SLAB_UNITS, 4)
    units = torch.randperm(4 * SLAB_UNITS).tolist()
    tier.own(units, [0] * len(units))
    tier.drop([3, 0])
    stayed = {unit for unit in units if unit // SLAB_UNITS in (1, 2)}
    assert set(tier.resident) == stayed
    assert sorted([*tier.free, *tier.resident.values()]) == list(range(4 * SLAB_UNITS))


def test_what_no_kernel_takes_is_refused() -> None:
    step = torch.zeros(1, dtype=torch.int32)
    host = HostMemory(4096, GEOMETRY.kv_bytes, 2)
    with pytest.raises(ShapeError, match="batches of 5 units for 4 slots"):
        TierUpkeep(GEOMETRY, host, 4, 5, step)
    with pytest.raises(ShapeError, match="65 slots over 64 units"):
        TierUpkeep(GEOMETRY, host, 65, 5, step)
    with pytest.raises(ShapeError, match="multiples of 16"):
        TierUpkeep(GEOMETRY, HostMemory(4100, GEOMETRY.kv_bytes, 2), 4, 1, step)
    with pytest.raises(ShapeError, match=r"copies of \(3, 2, 1, 2, 16, 16\)"):
        TierUpkeep(GEOMETRY, host, 4, 1, step, torch.zeros(3, 2, 1, 2, 16, 16).bfloat16())
