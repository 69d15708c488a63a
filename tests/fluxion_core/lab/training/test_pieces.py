"""Pieces of documents, and quotations in them."""

from __future__ import annotations

import random
import re
import zlib

import torch

from fluxion_core.lab.training.collect import RUN_OFFSETS, RUN_STEPS, plan_rows, prompt_ends
from fluxion_core.lab.training.lookups import repeated_passage, with_lookups
from fluxion_core.lab.training.pieces import (
    KINDS,
    MINIMUM_TOKENS,
    PIECE_TOKENS,
    cut,
    with_quotations,
)


def test_pieces_cover_a_document_and_kinds_take_turns():
    documents = [("a", list(range(10_000))), ("short", list(range(MINIMUM_TOKENS - 1)))]
    pieces = {piece.name: piece.token_ids for piece in cut(documents, encode)}
    assert sorted(pieces) == ["a-0-plain", f"a-{PIECE_TOKENS}-quoting"]
    assert pieces["a-0-plain"] == list(range(PIECE_TOKENS))
    more = cut([(str(i), list(range(3000))) for i in range(10)], encode)
    kinds = sorted(piece.name.split("-")[-1] for piece in more)
    assert kinds == sorted(KINDS * 2)
    assert cut(documents, encode) == cut(documents, encode)


def encode(text: str) -> list[int]:
    """A token for each word and for each other character."""
    return [zlib.crc32(part.encode()) for part in re.findall(r"\w+|\W", text)]


def test_a_lookup_asks_for_a_fact_of_the_region_and_the_run_is_its_value():
    filler, space = 7, encode(" ")[0]
    asking = with_lookups([filler] * 4608, encode, random.Random(0))
    assert len(asking) == 4608
    found = []
    for end in prompt_ends(4608):
        for offset in RUN_OFFSETS:
            first = end + offset
            value = asking[first + 1] if asking[first] == space else asking[first]
            assert value != filler
            found.append(value in asking[64 : first - 300])
    # Facts are written over one another now and then.
    assert sum(found) >= 0.9 * len(found)


def test_a_quotation_is_a_copy_from_the_retrieval_region_that_runs_lie_in():
    ids = list(range(4608))
    quoting = with_quotations(ids, random.Random(0))
    assert len(quoting) == len(ids)
    assert quoting[:900] == ids[:900]
    for end in prompt_ends(len(ids)):
        for offset in RUN_OFFSETS:
            first = end + offset
            run = quoting[first - 8 : first + RUN_STEPS + 2]
            sources = range(64, first - 8 - 256)
            assert any(quoting[at : at + len(run)] == run for at in sources)


def test_a_repeated_passage_is_one_of_the_document_over_and_over():
    text = list(range(4608))
    repeated = repeated_passage(text, random.Random(2))
    assert len(repeated) == len(text)
    assert repeated[:64] == text[:64]
    period = repeated[64:].index(repeated[64], 1)
    assert 12 <= period < 96
    assert repeated[64:-period] == repeated[64 + period :]


def test_runs_begin_at_the_prompts_end_or_with_a_step_before_them():
    rows = plan_rows([1024], torch.device("cpu"))
    positions = rows.positions.tolist()
    assert positions[:16] == list(range(1008, 1024))
    sampled = [positions[index] for index in rows.samples.tolist()]
    assert sampled == [1024 + offset + step for offset in RUN_OFFSETS for step in range(RUN_STEPS)]
    for index, previous in enumerate(rows.previous.tolist()):
        if previous >= 0:
            assert positions[previous] == positions[index] - 1
    unknown = [positions[i] for i in rows.samples.tolist() if rows.previous[i] < 0]
    assert unknown == [1024]
