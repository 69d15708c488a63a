"""Which queries of a prompt are profiled, and that none is lost between chunks."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.planning.profiled_queries import KeptQueries, ProfiledPositions


def test_every_32nd_token_is_profiled_before_the_last_ones():
    # By hand: 16 last ones from 4,984 on, and 32 before them, of which the first is 1,024 back.
    positions = ProfiledPositions.of(5000)
    assert list(positions.last) == list(range(4984, 5000))
    assert (positions.spread[0], positions.spread[1], positions.spread[-1]) == (3960, 3992, 4952)
    assert len(positions) == len(list(positions)) == 48


def test_a_short_prompt_has_those_of_its_second_half():
    # By hand: from 80 to 143 there are twice 32 tokens before the last 16.
    positions = ProfiledPositions.of(160)
    assert list(positions.spread) == [80, 112]
    assert list(ProfiledPositions.of(40)) == list(range(24, 40))
    assert list(ProfiledPositions.of(5)) == list(range(5))


@pytest.mark.parametrize(
    ("first_token", "spread", "last"), [(4910, [4920, 4952], 16), (4990, [], 10)]
)
def test_what_was_stored_before_has_no_queries(first_token: int, spread: list[int], last: int):
    positions = ProfiledPositions.of(5000, first_token)
    assert list(positions.spread) == spread
    assert list(positions.last) == list(range(5000 - last, 5000))


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 48, 1024])
@pytest.mark.parametrize(("num_tokens", "first_token"), [(9, 0), (1300, 0), (1300, 1170)])
def test_chunks_of_any_size_keep_them_all(num_tokens: int, first_token: int, chunk_tokens: int):
    # A query is its position.
    queries = torch.arange(num_tokens).float()[:, None, None].expand(-1, 2, 3)
    kept = KeptQueries(num_tokens, 2, first_token)
    for first in range(first_token, num_tokens, chunk_tokens):
        chunk = queries[first : min(first + chunk_tokens, num_tokens)]
        for layer in range(2):
            kept.add(layer, kept.positions.pick(chunk * (layer + 1), first))
    for layer in range(2):
        found = kept.take(layer)[:, 1, 2] / (layer + 1)
        assert found.tolist() == list(kept.positions)


def test_what_is_kept_does_not_hold_the_chunk():
    chunk = torch.zeros(64, 1, 1)
    picked = ProfiledPositions.of(64).pick(chunk, 0)
    chunk += 1
    assert not picked.any()


def test_queries_are_kept_as_they_come_and_taken_as_float32():
    kept = KeptQueries(3, 1)
    kept.add(0, kept.positions.pick(torch.full((3, 1, 2), 1.5, dtype=torch.bfloat16), 0))
    taken = kept.take(0)
    assert taken.dtype == torch.float32
    assert taken.tolist() == [[[1.5, 1.5]]] * 3
