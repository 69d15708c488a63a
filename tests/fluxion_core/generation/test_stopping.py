"""Stop conditions: by hand, and by law over every way to cut a text into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxion_core.generation.stopping import StopChecker, StopSettings

EOS, STOP, OTHER = 2, 7, 5


def run(
    pieces: list[str], *stops: str, max_new_tokens: int = 1000, owed: str = ""
) -> tuple[str, str | None]:
    """Push pieces, then what the detokeniser owes; all text shown, and the reason."""
    checker = StopChecker(StopSettings(max_new_tokens=max_new_tokens, stop_strings=stops))
    shown = ""
    for piece in pieces:
        shown += checker.push(OTHER, piece)
        if checker.finish_reason is not None:
            break
    shown += checker.push_text(owed)
    return shown, checker.finish_reason


def text_before_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: read character by character; end at the first stop string that is complete,
    the longest of those that end together."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


def test_the_last_token_allowed_ends_with_length():
    checker = StopChecker(StopSettings(max_new_tokens=2))
    assert checker.push(OTHER, "a") == "a"
    assert checker.finish_reason is None
    assert checker.push(OTHER, "b") == "b"
    assert checker.finish_reason == "length"


def test_a_stop_string_at_the_last_token_is_a_stop():
    assert run(["a", "b."], ".", max_new_tokens=2) == ("ab", "stop")


@pytest.mark.parametrize(
    ("token_id", "text", "matched"),
    [(STOP, "", STOP), (OTHER, "a long END", "END"), (EOS, "", None)],
    ids=["stop token", "stop string", "end of text"],
)
def test_what_ended_it_is_told_if_the_request_named_it(token_id, text, matched):
    checker = StopChecker(
        StopSettings(
            max_new_tokens=9,
            stop_strings=("ND", "END"),
            stop_token_ids=frozenset({STOP}),
            eos_token_ids=frozenset({EOS}),
        )
    )
    checker.push(token_id, text)
    assert checker.finish_reason == "stop"
    assert checker.matched_stop == matched


def test_text_that_may_begin_a_stop_string_waits_until_it_is_clear():
    checker = StopChecker(StopSettings(max_new_tokens=9, stop_strings=("END",)))
    assert checker.push(OTHER, "an E") == "an "
    assert checker.push(OTHER, "N") == ""
    assert checker.push(OTHER, "e") == "ENe"
    assert checker.push(OTHER, "EN") == ""
    assert checker.push(OTHER, "D of it") == ""
    assert checker.finish_reason == "stop"


def test_nothing_after_a_stop_string_is_shown_not_even_what_the_detokeniser_owes():
    assert run(["a.", "b"], ".", owed="c") == ("a", "stop")


def test_text_held_back_is_shown_when_nothing_follows():
    assert run(["an E", "N"], "END", max_new_tokens=2) == ("an EN", "length")
    assert run(["an E", "N"], "END", max_new_tokens=2, owed="D.") == ("an ", "stop")


@pytest.mark.parametrize(
    ("settings", "ending", "going_on"),
    [
        (StopSettings(9, eos_token_ids=frozenset({EOS})), [EOS], [STOP, OTHER]),
        (
            StopSettings(9, eos_token_ids=frozenset({EOS}), stop_token_ids=frozenset({STOP})),
            [EOS, STOP],
            [OTHER],
        ),
        (
            StopSettings(
                9,
                eos_token_ids=frozenset({EOS}),
                stop_token_ids=frozenset({STOP}),
                ignore_eos=True,
            ),
            [STOP],
            [EOS, OTHER],
        ),
        # Asked for by the caller too: ignoring the model's end of text does not ignore theirs.
        (
            StopSettings(
                9, eos_token_ids=frozenset({EOS}), stop_token_ids=frozenset({EOS}), ignore_eos=True
            ),
            [EOS],
            [STOP, OTHER],
        ),
    ],
)
def test_ending_tokens_end_and_their_text_is_not_shown(
    settings: StopSettings, ending: list[int], going_on: list[int]
):
    for token_id in ending:
        checker = StopChecker(settings)
        assert checker.push(OTHER, "a") == "a"
        assert checker.push(token_id, "</s>") == ""
        assert checker.finish_reason == "stop"
    for token_id in going_on:
        checker = StopChecker(settings)
        assert checker.push(token_id, "b") == "b"
        assert checker.finish_reason is None


def test_an_ending_token_lets_go_of_the_text_held_back():
    settings = StopSettings(9, stop_strings=("END",), eos_token_ids=frozenset({EOS}))
    checker = StopChecker(settings)
    assert checker.push(OTHER, "an EN") == "an "
    assert checker.push(EOS, "</s>") == "EN"


def test_an_ending_token_at_the_last_place_is_a_stop():
    checker = StopChecker(StopSettings(1, eos_token_ids=frozenset({EOS})))
    checker.push(EOS, "</s>")
    assert checker.finish_reason == "stop"


def test_of_two_stop_strings_the_one_complete_first_wins_however_the_text_is_cut():
    for pieces in (["abcde"], ["ab", "cde"], ["a", "b", "c", "d", "e"]):
        assert run(pieces, "abcd", "c") == ("ab", "stop")
        assert run(pieces, "cd", "bcd") == ("a", "stop")


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    # Two letters: stop strings overlap themselves and each other all the time.
    pieces = draw(st.lists(st.text("ab", max_size=4), max_size=12))
    stops = draw(st.lists(st.text("ab", min_size=1, max_size=5), max_size=3, unique=True))
    return pieces, stops


@given(cut_texts(), st.text("ab", max_size=3))
def test_any_cut_shows_the_text_before_the_first_stop_string(
    cut: tuple[list[str], list[str]], owed: str
):
    pieces, stops = cut
    shown, reason = run(pieces, *stops, owed=owed)
    expected, is_stopped = text_before_stop("".join(pieces) + owed, stops)
    assert shown == expected
    assert reason == ("stop" if is_stopped else None)


@given(cut_texts())
def test_text_is_held_back_only_while_it_may_begin_a_stop_string(
    cut: tuple[list[str], list[str]],
):
    pieces, stops = cut
    checker = StopChecker(StopSettings(max_new_tokens=1000, stop_strings=tuple(stops)))
    shown, text = "", ""
    for piece in pieces:
        shown += checker.push(OTHER, piece)
        text += piece
        if checker.finish_reason is not None:
            break
        held = text[len(shown) :]
        assert text == shown + held
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_special_token_given_as_a_stop_string_ends_and_is_named_as_that(ignore_eos):
    settings = StopSettings(
        max_new_tokens=9,
        stop_tokens={STOP: "<|turn|>"},
        eos_token_ids=frozenset([EOS]),
        ignore_eos=ignore_eos,
    )
    checker = StopChecker(settings)
    assert checker.push(OTHER, "answer") == "answer"
    assert checker.is_ending_token(STOP)
    assert checker.push(STOP, "") == ""
    assert (checker.finish_reason, checker.matched_stop) == ("stop", "<|turn|>")
