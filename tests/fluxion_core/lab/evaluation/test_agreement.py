"""Agreement counts what a reader would see differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fluxion_core.lab.evaluation import render
from fluxion_core.lab.evaluation.agreement import compare, equal_tokens, forced_agreement
from fluxion_core.lab.evaluation.work import Answer

MakeAnswer = Callable[..., Answer]


def test_equal_tokens_end_at_the_first_difference_or_the_shorter_text():
    assert equal_tokens([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert equal_tokens([1, 2, 3], [1, 2]) == 2
    assert equal_tokens([1, 2], [1, 2]) == 2


def test_forced_agreement_counts_steps_without_the_first_token():
    assert forced_agreement([1, 2, 3, 4, 5], [1, 2, 9, 4, 9]) == 0.5
    assert forced_agreement([1], [1]) == 1.0


def document(answer: MakeAnswer, number: int, free: tuple[int, ...], forced: tuple[int, ...]):
    return [
        answer("agreement", number, "exact", None, token_ids=(1, 2, 3, 4)),
        answer("agreement", number, "fast", None, token_ids=free),
        answer("agreement", number, "fast, forced", None, token_ids=forced, read=(100, 100)),
    ]


def test_rows_average_over_documents(answer: MakeAnswer):
    answers = document(answer, 0, (1, 2, 3, 4), (1, 2, 3, 4))
    answers += document(answer, 1, (1, 9, 3, 4), (1, 9, 3, 9))
    (row,) = compare(answers, ["exact", "fast"])
    assert (row.way, row.length, row.documents) == ("fast", 1024, 2)
    assert row.equal_share.mean == pytest.approx((1 + 0.25) / 2)
    assert row.first_divergence == 2.5
    assert row.fully_equal == 0.5
    assert row.forced_share.mean == pytest.approx((1 + 1 / 3) / 2)
    assert row.of_exact == pytest.approx(0.2)
    assert "| 1024 | 2 | fast | 0.667 [" in render.agreement_markdown("T", [row], {}, [])


def test_a_document_that_is_not_finished_does_not_count(answer: MakeAnswer):
    answers = document(answer, 0, (1, 2, 3, 4), (1, 2, 3, 4))
    answers += document(answer, 1, (1, 9, 3, 4), (1, 9, 3, 9))[:2]
    (row,) = compare(answers, ["exact", "fast"])
    assert row.documents == 1
