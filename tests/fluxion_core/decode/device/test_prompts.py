"""A chunk on the device is the host's, in any pieces, with any tier, however often it stops.

On the CPU the kernels are interpreted and streams are none; on a GPU the same runs on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from fluxion_core.decode.chunk import PromptComputer
from fluxion_core.decode.device import prompts as prompts_module
from fluxion_core.decode.device.pinned import RegisteredStore
from fluxion_core.decode.device.prompts import DevicePromptComputer
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.step import PromptEnd
from fluxion_core.errors import FluxionError, NonFiniteKvError
from fluxion_core.geometry import WindowSpec
from fluxion_core.kernels.tier.gather import ResidentUnits
from fluxion_core.kvstore.digest_index import gather_digests, gather_kv
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.decoder import Decoder
from fluxion_core.observe.device_usage import DeviceUsage
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.small_step import CONFIG, WINDOW, random_decoder, store_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = [(7 * n * n + n) % CONFIG.vocab_size for n in range(700)]
BLOCK_BYTES = CONFIG.num_kv_heads * 2 * 16 * CONFIG.head_dim * 2
"""Of one layer, all KV heads."""


class Body(NamedTuple):
    """What computes prompts on the device, and what it counts into."""

    prompts: DevicePromptComputer
    usage: DeviceUsage


@pytest.fixture(scope="module")
def host() -> PromptComputer:
    pool = CpuPool(1)
    return PromptComputer(HostDecoder(random_decoder("cpu"), pool), pool)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(DEVICE)


@pytest.fixture
def seen_store() -> Iterator[HostKvStore]:
    """A store whose memory the device reads."""
    store = store_for(16)
    registered = RegisteredStore(store) if DEVICE == "cuda" else None
    yield store
    if registered is not None:
        registered.close()


@pytest.fixture
def body_of(decoder: Decoder, seen_store: HostKvStore) -> Callable[..., Body]:
    def make(**options) -> Body:
        usage = DeviceUsage()
        return Body(DevicePromptComputer(decoder, seen_store, CpuPool(1), usage, **options), usage)

    return make


def by_host(
    host: PromptComputer, sequence: SequenceKv, end: int, window: WindowSpec | None = None
) -> PromptEnd | None:
    """Compute a prompt's tokens up to `end` on the host."""
    return host.compute_chunk(sequence, PROMPT[sequence.num_tokens : end], window)


def begun(store: HostKvStore, length: int) -> SequenceKv:
    sequence = store.reserve(PROMPT[:length], 8)
    sequence.begin_prompt()
    return sequence


