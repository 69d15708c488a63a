"""The store's accounting adds up whatever happens, and what is in it is what was written."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from fluxion_core.errors import (
    CapacityError,
    FluxionError,
    FrameFormatError,
    NonFiniteKvError,
    StreamTruncatedError,
)
from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kernels.block_digest import reference
from fluxion_core.kvstore.digest_index import gather_digests, gather_kv
from fluxion_core.kvstore.sequence import LandingPlace, SequenceKv
from fluxion_core.kvstore.step_append import StepAppend
from fluxion_core.kvstore.store import HostKvStore

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=32, slab_tokens=128)


def make_store(num_slabs: int, geometry: KvGeometry = GEOMETRY) -> HostKvStore:
    return HostKvStore(geometry, num_slabs * (geometry.slab_bytes + 4096), model_key=b"toy")


def kv_of(token_ids: list[int], geometry: KvGeometry = GEOMETRY) -> torch.Tensor:
    """KV that depends on the tokens so far: [layers, kv_heads, 2, tokens, head_dim] bfloat16."""
    shape = (geometry.num_layers, geometry.num_kv_heads, 2, 1, geometry.head_dim)
    columns, state = [], 0
    for token in token_ids:
        state = (state * 31 + token + 1) % 1_000_003
        columns.append(torch.randn(shape, generator=torch.Generator().manual_seed(state)))
    return torch.cat(columns, dim=3).bfloat16()


def payload(kv: torch.Tensor, layer: int, first: int, count: int) -> bytes:
    """The wire's bytes of a run of tokens: [kv_head][block][K | V], zero padded."""
    heads, _, _, dim = kv.shape[1:]
    blocks = ceil_div(count, BLOCK_TOKENS)
    padded = torch.zeros(heads, 2, blocks * BLOCK_TOKENS, dim, dtype=torch.bfloat16)
    padded[:, :, :count] = kv[layer, :, :, first : first + count]
    blocked = padded.unflatten(2, (blocks, BLOCK_TOKENS)).transpose(1, 2).contiguous()
    return blocked.view(torch.uint8).numpy().tobytes()


def ingest(sequence: SequenceKv, kv: torch.Tensor, step: int = 64) -> None:
    layers, end = kv.shape[0], kv.shape[3]
    for first in range(sequence.kv_from_token, end, step):
        count = min(step, end - first)
        for layer in range(layers):
            sequence.write_blocks(layer, first, count, payload(kv, layer, first, count))


def append(sequence: SequenceKv, token_ids: list[int], count: int, *, exact: bool = True) -> None:
    """Store the next tokens of a sequence, one step for all of them."""
    first = sequence.num_tokens
    kv = kv_of(token_ids[: first + count])
    step = StepAppend(GEOMETRY, [sequence], [count])
    for layer in range(GEOMETRY.num_layers):
        columns = kv[layer, :, :, first:].permute(2, 0, 1, 3).float()
        step.append(layer, columns[:, :, 0].contiguous(), columns[:, :, 1].contiguous())
    step.advance([exact])


def stored(store: HostKvStore, token_ids: list[int], new_tokens: int = 0) -> SequenceKv:
    sequence = store.reserve(token_ids, new_tokens)
    ingest(sequence, kv_of(token_ids))
    sequence.commit()
    return sequence


def check_content(sequence: SequenceKv, kv: torch.Tensor) -> None:
    for layer in range(GEOMETRY.num_layers):
        for head in range(GEOMETRY.num_kv_heads):
            keys, values = gather_kv(sequence, layer, head)
            assert torch.equal(keys, kv[layer, head, 0])
            assert torch.equal(values, kv[layer, head, 1])
            # Digests cover complete 16-token blocks only, also inside a coarse block.
            digested = keys[: len(keys) // BLOCK_TOKENS * BLOCK_TOKENS]
            for level, block_size in enumerate(BLOCK_SIZES):
                low, high = gather_digests(sequence, layer, head, level)
                if len(low):
                    expected = reference.digest(digested[: len(low) * block_size], block_size)
                    assert torch.equal(low, expected[0])
                    assert torch.equal(high, expected[1])


def check_accounting(store: HostKvStore) -> None:
    stats = store.statistics()
    parts = stats.free_bytes, stats.reserved_bytes, stats.used_bytes, stats.cached_bytes
    assert sum(parts) == stats.capacity_bytes
    assert min(parts) >= 0


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 127, 128, 129, 300])
def test_what_was_streamed_is_what_is_read(num_tokens: int):
    store = make_store(4)
    tokens = list(range(num_tokens))
    sequence = stored(store, tokens)
    check_content(sequence, kv_of(tokens))


