"""Profiles made from the store in slices, against the estimator that has everything at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.profiling import ProfilePace, PromptProfiling
from fluxion_core.errors import FluxionError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kernels.isa import available_isas, current_isa, set_isa
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.step_append import StepAppend
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.planning.profiled_queries import KeptQueries, ProfiledPositions
from fluxion_core.planning.prompt_estimate import PromptEstimator, padded_tokens
from fluxion_core.planning.prompt_profile import PromptProfile
from fluxion_core.pool.cpu_pool import CpuPool

LAYERS = 2
WINDOW = WindowSpec(sink_tokens=32, recent_tokens=256)


@pytest.fixture(autouse=True)
def one_thread_of_torch() -> Iterator[None]:
    # The estimator's products are this small, and others keep the CPUs busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Prompt:
    """A prompt's KV of random numbers, in the store and beside it, and its profiled queries."""

    def __init__(
        self,
        num_tokens: int,
        *,
        kv_heads: int = 2,
        group: int = 3,
        head_dim: int = 32,
        digest_bits: int = 16,
        loudness: float = 2.0,
        first_token: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        geometry = KvGeometry(LAYERS, kv_heads, head_dim, 512, digest_bits)
        self.num_tokens = num_tokens
        self.first_token = first_token
        self.positions = ProfiledPositions.of(num_tokens, first_token)
        shape = (LAYERS, len(self.positions), kv_heads * group, head_dim)
        self.queries = list(torch.randn(shape, generator=generator) * loudness)
        shape = (LAYERS, 2, padded_tokens(num_tokens), kv_heads, head_dim)
        # Keys of a few kinds, so that some blocks are worth more than others.
        self.kv = torch.randn(shape, generator=generator)
        self.kv += (
            2
            * torch.randn(shape[-1], generator=generator)
            * (torch.arange(shape[2])[:, None, None] % 97 < 20)
        )
        self.kv = self.kv.bfloat16().float()
        self.kv[:, :, num_tokens:] = 0
        self.store = HostKvStore(geometry, 64 << 20, model_key=b"random")
        self.sequence = self._stored()

    def _stored(self) -> SequenceKv:
        sequence = self.store.reserve(list(range(self.num_tokens)), 0)
        sequence.begin_prompt()
        append = StepAppend(sequence.store.geometry, [sequence], [self.num_tokens])
        for layer in range(LAYERS):
            append.append(layer, *self.kv[layer, :, : self.num_tokens])
        append.advance([True])
        sequence.commit()
        return sequence

    def profiling(self, threads: int = 1) -> PromptProfiling:
        kept = KeptQueries(self.num_tokens, LAYERS, self.first_token)
        for layer, queries in enumerate(self.queries):
            kept.add(layer, queries)
        return PromptProfiling(self.sequence, WINDOW, kept, CpuPool(threads))

    def expected(self) -> list[PromptProfile]:
        estimator = PromptEstimator(self.num_tokens, WINDOW, first_token=self.first_token)
        return [
            estimator.estimate(query, *(part.transpose(0, 1).contiguous() for part in kv))
            for query, kv in zip(self.queries, self.kv, strict=True)
        ]


def profiles_of(profiling: PromptProfiling, work: int = 1 << 30) -> list[PromptProfile]:
    while not profiling.is_done:
        profiling.advance(work)
    return profiling.profiles


def numbers(profiles: list[PromptProfile]) -> list[Tensor]:
    return [getattr(one, field.name) for one in profiles for field in fields(PromptProfile)]


def assert_close(found: list[PromptProfile], expected: list[PromptProfile], **tolerance) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for field in fields(PromptProfile):
            torch.testing.assert_close(
                getattr(mine, field.name),
                getattr(theirs, field.name),
                msg=lambda text, name=field.name: f"{name}: {text}",
                **{"atol": 5e-4, "rtol": 1e-3, **tolerance},
            )


# 303 to 305: a region of none and of one block for some of the queries; 1,040 and 1,050 end with a
# block and within one; below 289 there is no region; fewer tokens than queries.
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 100, 288, 303, 304, 305, 700, 1040, 1050, 2100])
def test_it_is_what_the_estimator_says(num_tokens: int):
    prompt = Prompt(num_tokens)
    assert_close(profiles_of(prompt.profiling()), prompt.expected())


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"),
    [(1, 1, 16), (3, 3, 64), (1, 7, 128), (2, 8, 80), (1, 16, 48)],
)
def test_it_is_so_for_other_shapes_of_heads(kv_heads: int, group: int, head_dim: int):
    prompt = Prompt(900, kv_heads=kv_heads, group=group, head_dim=head_dim)
    assert_close(profiles_of(prompt.profiling()), prompt.expected())


