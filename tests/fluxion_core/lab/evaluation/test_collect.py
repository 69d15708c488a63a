"""Tasks that collect: what is asked for is in the text, within the length, always the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fluxion_core.errors import ConfigError, ContextLengthError
from fluxion_core.lab.evaluation.case import Case, PromptEncoder
from fluxion_core.lab.evaluation.tasks.collect import LOOKUPS, TASK_NAMES, TURN_TOKENS, CollectSuite
from fluxion_core.lab.evaluation.tasks.conversation import TURNS

SINGLE = tuple(name for name in TASK_NAMES if name != LOOKUPS)

LENGTH = 12_000
"""In bytes here: the tokenizer's tokens are bytes."""


@pytest.fixture
def suite(encoder: PromptEncoder) -> CollectSuite:
    return CollectSuite(encoder, seed=3)


def text_of(case: Case, encoder: PromptEncoder) -> str:
    return encoder.tokenizer.decode(case.prompt_token_ids)


@pytest.mark.parametrize("name", SINGLE)
def test_prompt_and_answer_fill_the_length_and_never_exceed_it(name: str, suite: CollectSuite):
    case = suite.case(name, LENGTH, 0)
    used = len(case.prompt_token_ids) + case.max_new_tokens
    # The unit of haystack is a sentence, or a line of source.
    assert LENGTH - 250 < used <= LENGTH


@pytest.mark.parametrize("name", SINGLE)
def test_a_case_is_the_same_for_the_same_seed_and_another_for_another(
    name: str, suite: CollectSuite, encoder: PromptEncoder
):
    case = suite.case(name, LENGTH, 1)
    assert CollectSuite(encoder, seed=3).case(name, LENGTH, 1) == case
    others = [CollectSuite(encoder, seed=4).case(name, LENGTH, 1), suite.case(name, LENGTH, 2)]
    assert all(other.prompt_token_ids != case.prompt_token_ids for other in others)


def test_every_field_of_a_record_is_in_one_sentence(suite: CollectSuite, encoder: PromptEncoder):
    case = suite.case("records", LENGTH, 0)
    sentences = re.split(r"(?<=\.)\s", text_of(case, encoder).split("\n\n")[1])
    for answer in case.answers:
        record = json.loads(answer)
        (own,) = [sentence for sentence in sentences if record["name"] in sentence]
        assert all(str(value) in own for value in record.values())
    assert case.score_of(", ".join(case.answers)[len('{"name":') :]) == 100.0


def test_values_are_all_numbers_of_the_meter_and_no_others(
    suite: CollectSuite, encoder: PromptEncoder
):
    case = suite.case("values", LENGTH, 0)
    (meter,) = re.findall(r"the meter of the ([a-z ]+) showed are:", case.answer_prefix)
    text = text_of(case, encoder)
    found = re.findall(rf"The meter of the {meter} showed (\d+)\.", text)
    assert sorted(found) == sorted(case.answers)
    assert len(re.findall(r"The meter of the [a-z ]+ showed \d+\.", text)) == 8 + 3 * 4


@pytest.mark.parametrize("number", range(4))
def test_the_total_is_the_number_of_entries(
    number: int, suite: CollectSuite, encoder: PromptEncoder
):
    case = suite.case("count", LENGTH, number)
    text = text_of(case, encoder)
    ship, town = re.findall(r"did a (\w+) call at (\w+)\?", text)[-1]
    entries = re.findall(rf"Entry \d+: a {ship} called at {town}\.", text)
    assert case.answers == (str(len(entries)),)
    assert len(re.findall(r"Entry \d+: a \w+ called at \w+\.", text)) == 8 + len(entries)


def test_a_completion_calls_what_an_earlier_file_defines(
    suite: CollectSuite, encoder: PromptEncoder
):
    case = suite.case("completion", LENGTH, 0)
    text = text_of(case, encoder)
    name, *parameters = case.answers
    purpose = text.split("\n# ")[-1].split("\n")[0]
    definition = f"# {purpose}\ndef {name}({', '.join(parameters)}):"
    assert text.count(definition) == 1
    assert text.index(definition) < text.index("# file: main.py")
    module = case.answer_prefix.removeprefix("result = ").removesuffix(".")
    own_file = text[text.index(f"# file: depot/{module}.py") :]
    assert definition in own_file[: own_file.index("# file:", 1)]


def test_a_conversation_goes_on_from_what_was_said(suite: CollectSuite, encoder: PromptEncoder):
    said = ["Nobody.", "Somebody else", "A third one"]
    turns = [suite.turn_case(LENGTH, 0, said[:turn]) for turn in range(TURNS)]
    texts = [text_of(turn, encoder) for turn in turns]
    for before, after, answer in zip(texts, texts[1:], said, strict=False):
        assert after.startswith(f"{before} {answer}\n\nWhich is the secret number ")
    assert len({turn.answers for turn in turns}) == TURNS
    for turn in turns:
        assert texts[0].count(f"{turn.answer_prefix} {turn.answers[0]}.") == 1
    assert [turn.name for turn in turns] == [
        f"lookups_{turn}/{LENGTH}/0" for turn in range(1, TURNS + 1)
    ]


def test_the_longest_conversation_fits_the_length(suite: CollectSuite):
    last = suite.turn_case(LENGTH, 0, ["x" * TURN_TOKENS] * (TURNS - 1))
    assert LENGTH - 250 < len(last.prompt_token_ids) + last.max_new_tokens <= LENGTH


def test_a_length_that_a_task_does_not_fit_is_refused(suite: CollectSuite):
    with pytest.raises(ContextLengthError):
        suite.case("records", 400, 0)
    with pytest.raises(ContextLengthError):
        suite.turn_case(400, 0, [])


def test_an_unknown_task_is_named(suite: CollectSuite):
    with pytest.raises(ConfigError, match="'vt'"):
        suite.case("vt", LENGTH, 0)


def test_a_fingerprint_changes_with_prose_files_and_seed(encoder: PromptEncoder, tmp_path: Path):
    (tmp_path / "essay.txt").write_text("One more sentence. " * 200)
    suites = [
        CollectSuite(encoder, seed=3),
        CollectSuite(encoder, seed=4),
        CollectSuite(encoder, seed=3, prose_directory=tmp_path),
    ]
    assert len({suite.fingerprint for suite in suites}) == 3
    assert suites[0].fingerprint == CollectSuite(encoder, seed=3).fingerprint
