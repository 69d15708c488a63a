"""The bench of sampling: what it measures, and what it says."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from fluxion_core.errors import ConfigError
from fluxion_core.lab.benchmark.sampling import SamplingOptions, options_from, run_sampling_bench


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


def test_options_are_words():
    options, path = options_from(["rows=2,5", "vocab=99", "threads=3", "json=x.json"])
    assert options == SamplingOptions(vocab=99, rows=(2, 5), threads=3)
    assert path is not None
    assert path.name == "x.json"


@pytest.mark.parametrize("word", ["rows=two", "colour=red", "vocab", "json="])
def test_words_that_are_no_options_are_refused_by_name(word):
    with pytest.raises(ConfigError, match=f"'{word}'; give vocab"):
        options_from([word])