@pytest.mark.parametrize("isa", available_isas())
def test_it_is_so_with_every_instruction_set(isa: str):
    before = current_isa()
    set_isa(isa)
    try:
        prompt = Prompt(700, head_dim=80)
        assert_close(profiles_of(prompt.profiling()), prompt.expected())
    finally:
        set_isa(before)


@pytest.mark.parametrize("computed", [1, 5, 16, 100])
def test_of_a_prompt_whose_beginning_was_stored_there_are_fewer_queries(computed: int):
    prompt = Prompt(700, first_token=700 - computed)
    assert_close(profiles_of(prompt.profiling()), prompt.expected())


def test_with_small_digests_blocks_are_ranked_as_steps_rank_them():
    # Their bounds are a little wider, so that near ties go otherwise.
    prompt = Prompt(1050, digest_bits=8)
    found, expected = profiles_of(prompt.profiling()), prompt.expected()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.region_mass, theirs.region_mass, atol=5e-4, rtol=1e-3)
        torch.testing.assert_close(mine.kv, theirs.kv, atol=5e-4, rtol=1e-3)
        torch.testing.assert_close(mine.bounds, theirs.bounds, atol=0.1, rtol=0.02)
        away = (mine.log_squares - theirs.log_squares).abs()
        assert away.mean() < 0.05


def test_slices_of_any_size_and_threads_give_the_same_bits():
    prompt = Prompt(1050)
    whole = numbers(profiles_of(prompt.profiling()))
    for work, threads in ((1, 1), (37, 2), (1000, 3)):
        parts = numbers(profiles_of(prompt.profiling(threads), work))
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_window_without_weight_is_finite():
    # One key of the region outweighs everything by more than float32 can tell.
    prompt = Prompt(700)
    prompt.kv[:] = 0
    prompt.kv[:, 0, 300] = 1e3
    prompt.queries = [query.abs() + 1 for query in prompt.queries]
    prompt.sequence.release()
    prompt.store = HostKvStore(prompt.store.geometry, 64 << 20, model_key=b"other")
    prompt.sequence = prompt._stored()
    assert_close(profiles_of(prompt.profiling()), prompt.expected())


