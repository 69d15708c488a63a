"""Pieces of documents, and quotations in them."""

from __future__ import annotations

import random

import torch

from fluxion_core.training.collect import RUN_OFFSETS, RUN_STEPS, plan_rows, prompt_ends
from fluxion_core.training.pieces import MINIMUM_TOKENS, PIECE_TOKENS, cut, with_quotations


def test_pieces_cover_a_document_and_every_third_quotes():
    documents = [("a", list(range(10_000))), ("short", list(range(MINIMUM_TOKENS - 1)))]
    pieces = {piece.name: piece.token_ids for piece in cut(documents * 1)}
    assert sorted(pieces) == ["a-0", f"a-{PIECE_TOKENS}"]
    assert pieces["a-0"] == list(range(PIECE_TOKENS))
    more = cut([(str(i), list(range(3000))) for i in range(6)])
    assert sum("quoting" in piece.name for piece in more) == 2
    assert cut(documents) == cut(documents)


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
