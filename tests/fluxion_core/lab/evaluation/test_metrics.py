"""Metrics, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxion_core.lab.evaluation.metrics import (
    Metric,
    classification,
    edit_similarity,
    exact_match,
    first_code_line,
    match_all,
    match_part,
    normalise,
    rouge_l,
    score,
    token_f1,
)


def test_normalising_drops_case_punctuation_articles_and_spaces():
    assert normalise("  The  Cat's, a hat! ") == "cats hat"


def test_match_all_is_the_share_of_references_found_whatever_their_case():
    assert match_all("It was ALPHA, then beta.", ["alpha", "beta", "gamma", "delta"]) == 0.5


def test_match_part_needs_one_reference():
    assert match_part("in Paris", ["paris", "lutetia"]) == 1.0
    assert match_part("in Rome", ["paris", "lutetia"]) == 0.0


def test_exact_match_is_after_normalisation():
    assert exact_match("The Seine.", "seine") == 1.0
    assert exact_match("The Seine river", "seine") == 0.0


def test_f1_of_two_shared_words_of_three_and_four():
    # precision 2/3, recall 2/4: 2 * (2/3 * 1/2) / (2/3 + 1/2) = 4/7
    assert token_f1("red green blue", "green red black white") == pytest.approx(4 / 7)


def test_f1_counts_a_repeated_word_as_often_as_both_have_it():
    # common: one "go"; precision 1/3, recall 1/1
    assert token_f1("go go go", "go") == pytest.approx(0.5)


def test_f1_without_a_shared_word_is_zero_even_for_empty_answers():
    assert token_f1("", "word") == 0.0
    assert token_f1("the", "word") == 0.0


def test_rouge_l_keeps_the_order():
    # "police killed the gunman" / "police kill the gunman": police, the, gunman: 3 of 4 each
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    # "the gunman kill police": the longest common subsequence is "the gunman"
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)


def test_rouge_l_of_texts_of_different_lengths():
    # common 2: precision 2/2, recall 2/6; F = 2 * 1 * (1/3) / (4/3) = 0.5
    assert rouge_l("a b", "x a y b z w") == pytest.approx(0.5)


def test_edit_similarity_of_kitten_and_sitting():
    # distance 3, longest 7
    assert edit_similarity("kitten", "sitting") == pytest.approx(4 / 7)
    assert edit_similarity("", "") == 1.0
    assert edit_similarity("", "abc") == 0.0


def longest_common_subsequence(left: list[str], right: list[str]) -> int:
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return 1 + longest_common_subsequence(left[:-1], right[:-1])
    return max(
        longest_common_subsequence(left[:-1], right), longest_common_subsequence(left, right[:-1])
    )


def edit_distance(left: str, right: str) -> int:
    if not left or not right:
        return len(left) + len(right)
    change = edit_distance(left[:-1], right[:-1]) + (left[-1] != right[-1])
    return min(change, edit_distance(left[:-1], right) + 1, edit_distance(left, right[:-1]) + 1)


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_by_definition_for_short_texts(left: str, right: str):
    longest = max(len(left), len(right), 1)
    expected = 1 - edit_distance(left, right) / longest
    assert edit_similarity(left, right) == pytest.approx(expected)
    common = longest_common_subsequence([*left], [*right])
    rouge = 2 * common / (len(left) + len(right)) if common else 0.0
    assert rouge_l(" ".join(left), " ".join(right)) == pytest.approx(rouge)


def test_classification_shares_the_point_with_wrong_labels_named():
    labels = ["Person", "City", "City name", "Date"]
    assert classification("City", ["City"], labels) == 1.0
    assert classification("Date or Person", ["Person"], labels) == 0.5
    assert classification("Date", ["Person"], labels) == 0.0


def test_classification_forgives_a_label_that_is_part_of_the_right_one():
    # "City name" names "City" too
    assert classification("City name", ["City name"], ["City", "City name"]) == 1.0


def test_the_first_code_line_is_no_comment_and_no_fence():
    assert first_code_line("\n```python\n# note\n    return x\ny = 1") == "    return x"
    assert first_code_line("# only a comment") == ""


@pytest.mark.parametrize(
    ("metric", "answer", "references", "expected"),
    [
        (Metric.MATCH_ALL, "1 and 2", ["1", "3"], 50.0),
        (Metric.MATCH_PART, "1 and 2", ["1", "3"], 100.0),
        (Metric.EXACT_MATCH, "A yes.", ["no", "yes"], 100.0),
        (Metric.F1, "red green blue", ["nothing", "green red black white"], 400 / 7),
        (Metric.ROUGE_L, "a b", ["zzz", "x a y b z w"], 50.0),
        (Metric.CODE_SIMILARITY, "# c\nkitten\nmore", ["sitting"], 400 / 7),
    ],
)
def test_scores_are_percentages_of_the_best_reference(
    metric: Metric, answer: str, references: list[str], expected: float
):
    assert score(metric, answer, references) == pytest.approx(expected)


def test_score_by_classification_knows_all_labels():
    assert score(Metric.CLASSIFICATION, "x or y", ["x"], ["x", "y"]) == 50.0