def test_appended_tokens_are_stored_and_digested_like_the_prompt():
    store = make_store(4)
    tokens = list(range(100))
    sequence = stored(store, tokens, new_tokens=200)
    kv = kv_of(list(range(300)))
    for position in range(100, 300):
        step = StepAppend(GEOMETRY, [sequence])
        for layer in range(GEOMETRY.num_layers):
            column = kv[layer, :, :, position]
            step.append(layer, column[None, :, 0].float(), column[None, :, 1].float())
        step.advance([True])
    assert sequence.num_tokens == 300
    check_content(sequence, kv)
    # A coarse block of which only a part is complete bounds that part.
    low, _ = gather_digests(sequence, 1, 1, 0)
    assert len(low) == 300 // 16


def test_sequences_of_one_step_do_not_mix():
    store = make_store(8)
    prompts = [[1] * 40, [2] * 200, [3] * 16]
    sequences = [stored(store, prompt, new_tokens=20) for prompt in prompts]
    streams = [kv_of(prompt + [9] * 20) for prompt in prompts]
    for offset in range(20):
        step = StepAppend(GEOMETRY, sequences)
        for layer in range(GEOMETRY.num_layers):
            columns = torch.stack(
                [kv[layer, :, :, len(p) + offset] for kv, p in zip(streams, prompts, strict=True)]
            )
            step.append(
                layer, columns[:, :, 0].float().contiguous(), columns[:, :, 1].float().contiguous()
            )
        step.advance([True] * 3)
    for sequence, kv in zip(sequences, streams, strict=True):
        check_content(sequence, kv)


def test_a_repeated_prompt_is_not_stored_twice():
    store = make_store(8)
    tokens = list(range(300))
    first = stored(store, tokens)
    used = store.statistics().used_bytes
    second = store.reserve(tokens, 0)
    assert second.shared_tokens == 256
    ingest(second, kv_of(tokens))
    second.commit()
    # Two full slabs are shared; only the ragged third is stored again.
    assert store.statistics().used_bytes == used + store.slab_stride_bytes
    assert store.statistics().shared_slabs == 2
    assert first.slabs[:2] == second.slabs[:2]
    first.release()
    check_content(second, kv_of(tokens))


def test_prompts_that_arrive_together_are_stored_once():
    store = make_store(8)
    tokens = list(range(257))
    both = [store.reserve(tokens, 0), store.reserve(tokens, 0)]
    for sequence in both:
        assert sequence.shared_tokens == 0
        ingest(sequence, kv_of(tokens))
    for sequence in both:
        sequence.commit()
        check_content(sequence, kv_of(tokens))
    assert both[0].slabs[:2] == both[1].slabs[:2]
    assert store.statistics().used_bytes == 4 * store.slab_stride_bytes
    for sequence in both:
        sequence.release()
    check_accounting(store)


def test_a_prompt_of_whole_slabs_leaves_a_token_to_compute():
    store = make_store(8)
    tokens = list(range(256))
    stored(store, tokens).release()
    assert store.reserve(tokens, 0).shared_tokens == 128


def test_another_model_shares_nothing():
    tokens = list(range(200))
    store = make_store(4)
    other = HostKvStore(GEOMETRY, 4 * (GEOMETRY.slab_bytes + 4096), model_key=b"other")
    keys = [
        each.prefixes.name(tokens, domain).exact_keys
        for each in (store, other)
        for domain in ("", "alice")
    ]
    assert len({key for (key,) in keys}) == 4


def test_domains_find_nothing_of_each_other():
    store = make_store(16)
    prompt = [*range(200), 9]

    def talk(domain: str, approximation: str) -> int:
        sequence = store.reserve(prompt, 0, domain=domain, approximation=approximation)
        shared = sequence.shared_tokens
        ingest(sequence, kv_of(prompt))
        sequence.commit()
        sequence.keep([])
        sequence.release()
        check_accounting(store)
        return shared

    def found(domain: str) -> int:
        sequence = store.reserve([*prompt, 1], 0, domain=domain)
        sequence.release()
        return sequence.shared_tokens

    assert [talk(domain, "") for domain in ("alice", "mallory", "")] == [0, 0, 0]
    assert [found(domain) for domain in ("alice", "mallory", "", "bob")] == [201, 201, 201, 0]
    # A tail that one takes is not another's, and what fails in one domain is withdrawn there alone.
    failed = store.reserve([*prompt, 1], 0, domain="mallory")
    failed.withdraw()
    failed.release()
    assert [found(domain) for domain in ("alice", "mallory", "", "bob")] == [201, 0, 201, 0]


