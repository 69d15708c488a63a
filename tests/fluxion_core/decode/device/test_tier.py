"""The device tier beside a shadow of its tables, while sequences come, go, and share text.

The steps' kernels are played in plain torch: they look units up, stamp what is there, and ask for
what is not. The shadow knows the rules and no more: where any choice is right, it takes over the
tier's, once it has seen that it is one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.device.pinned import RegisteredStore
from fluxion_core.decode.device.tier import DeviceTier, TierState
from fluxion_core.decode.device.window_copies import WindowCopies
from fluxion_core.decode.device.windows import DeviceWindows
from fluxion_core.errors import CapacityError, FluxionError, ShapeError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kernels.tier import constants, upkeep
from fluxion_core.kernels.window_fill.triton import fill_window
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.step_append import StepAppend
from fluxion_core.kvstore.store import HostKvStore

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ABSENT, PENDING = constants.ABSENT.value, constants.PENDING.value
NOTHING = upkeep.NOTHING.value
GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=1, head_dim=16, slab_tokens=128)
LAYER_HEADS = 2
SLAB_UNITS = LAYER_HEADS * GEOMETRY.slab_blocks
WINDOW = WindowSpec(sink_tokens=16, recent_tokens=128)
MAX_TOKENS = 500
STEPS = 2000 if DEVICE.type == "cuda" else 240


def settle() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class LateTier(DeviceTier):
    """Fills end when the test says so; every other one reads the store not before then."""

    ends: Callable[[], bool] = staticmethod(lambda: True)
    begun = ended = 0
    """Batches so far."""

    def _fill(self) -> None:
        self.state = TierState.FILLING
        self.begun += 1
        if self.begun % 2:
            settle()
            self._launch_fill()

    def _has_filled(self) -> bool:
        if not self.ends():
            return False
        settle()
        if self.begun % 2 == 0:
            self._launch_fill()
            settle()
        self.ended += 1
        return True


class SlowTier(DeviceTier):
    """Fills read the store at once, and end when the test says so."""

    ends: Callable[[], bool] = staticmethod(lambda: True)
    begun = ended = 0
    """Batches so far."""

    def _fill(self) -> None:
        super()._fill()
        self.begun += 1

    def _has_filled(self) -> bool:
        settle()
        has_filled = self.ends() and super()._has_filled()
        self.ended += has_filled
        return has_filled


@dataclass
class Running:
    """A sequence that takes part in steps."""

    sequence: SequenceKv
    tokens: list[int]

    @property
    def region(self) -> range:
        return WINDOW.retrieval_region(self.sequence.num_tokens + 1)

    def units(self) -> list[int]:
        """Arena blocks of the region, all layers and heads."""
        return units_of(self.sequence, self.region)


@dataclass
class Arriving:
    """A prompt that is being written."""

    sequence: SequenceKv
    tokens: list[int]
    queued: int = WINDOW.sink_tokens
    """Tokens up to which the tier has queued it."""
    is_anew: bool = False
    """Its hand-off has begun anew since."""

    def __post_init__(self) -> None:
        self.written = [self.sequence.kv_from_token] * GEOMETRY.num_layers

    @property
    def region(self) -> range:
        return WINDOW.retrieval_region(len(self.tokens))

    @property
    def is_whole(self) -> bool:
        return min(self.written) == len(self.tokens)

    def whole_units(self) -> list[int]:
        """Arena blocks of the region that are written."""
        end = min(self.written) // BLOCK_TOKENS * BLOCK_TOKENS
        return units_of(self.sequence, range(self.region.start, min(self.region.stop, end)))

    def newly_queued(self) -> list[int]:
        """Arena blocks of the slabs that are whole and were not, and of the whole region's rest."""
        if min(self.written) < self.queued or self.is_anew:
            self.queued = self.region.start
        self.is_anew = False
        end = min(self.region.stop, *self.written)
        if end < self.region.stop:
            end = end // GEOMETRY.slab_tokens * GEOMETRY.slab_tokens
        begin, self.queued = self.queued, max(self.queued, end)
        return units_of(self.sequence, range(begin, self.queued))