def assert_same_kv(found: SequenceKv, expected: SequenceKv) -> None:
    """In bfloat16, within a rounding or two; digests belong to the keys that are stored."""
    assert found.num_tokens == expected.num_tokens
    for layer in range(CONFIG.num_layers):
        for head in range(CONFIG.num_kv_heads):
            kv = zip(gather_kv(found, layer, head), gather_kv(expected, layer, head), strict=True)
            for mine, theirs in kv:
                torch.testing.assert_close(mine.float(), theirs.float(), atol=0.02, rtol=0.02)
            low, high = gather_digests(found, layer, head, 0)
            keys = gather_kv(found, layer, head)[0]
            blocks = keys[: len(keys) // 16 * 16].unflatten(0, (-1, 16)).float()
            assert torch.equal(low[: len(blocks)].float(), blocks.amin(1))
            assert torch.equal(high[: len(blocks)].float(), blocks.amax(1))


# By hand: a block of a layer is 8 KiB here; a piece holds one at least.
@pytest.mark.parametrize(
    ("stored", "piece_bytes"), [(0, 1), (5, 64 << 20), (160, 32 << 10), (75, 1), (333, 64 << 20)]
)
def test_a_follow_up_is_the_hosts(
    host: PromptComputer,
    seen_store: HostKvStore,
    body_of: Callable[..., Body],
    stored: int,
    piece_bytes: int,
):
    prompts, usage = body_of(piece_bytes=piece_bytes)
    length = stored + 50
    theirs, mine = begun(store_for(16), length), begun(seen_store, length)
    if stored:
        by_host(host, theirs, stored)
        by_host(host, mine, stored)
    expected = by_host(host, theirs, length)
    found = prompts.compute_chunk(mine, PROMPT[stored:length], None)
    assert found is not None
    assert expected is not None
    assert found.profiling is None
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-3, rtol=2e-3)
    assert int(found.logits.argmax()) == int(expected.logits.argmax())
    assert found.logits.device.type == "cpu"
    assert_same_kv(mine, theirs)
    assert mine.exact_tokens == length
    moved = usage.pcie_bytes
    blocks = -(-stored // 16)
    assert moved["host_to_device", "missing_kv"] == CONFIG.num_layers * blocks * BLOCK_BYTES
    kv_floats = CONFIG.num_layers * 50 * 2 * CONFIG.num_kv_heads * CONFIG.head_dim
    assert moved["device_to_host", "queries"] == 4 * kv_floats
    assert usage.busy_seconds > 0


def test_a_chunk_waits_for_its_own_work_alone(
    host: PromptComputer,
    seen_store: HostKvStore,
    body_of: Callable[..., Body],
    monkeypatch: pytest.MonkeyPatch,
):
    # Beside it the tier may be filled, which takes longer than a part of a chunk.
    def refuse(*_) -> None:
        raise AssertionError("waited for all that the device does")

    monkeypatch.setattr(torch.get_device_module(DEVICE), "synchronize", refuse)
    prompts, _ = body_of()
    mine = begun(seen_store, 120)
    by_host(host, mine, 80)
    assert prompts.compute_chunk(mine, PROMPT[80:120], None) is not None


def test_a_chunk_that_fails_leaves_nothing_under_way_and_can_be_computed_again(
    host: PromptComputer,
    seen_store: HostKvStore,
    body_of: Callable[..., Body],
    monkeypatch: pytest.MonkeyPatch,
):
    prompts, _ = body_of()
    theirs, mine = begun(store_for(16), 120), begun(seen_store, 120)
    for sequence in (theirs, mine):
        by_host(host, sequence, 80)
    rests = []
    rest, attend_part = prompts._pieces.rest, prompts_module.attend_part

    def full(*_, **__) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(prompts._pieces, "rest", lambda: rests.append(rest()))
    monkeypatch.setattr(prompts_module, "attend_part", full)
    with pytest.raises(torch.OutOfMemoryError):
        prompts.compute_chunk(mine, PROMPT[80:120], None)
    assert len(rests) == 1
    assert mine.num_tokens == 80
    monkeypatch.setattr(prompts_module, "attend_part", attend_part)
    assert prompts.compute_chunk(mine, PROMPT[80:120], None) is not None
    by_host(host, theirs, 120)
    assert_same_kv(mine, theirs)


def test_chunks_follow_each_other(
    host: PromptComputer, seen_store: HostKvStore, body_of: Callable[..., Body]
):
    prompts, _ = body_of()
    theirs, mine = begun(store_for(16), 300), begun(seen_store, 300)
    expected = by_host(host, theirs, 300)
    ends = [
        prompts.compute_chunk(mine, PROMPT[first:end], None)
        for first, end in ((0, 100), (100, 299), (299, 300))
    ]
    assert ends[:2] == [None, None]
    assert expected is not None
    assert ends[2] is not None
    torch.testing.assert_close(ends[2].logits, expected.logits, atol=2e-3, rtol=2e-3)
    assert_same_kv(mine, theirs)


def test_a_profile_has_the_queries_of_all_chunks(
    host: PromptComputer, seen_store: HostKvStore, body_of: Callable[..., Body]
):
    prompts, _ = body_of()
    theirs, mine = begun(store_for(16), 700), begun(seen_store, 700)
    by_host(host, theirs, 500)
    by_host(host, mine, 500)
    expected = by_host(host, theirs, 700, WINDOW)
    assert prompts.compute_chunk(mine, PROMPT[500:690], WINDOW) is None
    # One that is begun, and forgotten for another prompt's.
    assert prompts.compute_chunk(mine, PROMPT[690:], WINDOW, seconds=0.0) is None
    other = begun(seen_store, 50)
    assert prompts.compute_chunk(other, PROMPT[:50], None) is not None
    found = prompts.compute_chunk(mine, PROMPT[690:], WINDOW)
    assert found is not None
    assert expected is not None
    profiles = []
    for computer, end in ((prompts, found), (host, expected)):
        assert end.profiling is not None
        done = None
        while done is None:
            done = computer.advance_profile(end.profiling)
        profiles.append(done)
    for mine_of, theirs_of in zip(*profiles, strict=True):
        for name, value in vars(theirs_of).items():
            torch.testing.assert_close(getattr(mine_of, name), value, atol=0.1, rtol=0.05)


def test_a_chunk_that_others_cannot_wait_for_stops_between_layers(
    host: PromptComputer, seen_store: HostKvStore, body_of: Callable[..., Body]
):
    prompts, usage = body_of(piece_bytes=64 << 10)
    mine = begun(seen_store, 250)
    by_host(host, mine, 200)
    theirs = begun(store_for(16), 250)
    expected = by_host(host, theirs, 250)
    ends = []
    for call in range(CONFIG.num_layers):
        assert mine.num_tokens == 200
        # Whoever calls may name more tokens then: those that it began with count.
        tokens = PROMPT[200 : 250 if call == 0 else 230]
        ends.append(prompts.compute_chunk(mine, tokens, None, seconds=0.0))
    assert ends[:-1] == [None] * (CONFIG.num_layers - 1)
    assert expected is not None
    assert ends[-1] is not None
    torch.testing.assert_close(ends[-1].logits, expected.logits, atol=2e-3, rtol=2e-3)
    assert_same_kv(mine, theirs)
    gathered = usage.pcie_bytes["host_to_device", "missing_kv"]
    assert gathered == CONFIG.num_layers * 13 * BLOCK_BYTES


def test_a_call_does_as_many_layers_as_there_is_time_for_by_what_the_last_one_took(
    host: PromptComputer, seen_store: HostKvStore, body_of: Callable[..., Body], monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(prompts_module.time, "perf_counter", lambda: now[0])
    prompts, _ = body_of()
    mine = begun(seen_store, 60)
    layers = []
    attend = prompts_module._GatheredAttention.attend

    def timed(self, layer, *qkv):
        layers.append(layer)
        now[0] += 1.0
        return attend(self, layer, *qkv)

    monkeypatch.setattr(prompts_module._GatheredAttention, "attend", timed)
    # By hand: nothing is stored, and a layer is thought to take 0.3 ms: one in 0.5 ms. It took 1 s:
    # two in 2.5 s.
    assert prompts.compute_chunk(mine, PROMPT[:60], None, seconds=5e-4) is None
    assert layers == [0]
    assert prompts.compute_chunk(mine, PROMPT[:60], None, seconds=2.5) is not None
    assert layers == [0, 1, 2]


def test_another_sequences_chunk_takes_the_place_of_one_that_was_given_up(
    host: PromptComputer, seen_store: HostKvStore, body_of: Callable[..., Body]
):
    prompts, _ = body_of(piece_bytes=64 << 10)
    given_up = begun(seen_store, 250)
    by_host(host, given_up, 200)
    assert prompts.compute_chunk(given_up, PROMPT[200:250], None, seconds=0.0) is None
    given_up.release()
    mine, theirs = begun(seen_store, 150), begun(store_for(16), 150)
    by_host(host, mine, 120)
    expected = by_host(host, theirs, 150)
    found = prompts.compute_chunk(mine, PROMPT[120:150], None)
    assert expected is not None
    assert found is not None
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-3, rtol=2e-3)
    assert_same_kv(mine, theirs)


def test_what_the_tier_holds_is_read_there_and_does_not_cross_the_link(
    host: PromptComputer, seen_store: HostKvStore, body_of: Callable[..., Body]
):
    geometry = seen_store.geometry
    mine = begun(seen_store, 250)
    by_host(host, mine, 200)
    units = geometry.num_layers * geometry.num_kv_heads * geometry.slab_blocks
    table = torch.full((seen_store.num_slabs * units,), -1, dtype=torch.int32)
    kv = seen_store.slab_kv(mine.slabs[0]).reshape(units, -1)
    resident = torch.randperm(units, generator=torch.Generator().manual_seed(1))[: units // 2]
    table[mine.slabs[0] * units + resident] = torch.arange(len(resident), dtype=torch.int32)
    tier = kv[resident].to(DEVICE)
    asked = []

    def residents(sequence: SequenceKv) -> ResidentUnits:
        asked.append(sequence)
        return ResidentUnits(table.to(DEVICE), tier.data_ptr())

    theirs = begun(store_for(16), 250)
    expected = by_host(host, theirs, 250)
    # Where the tier holds them, the host's are not looked at.
    kv[resident] = float("nan")
    prompts, usage = body_of(residents=residents)
    found = prompts.compute_chunk(mine, PROMPT[200:250], None)
    assert asked == [mine]
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-3, rtol=2e-3)
    blocks = torch.arange(units) % geometry.slab_blocks
    missing = int(((table[mine.slabs[0] * units :][:units] < 0) & (blocks < 13)).sum())
    gathered = usage.pcie_bytes["host_to_device", "missing_kv"]
    assert gathered == missing * geometry.block_bytes
    assert 0 < missing < 13 * geometry.num_layers * geometry.num_kv_heads


def test_no_chunk_goes_beyond_the_room(seen_store: HostKvStore, body_of: Callable[..., Body]):
    prompts, _ = body_of()
    sequence = seen_store.reserve(PROMPT[:100], 0)
    sequence.begin_prompt()
    with pytest.raises(FluxionError, match="reservation"):
        prompts.compute_chunk(sequence, PROMPT[:600], None)


def test_kv_that_is_not_finite_does_not_count(
    seen_store: HostKvStore, decoder: Decoder, body_of: Callable[..., Body]
):
    prompts, _ = body_of()
    sequence = begun(seen_store, 60)
    row = decoder.embedding.data[PROMPT[20]]
    before = row.clone()
    row.fill_(float("nan"))
    try:
        with pytest.raises(NonFiniteKvError, match="token"):
            prompts.compute_chunk(sequence, PROMPT[:60], None)
    finally:
        row.copy_(before)
    assert sequence.num_tokens == 0
    assert sequence.damage is not None
