"""The bench of sampling: what it measures, and what it says."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from fluxion_core.config.commands import run_module
from fluxion_core.lab.benchmark import sampling
from fluxion_core.lab.benchmark.sampling import (
    SamplingBench,
    SamplingOptions,
    run_sampling_bench,
)


def test_every_figure_that_has_a_limit_is_printed_beside_it(tmp_path):
    console = Console(record=True, width=160)
    options = SamplingOptions(vocab=3000, prompt=500, rows=(1, 3), threads=2, repeats=2)
    report = json.loads(json.dumps(run_sampling_bench(console, options)))
    text = console.export_text()
    limited = [figure for figure in report["figures"] if figure["limit_milliseconds"]]
    # By hand: top_p on three kinds of logits, three penalties, two steps of three, twice each.
    assert len(limited) == 3 + 3 + 2 * 3 * 2
    for figure in report["figures"]:
        assert figure["milliseconds"] > 0
        assert figure["what"].strip() in text
    assert "3,000 tokens" in text
    assert report["threads"] == 2


def test_flags_become_options(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        sampling, "run_sampling_bench", lambda _, options: asked.append(options) or {"a": 1}
    )
    flags = ["--rows", "2,5", "--vocab", "99", "--threads", "3", "--json", str(tmp_path / "x")]
    assert run_module(SamplingBench, flags) == 0
    assert asked == [SamplingOptions(vocab=99, rows=(2, 5), threads=3)]
    assert json.loads((tmp_path / "x").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--rows", "two"], 1, "rows 'two': whole numbers"),
        (["--colour", "red"], 2, "Unknown option: --colour"),
        (["--vocab"], 2, "--vocab"),
        (["vocab=3"], 2, "'vocab=3' is more than"),
    ],
)
def test_flags_that_are_no_options_are_refused_by_name(flags, status, words, capsys):
    assert run_module(SamplingBench, flags) == status
    assert words in capsys.readouterr().err
