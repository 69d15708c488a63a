"""One command measures all that is published, goes on where it was stopped, and compares bodies."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from fluxion_core.errors import ConfigError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.lab.evaluation import measure as measure_module
from fluxion_core.lab.evaluation.case import PromptEncoder
from fluxion_core.lab.evaluation.essays import cut_evenly
from fluxion_core.lab.evaluation.measure import Measurement
from fluxion_core.lab.evaluation.measure_tables import side_by_side
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.session import EvaluationModel
from fluxion_core.lab.provenance import faults_of
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import PlannerWeights


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for folder in ("essays", "documents"):
        (tmp_path / folder).mkdir()
        text = " ".join(f"word{number**3 % 97} is here." for number in range(400))
        (tmp_path / folder / "0.txt").write_text(text)
    return tmp_path


@pytest.fixture
def loads(
    monkeypatch: pytest.MonkeyPatch, decoder: Decoder, tokenizer: Tokenizer
) -> list[EvaluationOptions]:
    """Options that the toy model was loaded for."""
    config, found = decoder.config, []
    weights = PlannerWeights.training_free(config.num_layers, config.num_heads)
    planner = Planner(
        weights,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
    )

    def load(options: EvaluationOptions) -> EvaluationModel:
        found.append(options)
        encoder = PromptEncoder(tokenizer, is_chat=False)
        return EvaluationModel(
            "toy",
            "0" * 64,
            config,
            lambda: copy.deepcopy(decoder),
            decoder,
            tokenizer,
            encoder,
            weights,
            planner,
        )

    monkeypatch.setattr(measure_module.EvaluationModel, "load", load)
    monkeypatch.setattr(measure_module, "RULER_TASKS", ("niah_single_2",))
    return found


def measurement(texts: Path, output: Path, **options: object) -> Measurement:
    small = {"cases": 1, "lengths": (700,), "documents": 1, "document_tokens": 800}
    return Measurement(texts=texts, output=output, commit="abcdef0", **(small | options))


def test_a_measurement_is_of_one_model_and_says_where_it_comes_from(
    texts: Path, tmp_path: Path, loads: list[EvaluationOptions], capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    measurement(texts, output)()
    assert len(loads) == 1
    assert "# RULER, toy" in capsys.readouterr().out
    for name in ("divergence", "agreement", "ruler"):
        result = json.loads((output / f"{name}-host.json").read_text())
        assert faults_of(result["about"]) == []
        assert result["about"]["commit"] == "abcdef0"
        assert result["settings"]["step"] == "host, float32"
        # Another body's, as if it had been measured.
        shutil.copy(output / f"{name}-host.json", output / f"{name}-device.json")
    journals = {path: path.read_bytes() for path in output.glob("*.jsonl")}
    measurement(texts, output)()
    assert {path: path.read_bytes() for path in output.glob("*.jsonl")} == journals

    tables = side_by_side(output)
    assert tables.count("| fast | host |") == tables.count("| fast | device |") == 2
    rows = [line for line in tables.splitlines() if line.startswith("| niah_single_2, 700")]
    assert [row.split(" | ")[1] for row in rows] == ["host", "device"]
    assert tables.index(rows[1]) < tables.index("| bytes of exact | host |")


def test_a_measurement_that_is_out_of_time_says_what_is_left(
    texts: Path, tmp_path: Path, loads: list[EvaluationOptions]
):
    with pytest.raises(ConfigError, match="over before divergence: call it again"):
        measurement(texts, tmp_path / "out", seconds=1e-9)()
    with pytest.raises(ConfigError, match="holds no results"):
        side_by_side(tmp_path)


def test_texts_are_cut_evenly_at_lines_where_lines_are_near():
    text = "".join(f"line {number:03}\n" for number in range(300))
    pieces = cut_evenly(text, 7)
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)
    assert max(map(len, pieces)) - min(map(len, pieces)) < 20
    assert cut_evenly("a" * 100, 4) == ["a" * 25] * 4
