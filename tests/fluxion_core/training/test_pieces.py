"""Pieces of documents, and quotations in them."""

from __future__ import annotations

import random

import torch

from fluxion_core.training.collect import RUN_OFFSETS, RUN_STEPS, plan_rows, prompt_ends
from fluxion_core.training.lookups import with_lookups
from fluxion_core.training.pieces import MINIMUM_TOKENS, PIECE_TOKENS, cut, with_quotations


def test_pieces_cover_a_document_and_kinds_take_turns():
    documents = [("a", list(range(10_000))), ("short", list(range(MINIMUM_TOKENS - 1)))]
    pieces = {piece.name: piece.token_ids for piece in cut(documents, encode)}
    assert sorted(pieces) == ["a-0-plain", f"a-{PIECE_TOKENS}-quoting"]
    assert pieces["a-0-plain"] == list(range(PIECE_TOKENS))
    more = cut([(str(i), list(range(3000))) for i in range(6)], encode)
    kinds = sorted(piece.name.split("-")[-1] for piece in more)
    assert kinds == ["asking", "asking", "plain", "plain", "quoting", "quoting"]
    assert cut(documents, encode) == cut(documents, encode)


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_a_lookup_asks_for_a_fact_of_the_region_and_the_run_is_its_value():
    text = list(b"." * 4608)
    asking = bytes(with_lookups(text, encode, random.Random(0)))
    assert len(asking) == len(text)
    found = 0
    for end in prompt_ends(len(text)):
        for offset in RUN_OFFSETS:
            first = end + offset
            value = asking[first : first + RUN_STEPS + 2].split(b"\n")[0].strip(b' ".|')
            # Facts are written over one another now and then: most are still there.
            found += value[:5] in asking[: first - 300]
    assert found >= 0.8 * len(prompt_ends(len(text))) * len(RUN_OFFSETS)


def test_a_quotation_is_a_copy_from_before_the_recent_window_that_runs_lie_in():
    ids = list(range(4608))
    quoting = with_quotations(ids, random.Random(0))
    assert len(quoting) == len(ids)
    for end in prompt_ends(len(ids)):
        for offset in RUN_OFFSETS:
            first = end + offset
            run = quoting[first - 8 : first + RUN_STEPS + 2]
            # Somewhere in the retrieval region of the run's first step.
            sources = range(64, first - 8 - 256)
            assert any(quoting[at : at + len(run)] == run for at in sources)
    assert quoting[:900] == ids[:900]


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
