"""A prompt's profile against the plain steps that define it, and its bytes on the wire."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fluxion_core.errors import FrameFormatError, ShapeError
from fluxion_core.geometry import WindowSpec
from fluxion_core.planning import prompt_profile
from fluxion_core.planning.constants import CLIP, ERROR_FLOOR
from fluxion_core.planning.features import kv_distribution
from fluxion_core.planning.layer_step import LayerStep, query_needs
from fluxion_core.planning.profiled_queries import ProfiledPositions
from fluxion_core.planning.prompt_estimate import PromptEstimator, padded_tokens
from fluxion_core.planning.prompt_profile import PromptProfile, QueryNeeds

KV_HEADS, GROUP, HEAD_DIM = 2, 3, 16
WINDOW = WindowSpec(sink_tokens=32, recent_tokens=128)


def random_layer(num_tokens: int, loudness: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Profiled queries of a prompt, and its keys and values, padded with zeros."""
    generator = torch.Generator().manual_seed(num_tokens)
    rows = len(ProfiledPositions.of(num_tokens))
    query = torch.randn(rows, KV_HEADS * GROUP, HEAD_DIM, generator=generator) * loudness
    shape = (2, KV_HEADS, padded_tokens(num_tokens), HEAD_DIM)
    key, value = torch.randn(shape, generator=generator).bfloat16().float()
    key[:, num_tokens:], value[:, num_tokens:] = 0, 0
    return query, key, value


def by_plain_steps(query: Tensor, key: Tensor, value: Tensor, num_tokens: int) -> PromptProfile:
    profiled = ProfiledPositions.of(num_tokens)
    positions = torch.tensor(list(profiled))
    own_key, own_value = key[:, positions].transpose(0, 1), value[:, positions].transpose(0, 1)
    step = LayerStep(key, value, query, own_key, own_value, positions, WINDOW)
    kv = kv_distribution(key[:, :num_tokens], value[:, :num_tokens])
    needs = query_needs(step)
    spread = len(profiled.spread)
    last = QueryNeeds(*(getattr(needs, f.name)[spread:] for f in fields(QueryNeeds)))
    profile = last.summarize(1, kv[None], needs.log_squares[None, :spread])
    return PromptProfile(*(getattr(profile, f.name)[0] for f in fields(PromptProfile)))


def assert_close(found: PromptProfile, expected: PromptProfile) -> None:
    for field in fields(PromptProfile):
        torch.testing.assert_close(
            getattr(found, field.name), getattr(expected, field.name), atol=2e-4, rtol=1e-4
        )


# 1,000 ends within a block and 1,008 with one; 175 and 176 have a region of none and of one block
# for some of the queries, 300 for the spread ones; the others have no region, or fewer tokens than
# queries.
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 100, 175, 176, 177, 190, 300, 1000, 1008, 2200])
def test_it_is_what_plain_steps_say(num_tokens: int):
    layer = random_layer(num_tokens)
    found = PromptEstimator(num_tokens, WINDOW).estimate(*layer)
    assert_close(found, by_plain_steps(*layer, num_tokens))


def test_a_few_queries_at_a_time_say_the_same():
    layer = random_layer(600)
    found = PromptEstimator(600, WINDOW, part_bytes=1).estimate(*layer)
    assert_close(found, PromptEstimator(600, WINDOW).estimate(*layer))


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_heads_that_are_looked_at_together_say_the_same(part_bytes: int):
    layer = random_layer(600)
    estimator = PromptEstimator(600, WINDOW, heads_at_once=KV_HEADS, part_bytes=part_bytes)
    assert_close(estimator.estimate(*layer), PromptEstimator(600, WINDOW).estimate(*layer))