def test_cached_prefixes_give_way_oldest_first():
    store = make_store(3)
    stored(store, [1] * 128).release()
    stored(store, [2] * 128).release()
    assert store.statistics().cached_bytes == 2 * store.slab_stride_bytes
    stored(store, [3] * 250).release()
    assert store.reserve([2] * 129, 0).shared_tokens == 128
    # Two slabs were needed and one was free: the older prefix went.
    assert store.reserve([1] * 100, 0).shared_tokens == 0


def test_what_does_not_fit_is_refused_whole():
    store = make_store(3)
    held = store.reserve(list(range(128)), 128)
    with pytest.raises(CapacityError) as refusal:
        store.reserve(list(range(200)), 0)
    assert refusal.value.needed == 2 * store.slab_stride_bytes
    assert refusal.value.free == store.slab_stride_bytes
    check_accounting(store)
    held.release()
    store.reserve(list(range(200)), 0).release()
    with pytest.raises(CapacityError):
        store.check_can_ever_hold(3 * 128 + 1)


def test_a_store_smaller_than_a_slab_is_refused():
    with pytest.raises(CapacityError, match="host_kv_bytes"):
        HostKvStore(GEOMETRY, GEOMETRY.slab_bytes - 1, model_key=b"toy")


def test_incomplete_prompts_cannot_be_committed():
    store = make_store(2)
    tokens = list(range(40))
    sequence = store.reserve(tokens, 8)
    with pytest.raises(StreamTruncatedError):
        sequence.commit()
    with pytest.raises(FluxionError):
        StepAppend(GEOMETRY, [sequence])
    sequence.release()
    sequence.release()
    assert store.statistics().free_bytes == store.statistics().capacity_bytes


@pytest.mark.parametrize(
    ("layer", "first", "count", "size"),
    [
        (2, 0, 16, None),
        (0, 16, 16, None),
        (0, 0, 8, None),
        (0, 0, 48, None),
        (0, 0, 0, 0),
        (0, 0, 16, 100),
    ],
)
def test_blocks_that_do_not_fit_are_refused(layer: int, first: int, count: int, size: int | None):
    sequence = make_store(2).reserve(list(range(40)), 0)
    right = GEOMETRY.num_kv_heads * ceil_div(count, 16) * GEOMETRY.block_bytes
    with pytest.raises(FrameFormatError):
        sequence.write_blocks(layer, first, count, bytes(right if size is None else size))


def test_a_restarted_hand_off_writes_again():
    store = make_store(2)
    tokens = list(range(40))
    sequence = store.reserve(tokens, 0)
    sequence.write_blocks(0, 0, 16, bytes(2 * GEOMETRY.block_bytes))
    sequence.restart()
    ingest(sequence, kv_of(tokens))
    sequence.commit()
    check_content(sequence, kv_of(tokens))


class WritingLanding:
    """A landing that writes where it was told, and says what the store held when it was closed."""

    def __init__(self, store: HostKvStore, place: LandingPlace) -> None:
        self.place, self.held_at_close = place, []
        self.whole_tokens = place.kv_from_token
        self._store = store

    def write(self, kv: torch.Tensor) -> None:
        first, count = self.place.kv_from_token, self.place.num_tokens - self.place.kv_from_token
        for ordinal, inside, part in GEOMETRY.split_by_slab(first, count):
            begin = ordinal * GEOMETRY.slab_tokens + inside
            for layer in range(GEOMETRY.num_layers):
                heads = np.frombuffer(payload(kv, layer, begin, part), np.uint8).reshape(2, -1)
                address = int(self.place.slab_addresses[ordinal])
                block_digest.ingest_blocks(GEOMETRY, address, layer, inside, part, heads)
            self.whole_tokens = begin + part

    def close(self) -> None:
        self.held_at_close.append(self._store.statistics().used_bytes)


def test_what_has_landed_is_what_is_read():
    store = make_store(4)
    tokens = list(range(300))
    stored(store, tokens[:150]).release()
    sequence = store.reserve(tokens, 0)
    landing = sequence.open_landing(lambda place: WritingLanding(store, place))
    assert (landing.place.kv_from_token, landing.place.num_tokens) == (128, 300)
    assert landing.place.slab_addresses.tolist() == [store.slab_address(s) for s in sequence.slabs]
    assert sequence.whole().num_tokens == 128
    landing.write(kv_of(tokens))
    assert sequence.whole().num_tokens == 300
    sequence.landed()
    assert sequence.whole().num_tokens == 300
    assert len(landing.held_at_close) == 1
    sequence.commit()
    check_content(sequence, kv_of(tokens))
    sequence.release()
    assert len(landing.held_at_close) == 1
    check_accounting(store)