@pytest.mark.parametrize("part", [0, 1])
def test_values_that_are_not_finite_are_refused(part: int):
    prompt = Prompt(700)
    block = prompt.store.slab_kv(prompt.sequence.slabs[0])[1, 0, 300 // BLOCK_TOKENS]
    block[part, 3, 5] = float("nan")
    profiling = prompt.profiling()
    with pytest.raises(FluxionError, match="not finite"):
        profiles_of(profiling)


def test_a_slice_does_no_more_than_it_is_given_and_a_piece_of_each_tile():
    # By hand: two KV heads of 48 rows are six tiles, whose pieces are of up to 8 blocks.
    prompt = Prompt(2100, first_token=2084)
    profiling = prompt.profiling()
    assert profiling.num_tiles == 6
    slices = []
    while not profiling.is_done:
        slices.append(profiling.advance(60))
    assert 0 < max(slices) <= 60 + 6 * 8
    # 132 blocks, 2 layers and 6 tiles, and what ranking costs.
    assert sum(slices) > 132 * 2 * 6
    assert len(slices) > 132 * 2 * 6 / (60 + 6 * 8)


def test_no_more_tiles_than_64_go_on_beside_each_other():
    # By hand: 4 KV heads of 48 * 7 rows are 84 tiles.
    prompt = Prompt(2100, kv_heads=4, group=7)
    profiling = prompt.profiling()
    assert profiling.num_tiles == 64
    assert 64 <= profiling.advance(1) <= 64 * 2
    assert_close(profiles_of(profiling), prompt.expected())


def test_no_round_of_the_pool_is_long():
    # By hand: six tiles that may do all at once do 128 at a time, and end a piece of up to 8.
    profiling = Prompt(2100, first_token=2084).profiling()
    rounds: list[int] = []
    native = profiling._native

    class Watched:
        def __getattr__(self, name: str):
            return getattr(native, name)

        def advance(self, *arguments) -> int:
            rounds.append(native.advance(*arguments))
            return rounds[-1]

    profiling._native = Watched()
    profiling.advance(1 << 30)
    assert profiling.is_done
    assert max(rounds) <= 6 * (128 + 8)


class FakeProfiling:
    """Takes `seconds` on the clock for each piece of work, of which there are so many."""

    def __init__(self, seconds: float, pieces: int = 1 << 30) -> None:
        self.seconds, self.pieces = seconds, pieces
        self.now = 0.0
        self.asked: list[int] = []

    @property
    def is_done(self) -> bool:
        return self.pieces <= 0

    def advance(self, work: int) -> int:
        self.asked.append(work)
        self.now += work * self.seconds
        self.pieces -= work
        return work


def slice_of(pace: ProfilePace, profiling: FakeProfiling) -> list[int]:
    """Parts of the next slice."""
    before = len(profiling.asked)
    pace.advance(profiling)
    return profiling.asked[before:]


def test_a_slice_ends_with_the_time_of_one_layer_of_a_step():
    # By hand: a step of 30 layers takes 60 ms, a layer 2; 64 pieces of 1 us are less than an eighth
    # of that, as 128 are. 256 are just more. A slice ends once a quarter might be too long.
    profiling = FakeProfiling(1e-6)
    pace = ProfilePace(30, clock=lambda: profiling.now)
    pace.step_took(0.06)
    assert slice_of(pace, profiling) == [64, 128, 256, 256, 256, 256, 256, 256]
    assert slice_of(pace, profiling) == [256] * 6
    # Steps that are longer make longer slices: 0.3 of 160 ms and 0.7 of 60 are 90 ms, a layer 3.
    pace.step_took(0.16)
    assert slice_of(pace, profiling) == [256, 512, 512, 512, 512]


def test_a_machine_that_became_slow_makes_smaller_slices():
    # By hand: 256 pieces of 10 us take 2.56 ms of 2, and are halved until they are half a
    # millisecond: a slice too many of 2.56 ms, one of 1.28 and 0.64, then four parts of 0.32.
    profiling = FakeProfiling(1e-6)
    pace = ProfilePace(30, clock=lambda: profiling.now)
    pace.step_took(0.06)
    slice_of(pace, profiling)
    profiling.seconds = 1e-5
    assert slice_of(pace, profiling) == [256]
    assert slice_of(pace, profiling) == [128, 64]
    assert slice_of(pace, profiling) == [32] * 5


def test_before_the_first_step_a_slice_is_half_a_layer_of_the_last_chunk():
    profiling = FakeProfiling(1e-5)
    pace = ProfilePace(10, clock=lambda: profiling.now)
    pace.chunk_took(0.02)
    # By hand: a millisecond is 100 pieces of 10 us; a quarter of it 25.
    assert slice_of(pace, profiling) == [64, 32]
    assert slice_of(pace, profiling) == [16] * 5


def test_a_slow_machine_does_one_piece_at_a_time():
    profiling = FakeProfiling(1.0)
    pace = ProfilePace(10, clock=lambda: profiling.now)
    pace.step_took(1.0)
    slices = [slice_of(pace, profiling) for _ in range(8)]
    assert slices == [[64], [32], [16], [8], [4], [2], [1], [1]]


def test_a_slice_ends_with_the_profile():
    profiling = FakeProfiling(1e-9, pieces=200)
    pace = ProfilePace(10, clock=lambda: profiling.now)
    pace.step_took(1.0)
    assert slice_of(pace, profiling) == [64, 128, 256]
    assert slice_of(pace, profiling) == []
