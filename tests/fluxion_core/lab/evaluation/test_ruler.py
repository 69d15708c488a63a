"""RULER's tasks: what is asked for is in the text, once, within the length, the same every time."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from fluxion_core.errors import ConfigError, ContextLengthError
from fluxion_core.lab.evaluation.case import Case, PromptEncoder
from fluxion_core.lab.evaluation.tasks.aggregation import frequent_words_question
from fluxion_core.lab.evaluation.tasks.needles import NEEDLE_TASKS
from fluxion_core.lab.evaluation.tasks.ruler import TASK_NAMES, RulerSuite

GENERATED = tuple(name for name in TASK_NAMES if not name.startswith("qa"))

LENGTH = 8000
"""In bytes here: the tokenizer's tokens are bytes."""


@pytest.fixture
def suite(encoder: PromptEncoder) -> RulerSuite:
    return RulerSuite(encoder, seed=3)


def text_of(case: Case, encoder: PromptEncoder) -> str:
    return encoder.tokenizer.decode(case.prompt_token_ids)


def test_there_are_thirteen_tasks():
    assert len(TASK_NAMES) == len(set(TASK_NAMES)) == 13


@pytest.mark.parametrize("name", GENERATED)
def test_prompt_and_answer_fill_the_length_and_never_exceed_it(name: str, suite: RulerSuite):
    case = suite.case(name, LENGTH, 0)
    used = len(case.prompt_token_ids) + case.max_new_tokens
    # The unit of haystack is a line: the longest, a needle of two UUIDs, has some 110 bytes.
    assert LENGTH - 250 < used <= LENGTH


@pytest.mark.parametrize("name", GENERATED)
def test_answers_are_in_the_text_and_differ(name: str, suite: RulerSuite, encoder: PromptEncoder):
    case = suite.case(name, LENGTH, 0)
    text = text_of(case, encoder)
    assert all(answer in text for answer in case.answers)
    assert len(set(case.answers)) == len(case.answers)


@pytest.mark.parametrize("name", GENERATED)
def test_a_case_is_the_same_for_the_same_seed_and_another_for_another(
    name: str, suite: RulerSuite, encoder: PromptEncoder
):
    case = suite.case(name, LENGTH, 1)
    assert RulerSuite(encoder, seed=3).case(name, LENGTH, 1) == case
    assert RulerSuite(encoder, seed=4).case(name, LENGTH, 1).answers != case.answers
    assert suite.case(name, LENGTH, 2).answers != case.answers


@pytest.mark.parametrize("name", sorted(NEEDLE_TASKS))
def test_a_needle_stands_once_and_the_question_names_its_key(
    name: str, suite: RulerSuite, encoder: PromptEncoder
):
    case = suite.case(name, LENGTH, 0)
    lines = text_of(case, encoder).split("The secret ")
    for answer in case.answers:
        (needle,) = [line for line in lines if f"is: {answer}." in line]
        key = needle.split('"')[1]
        assert f'"{key}"' in case.answer_prefix


@pytest.mark.parametrize(
    ("name", "answers"),
    [("niah_single_3", 1), ("niah_multikey_1", 1), ("niah_multivalue", 4), ("niah_multiquery", 4)],
)
def test_as_many_answers_as_are_asked_for(name: str, answers: int, suite: RulerSuite):
    assert len(suite.case(name, LENGTH, 0).answers) == answers


def test_multivalue_hides_four_needles_of_one_key(suite: RulerSuite, encoder: PromptEncoder):
    case = suite.case("niah_multivalue", LENGTH, 0)
    key = case.answer_prefix.split('"')[1]
    assert text_of(case, encoder).count(f'"{key}" is: ') == 4


def test_multikey_hides_four_keys_of_which_one_is_asked(suite: RulerSuite, encoder: PromptEncoder):
    case = suite.case("niah_multikey_1", LENGTH, 0)
    assert text_of(case, encoder).count('" is: ') == 4


def test_needles_lie_at_many_depths(suite: RulerSuite, encoder: PromptEncoder):
    depths = []
    for number in range(12):
        case = suite.case("niah_single_1", 4000, number)
        text = text_of(case, encoder)
        depths.append(text.index(case.answers[0]) / len(text))
    assert min(depths) < 0.35
    assert max(depths) > 0.65


def test_a_chain_of_variables_leads_from_the_value_to_all_answers(
    suite: RulerSuite, encoder: PromptEncoder
):
    case = suite.case("vt", LENGTH, 0)
    value = case.answer_prefix.split(" hold the value ")[1].split(",")[0]
    text = text_of(case, encoder)
    found = [line[4:9] for line in text.split("\n") if line.endswith(f"= {value}")]
    for _ in range(4):
        (following,) = [
            line[4:9] for line in text.split("\n") if line.endswith(f"= VAR {found[-1]}")
        ]
        found.append(following)
    assert tuple(found) == case.answers


