"""Stop strings never show, whatever pieces they come in; everything before them does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fluxion_core.generation.stopping import StopChecker, StopSettings

TEXT = st.text(alphabet="abc", max_size=30)


@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=3), max_size=20),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
def test_what_shows_is_the_text_before_the_first_stop_string(pieces: list[str], stops: list[str]):
    checker = StopChecker(StopSettings(max_new_tokens=1000, stop_strings=tuple(stops)))
    shown, given_text = "", ""
    for piece in pieces:
        given_text += piece
        shown += checker.push(5, piece)
        assert not any(stop in shown for stop in stops)
        if checker.finish_reason:
            break
    shown += checker.flush()
    # The earliest stop string of the text so far, as it completes.
    ends = [given_text.index(stop) for stop in stops if stop in given_text]
    if checker.finish_reason == "stop":
        assert shown == given_text[: min(ends)]
    else:
        assert not ends
        assert shown == given_text


def test_a_stop_token_ends_without_its_text():
    checker = StopChecker(StopSettings(max_new_tokens=9, eos_token_ids=frozenset({2})))
    assert checker.push(1, "a") == "a"
    assert checker.push(2, "<end>") == ""
    assert checker.finish_reason == "stop"


def test_ignore_eos_still_honours_the_callers_stop_tokens():
    settings = StopSettings(
        max_new_tokens=9,
        eos_token_ids=frozenset({2}),
        stop_token_ids=frozenset({3}),
        ignore_eos=True,
    )
    checker = StopChecker(settings)
    assert checker.push(2, "x") == "x"
    assert checker.finish_reason is None
    checker.push(3, "y")
    assert checker.finish_reason == "stop"


def test_length_ends_after_exactly_that_many_tokens():
    checker = StopChecker(StopSettings(max_new_tokens=2, stop_strings=("xyz",)))
    assert checker.push(1, "ax") == "a"
    assert checker.finish_reason is None
    assert checker.push(1, "y") == ""
    assert checker.finish_reason == "length"
    assert checker.flush() == "xy"
