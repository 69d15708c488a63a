"""Directories that stand for a model with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fluxion_core.errors import ModelFileError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.lab.benchmark.model_shapes import TINY
from fluxion_core.lab.benchmark.random_model import write_random_model
from fluxion_core.models.random_weights import RANDOM_WEIGHTS_FILE
from fluxion_core.models.weights import LoadedModel, load_model


def load(path: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(path, device=torch.device("cpu"), dtype=dtype)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_random_model(tmp_path / "tiny", TINY, seed=7)
    return tmp_path / "tiny"


def test_two_loads_are_one_model_whose_name_says_what_it_is(directory: Path):
    one, other = load(directory), load(directory)
    assert one.config == TINY
    assert one.name == "tiny, random weights"
    assert one.revision_hash == other.revision_hash
    pairs = zip(one.decoder.parameters(), other.decoder.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_other_weights_are_another_revision(directory: Path, tmp_path: Path):
    write_random_model(tmp_path / "other", TINY, seed=8)
    revisions = {
        load(directory).revision_hash,
        # What is drawn in another dtype is not the same numbers rounded.
        load(directory, torch.bfloat16).revision_hash,
        load(tmp_path / "other").revision_hash,
    }
    assert len(revisions) == 3


def test_logits_are_finite_and_differ_by_token(directory: Path):
    class NoAttention:
        def attend(self, layer, query, key, value):
            return query

    decoder = load(directory).decoder
    with torch.inference_mode():
        logits = decoder.logits(decoder(torch.arange(8), torch.arange(8), NoAttention()))
    assert logits.isfinite().all()
    assert len(set(logits.argmax(-1).tolist())) > 1


def test_a_token_is_a_byte(directory: Path):
    tokenizer = Tokenizer.load(directory)
    tokenizer.check_fits(TINY.vocab_size)
    text = "schön, 17 °C"
    token_ids = tokenizer.encode(text)
    assert len(token_ids) == len(text.encode())
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode([300]) == ""


def test_weights_beside_it_are_refused(directory: Path):
    (directory / "model.safetensors").touch()
    with pytest.raises(ModelFileError, match=r"random_weights\.json and safetensors"):
        load(directory)


@pytest.mark.parametrize("text", ["{}", '{"seed": "one"}', '{"seed": 1, "std": 2}', "17"])
def test_what_is_no_seed_is_refused_by_name(directory: Path, text: str):
    (directory / RANDOM_WEIGHTS_FILE).write_text(text)
    with pytest.raises(ModelFileError, match=r"random_weights\.json"):
        load(directory)