def units_of(sequence: SequenceKv, tokens: range) -> list[int]:
    """Arena blocks of these tokens, all layers and heads."""
    return [
        (sequence.slabs[block // GEOMETRY.slab_blocks] * LAYER_HEADS + head) * GEOMETRY.slab_blocks
        + block % GEOMETRY.slab_blocks
        for block in range(tokens.start // BLOCK_TOKENS, tokens.stop // BLOCK_TOKENS)
        for head in range(LAYER_HEADS)
    ]


class World:
    """A store, a tier over it, and what a step does to both."""

    def __init__(
        self,
        *,
        num_slabs: int,
        num_slots: int,
        seed: int = 0,
        tier_type: type[DeviceTier] = LateTier,
        num_rows: int = 3,
    ) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        size = num_slabs * (GEOMETRY.slab_bytes // 4096 + 1) * 4096
        self.store = HostKvStore(GEOMETRY, size, model_key=b"")
        self.registered = RegisteredStore(self.store) if DEVICE.type == "cuda" else None
        self.step = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        stream = torch.cuda.Stream(DEVICE) if DEVICE.type == "cuda" else None
        self.windows = DeviceWindows(GEOMETRY, WINDOW, 3, DEVICE)
        copies = WindowCopies(self.windows, num_rows)
        size = num_slots * GEOMETRY.block_bytes
        self.tier = tier_type(self.store, size, self.step, stream, copies)
        self.running: dict[int, Running] = {}

    def close(self) -> None:
        self.tier.close()
        settle()
        if self.registered is not None:
            self.registered.close()

    # What happens to sequences.

    def payload(self, tokens: int) -> bytes:
        shape = (GEOMETRY.num_kv_heads, ceil_div(tokens, BLOCK_TOKENS), 2, BLOCK_TOKENS, 16)
        kv = torch.randn(shape, generator=self.generator).bfloat16()
        if tokens % BLOCK_TOKENS:
            kv[:, -1, :, tokens % BLOCK_TOKENS :] = 0
        return kv.view(torch.uint8).numpy().tobytes()

    def come(self, slot: int, tokens: list[int]) -> None:
        """Store what is not stored yet of a prompt, and join."""
        arriving = self.begin(tokens)
        for layer in range(GEOMETRY.num_layers):
            self.write(arriving, layer, len(tokens))
        self.join(slot, arriving)

    def begin(self, tokens: list[int]) -> Arriving:
        return Arriving(self.store.reserve(tokens, MAX_TOKENS - len(tokens)), list(tokens))

    def write(self, arriving: Arriving, layer: int, count: int) -> None:
        """Write a layer's next tokens, at most so many."""
        first = arriving.written[layer]
        count = min(count, len(arriving.tokens) - first)
        if count:
            arriving.sequence.write_blocks(layer, first, count, self.payload(count))
            arriving.written[layer] += count

    def arrive(self, *arriving: Arriving) -> None:
        self.tier.arrive({one.sequence: one.region for one in arriving})

    def join(self, slot: int, arriving: Arriving) -> None:
        sequence, tokens = arriving.sequence, arriving.tokens
        sequence.commit()
        self.running[slot] = Running(sequence, list(tokens))
        table, tensors = sequence.slab_table, self.windows.tensors
        fill_window(GEOMETRY, WINDOW, table, sequence.num_tokens, slot, tensors)
        settle()
        self.tier.join(slot, sequence, self.running[slot].region)

    def append(self, slot: int, count: int) -> None:
        running = self.running[slot]
        added = StepAppend(GEOMETRY, [running.sequence], [count])
        for layer in range(GEOMETRY.num_layers):
            key, value = torch.randn(2, count, 1, 16, generator=self.generator)
            added.append(layer, key, value)
            for token in range(count):
                entry = WINDOW.slot_index(running.sequence.num_tokens + token)
                self.windows.tensors[layer, 0, slot, :, entry] = key[token].to(DEVICE).bfloat16()
                self.windows.tensors[layer, 1, slot, :, entry] = value[token].to(DEVICE).bfloat16()
        added.advance([True])
        settle()
        running.tokens += [self.random.randrange(9) for _ in range(count)]

    def go(self, slot: int, *, keep: bool) -> list[int]:
        """Leave; returns the tokens."""
        running = self.running.pop(slot)
        if keep:
            running.sequence.keep(running.tokens[running.sequence.num_prompt_tokens :])
        self.tier.leave(slot)
        running.sequence.release()
        return running.tokens

    @property
    def queued(self) -> set[int]:
        """Units of ranges that the last batch might have taken."""
        queues = self.tier._upkeep.queues
        ranges = queues.ranges[: int(queues.num_ranges[0])].tolist()
        return {
            (slab * LAYER_HEADS + head) * GEOMETRY.slab_blocks + block
            for slab, begin, end, _ in ranges
            for head in range(LAYER_HEADS)
            for block in range(begin, end)
        }

    # What a step's kernels do.

    def arena_unit(self, unit: int) -> Tensor:
        kv = self.store.slab_kv(unit // SLAB_UNITS).view(SLAB_UNITS, -1)
        return kv[unit % SLAB_UNITS].view(torch.uint8)

    def slot_unit(self, slot: int) -> Tensor:
        kv = self.tier._upkeep.tensors.kv.view(-1, GEOMETRY.block_bytes)
        return kv[slot].cpu()

    def select(self, units: list[int]) -> tuple[list[int], list[int]]:
        """Units that are resident, whose copies are right, and those that are asked for now."""
        tier, step = self.tier, int(self.step.item())
        table, asked = tier.table.cpu(), []
        resident = [unit for unit in units if table[unit] >= 0]
        for unit in resident:
            slot = int(table[unit])
            assert torch.equal(self.slot_unit(slot), self.arena_unit(unit))
            tier.stamps[slot] = step
        for unit in units:
            if table[unit] == ABSENT:
                place = int(tier.request_count.item())
                tier.request_count.add_(1)
                if place < len(tier.requests):
                    tier.table[unit] = PENDING
                    tier.requests[place] = unit
                    asked.append(unit)
        return resident, asked


class Shadow:
    """Tables in dictionaries, and the rules by which they change."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.slot_of: dict[int, int] = {}
        self.stamp_of: dict[int, int] = {}
        self.waiting: list[int] = []
        """Units that have been asked for, or NOTHING."""
        self.batch: list[tuple[int, int]] = []
        """Units that are being filled, or NOTHING, and their slots."""
        self.generation_of: dict[int, int] = {}
        self.filled = self.evicted = 0
        self.given_up = self.pushed_by_ranges = 0

    @property
    def free(self) -> int:
        return self.world.tier.num_slots - len(self.slot_of) - len(self.batch)

    def look_at(self, units: list[int]) -> set[int]:
        """Slabs of a region that hold something new."""
        stale = set()
        for slab in {unit // SLAB_UNITS for unit in units}:
            generation = self.world.store.generation(slab)
            if self.generation_of.setdefault(slab, generation) != generation:
                stale.add(slab)
            self.generation_of[slab] = generation
        return stale

    def rounded_age(self, unit: int) -> int:
        """Steps since it was selected, from 512 on to a 64th."""
        age = int(self.world.step.item()) - self.stamp_of[unit]
        unknown_bits = max(0, age.bit_length() - 7) if age >= 512 else 0
        return age >> unknown_bits << unknown_bits

    def enter_batch(self) -> None:
        step = int(self.world.step.item())
        for unit, slot in self.batch:
            if unit != NOTHING:
                self.slot_of[unit], self.stamp_of[unit] = slot, step
        self.batch = []

    def drop(self, slabs: set[int]) -> None:
        for unit in [unit for unit in self.slot_of if unit // SLAB_UNITS in slabs]:
            del self.slot_of[unit], self.stamp_of[unit]
        self.batch = [(NOTHING if u // SLAB_UNITS in slabs else u, slot) for u, slot in self.batch]
        self.waiting = [NOTHING if unit // SLAB_UNITS in slabs else unit for unit in self.waiting]

    def stamp(self, units: list[int]) -> None:
        for unit in units:
            self.stamp_of[unit] = int(self.world.step.item())

    def close(self) -> None:
        """Take over a batch, if it keeps the rules."""
        tier, free, asked, queued = self.world.tier, self.free, self.waiting, self.world.queued
        ages = [int(self.world.step.item()) - stamp for stamp in self.stamp_of.values()]
        taken = asked[: free + sum(age > 0 for age in ages)]
        old = sum(age >= upkeep.OLD_AGE.value for age in ages)
        tensors = tier._upkeep.tensors
        size = int(tensors.words[upkeep.BATCH.value].item())
        units, slots = tensors.batch[:size].tolist(), tensors.request_slots[:size].tolist()
        assert units[: len(taken)] == taken
        assert len(set(units) - {NOTHING}) == size - units.count(NOTHING)
        room = max(min(len(tier.requests), free + old) - len(taken), 0)
        absent = queued - set(self.slot_of) - set(taken)
        assert set(units[len(taken) :]) <= absent
        assert size == len(taken) + min(room, len(absent))

        table = tier.table.tolist()
        gone = {unit for unit, slot in self.slot_of.items() if table[unit] != slot}
        assert all(table[unit] == ABSENT for unit in gone)
        assert len(gone) == max(0, size - free)
        key_of = {unit: self.rounded_age(unit) for unit in self.slot_of}
        stayed = [key_of[unit] for unit in self.slot_of if unit not in gone]
        assert not gone or min(key_of[unit] for unit in gone) >= max([1, *stayed])
        for unit in gone:
            del self.slot_of[unit], self.stamp_of[unit]
        self.batch, self.waiting = list(zip(units, slots, strict=True)), []
        self.given_up += len(asked) - len(taken)
        self.pushed_by_ranges += len(gone) - max(0, len(taken) - free)
        self.filled, self.evicted = self.filled + size, self.evicted + len(gone)

    def compare(self) -> None:
        """The tier's tables are these, and every slot is in one place."""
        tier, tensors = self.world.tier, self.world.tier._upkeep.tensors
        table = {u: slot for u, slot in enumerate(tier.table.tolist()) if slot != ABSENT}
        coming = [*self.waiting, *(unit for unit, _ in self.batch)]
        assert len(set(coming) - {NOTHING}) == len(coming) - coming.count(NOTHING)
        assert table == self.slot_of | dict.fromkeys(set(coming) - {NOTHING}, PENDING)
        assert tier.requests[: len(self.waiting)].tolist() == self.waiting
        assert min(tier.request_count.item(), len(tier.requests)) == len(self.waiting)
        owner = {slot: u for slot, u in enumerate(tensors.owner.tolist()) if u != -1}
        assert owner == {slot: unit for unit, slot in self.slot_of.items()}
        stamps = tier.stamps.tolist()
        assert {unit: stamps[slot] for unit, slot in self.slot_of.items()} == self.stamp_of
        free = tensors.free[: int(tensors.words[upkeep.FREE.value].item())].tolist()
        filling = [slot for _, slot in self.batch]
        assert sorted([*free, *owner, *filling]) == list(range(tier.num_slots))
        statistics, unit = tier.statistics(), GEOMETRY.block_bytes
        assert statistics.filled_bytes == self.filled * unit
        assert statistics.evicted_bytes == self.evicted * unit


@pytest.fixture
def worlds() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(**options: Any) -> World:
        made.append(World(**options))
        return made[-1]

    yield make
    for world in made:
        world.close()


def run_step(world: World, units: list[int]) -> tuple[list[int], list[int]]:
    """One step that selects these units; see World.select."""
    settle()
    world.tier.before_step()
    settle()
    world.step += 1
    resident, asked = world.select(units)
    settle()
    world.tier.after_step(has_requests=len(resident) < len(units))
    settle()
    return resident, asked


def test_hits_stay_right_while_sequences_come_and_go_and_share(worlds) -> None:
    world = worlds(num_slabs=18, num_slots=40, seed=3)
    tier, shadow, chance = world.tier, Shadow(world), world.random.random
    tier.ends = lambda: chance() < 0.4
    texts: list[list[int]] = []
    coming: list[Arriving] = []
    kinds = ["shared", "tails", "stale", "stale in a batch", "stale and waiting", "evictions"]
    seen = dict.fromkeys([*kinds, "cut", "waiting", "one after the other"], 0)
    seen |= dict.fromkeys(["failed", "restarted", "arrived", "come ahead"], 0)

    def follow_batches(begun: int, ended: int) -> None:
        if tier.ended > ended:
            shadow.enter_batch()
        if tier.begun > begun:
            evicted = shadow.evicted
            whole = {unit for arriving in coming for unit in arriving.whole_units()}
            in_steps = {unit for running in world.running.values() for unit in running.units()}
            assert world.queued <= in_steps | whole
            seen["come ahead"] += bool(world.queued - in_steps)
            shadow.close()
            seen["evictions"] += shadow.evicted > evicted
            seen["cut"] += int(tier._upkeep.queues.counters[upkeep.RANGES_CUT.value])
        # What waits, waits for a batch.
        assert tier.state is TierState.FILLING or not set(shadow.waiting) - {NOTHING}
        shadow.compare()

    def text() -> list[int]:
        tokens = [world.random.randrange(9) for _ in range(world.random.randrange(40, 400))]
        if texts and chance() < 0.6:
            before = world.random.choice(texts)
            end = len(before) if chance() < 0.5 else world.random.randrange(len(before))
            tokens = (before[:end] + tokens)[: max(end + 1, 350)]
        return tokens

    def go_on(arriving: Arriving) -> None:
        """Write some more of a prompt, or begin anew, or give it up."""
        if chance() < 0.08:
            arriving.sequence.restart()
            seen["restarted"] += arriving.queued > WINDOW.sink_tokens
            arriving.is_anew = max(arriving.written) > arriving.sequence.kv_from_token
            arriving.__post_init__()
        for layer in range(GEOMETRY.num_layers):
            world.write(arriving, layer, BLOCK_TOKENS * world.random.randrange(5))
        if chance() < 0.08:
            arriving.sequence.release()
            coming.remove(arriving)
            seen["failed"] += arriving.queued > WINDOW.sink_tokens

    for number in range(STEPS):
        stale: set[int] = set()
        if len(coming) < 2 and chance() < 0.3:
            with suppress(CapacityError):
                coming.append(world.begin(text()))
        for arriving in list(coming):
            go_on(arriving)
        world.arrive(*coming)
        for arriving in coming:
            stale |= shadow.look_at(arriving.newly_queued())
        whole = next((arriving for arriving in coming if arriving.is_whole), None)
        if len(world.running) < 3 and whole is not None:
            coming.remove(whole)
            slot = next(slot for slot in range(3) if slot not in world.running)
            world.join(slot, whole)
            stale |= shadow.look_at(world.running[slot].units())
            seen["arrived"] += 1
        if len(world.running) < 3 and chance() < 0.3:
            slot = next(slot for slot in range(3) if slot not in world.running)
            try:
                world.come(slot, text())
            except CapacityError:
                assert slot not in world.running
            else:
                stale |= shadow.look_at(world.running[slot].units())
                seen["shared"] += world.running[slot].sequence.shared_tokens >= 128
                seen["tails"] += world.running[slot].sequence.shared_tokens % 128 != 0
        for slot in list(world.running):
            running = world.running[slot]
            if chance() < 0.1 or len(running.tokens) > MAX_TOKENS - 16:
                texts = [*texts[-5:], world.go(slot, keep=chance() < 0.7)]
            else:
                world.append(slot, world.random.randrange(1, 9))
                tier.follow(slot, running.sequence, running.region.stop)
                stale |= shadow.look_at(running.units())
        settle()

        before = tier.begun, tier.ended
        seen["stale in a batch"] += any(unit // SLAB_UNITS in stale for unit, _ in shadow.batch)
        seen["stale and waiting"] += any(unit // SLAB_UNITS in stale for unit in shadow.waiting)
        seen["stale"] += any(unit // SLAB_UNITS in stale for unit in shadow.slot_of)
        shadow.drop(stale)
        tier.before_step()
        settle()
        seen["one after the other"] += tier.begun > before[0]
        follow_batches(*before)

        # Now and then many have gone by. Half of the time they select nearly everything.
        world.step += 50 if chance() < 0.1 else 1
        share = 0.1 if number % 80 < 40 else 0.97
        wanted = {unit for running in world.running.values() for unit in running.units()}
        some = [unit for unit in sorted(wanted) if chance() < share]
        resident, asked = world.select(some)
        assert resident == [unit for unit in some if unit in shadow.slot_of]
        shadow.stamp(resident)
        seen["waiting"] += bool(asked) and tier.state is TierState.FILLING
        shadow.waiting += asked
        settle()
        before = tier.begun, tier.ended
        tier.after_step(has_requests=len(resident) < len(some))
        settle()
        follow_batches(*before)
        statistics = tier.statistics()
        come = statistics.window_bytes + statistics.link_bytes
        assert tier.state is TierState.FILLING or come == statistics.filled_bytes
    seen["windows"] = statistics.window_bytes
    # Otherwise nothing has been tested.
    seen |= {"given up": shadow.given_up, "pushed by ranges": shadow.pushed_by_ranges}
    assert all(seen.values()), seen


def test_a_region_comes_over_several_batches_while_there_is_room(worlds) -> None:
    # By hand: blocks 1 to 11 of two layers are 22 units; a batch takes 64 / 8 = 8.
    world = worlds(num_slabs=4, num_slots=64)
    world.come(0, list(range(320)))
    units = world.running[0].units()
    assert len(units) == 22
    sizes = []
    for _ in range(3):
        run_step(world, [])
        sizes.append(world.tier.statistics().held_bytes // GEOMETRY.block_bytes)
    assert sizes == [8, 16, 22]
    assert run_step(world, units) == (units, [])
    assert int(world.tier._upkeep.queues.num_ranges[0]) == 0
    # One block more, as soon as it is in the region.
    world.append(0, 16)
    running = world.running[0]
    world.tier.follow(0, running.sequence, running.region.stop)
    run_step(world, [])
    assert run_step(world, running.units()) == (running.units(), [])
    assert world.tier.statistics().filled_bytes == 24 * GEOMETRY.block_bytes


def drained(world: World) -> World:
    """A world in which a sequence's region is resident, and its eleventh token moves the window."""
    world.come(0, list(range(340)))
    for _ in range(5):
        run_step(world, [])
    assert run_step(world, world.running[0].units())[1] == []
    return world


def move_window(world: World, slot: int, count: int) -> list[int]:
    """Append tokens, as steps do; returns the units of the last block that left the window."""
    running = world.running[slot]
    for _ in range(count):
        world.tier.follow(slot, running.sequence, running.region.stop)
        world.append(slot, 1)
    world.tier.follow(slot, running.sequence, running.region.stop)
    return running.units()[-LAYER_HEADS:]


@pytest.mark.parametrize("is_asked_for", [False, True])
@pytest.mark.parametrize("tier_type", [LateTier, SlowTier])
def test_what_leaves_a_window_comes_from_there_and_not_from_the_ring_that_goes_on(
    worlds, tier_type, is_asked_for: bool
) -> None:
    # A batch of 20 units takes all of both times: of more, a GPU takes any.
    # The store's bytes are changed, so that one can tell. Before the fill, the ring goes round.
    world = drained(worlds(num_slabs=10, num_slots=160, tier_type=tier_type))
    before = world.tier.statistics()
    tier = world.tier
    tier.ends = lambda: False
    units = move_window(world, 0, 11)
    expected = [world.arena_unit(unit).clone() for unit in units]
    for unit in units:
        world.arena_unit(unit).fill_(7)
    run_step(world, units if is_asked_for else [])
    move_window(world, 0, 140)
    for _ in range(2):
        run_step(world, [])
    tier.ends = lambda: True
    tier.before_step()
    settle()
    for unit, copy in zip(units, expected, strict=True):
        assert torch.equal(world.slot_unit(int(tier.table[unit])), copy)
    while tier.state is not TierState.IDLE:
        run_step(world, [])
    after = tier.statistics()
    # By hand: two units a block; three of eight that left while that batch was filled had room.
    assert after.window_bytes - before.window_bytes == 4 * LAYER_HEADS * GEOMETRY.block_bytes
    assert after.link_bytes - before.link_bytes == 5 * LAYER_HEADS * GEOMETRY.block_bytes


def test_what_has_left_a_window_long_ago_comes_from_the_store(worlds) -> None:
    world = drained(worlds(num_slabs=4, num_slots=64))
    before = world.tier.statistics()
    # By hand: at once a block more than the ring keeps of what leaves it; then one that it keeps.
    world.append(0, 27)
    move_window(world, 0, 0)
    units = world.running[0].units()
    for _ in range(3):
        run_step(world, [])
    assert run_step(world, units) == (units, [])
    after = world.tier.statistics()
    assert after.window_bytes - before.window_bytes == LAYER_HEADS * GEOMETRY.block_bytes
    assert after.link_bytes - before.link_bytes == LAYER_HEADS * GEOMETRY.block_bytes


def test_a_copy_of_what_left_a_window_is_not_taken_for_the_next_text_of_its_slab(worlds) -> None:
    # A block leaves, its sequence too, and the slab has another text before a batch is closed.
    world = drained(worlds(num_slabs=4, num_slots=64))
    tier = world.tier
    units = move_window(world, 0, 11)
    world.go(0, keep=False)
    world.come(0, [5] * 403)
    assert set(units) <= set(world.running[0].units())
    for _ in range(5):
        run_step(world, [])
    # Every hit is looked at.
    units = world.running[0].units()
    assert run_step(world, units) == (units, [])
    assert tier.statistics().window_bytes == 0


def test_a_prompt_is_copied_while_it_is_written_whole_slabs_of_all_layers(worlds) -> None:
    # By hand: slabs have 8 blocks, the first is the sink's; 22 are the region's, up to token 368.
    world = worlds(num_slabs=8, num_slots=64)
    tier, arriving = world.tier, world.begin(list(range(500)))
    held = []
    for ends in ((256, 64), (256, 128), (320, 352), (384, 383), (500, 500)):
        for layer, end in enumerate(ends):
            world.write(
                arriving, layer, end // 16 * 16 - arriving.written[layer] if end < 500 else end
            )
        for _ in range(8):
            world.arrive(arriving)
            tier.advance()
            settle()
        held.append(tier.statistics().held_bytes // GEOMETRY.block_bytes)
    assert held == [0, 14, 30, 44, 44]
    world.join(0, arriving)
    world.arrive()
    units = world.running[0].units()
    assert len(units) == 44
    run_step(world, units)
    assert run_step(world, units) == (units, [])
    assert tier.statistics().filled_bytes == 44 * GEOMETRY.block_bytes


def test_a_prompt_that_is_written_anew_is_copied_anew_before_it_joins(worlds) -> None:
    # All is written again between two looks: what is whole is never seen to be less.
    world = worlds(num_slabs=8, num_slots=64)
    tier, arriving = world.tier, world.begin(list(range(500)))
    for turn in range(2):
        for layer in range(GEOMETRY.num_layers):
            world.write(arriving, layer, 500)
        for _ in range(8):
            world.arrive(arriving)
            tier.advance()
            settle()
        assert tier.statistics().filled_bytes == (turn + 1) * 44 * GEOMETRY.block_bytes
        if not turn:
            arriving.sequence.restart()
            arriving.__post_init__()
    world.join(0, arriving)
    world.arrive()
    units = world.running[0].units()
    assert run_step(world, units) == (units, [])


def test_a_prompt_that_fails_leaves_nothing_queued(worlds) -> None:
    world = worlds(num_slabs=8, num_slots=64)
    tier, arriving = world.tier, world.begin(list(range(500)))
    for layer in range(GEOMETRY.num_layers):
        world.write(arriving, layer, 256)
    world.arrive(arriving)
    arriving.sequence.release()
    # Before the tier hears of it, and afterwards.
    for others in ((arriving,), ()):
        world.arrive(*others)
        for _ in range(3):
            tier.advance()
            settle()
    assert tier.statistics().filled_bytes == 0
    assert tier.state is TierState.IDLE


@pytest.mark.parametrize("tier_type", [LateTier, SlowTier])
@pytest.mark.parametrize("ends", ["restarted", "released"])
def test_what_another_hand_off_writes_is_not_taken_for_what_was_copied_of_the_first(
    worlds, tier_type, ends: str
) -> None:
    world = worlds(num_slabs=4, num_slots=64, tier_type=tier_type)
    tier, arriving = world.tier, world.begin(list(range(500)))
    for layer in range(GEOMETRY.num_layers):
        world.write(arriving, layer, 256)
    for _ in range(2):
        # A batch has come, another is on its way, and a range waits.
        world.arrive(arriving)
        tier.advance()
        settle()
        tier.ends = lambda: False
    if ends == "restarted":
        arriving.sequence.restart()
        arriving.__post_init__()
    else:
        arriving.sequence.release()
        arriving = world.begin(list(range(1000, 1500)))
    for layer in range(GEOMETRY.num_layers):
        world.write(arriving, layer, 256)
    world.arrive(arriving)
    tier.advance()
    settle()
    tier.ends = lambda: True
    for layer in range(GEOMETRY.num_layers):
        world.write(arriving, layer, 500)
    world.join(0, arriving)
    world.arrive()
    units = world.running[0].units()
    # Every hit is looked at.
    for _ in range(9):
        run_step(world, units)
    assert run_step(world, units) == (units, [])


def test_a_full_tier_gives_up_regions_and_follows_what_is_selected(worlds) -> None:
    # By hand: of 22 units 16 fit; what is missing then takes the place of the least recent.
    world = worlds(num_slabs=4, num_slots=16)
    world.come(0, list(range(320)))
    units = world.running[0].units()
    for _ in range(12):
        run_step(world, [])
    assert int(world.tier._upkeep.queues.num_ranges[0]) == 0
    table = world.tier.table.tolist()
    resident = [unit for unit in units if table[unit] >= 0]
    missing = [unit for unit in units if unit not in resident]
    assert len(resident) == 16
    assert world.tier.statistics().evicted_bytes == 0

    assert run_step(world, [*resident[2:], *missing[:2]])[1] == missing[:2]
    assert run_step(world, missing[:2])[0] == missing[:2]
    assert world.tier.statistics().evicted_bytes == 2 * GEOMETRY.block_bytes
    assert [unit for unit in resident if world.tier.table[unit] >= 0] == resident[2:]


def test_exact_hits_what_fits_and_fills_no_more(worlds) -> None:
    # By hand: of 22 units 16 fit, two a batch; steps then select all, and the same 16 are hit.
    world = worlds(num_slabs=4, num_slots=16)
    world.come(0, list(range(320)))
    units = world.running[0].units()
    for step in range(9):
        assert len(run_step(world, units)[0]) == min(2 * step, 16)
    resident, asked = run_step(world, units)
    assert len(asked) == 2
    for _ in range(3):
        # Each of those that missed may be asked for in turn.
        assert run_step(world, units) == (resident, asked)
        assert world.tier.state is TierState.FILLING
    statistics = world.tier.statistics()
    assert statistics.filled_bytes == statistics.held_bytes == 16 * GEOMETRY.block_bytes
    assert statistics.evicted_bytes == 0
    # These wait, and are given up before the next step.
    assert (world.tier.table == PENDING).nonzero().flatten().tolist() == sorted(asked)


def test_beside_steps_of_a_fill_what_the_newest_has_selected_stays(worlds) -> None:
    # By hand: three slots. The fourth unit takes that of the third; while it comes, the first and
    # the second are hit, and then the first alone: the fifth takes the second's.
    world = worlds(num_slabs=4, num_slots=3, tier_type=SlowTier)
    world.come(0, list(range(320)))
    first, second, third, fourth, fifth = world.running[0].units()[:5]
    tier = world.tier
    # No ranges.
    tier.leave(0)
    for unit in (first, second, third):
        run_step(world, [unit])
    assert run_step(world, [first, second, third])[0] == [first, second, third]
    run_step(world, [first, second, fourth])
    tier.ends = lambda: False
    for _ in range(3):
        run_step(world, [first, second])
    tier.ends = lambda: True
    assert run_step(world, [first, fourth, fifth]) == ([first, fourth], [fifth])
    assert run_step(world, [first, second, fourth, fifth]) == ([first, fourth, fifth], [second])


def test_newcomers_take_what_a_sequence_that_left_long_ago_has_left(worlds) -> None:
    # By hand: 22 units of each of two sequences fill the tier; one of them goes on, and its
    # steps select 4 of its units; 64 steps later a third comes.
    world = worlds(num_slabs=12, num_slots=44)
    world.come(0, list(range(320)))
    world.come(1, list(range(1, 321)))
    stays, left = world.running[0].units(), world.running[1].units()
    for _ in range(11):
        run_step(world, [])
    assert run_step(world, [*stays, *left]) == ([*stays, *left], [])
    world.go(1, keep=True)
    since = int(world.step.item())

    def come(first_token: int) -> list[int]:
        world.come(1, list(range(first_token, first_token + 320)))
        return world.running[1].units()

    # Too early: nothing of it comes.
    come(1000)
    run_step(world, stays)
    run_step(world, stays)
    assert world.tier.statistics().filled_bytes == 44 * GEOMETRY.block_bytes
    world.go(1, keep=False)
    while int(world.step.item()) < since + upkeep.OLD_AGE.value:
        assert run_step(world, stays) == (stays, [])
    comes = come(2000)
    for _ in range(6):
        assert run_step(world, stays) == (stays, [])
    assert run_step(world, [*stays, *comes]) == ([*stays, *comes], [])
    assert (world.tier.table[left] == ABSENT).all()
    assert world.tier.statistics().evicted_bytes == 22 * GEOMETRY.block_bytes


def test_a_step_that_misses_nothing_makes_a_batch_of_regions_or_none(worlds) -> None:
    world = worlds(num_slabs=4, num_slots=64)
    world.come(0, list(range(320)))
    states = []
    for _ in range(5):
        settle()
        world.tier.before_step()
        settle()
        world.tier.after_step(has_requests=False)
        states.append(world.tier.state)
    # By hand: 22 units, 8 a batch.
    assert states == [TierState.FILLING] * 3 + [TierState.IDLE] * 2


def test_a_batch_follows_a_batch_with_no_step_between(worlds) -> None:
    # By hand: eight units a batch, no ranges. While the first is filled three steps ask for six
    # more, and one for nothing; they are the second, which begins before the next step.
    world = worlds(num_slabs=4, num_slots=64, tier_type=SlowTier)
    world.come(0, list(range(320)))
    units, tier = world.running[0].units(), world.tier
    tier.leave(0)
    assert run_step(world, units[:3]) == ([], units[:3])
    tier.ends = lambda: False
    for number in range(3, 9, 2):
        assert run_step(world, units[: number + 2]) == ([], units[number : number + 2])
    run_step(world, [])
    assert (tier.begun, tier.ended) == (1, 0)
    tier.ends = lambda: True
    tier.before_step()
    settle()
    assert (tier.begun, tier.ended) == (2, 1)
    tier.ends = lambda: False
    assert run_step(world, units[:9]) == (units[:3], [])
    tier.ends = lambda: True
    assert run_step(world, units[:9]) == (units[:9], [])
    assert (tier.begun, tier.ended) == (3, 2)
    assert tier.statistics().filled_bytes == 9 * GEOMETRY.block_bytes
    for _ in range(2):
        assert run_step(world, units[:9]) == (units[:9], [])
    assert tier.state is TierState.IDLE
    assert tier.begun == 3


def test_regions_come_batch_after_batch_though_no_step_misses_anything(worlds) -> None:
    # By hand: 22 units, eight a batch, each begun before the step after the last one's.
    world = worlds(num_slabs=4, num_slots=64)
    world.come(0, list(range(320)))
    run_step(world, [])
    assert world.tier.begun == 1
    for begun in (2, 3, 3):
        settle()
        world.tier.before_step()
        assert world.tier.begun == begun


def test_what_comes_into_a_region_of_a_slab_taken_anew_is_not_dropped_with_the_old(worlds) -> None:
    # By hand: a batch of the old text ends before the step that drops it; the next batch, of the
    # new text's region, begins before that step too.
    world = worlds(num_slabs=4, num_slots=64, tier_type=SlowTier)
    tier = world.tier
    world.come(0, list(range(320)))
    units = world.running[0].units()
    run_step(world, units[:3])
    world.go(0, keep=False)
    world.come(0, [5] * 320)
    assert world.running[0].units() == units
    for _ in range(3):
        assert tier.state is TierState.FILLING
        run_step(world, [])
    assert run_step(world, units) == (units, [])


def test_one_slot_is_a_tier(worlds) -> None:
    world = worlds(num_slabs=4, num_slots=1)
    world.come(0, list(range(320)))
    first, second = world.running[0].units()[:2]
    run_step(world, [first])
    for _ in range(3):
        assert run_step(world, [first, second]) == ([first], [second])
    # Asked for beside a batch of nothing, it comes with the next one.
    assert run_step(world, [second]) == ([], [second])
    assert run_step(world, [second]) == ([], [])
    assert run_step(world, [first, second]) == ([second], [first])
    assert world.tier.statistics().held_bytes == GEOMETRY.block_bytes


def test_copies_that_are_under_way_when_their_slab_is_taken_anew_do_not_count(worlds) -> None:
    world = worlds(num_slabs=4, num_slots=64, tier_type=SlowTier)
    tier = world.tier
    world.come(0, list(range(320)))
    units = world.running[0].units()
    tier.ends = lambda: False
    run_step(world, units[:3])
    world.go(0, keep=False)
    world.come(0, [5] * 320)
    assert set(world.running[0].units()) == set(units)
    # What the next step sees is of nobody; what it misses is asked for, the old copies or not.
    assert run_step(world, units) == ([], units[:8])
    tier.ends = lambda: True
    # The old batch ends, and the next one begins; every hit is looked at.
    assert run_step(world, units[:3]) == ([], [])
    assert run_step(world, units[:8])[0] == units[:8]
    for _ in range(3):
        run_step(world, [])
    assert run_step(world, units) == (units, [])


def test_who_has_left_is_waited_for_no_more(worlds) -> None:
    world = worlds(num_slabs=4, num_slots=64)
    world.come(0, list(range(320)))
    run_step(world, [])
    world.go(0, keep=True)
    for _ in range(3):
        run_step(world, [])
    # The batch of the first step, and nothing after it.
    assert world.tier.statistics().filled_bytes == 8 * GEOMETRY.block_bytes


def test_a_prompt_that_joins_and_leaves_at_once_is_waited_for_no_more(worlds) -> None:
    world = worlds(num_slabs=8, num_slots=64)
    arriving = world.begin(list(range(500)))
    for layer in range(GEOMETRY.num_layers):
        world.write(arriving, layer, 500)
    world.arrive(arriving)
    world.join(0, arriving)
    world.go(0, keep=True)
    # The tier has not been told since which prompts are on their way.
    world.tier.advance()
    settle()
    assert world.tier.state is TierState.IDLE
    assert world.tier.statistics().filled_bytes == 0


def test_a_fill_that_could_not_be_launched_is_launched_again(worlds, monkeypatch) -> None:
    world = worlds(num_slabs=4, num_slots=64, tier_type=DeviceTier)
    world.come(0, list(range(320)))
    units, tier = world.running[0].units()[:3], world.tier

    def refuse() -> None:
        raise FluxionError("no")

    with monkeypatch.context() as patched:
        patched.setattr(tier, "_launch_fill", refuse)
        with pytest.raises(FluxionError):
            run_step(world, units)
        with pytest.raises(FluxionError):
            tier.before_step()
    settle()
    tier.before_step()
    assert run_step(world, units) == (units, [])


def test_a_tier_holds_at_least_one_unit_and_at_most_the_store() -> None:
    store = HostKvStore(GEOMETRY, 1 << 16, model_key=b"")
    step = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(CapacityError, match="device_kv_bytes"):
        DeviceTier(store, GEOMETRY.block_bytes - 1, step, None)
    assert DeviceTier(store, 1 << 30, step, None).num_slots == store.num_slabs * SLAB_UNITS


def test_a_tier_that_begins_anew_holds_nothing_and_takes_no_more_than_it_is_told(worlds) -> None:
    world = worlds(num_slabs=8, num_slots=64, seed=4)
    tier, unit = world.tier, GEOMETRY.block_bytes

    def steps(number: int) -> list[int]:
        for _ in range(number):
            resident, _ = run_step(world, world.running[0].units())
        while tier.state is not TierState.IDLE:
            tier.before_step()
            settle()
        return resident

    world.come(0, [1] * 480)
    units = world.running[0].units()
    assert 20 < len(units) < 64
    assert steps(16) == units
    with pytest.raises(FluxionError, match="without sequences"):
        tier.restart(20 * unit)
    world.go(0, keep=True)
    for wrong in (65, 7):
        with pytest.raises(ShapeError, match="slots"):
            tier.restart(wrong * unit)
    tier.restart(20 * unit)
    assert (tier.table == ABSENT).all()
    assert (tier.statistics().capacity_bytes, tier.statistics().held_bytes) == (20 * unit, 0)
    world.come(0, [1] * 480)
    assert 0 < len(steps(16)) <= 20
    assert tier.statistics().held_bytes == 20 * unit
    assert int((tier.table >= 0).sum()) == 20
    assert int(tier.table.max()) < 20
    world.go(0, keep=True)
    tier.restart(64 * unit)
    world.come(0, [1] * 480)
    assert steps(16) == units
