"""Copies of digests follow the retrieval region as it grows, where there are places for them."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fluxion_core.decode.device.digests import CoarseDigests, DeviceDigests, digests_that_fit
from fluxion_core.decode.device.pinned import RegisteredStore
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kernels.tier import constants
from fluxion_core.kernels.tier.selection import GroupSelection
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from tests.fluxion_core.decode.small_step import random_sequence, store_for

GEOMETRY = KvGeometry(num_layers=1, num_kv_heads=1, head_dim=8, slab_tokens=128)
WINDOW = WindowSpec(sink_tokens=32, recent_tokens=128)
SLABS = 9
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Store:
    """Each digest byte of a slab is its generation and how many of its blocks some region holds."""

    num_slabs, geometry = SLABS, GEOMETRY
    arena_address, slab_stride_bytes = 4096, GEOMETRY.slab_bytes

    def __init__(self) -> None:
        self.digests = torch.zeros(SLABS, GEOMETRY.digest_bytes, dtype=torch.uint8)
        self.generations = [0] * SLABS

    def slab_digests(self, slab: int) -> torch.Tensor:
        return self.digests[slab]

    def generation(self, slab: int) -> int:
        return self.generations[slab]

    def take(self, slab: int) -> None:
        """For another text."""
        self.generations[slab] += 1
        self.digests[slab] = self.generations[slab] % 15 << 4

    def reach(self, slabs: list[int], region_end: int) -> None:
        for ordinal, slab in enumerate(slabs):
            blocks = (region_end - ordinal * GEOMETRY.slab_tokens) // 16
            blocks = min(max(blocks, 0), GEOMETRY.slab_blocks)
            base = self.generations[slab] % 15 << 4
            self.digests[slab] = max(int(self.digests[slab, 0]), base + blocks)


def _digests(store: _Store, num_places: int = SLABS) -> tuple[DeviceDigests, torch.Tensor]:
    digests = DeviceDigests(store, torch.device("cpu"), num_places)  # type: ignore[arg-type]
    digests._copies.fill_(255)
    return digests, digests._copies


def _sequence(slabs: list[int]) -> Any:
    return SimpleNamespace(slabs=tuple(slabs))


@pytest.mark.parametrize("prompt_tokens", [20, 300, 500])
def test_what_is_in_the_region_is_copied_as_soon_as_it_is(prompt_tokens: int) -> None:
    store, slabs = _Store(), [4, 1, 7, 0, 3, 2]
    digests, copies = _digests(store)
    store.reach(slabs, WINDOW.retrieval_region(prompt_tokens).stop)
    sequence = _sequence(slabs)
    digests.join(2, sequence, WINDOW.retrieval_region(prompt_tokens).stop)
    for tokens in range(prompt_tokens, 700):
        end = WINDOW.retrieval_region(tokens).stop
        store.reach(slabs, end)
        digests.follow(2, sequence, end)
        for slab in slabs[: -(-end // GEOMETRY.slab_tokens)]:
            assert torch.equal(copies[slab], store.digests[slab])
    assert (copies[[5, 6, 8]] == 255).all()


def test_a_block_that_comes_into_the_region_costs_one_slab() -> None:
    store, slabs = _Store(), [4, 1, 7, 0]
    digests, _ = _digests(store)
    sequence = _sequence(slabs)
    digests.join(0, sequence, 160)
    assert digests.take_copied_bytes() == 2 * GEOMETRY.digest_bytes
    digests.follow(0, sequence, 160)
    assert digests.take_copied_bytes() == 0
    digests.follow(0, sequence, 176)
    assert digests.take_copied_bytes() == GEOMETRY.digest_bytes


def test_a_slot_s_next_sequence_is_copied_from_its_start() -> None:
    store = _Store()
    digests, copies = _digests(store)
    digests.join(0, _sequence([4, 1, 7]), 384)
    digests.leave(0)
    store.reach([2, 3], 160)
    digests.join(0, _sequence([2, 3]), 160)
    assert torch.equal(copies[[2, 3]], store.digests[[2, 3]])


def test_a_sequence_that_comes_back_costs_nothing_unless_its_slabs_hold_another_text() -> None:
    store, slabs = _Store(), [4, 1, 7]
    digests, copies = _digests(store)
    digests.join(0, _sequence(slabs), 300)
    digests.leave(0)
    digests.take_copied_bytes()
    digests.join(1, _sequence(slabs), 300)
    assert digests.take_copied_bytes() == 0
    # The same slab, as far as it was known and farther.
    digests.join(2, _sequence(slabs), 320)
    assert digests.take_copied_bytes() == GEOMETRY.digest_bytes
    for slot in (1, 2):
        digests.leave(slot)
    store.take(1)
    digests.join(0, _sequence([4, 1]), 256)
    assert digests.take_copied_bytes() == GEOMETRY.digest_bytes
    assert torch.equal(copies[1], store.digests[1])


def test_what_has_no_room_is_read_in_the_store_until_there_is_some() -> None:
    store = _Store()
    digests, _ = _digests(store, num_places=3)
    size = GEOMETRY.digest_bytes
    assert digests.copies is None
    assert digests.capacity_bytes == 3 * size
    digests.join(0, _sequence([8, 7]), 256)
    digests.place()
    digests.join(1, _sequence([6, 5]), 256)
    digests.place()
    assert digests.running_bytes == (3 * size, size)
    assert (digests.share_in_store(0), digests.share_in_store(1)) == (0.0, 0.5)
    assert digests.placed.places.tolist() == [-1, -1, -1, -1, -1, -1, 2, 1, 0]
    assert digests.take_copied_bytes() == 3 * size
    digests.leave(0)
    digests.place()
    assert digests.running_bytes == (2 * size, 0)
    # The end of what has left gave its place up; its beginning is there when it comes back.
    assert digests.placed.places.tolist() == [-1, -1, -1, -1, -1, 1, 2, -1, 0]
    assert digests.take_copied_bytes() == size
    digests.join(0, _sequence([8, 7]), 256)
    digests.place()
    assert digests.take_copied_bytes() == 0
    assert digests.share_in_store(0) == 0.5


@pytest.mark.parametrize(
    ("free_slabs", "may_lack_some", "max_slabs", "where", "places"),
    [
        (2 * SLABS, False, None, "device", SLABS),
        (2 * SLABS, True, None, "device", SLABS),
        (2 * SLABS, True, 4, "both", 4),
        (2 * SLABS - 1, True, None, "both", SLABS - 1),
        (2 * SLABS - 1, False, None, "host", 0),
        # One at least: where not even that has room there is none for a tier either.
        (0, True, None, "both", 1),
    ],
)
def test_digests_take_half_of_what_is_free_at_most(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free_slabs: int,
    may_lack_some: bool,
    max_slabs: int | None,
    where: str,
    places: int,
) -> None:
    free = free_slabs * GEOMETRY.digest_bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1 << 40))
    with caplog.at_level(logging.INFO):
        digests = digests_that_fit(
            _Store(),  # type: ignore[arg-type]
            torch.device("cpu"),
            may_lack_some=may_lack_some,
            max_slabs=max_slabs,
        )
    assert f"where={where}" in caplog.text
    capacity = 0 if digests is None else digests.capacity_bytes
    assert capacity == places * GEOMETRY.digest_bytes


class _Life:
    """Sequences that come, share what others have stored, grow, and go; and what must be true."""

    def __init__(self, num_places: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.store = _Store()
        self.digests, self.copies = _digests(self.store, num_places)
        self.free = list(range(SLABS))
        self.kept: list[list[int]] = []
        """Texts that have ended and can be found, by their slabs."""
        self.slots: dict[int, tuple[list[int], int]] = {}
        """By window slot: slabs and the region's end."""
        self.copied, self.moved, self.in_store = 0, 0, 0

    def _take(self) -> int | None:
        while not self.free and self.kept:
            gone = self.kept.pop(0)
            held = {slab for slabs, _ in self.slots.values() for slab in slabs}
            held |= {slab for slabs in self.kept for slab in slabs}
            self.free += sorted(set(gone) - held)
        if not self.free:
            return None
        slab = self.free.pop(self.rng.randrange(len(self.free)))
        self.store.take(slab)
        return slab

    def join(self) -> None:
        prefix = self.rng.choice([*self.kept, *(of for of, _ in self.slots.values()), []])
        slabs = prefix[: self.rng.randint(0, len(prefix))]
        self.slots[slot := min({0, 1, 2} - self.slots.keys())] = slabs, 0
        while len(slabs) < self.rng.randint(1, 3) and (slab := self._take()) is not None:
            slabs.append(slab)
        end = len(slabs) * GEOMETRY.slab_tokens - 16 * self.rng.randint(0, 12)
        self.slots[slot] = slabs, max(0, end)
        self.store.reach(*self.slots[slot])
        self.digests.join(slot, _sequence(slabs), self.slots[slot][1])

    def leave(self) -> None:
        slot = self.rng.choice(list(self.slots))
        self.digests.leave(slot)
        self.kept.append(self.slots.pop(slot)[0])

    def step(self) -> None:
        for slot, (slabs, before) in self.slots.items():
            end = before + 16 * self.rng.randint(0, 2)
            if end > len(slabs) * GEOMETRY.slab_tokens:
                slab = self._take()
                if slab is None:
                    continue
                slabs.append(slab)
            self.slots[slot] = slabs, end
            self.store.reach(slabs, end)
            self.digests.follow(slot, _sequence(slabs), end)
        self.digests.place()

    def check(self, before: list[int]) -> list[int]:
        """Hold the map and the copies against what runs; returns the map."""
        places = self.digests.placed.places.tolist()
        taken = [place for place in places if place >= 0]
        assert sorted(taken) == list(range(len(self.copies)))
        running: set[int] = set()
        for slot, (slabs, end) in self.slots.items():
            reached = slabs[: -(-end // GEOMETRY.slab_tokens)]
            running |= set(reached)
            lacking = sum(places[slab] < 0 for slab in reached)
            assert self.digests.share_in_store(slot) == pytest.approx(
                lacking / max(1, len(reached))
            )
            self.in_store += lacking
            for ordinal, slab in enumerate(reached):
                if places[slab] >= 0:
                    generation, blocks = divmod(int(self.copies[places[slab], 0]), 16)
                    assert generation == self.store.generations[slab] % 15
                    assert 16 * blocks >= min(end - ordinal * GEOMETRY.slab_tokens, 128)
        placed = {slab for slab in running if places[slab] >= 0}
        assert len(placed) == min(len(running), len(self.copies))
        size = GEOMETRY.digest_bytes
        expected = len(placed) * size, len(running - placed) * size
        assert self.digests.running_bytes == expected
        # Whoever has run all along has kept its place.
        for slab in running & self.ran:
            assert before[slab] in (-1, places[slab])
        self.moved += before != places
        self.ran = running
        return places

    def live(self, steps: int) -> None:
        self.ran: set[int] = set()
        before = self.digests.placed.places.tolist()
        for _ in range(steps):
            if len(self.slots) < 3 and self.rng.random() < 0.3:
                self.join()
            if self.slots and self.rng.random() < 0.1:
                self.leave()
            self.step()
            before = self.check(before)
            self.copied += self.digests.take_copied_bytes() // GEOMETRY.digest_bytes


@pytest.mark.parametrize("num_places", [1, 3, 6, SLABS])
def test_places_stay_right_over_sequences_that_come_and_go(num_places: int) -> None:
    life = _Life(num_places, seed=num_places)
    life.live(2000)
    assert life.copied > 50
    assert (life.moved > 10) == (num_places < SLABS)
    assert (life.in_store > 10) == (num_places < SLABS)


@pytest.fixture
def store_on_device() -> Iterator[HostKvStore]:
    """Memory that kernels may read: on a GPU it has to be registered."""
    store = store_for(16)
    registered = RegisteredStore(store) if DEVICE.type == "cuda" else None
    yield store
    if registered is not None:
        registered.close()


def _row_words(sequence: SequenceKv, region: range) -> torch.Tensor:
    words = torch.zeros(1, constants.ROW_WORDS.value, dtype=torch.int64)
    words[0, constants.SLAB_TABLE.value] = sequence.slab_table.data_ptr()
    words[0, constants.REGION_BEGIN.value] = region.start
    words[0, constants.REGION_END.value] = region.stop
    return words.to(DEVICE)


@pytest.mark.parametrize("num_places", [1, 4, None])
def test_a_step_s_kernel_finds_each_slab_s_digests(
    store_on_device: HostKvStore, num_places: int | None
) -> None:
    store, window = store_on_device, WindowSpec()
    geometry, generator = store.geometry, torch.Generator().manual_seed(1)
    room = num_places or store.num_slabs
    digests = DeviceDigests(store, DEVICE, room)
    assert digests.is_whole == (num_places is None)
    sequences = [random_sequence(store, 1300, 8, generator, first=first) for first in (5, 6, 7)]
    region = window.retrieval_region(1300)
    for slot, sequence in enumerate(sequences[:2]):
        digests.join(slot, sequence, region.stop)
    digests.place()
    digests.leave(0)
    digests.join(0, sequences[2], region.stop)
    digests.place()
    selection = GroupSelection(geometry, 8, 8192, geometry.slabs_for(8192), digests.placed)
    scratch = selection.make_scratch(1, DEVICE)
    copies, on_device = digests._copies.cpu(), 0
    for sequence in sequences[1:]:
        selection.begin(_row_words(sequence, region), scratch)
        for ordinal in range(3):
            slab, address = sequence.slabs[ordinal], int(scratch.digests[0, ordinal])
            place, rest = divmod(address - digests._copies.data_ptr(), geometry.digest_bytes)
            if 0 <= place < room:
                assert rest == 0
                assert torch.equal(copies[place], store.slab_digests(slab))
                on_device += 1
            else:
                assert address == store.slab_address(slab) + geometry.kv_bytes
    assert on_device == min(room, 6)


def test_coarse_copies_are_the_stores_128_token_digests(store_on_device: HostKvStore) -> None:
    store = store_on_device
    geometry = store.geometry
    sequence = random_sequence(store, 1300, 8, torch.Generator().manual_seed(1))
    coarse = CoarseDigests(store, DEVICE)
    coarse.place.copies.fill_(255)
    layers, kv_heads, level_bytes = 3, 2, geometry.level_bytes(3)

    def expect(whole: int) -> None:
        for ordinal, slab in enumerate(sequence.slabs):
            got = coarse.place.copies[:, slab].cpu()
            digests = store.slab_digests(slab).view(torch.uint8)
            digests = digests.view(layers, kv_heads, geometry.head_digest_bytes)
            expected = digests[..., geometry.level_offset(3) :][..., :level_bytes]
            assert torch.equal(got, expected) == (ordinal < whole)

    coarse.join(1, sequence, 544)
    expect(2)
    assert coarse.take_copied_bytes() == 2 * layers * kv_heads * level_bytes
    coarse.follow(1, sequence, 1040)
    expect(3)
    # The second slab's again, since the region ended in it.
    assert coarse.take_copied_bytes() == 2 * layers * kv_heads * level_bytes
