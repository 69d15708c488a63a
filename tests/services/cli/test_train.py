"""`fluxion train` from documents to weights that a planner takes, on a toy model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fluxion_core.errors import ConfigError
from fluxion_core.lab.training import pieces
from fluxion_core.lab.training.pipeline import TrainOptions
from fluxion_core.planning.planner_weights import load_planner_weights
from fluxion_core.planning.policy import MarginalPolicy
from services.cli.train_command import parse_levels, run_training


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    directory = tmp_path / "documents"
    directory.mkdir()
    generator = random.Random(4)
    entries = []
    for number, split in enumerate(("train", "train", "validation", "test")):
        words = ["".join(generator.choices("abcdefgh ", k=6)) for _ in range(300)]
        name = f"prose-{number}"
        (directory / f"{name}.txt").write_text(" ".join(words)[:1900])
        entry = {"name": name, "kind": "prose", "split": split, "origin": "made here"}
        entries.append(entry | {"licence": "none", "characters": 1900})
    (directory / "manifest.json").write_text(json.dumps(entries))
    return directory


def test_training_writes_weights_with_a_card_and_plots_and_resumes(
    make_toy_model: Callable[[int], Path],
    documents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(pieces, "PIECE_TOKENS", 1792)
    monkeypatch.setattr(pieces, "MINIMUM_TOKENS", 1792)
    options = TrainOptions(
        model=make_toy_model(1),
        documents=documents,
        output=tmp_path / "out",
        epochs=1,
        workers=2,
        sensitivity_pieces=1,
        curve_starts=(1100,),
        direct_thresholds=(0.2,),
        ablation=True,
        levels=parse_levels(["accurate = marginal(0.2)"]),
    )
    path = run_training(options, Console(quiet=True), plots=True)
    weights = load_planner_weights(path)
    assert weights.mode == "network"
    assert weights.levels == {"ACCURATE": MarginalPolicy(0.2)}
    assert weights.priors.shape == (2, 4, 3)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["curve"]["steps"] == 8
    assert set(report["ablation"]) > {"none", "cross_head"}
    card = (tmp_path / "out" / "card.md").read_text()
    assert "fixed(16, 5 %)" in card
    assert "| cross_head | 4 |" in card
    for name in ("curve", "assessment", "losses"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000

    shard = next((tmp_path / "out" / "samples" / "train").glob("*.safetensors"))
    written = shard.stat().st_mtime_ns
    again = load_planner_weights(run_training(options, Console(quiet=True), plots=False))
    assert shard.stat().st_mtime_ns == written
    assert (again.priors == weights.priors).all()


def test_levels_are_named_policies():
    assert parse_levels(["fast=threshold(0.3)"]) == (("FAST", "threshold(0.3)"),)
    with pytest.raises(ConfigError, match="NAME=POLICY"):
        parse_levels(["fast"])