@pytest.mark.parametrize("end", ["restart", "release"])
def test_a_landing_is_closed_before_its_slabs_are_anothers(end: str):
    store = make_store(4)
    tokens = list(range(300))
    sequence = store.reserve(tokens, 0)
    landing = sequence.open_landing(lambda place: WritingLanding(store, place))
    held = store.statistics().used_bytes
    assert held
    getattr(sequence, end)()
    assert landing.held_at_close == [held]
    if end == "restart":
        again = sequence.open_landing(lambda place: WritingLanding(store, place))
        again.write(kv_of(tokens))
        sequence.landed()
        sequence.commit()
        check_content(sequence, kv_of(tokens))
    sequence.release()
    assert store.statistics().reserved_bytes == store.statistics().used_bytes == 0


def test_a_landing_and_another_writer_exclude_each_other():
    store = make_store(4)
    sequence = store.reserve(list(range(40)), 0)
    with pytest.raises(AssertionError):
        sequence.landed()
    sequence.open_landing(lambda place: WritingLanding(store, place))
    for not_now in (
        sequence.commit,
        sequence.begin_prompt,
        lambda: sequence.open_landing(lambda place: WritingLanding(store, place)),
        lambda: sequence.write_blocks(0, 0, 16, bytes(2 * GEOMETRY.block_bytes)),
    ):
        with pytest.raises(AssertionError):
            not_now()
    sequence.release()
    other = stored(store, list(range(40)))
    with pytest.raises(AssertionError):
        other.open_landing(lambda place: WritingLanding(store, place))
    gone = store.reserve(list(range(50, 90)), 0)
    gone.release()
    with pytest.raises(FluxionError, match="released"):
        gone.open_landing(lambda place: WritingLanding(store, place))


