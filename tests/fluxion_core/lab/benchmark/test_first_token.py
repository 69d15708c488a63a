"""What is made of times to the first token, by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fluxion_core.errors import ConfigError
from fluxion_core.lab.benchmark.first_token import (
    Answer,
    Crowd,
    Prompts,
    WayAnswers,
    crowd_figures,
    first_token_report,
    single_rows,
)


def answer(tokens: int, seconds: float, *, prefill: float = 1.0) -> Answer:
    return Answer(tokens, seconds, 0.25, prefill, 0.5, 2_000_000_000, 3.0, 1.0)


def test_a_length_has_its_repeats_or_one():
    assert Prompts.parse("8192=3") == Prompts(8192, 3)
    assert Prompts.parse("8192") == Prompts(8192, 1)


@pytest.mark.parametrize("text", ["", "x", "8=x", "0", "8=0", "-8", "8=-1"])
def test_what_is_no_length_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"tokens and repeats|TOKENS=REPEATS"):
        Prompts.parse(text)


def test_rows_are_medians_of_each_length():
    computing = {10: [2.0, 1.0, 9.0], 20: [4.0]}
    answers = [answer(20, 6.0, prefill=5.0), *(answer(10, one) for one in (8.0, 3.0, 2.5))]
    short, long = single_rows(computing, WayAnswers("grpc", 1.0, tuple(answers), None))
    assert (short["prompt_tokens"], short["repeats"]) == (10, 3)
    assert (short["first_token_seconds"], short["over_computing"]) == (3.0, 1.5)
    assert (long["over_computing"], long["over_prefill"]) == (1.5, 1.2)
    # 2 GB in half a second; 3 s and 1 s of processor time.
    assert short["handoff_gigabytes_per_second"] == 4.0
    assert short["prefill_cpu_seconds_per_gigabyte"] == 1.5
    assert short["decode_cpu_seconds_per_gigabyte"] == 0.5


def test_a_crowd_is_its_last_first_token_over_all_that_is_computed():
    crowd = Crowd(
        long=(answer(10, 3.0), answer(10, 6.0)),
        short=(answer(1, 0.5),),
        quiet_gaps=(0.01,) * 3,
        gaps=(0.01, 0.02, 0.03),
    )
    figures = crowd_figures({10: [2.0]}, crowd)
    assert figures["long_over_computing"] == 1.5
    assert figures["long_over_prefill"] == 3.0
    assert figures["short_first_token_seconds"] == [0.5]
    assert figures["stream_over_quiet"]["p50"] == pytest.approx(2)
    # Between the second and the third of three: 0.02 + 0.98 * 0.01.
    assert figures["stream_over_quiet"]["p99"] == pytest.approx(2.98)


def test_the_report_has_all_answers_and_a_crowd_only_if_there_was_one():
    text = io.StringIO()
    ways = [
        WayAnswers(
            "sockets", 1.0, (answer(10, 2.0),), Crowd((answer(10, 3.0),), (), (1.0,), (2.0,))
        ),
        WayAnswers("grpc", 1.0, (answer(10, 2.0),), None),
    ]
    report = first_token_report(Console(file=text, width=180), {10: [1.0]}, ways)
    assert report["computing_seconds"] == {"10": [1.0]}
    with_crowd, without = report["ways"]
    assert with_crowd["crowd"]["long"][0]["first_token_seconds"] == 3.0
    assert "crowd" not in without
    assert without["answers"][0]["prompt_tokens"] == 10
    assert text.getvalue().count("sockets") == 2
    assert text.getvalue().count("grpc") == 1
