"""Scores of answers that collect, worked out by hand."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxion_core.lab.evaluation.case import Case
from fluxion_core.lab.evaluation.collected import (
    has_total,
    numbers_iou,
    records_in,
    records_iou,
    total_nearness,
)
from fluxion_core.lab.evaluation.metrics import Metric, score

ANNA = {"name": "Anna", "crates": 12, "town": "Isford"}
BEN = {"name": "Ben", "crates": 30, "town": "Lowick"}
REFERENCES = (json.dumps(ANNA), json.dumps(BEN))


def case(metric: Metric, answers: tuple[str, ...], prefix: str, *, one_line: bool = False) -> Case:
    return Case("task", 64, 0, (1,), answers, metric, 8, one_line, answer_prefix=prefix)


@pytest.mark.parametrize(
    "answer",
    [
        f"[{REFERENCES[0]}, {REFERENCES[1]}]",
        f"Here they are:\n```json\n[\n{REFERENCES[1]},\n{REFERENCES[0]}\n]\n```\nAll of them.",
        f"[{REFERENCES[0].upper()}, {REFERENCES[1]}] [{{}}]",
        '[{"name": "Anna", "crates": "12", "town": "Isford"},' + f"{REFERENCES[1]}]",
    ],
)
def test_right_records_count_in_any_order_case_and_surroundings(answer: str):
    assert records_iou(answer, REFERENCES) == 1.0


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("No deliveries.", 0),
        # Three fields of six.
        (f"[{REFERENCES[0]}]", 3 / 6),
        (REFERENCES[0], 3 / 6),
        # Ben's name and crates are whole before the cut: five of six.
        (f"[{REFERENCES[0]}, {REFERENCES[1][:-5]}", 5 / 6),
        # One wrong number: five in common, seven of either.
        (f"[{REFERENCES[0].replace('12', '13')}, {REFERENCES[1]}]", 5 / 7),
        # A record that nobody asked for: six in common, eight of either.
        (f'[{REFERENCES[0]}, {{"name": "Cal", "crates": 4}}, {REFERENCES[1]}]', 6 / 8),
        # An escape that JSON does not have spoils its own field: two of seven.
        (r'[{"name": "Anna", "town": "Is\qford", "crates": 12, ', 2 / 7),
        # A wrong name takes its fields with it: three in common, nine of either.
        (f"[{REFERENCES[0]}, {REFERENCES[1].replace('Ben', 'Bob')}]", 3 / 9),
    ],
)
def test_of_a_wrong_or_cut_answer_counts_what_is_right(answer: str, share: float):
    assert records_iou(answer, REFERENCES) == pytest.approx(share)


@given(st.integers(0, len(f"[{REFERENCES[0]}, {REFERENCES[1]}]")))
def test_a_longer_piece_of_a_right_answer_scores_no_less(cut: int):
    whole = f"[{REFERENCES[0]}, {REFERENCES[1]}]"
    assert records_iou(whole[:cut], REFERENCES) <= records_iou(whole[: cut + 1], REFERENCES)


@given(st.text(alphabet='[]{}":,0a\\n ', max_size=60))
def test_no_text_is_too_strange_to_score(text: str):
    assert 0 <= records_iou(text, REFERENCES) <= 1


def test_records_are_closed_where_their_array_ends():
    assert records_in(f"[{REFERENCES[0]}, ") == ([ANNA], False)
    assert records_in(f"[{REFERENCES[0]}] and") == ([ANNA], True)
    assert records_in(f"so: {REFERENCES[0]}, {REFERENCES[1]}") == ([ANNA], True)


def test_an_answer_of_records_ends_with_its_array_and_goes_on_from_its_prefix():
    records = case(Metric.RECORDS, REFERENCES, 'JSON: [{"name":')
    answer = f"{json.dumps(ANNA)[8:]}, {json.dumps(BEN)}"
    assert not records.cannot_change(answer)
    assert records.cannot_change(f"{answer}]")
    assert records.score_of(answer) == 100.0


def test_numbers_are_those_in_common_of_those_that_either_has():
    # Two of the three asked for, and one more that is not: 2 of 4.
    assert numbers_iou(" 1234, 5678 and 9999.", ("1234", "5678", "4321")) == pytest.approx(2 / 4)
    assert numbers_iou("none", ("1234",)) == 0.0
    assert score(Metric.NUMBERS, "1234, 1234", ("1234",)) == 100.0


@pytest.mark.parametrize(
    ("answer", "nearness"),
    [
        ("Entries: 12, 15. Total: 6", 1.0),
        ("the total number is 5.", 1 - 2 / 6),
        ("Total: 3", 0.0),
        ("Total: 60", 0.0),
        ("Entries: 6", 0.0),
    ],
)
def test_a_total_loses_twice_its_relative_error(answer: str, nearness: float):
    assert total_nearness(answer, "6") == pytest.approx(nearness)


def test_a_total_is_there_once_its_number_has_ended():
    assert not has_total("Entries: 6, 7. Total: 1")
    assert has_total("Total: 12.")
    total = case(Metric.TOTAL, ("2",), "Total:")
    assert not total.cannot_change(" 2")
    assert total.cannot_change(" 2 ")
    assert total.score_of(" 2") == 100.0