def test_common_words_are_the_ten_most_frequent(suite: RulerSuite, encoder: PromptEncoder):
    case = suite.case("cwe", LENGTH, 0)
    listed = text_of(case, encoder).split("\nWhich 10 words")[1]
    words = [word for word in listed.split() if not word[0].isdigit()]
    counts = Counter(word for word in words if word.isalpha() or "-" in word)
    assert {counts[answer] for answer in case.answers} == {30}
    others = {word: n for word, n in counts.items() if word not in case.answers}
    assert max(n for word, n in others.items() if word not in {"the", "words"}) < 30


def test_frequent_words_are_ordered_by_how_often_they_occur():
    question = frequent_words_question(1000, random.Random(1))
    words = question.text.split("\n\n")[1].split()
    counts = Counter(word for word in words if word != "...")
    ranked = [word for word, _ in counts.most_common(3)]
    assert tuple(ranked) == question.answers
    fourth = counts.most_common(4)[3][1]
    assert counts[ranked[2]] > fourth


def test_a_length_that_a_task_does_not_fit_is_refused(suite: RulerSuite):
    with pytest.raises(ContextLengthError, match="exceeds the context"):
        suite.case("cwe", 600, 0)


def test_question_answering_without_a_file_says_which_setting_it_needs(suite: RulerSuite):
    assert suite.needs_file == {"qa_1": "squad_file", "qa_2": "hotpot_file"}
    assert not {"qa_1", "qa_2"} & set(suite.task_names)
    with pytest.raises(ConfigError, match="squad_file"):
        suite.case("qa_1", LENGTH, 0)


def test_an_unknown_task_is_named(suite: RulerSuite):
    with pytest.raises(ConfigError, match="niah_single_9"):
        suite.case("niah_single_9", LENGTH, 0)


def squad_file(path: Path) -> Path:
    paragraphs = [
        {
            "context": f"Fact {i}: the city of C{i} lies on the river R{i}. " * 3,
            "qas": [{"question": f"Which river is C{i} on?", "answers": [{"text": f"R{i}"}]}],
        }
        for i in range(40)
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


def test_a_question_of_a_squad_file_lies_among_other_paragraphs(
    encoder: PromptEncoder, tmp_path: Path
):
    suite = RulerSuite(encoder, seed=3, squad_file=squad_file(tmp_path / "squad.json"))
    case = suite.case("qa_1", 4000, 0)
    text = text_of(case, encoder)
    city = text.rsplit("Which river is ", 1)[1].split(" ")[0]
    assert case.answers == (city.replace("C", "R"),)
    assert f"the city of {city} lies" in text
    assert 5 < text.count("Document ") < 40
    assert len(case.prompt_token_ids) + case.max_new_tokens <= 4000


def test_a_question_of_a_hotpot_file_keeps_all_its_paragraphs(
    encoder: PromptEncoder, tmp_path: Path
):
    asked = [
        {
            "question": f"Q{i}?",
            "answer": f"A{i}",
            "context": [[f"T{i}a", [f"One {i}.", f" Two {i}."]], [f"T{i}b", [f"Three {i}."]]],
        }
        for i in range(10)
    ]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(asked))
    suite = RulerSuite(encoder, seed=3, hotpot_file=path)
    case = suite.case("qa_2", 1000, 0)
    text = text_of(case, encoder)
    number = case.answers[0][1:]
    assert f"T{number}a\nOne {number}. Two {number}." in text
    assert f"T{number}b\nThree {number}." in text


def test_a_question_file_of_another_form_is_refused(encoder: PromptEncoder, tmp_path: Path):
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}')
    with pytest.raises(ConfigError, match="neither SQuAD"):
        RulerSuite(encoder, seed=3, squad_file=path)
    with pytest.raises(ConfigError, match="cannot be read"):
        RulerSuite(encoder, seed=3, squad_file=tmp_path / "absent.json")


def test_prose_comes_from_files_if_a_directory_is_given(encoder: PromptEncoder, tmp_path: Path):
    text = " ".join(f"Sentence number {i} of the essay." for i in range(150))
    (tmp_path / "essay.txt").write_text(text)
    suite = RulerSuite(encoder, seed=3, prose_directory=tmp_path)
    assert "of the essay." in text_of(suite.case("niah_single_2", 3000, 0), encoder)
    assert suite.prose.origin == f"files of {tmp_path.name}"


def test_a_directory_with_too_little_prose_is_refused(encoder: PromptEncoder, tmp_path: Path):
    (tmp_path / "short.txt").write_text("One. Two.")
    with pytest.raises(ConfigError, match="2 sentences"):
        RulerSuite(encoder, seed=3, prose_directory=tmp_path)


def test_a_fingerprint_changes_with_prose_files_and_seed(encoder: PromptEncoder, tmp_path: Path):
    base = RulerSuite(encoder, seed=3)
    assert base.fingerprint == RulerSuite(encoder, seed=3).fingerprint
    (tmp_path / "essay.txt").write_text("One more sentence. " * 200)
    squad = squad_file(tmp_path / "squad.json")
    others = [
        RulerSuite(encoder, seed=4),
        RulerSuite(encoder, seed=3, prose_directory=tmp_path),
        RulerSuite(encoder, seed=3, squad_file=squad),
    ]
    assert len({suite.fingerprint for suite in [base, *others]}) == 4