@pytest.mark.parametrize("digest_bits", [8, 16])
@pytest.mark.parametrize("scale", [64.0, float("inf")])
def test_nothing_of_a_hand_off_that_failed_is_left_in_digests(digest_bits: int, scale: float):
    geometry = KvGeometry(2, 2, 32, slab_tokens=512, digest_bits=digest_bits)
    tokens, cut = list(range(512)), 150
    kv = kv_of(tokens, geometry)
    digests = []
    for fails in (False, True):
        store = make_store(2, geometry)
        first = store.reserve(tokens[:cut], 0)
        ingest(first, kv[:, :, :, :cut])
        first.commit()
        first.keep([])
        first.release()
        second = store.reserve(tokens, 0)
        assert second.kv_from_token == 144
        if fails:
            with suppress(NonFiniteKvError):
                ingest(second, kv * scale)
            second.restart()
        ingest(second, kv)
        second.commit()
        digests.append([store.slab_digest(second.slabs[0], level).clone() for level in range(4)])
    for one, two in zip(*digests, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("token", [0, 130, 199])
def test_streamed_kv_that_is_not_finite_is_refused_and_its_place_is_told(token: int, side: int):
    store = make_store(4)
    tokens = list(range(200))
    sequence, kv = store.reserve(tokens, 0), kv_of(tokens)
    kv[1, 1, side, token, 31] = float("nan")
    with pytest.raises(NonFiniteKvError, match=f"token {token} in layer 1 is NaN"):
        ingest(sequence, kv, step=192)
    sequence.restart()
    ingest(sequence, kv_of(tokens), step=192)
    sequence.commit()
    check_content(sequence, kv_of(tokens))


def test_an_appended_token_that_is_not_finite_counts_for_its_sequence_alone():
    store = make_store(8)
    sequences = [stored(store, [number] * 40, new_tokens=9) for number in range(3)]
    step = StepAppend(GEOMETRY, sequences, [1, 2, 1])
    for layer in range(GEOMETRY.num_layers):
        key, value = torch.ones(2, 4, GEOMETRY.num_kv_heads, GEOMETRY.head_dim)
        if layer == 1:
            value[2, 0, 5] = float("inf")
        step.append(layer, key, value)
    step.advance([True] * 3)
    assert [sequence.num_tokens for sequence in sequences] == [41, 40, 41]
    damage = sequences[1].damage
    assert damage is not None
    assert (damage.layer, damage.token) == (1, 41)
    assert sequences[0].damage is sequences[2].damage is None
    with pytest.raises(NonFiniteKvError):
        sequences[1].keep([])


def test_a_prompt_computed_here_with_kv_that_is_not_finite_is_never_whole():
    store = make_store(4)
    sequence = store.reserve([1] * 128, 0)
    sequence.begin_prompt()
    step = StepAppend(GEOMETRY, [sequence], [128])
    for layer in range(GEOMETRY.num_layers):
        kv = torch.full((128, GEOMETRY.num_kv_heads, GEOMETRY.head_dim), float("nan"))
        step.append(layer, kv, kv)
    step.advance([True])
    with pytest.raises(NonFiniteKvError):
        sequence.commit()
    sequence.release()
    assert store.statistics().cached_bytes == 0


def test_appending_beyond_the_reservation_is_refused():
    store = make_store(2)
    sequence = stored(store, list(range(128)), new_tokens=0)
    with pytest.raises(FluxionError, match="reservation"):
        StepAppend(GEOMETRY, [sequence])


def session(store: HostKvStore, turns: list[int], **options) -> list[int]:
    """Tokens shared by each of these turns; each is longer than the one before, and kept."""
    shared = []
    for length in turns:
        sequence = store.reserve(list(range(length)), 10, **options)
        shared.append(sequence.shared_tokens)
        sequence.begin_prompt()
        append(sequence, list(range(length)), length - sequence.num_tokens)
        sequence.commit()
        check_content(sequence, kv_of(list(range(length))))
        sequence.keep([7])
        sequence.release()
        check_accounting(store)
        assert store.statistics().used_bytes == store.statistics().reserved_bytes == 0
    return shared


def test_a_turn_finds_all_that_was_kept_of_the_turn_before():
    store = make_store(4)
    # Of what was kept, a turn leaves a token to compute; 128 tokens fill a slab.
    assert session(store, [50, 51, 128, 129, 300, 400]) == [0, 50, 51, 128, 129, 300]
    assert store.statistics().cached_bytes == 4 * store.slab_stride_bytes


def test_generated_tokens_are_found_but_for_those_without_kv():
    store = make_store(4)
    first = stored(store, list(range(100)), new_tokens=60)
    append(first, list(range(150)), 50)
    first.keep([*range(100, 150), 777])
    first.release()
    second = store.reserve([*range(150), 777, 5], 4)
    assert (second.shared_tokens, second.kv_from_token) == (150, 144)
    # From a whole block on, a prefill node's KV comes: what is there is written again.
    kv = kv_of([*range(150), 777, 5])
    ingest(second, kv)
    second.commit()
    check_content(second, kv)


@pytest.mark.parametrize("digest_bits", [8, 16])
@pytest.mark.parametrize("cut", [130, 255, 257, 300])
def test_digests_of_a_slab_filled_by_two_turns_are_those_of_one(digest_bits: int, cut: int):
    geometry = KvGeometry(2, 2, 32, slab_tokens=512, digest_bits=digest_bits)
    tokens = list(range(512))
    kv = kv_of(tokens, geometry)
    digests = []
    for turns in ((512,), (cut, 512)):
        store = make_store(2, geometry)
        for length in turns:
            sequence = store.reserve(tokens[:length], 0)
            ingest(sequence, kv[:, :, :, :length])
            sequence.commit()
            sequence.keep([])
            sequence.release()
        assert sequence.shared_tokens == (0 if len(turns) == 1 else cut)
        again = store.reserve([*tokens, 1], 0)
        digests.append([store.slab_digest(again.slabs[0], level).clone() for level in range(4)])
    for one, two in zip(*digests, strict=True):
        assert torch.equal(one, two)


def test_a_tail_has_one_heir_and_moves_no_bytes():
    store = make_store(6)
    first = stored(store, list(range(200)))
    slabs = first.slabs
    first.keep([])
    first.release()
    heir, other = (store.reserve([*range(200), mark], 0) for mark in (1, 2))
    assert (heir.shared_tokens, heir.slabs) == (200, slabs)
    assert (other.shared_tokens, other.slabs) == (128, slabs[:1])
    # Nothing was written: whoever comes next finds the tail again.
    heir.release()
    third = store.reserve([*range(200), 3], 0)
    assert third.shared_tokens == 200
    # Something was, and did not become whole: nobody may find that.
    third.write_blocks(0, 192, 9, payload(kv_of([*range(200), 3]), 0, 192, 9))
    third.release()
    assert store.reserve([*range(200), 4], 0).shared_tokens == 128


def test_a_prompt_that_ends_within_a_tail_leaves_it_alone():
    store = make_store(4)
    assert session(store, [200]) == [0]
    assert store.reserve(list(range(200)), 0).shared_tokens == 128
    assert store.reserve([*range(190), 5, 6], 0).shared_tokens == 128
    assert store.reserve(list(range(201)), 0).shared_tokens == 200


def test_the_same_text_twice_is_one_tail():
    store = make_store(4)
    both = [stored(store, list(range(100))) for _ in range(2)]
    for sequence in both:
        sequence.keep([])
        sequence.release()
    assert store.statistics().cached_bytes == store.slab_stride_bytes
    assert store.reserve(list(range(101)), 0).slabs == (0,)


def test_tails_give_way_before_what_they_follow():
    store = make_store(3)
    assert session(store, [200]) == [0]
    assert store.reserve([9] * 250, 0).shared_tokens == 0
    # Two were needed and one was free: the tail went, and the full slab before it stayed.
    assert store.prefixes.find(store.prefixes.name(range(201), ""), "").num_tokens == 128


def test_approximate_kv_is_for_its_own_kind():
    store = make_store(20)
    first = store.reserve(list(range(100)), 200, approximation="fast")
    ingest(first, kv_of(list(range(100))))
    first.commit()
    append(first, list(range(300)), 10)
    append(first, list(range(300)), 190, exact=False)
    assert first.exact_tokens == 110
    first.keep(list(range(100, 300)))
    first.release()
    prompt = [*range(300), 1]
    assert store.reserve(prompt, 0).shared_tokens == 0
    assert store.reserve(prompt, 0, approximation="faster").shared_tokens == 0
    own = store.reserve(prompt, 200, approximation="fast")
    assert (own.shared_tokens, own.exact_tokens) == (300, 0)
    # All that follows an approximation is one, whoever computes it.
    own.begin_prompt()
    append(own, prompt, 1)
    own.commit()
    append(own, [*prompt, *range(100)], 100)
    assert own.exact_tokens == 0
    own.keep(list(range(100)))
    own.release()
    longer = [*prompt, *range(101)]
    assert store.reserve(longer, 0, approximation="fast").shared_tokens == 401
    assert store.reserve(longer, 0).shared_tokens == 0


def test_exact_kv_is_for_everybody():
    store = make_store(8)
    assert session(store, [300]) == [0]
    own = store.reserve(list(range(301)), 0, approximation="fast")
    assert (own.shared_tokens, own.exact_tokens) == (300, 300)


def test_approximate_kv_without_a_name_is_not_kept():
    store = make_store(4)
    sequence = stored(store, list(range(100)), new_tokens=8)
    append(sequence, list(range(104)), 4, exact=False)
    with pytest.raises(FluxionError, match="approximation"):
        sequence.keep(list(range(100, 104)))


def test_who_fails_takes_back_what_it_published_and_what_it_found():
    store = make_store(12)
    prompt = list(range(300))
    stored(store, prompt[:130]).release()
    failed = stored(store, prompt)
    assert failed.shared_tokens == 128
    failed.withdraw()
    failed.release()
    assert store.statistics().free_bytes == store.statistics().capacity_bytes
    assert store.reserve(prompt, 0).shared_tokens == 0


def test_what_others_computed_after_a_withdrawn_slab_is_withdrawn_too_and_they_go_on():
    store = make_store(20)
    prompt = list(range(400))
    failed = stored(store, prompt[:200])
    # One has published after it, one will, and one has left a tail.
    published, later = stored(store, prompt), store.reserve([*range(128), *[7] * 300], 0)
    tail = stored(store, [*range(128), *[8] * 20])
    tail.keep([])
    tail.release()
    failed.withdraw()
    failed.release()
    ingest(later, kv_of([*range(128), *[7] * 300]))
    later.commit()
    later.keep([])
    check_content(published, kv_of(prompt))
    check_content(later, kv_of([*range(128), *[7] * 300]))
    for sequence in (published, later):
        sequence.release()
    assert store.statistics().free_bytes == store.statistics().capacity_bytes
    # The same beginning, computed anew, finds nothing of what followed the withdrawn one.
    stored(store, prompt[:129]).release()
    for text in (prompt, [*range(128), *[7] * 300], [*range(128), *[8] * 21]):
        again = store.reserve(text, 0)
        assert again.shared_tokens == 128
        again.release()


def test_a_tail_that_was_not_used_is_not_left_behind_a_withdrawn_slab():
    store = make_store(8)
    assert session(store, [200]) == [0]
    heir, failed = store.reserve(list(range(201)), 0), store.reserve(list(range(129)), 0)
    failed.withdraw()
    for sequence in (heir, failed):
        sequence.release()
    assert store.statistics().free_bytes == store.statistics().capacity_bytes


class StoreMachine(RuleBasedStateMachine):
    """Any order of reserve, ingest or chunks, commit, append, keep and release."""

    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.store = make_store(6)
        self.tokens: dict[SequenceKv, list[int]] = {}
        self.room: dict[SequenceKv, int] = {}

    @rule(
        target=live,
        family=st.integers(0, 1),
        length=st.integers(1, 400),
        room=st.integers(0, 200),
        approximation=st.sampled_from(["fast", "faster"]),
    )
    def reserve(self, family: int, length: int, room: int, approximation: str) -> SequenceKv | None:
        tokens = [family] * length
        try:
            sequence = self.store.reserve(tokens, room, approximation=approximation)
        except CapacityError:
            return None
        self.tokens[sequence], self.room[sequence] = tokens, room
        return sequence

    @rule(sequence=live)
    def commit(self, sequence: SequenceKv | None) -> None:
        if sequence in self.tokens and not sequence.num_tokens:
            assert sequence.kv_from_token <= sequence.shared_tokens < sequence.num_prompt_tokens
            sequence.restart()
            ingest(sequence, kv_of(self.tokens[sequence]), step=128)
            sequence.commit()

    @rule(sequence=live, count=st.integers(1, 40), exact=st.booleans())
    def append(self, sequence: SequenceKv | None, count: int, exact: bool) -> None:
        if sequence not in self.tokens or not sequence.num_tokens:
            return
        count = min(count, self.room[sequence])
        if count:
            self.room[sequence] -= count
            self.tokens[sequence] += [sequence.num_tokens % 2] * count
            append(sequence, self.tokens[sequence], count, exact=exact)

    @rule(sequence=live, most=st.integers(1, 200))
    def compute_here(self, sequence: SequenceKv | None, most: int) -> None:
        if sequence not in self.tokens or sequence.num_tokens:
            return
        sequence.begin_prompt()
        while left := sequence.num_prompt_tokens - sequence.num_tokens:
            append(sequence, self.tokens[sequence], min(left, most))
        sequence.commit()

    @rule(sequence=consumes(live), is_kept=st.sampled_from([True, True, False, None]))
    def release(self, sequence: SequenceKv | None, is_kept: bool | None) -> None:
        """None: it has failed."""
        if sequence is not None:
            if is_kept is None and sequence in self.tokens:
                slabs = sequence.slabs
                sequence.withdraw()
                assert not any(slab in self.store.prefixes for slab in slabs)
            if is_kept and sequence in self.tokens:
                sequence.keep([*self.tokens[sequence][sequence.num_prompt_tokens :], 99])
            sequence.release()
            self.tokens.pop(sequence, None)

    @invariant()
    def the_accounting_adds_up(self) -> None:
        check_accounting(self.store)
        stats = self.store.statistics()
        held = {slab for sequence in self.tokens for slab in sequence.slabs}
        assert stats.used_bytes == len(held) * self.store.slab_stride_bytes
        assert stats.sequences == len(self.tokens)
        assert not held & set(self.store._free)
        assert not held & set(self.store._cached)
        # Whoever holds nothing is free, or found by a name; nobody is both.
        assert all(slab in self.store.prefixes for slab in self.store._cached)
        assert not any(slab in self.store.prefixes for slab in self.store._free)

    def teardown(self) -> None:
        for sequence, tokens in self.tokens.items():
            if sequence.num_tokens:
                check_content(sequence, kv_of(tokens))
        for sequence in self.tokens:
            sequence.release()
        stats = self.store.statistics()
        assert (stats.reserved_bytes, stats.used_bytes, stats.sequences) == (0, 0, 0)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=25,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_a_generation_goes_up_when_a_slab_is_taken_and_not_when_its_content_is_found_again():
    # By hand: a full slab and a tail of 60 tokens, found by a prompt that goes on from both.
    store = make_store(3)
    assert [store.generation(slab) for slab in range(3)] == [0, 0, 0]
    first = stored(store, list(range(188)))
    full, tail = first.slabs
    assert (store.generation(full), store.generation(tail)) == (1, 1)
    whole_blocks = store.slab_kv(tail)[:, :, :3].clone()
    first.keep([])
    first.release()

    heir = stored(store, list(range(250)), new_tokens=6)
    assert heir.slabs == (full, tail)
    assert (store.generation(full), store.generation(tail)) == (1, 1)
    # What was whole before the heir went on is what it was.
    append(heir, list(range(256)), 6)
    assert torch.equal(store.slab_kv(tail)[:, :, :3], whole_blocks)
    heir.release()

    # The tail was filled further and not kept: it is free, and the next to take it begins anew.
    other = stored(store, [7] * 250)
    assert tail in other.slabs
    assert store.generation(tail) == 2
    assert store.generation(full) == 1


def test_what_is_whole_of_a_prompt_is_told_while_it_is_written():
    # By hand: 128 tokens are found, and 300 come, layer after layer.
    store, tokens = make_store(6), list(range(428))
    stored(store, tokens[:130]).release()
    sequence, kv = store.reserve(tokens, 0), kv_of(tokens)
    told = [sequence.whole()]
    for layer, first, count in ((0, 128, 300), (1, 128, 64), (1, 192, 236)):
        sequence.write_blocks(layer, first, count, payload(kv, layer, first, count))
        told.append(sequence.whole())
    assert [whole.num_tokens for whole in told] == [128, 128, 192, 428]
    assert [len(whole.slabs) for whole in told] == [1, 4, 4, 4]
    assert told[-1].slabs == sequence.slabs
    assert told[-1].generations == tuple(store.generation(slab) for slab in sequence.slabs)
    sequence.commit()
    assert sequence.whole() == told[-1]
    sequence.release()
    assert sequence.whole() == (0, (), ())


def test_what_is_whole_of_a_prompt_that_is_computed_here_is_what_is_stored():
    store, tokens = make_store(4), list(range(200))
    sequence = store.reserve(tokens, 10)
    assert sequence.whole().num_tokens == 0
    sequence.begin_prompt()
    append(sequence, tokens, 70)
    assert sequence.whole().num_tokens == 70
    assert sequence.whole().slabs == sequence.slabs


def test_a_generation_goes_up_where_a_hand_off_writes_again_and_where_it_had_written_alone():
    # By hand: the first slab is found, the second is a tail of which three blocks are found.
    store, tokens = make_store(6), list(range(500))
    first = stored(store, tokens[:188])
    first.keep([])
    first.release()
    sequence, kv = store.reserve(tokens, 0), kv_of(tokens)
    sequence.restart()
    assert sequence.whole().generations == (1, 1)
    assert sequence.kv_from_token == 176
    ingest(sequence, kv)
    assert sequence.whole().generations == (1, 1, 1, 1)
    sequence.restart()
    assert sequence.whole() == (176, sequence.slabs, (1, 2, 2, 2))
    # A landing may have written anything.
    ingest(sequence, kv)
    sequence.commit()
    other = store.reserve([7] * 200, 0)
    other.open_landing(lambda place: WritingLanding(store, place))
    before = other.whole()
    other.restart()
    assert other.whole().generations == tuple(one + 1 for one in before.generations)


@pytest.mark.parametrize("end", ["commit", "release"])
def test_a_slab_that_is_given_up_meanwhile_is_not_told_with_anothers_generation(end: str):
    # Two write the same text. The second gives its slab up, by one end or the other, and a third
    # takes it, between two words of what is told.
    store, tokens = make_store(3), list(range(128))
    twins = [store.reserve(tokens, 0) for _ in range(2)]
    for twin in twins:
        ingest(twin, kv_of(tokens))
    twins[0].commit()
    second = twins[1]
    [ours] = second.slabs

    def read_between(slab: int) -> int:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(store, "generation", generation)
            getattr(second, end)()
            third = store.reserve([7] * 128, 0)
            third.grow_for_prompt()
            assert third.slabs == (ours,)
        return generation(slab)

    generation = store.generation
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "generation", read_between)
        assert second.whole() == (0, (), ())
    expected = {"commit": (128, twins[0].slabs, (1,)), "release": (0, (), ())}
    assert second.whole() == expected[end]


@pytest.mark.parametrize("end", ["commit", "release"])
def test_a_slab_is_anothers_only_when_it_is_told_no_more(end: str):
    store, tokens = make_store(3), list(range(128))
    twins = [store.reserve(tokens, 0) for _ in range(2)]
    for twin in twins:
        ingest(twin, kv_of(tokens))
    twins[0].commit()
    [ours], told = twins[1].slabs, []
    let_go = store._let_go

    def look(slab: int) -> None:
        told.append((slab, twins[1].whole().slabs))
        let_go(slab)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "_let_go", look)
        getattr(twins[1], end)()
    assert told == [(ours, twins[0].slabs if end == "commit" else ())]
