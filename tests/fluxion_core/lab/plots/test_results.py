"""Plots that are drawn again from the figures that lie beside them."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from fluxion_core.lab.evaluation.key_rankings import RankingFigure
from fluxion_core.lab.plots import results
from fluxion_core.lab.plots.results import RESULTS, draw_all


def test_every_plot_of_a_result_is_drawn_from_its_figures(tmp_path: Path):
    for path in RESULTS.glob("*/*.json"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name / path.name)
    drawn = draw_all(tmp_path)
    names = {picture.name for picture in drawn}
    assert names >= {"prefill.png", "shared-cpus.png", "serve.png"}
    assert names >= {"tier-128k.png", "who-leaves.png", "first-token.png", "unseen.png"}
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in drawn)


def test_a_bar_of_rankings_is_the_mean_over_all_texts_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn = {}
    monkeypatch.setattr(results, "draw_groups", lambda groups, *_, **__: drawn.update(groups))
    figures = [
        RankingFigure(text, "boxes", [0.1, 0.2], {"1 %": kl, "5 %": [0.0]})
        for text, kl in (("essay", [1.0]), ("code", [2.0, 6.0]))
    ]
    report = {"figures": [asdict(figure) for figure in figures]}
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "key-rankings.json").write_text(json.dumps(report))
    assert results.draw_all(tmp_path) == [tmp_path / "some" / "key-rankings.png"]
    assert drawn == {"1 % of the region": {"boxes": 3.0}, "5 % of the region": {"boxes": 0.0}}


def test_every_result_has_a_page_and_a_plot():
    folders = [path for path in RESULTS.iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        page = (folder / "README.md").read_text()
        plots = [path.name for path in folder.glob("*.png")]
        assert plots, folder.name
        assert all(f"({name})" in page for name in plots), folder.name
