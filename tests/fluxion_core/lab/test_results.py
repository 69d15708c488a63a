"""Results that are published say where they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxion_core import lab
from fluxion_core.lab.provenance import Provenance, faults_of

RESULTS = Path(lab.__file__).parent / "results"

FILES = sorted(path for path in RESULTS.rglob("*") if path.is_file())
FIGURES = [path for path in FILES if path.suffix == ".json"]


def relative(path: Path) -> str:
    return path.relative_to(RESULTS).as_posix()


@pytest.mark.parametrize("path", FIGURES, ids=relative)
def test_a_result_names_model_weights_machine_and_a_clean_commit(path: Path):
    assert faults_of(json.loads(path.read_text()).get("about")) == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_whatever_lies_beside_results_is_of_one_of_them(path: Path):
    # Pictures and tables are drawn from figures beside them, and a page says what all of it is.
    assert (path.parent / "README.md").is_file()
    assert any(other.parent == path.parent for other in FIGURES)


def test_there_are_results():
    assert len(FIGURES) >= 9


@pytest.mark.parametrize("part", ["model", "revision", "weights", "machine", "commit"])
def test_what_is_left_out_is_a_fault(part: str):
    whole = Provenance("m", "r", "w", "a machine", "abcdef0").as_json()
    assert faults_of(whole) == []
    assert any(part in fault for fault in faults_of(whole | {part: ""}))
    assert any(part in fault for fault in faults_of({n: v for n, v in whole.items() if n != part}))


@pytest.mark.parametrize("commit", ["abcdef0-dirty", "unknown", "main"])
def test_a_tree_with_changes_is_none_to_publish(commit: str):
    about = Provenance("m", "r", "w", "a machine", commit).as_json()
    assert faults_of(about) == [f"commit {commit!r} is none, or of a tree with changes"]


def test_a_result_of_here_names_this_machine():
    about = Provenance.of_shape("llama-3.1-8b", gpu="a card")
    assert (about.model, about.weights) == ("llama-3.1-8b, random weights", "none")
    assert "torch" in about.machine
    assert about.machine.endswith("gpu a card")
    assert Provenance.here(commit="abcdef0").commit == "abcdef0"