class CountedCalls(TorchDispatchMode):
    """Operations of torch; on a GPU all but views are launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_more_heads_together_are_no_more_calls():
    counts = []
    for kv_heads in (2, 8):
        query = torch.randn(len(ProfiledPositions.of(600)), 2 * kv_heads, HEAD_DIM)
        key, value = torch.randn(2, kv_heads, padded_tokens(600), HEAD_DIM)
        estimator = PromptEstimator(600, WINDOW, heads_at_once=kv_heads)
        with CountedCalls() as calls:
            estimator.estimate(query, key, value)
        counts.append(calls.count)
    assert counts[0] == counts[1]


def test_a_second_layer_does_not_see_the_first_ones_numbers():
    first, second = random_layer(600), random_layer(600, loudness=0.3)
    estimator = PromptEstimator(600, WINDOW)
    before = estimator.estimate(*first)
    kept = prompt_profile.pack([before])
    assert_close(estimator.estimate(*second), PromptEstimator(600, WINDOW).estimate(*second))
    assert prompt_profile.pack([before]) == kept


def test_without_a_region_nothing_is_needed():
    # By hand: no budget changes anything, so errors are at their floor and masses at the clip.
    profile = PromptEstimator(160, WINDOW).estimate(*random_layer(160))
    floor = 2 * torch.log(torch.tensor(ERROR_FLOOR))
    assert (profile.log_squares - floor).abs().max() < 1e-4
    assert (profile.region_mass == -CLIP).all()
    assert (profile.bounds == -CLIP).all()


def test_a_window_without_weight_is_finite():
    # One key of the region outweighs everything by more than float32 can tell.
    query, key, value = random_layer(600)
    key[:] = 0
    key[:, 300] = 1e3
    query = query.abs() + 1
    profile = PromptEstimator(600, WINDOW).estimate(query, key, value)
    for field in fields(PromptProfile):
        assert torch.isfinite(getattr(profile, field.name)).all(), field.name
    assert (profile.region_mass == CLIP).all()


def test_the_region_ends_where_the_receivers_window_begins():
    query, key, value = random_layer(600)
    wide = PromptEstimator(600, WindowSpec(32, 256)).estimate(query, key, value)
    narrow = PromptEstimator(600, WINDOW).estimate(query, key, value)
    assert (wide.region_mass < narrow.region_mass).all()


def test_fewer_queries_are_those_of_the_last_tokens():
    # The last 5 queries alone: means over them, and the largest of all 16 is no smaller.
    query, key, value = random_layer(600)

    def of_last(count: int) -> PromptProfile:
        estimator = PromptEstimator(600, WINDOW, first_token=600 - count)
        return estimator.estimate(query[-count:], key, value)

    whole = PromptEstimator(600, WINDOW).estimate(query, key, value)
    last = of_last(5)
    assert (last.worst_log_squares <= whole.worst_log_squares + 1e-5).all()
    for single in (of_last(count) for count in range(1, 5)):
        assert (single.worst_log_squares <= last.worst_log_squares + 1e-5).all()
    torch.testing.assert_close(last.spread_log_squares, last.log_squares)


def test_only_the_spread_estimate_knows_of_the_spread_queries():
    query, key, value = random_layer(2200)
    whole = PromptEstimator(2200, WINDOW).estimate(query, key, value)
    alone = PromptEstimator(2200, WINDOW, first_token=2184).estimate(query[-16:], key, value)
    for field in fields(PromptProfile):
        is_same = torch.equal(getattr(whole, field.name), getattr(alone, field.name))
        assert is_same == (field.name != "spread_log_squares"), field.name


def test_another_number_of_queries_is_refused():
    query, key, value = random_layer(600)
    estimator = PromptEstimator(600, WINDOW)
    for rows in (torch.cat([query, query[:1]]), query[-16:]):
        with pytest.raises(ShapeError, match="need 24 queries and 640 keys"):
            estimator.estimate(rows, key, value)
    with pytest.raises(ShapeError, match="need 24 queries and 640 keys"):
        estimator.estimate(query, key[:, :600], value)


def test_a_profile_survives_the_wire():
    profiles = [PromptEstimator(600, WINDOW).estimate(*random_layer(600, n)) for n in (1.0, 3.0)]
    packed = prompt_profile.pack(profiles)
    shape = {"num_layers": 2, "num_heads": KV_HEADS * GROUP, "num_kv_heads": KV_HEADS}
    assert len(packed) == prompt_profile.packed_bytes(**shape)
    for found, sent in zip(prompt_profile.unpack(packed, **shape), profiles, strict=True):
        for field in fields(PromptProfile):
            assert torch.equal(getattr(found, field.name), getattr(sent, field.name))
    with pytest.raises(FrameFormatError, match="need"):
        prompt_profile.unpack(packed[:-4], **shape)
    with pytest.raises(FrameFormatError, match="not finite"):
        prompt_profile.unpack(packed[:-4] + b"\x00\x00\x80\x7f", **shape)
