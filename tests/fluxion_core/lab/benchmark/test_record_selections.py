"""Recorded selections are what the heads read: all of a region, or so many blocks of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fluxion_core.errors import ConfigError
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.lab.benchmark.record_selections import (
    RecordedText,
    SelectionRecorder,
    read_text,
)
from fluxion_core.lab.benchmark.recorded_selections import RecordedSelections
from fluxion_core.lab.held_prompt import PromptMaker
from fluxion_core.lab.provenance import Provenance
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.constants import READ_ALL
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import PlannerWeights
from fluxion_core.planning.policy import ExactPolicy, FixedPolicy, ThresholdPolicy
from tests.fluxion_core.lab.evaluation.conftest import CONFIG

TOKENS, STEPS = 1100, 20
GROUP = CONFIG.num_heads // CONFIG.num_kv_heads


@pytest.fixture(scope="module")
def recorder() -> SelectionRecorder:
    decoder = Decoder(CONFIG, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(5)
    for parameter in decoder.parameters():
        parameter.normal_(std=0.2, generator=generator)
    ids = torch.randint(0, 250, (2, TOKENS + STEPS), generator=generator).tolist()
    texts = [
        RecordedText(name, one[:TOKENS], one[TOKENS:], -1)
        for name, one in zip("ab", ids, strict=True)
    ]
    geometry = KvGeometry(CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim)
    maker = PromptMaker(decoder, geometry)
    held = [maker.make(text.prompt, profile_window=WindowSpec()) for text in texts]
    planner = Planner(
        PlannerWeights.training_free(CONFIG.num_layers, CONFIG.num_heads),
        num_layers=CONFIG.num_layers,
        num_heads=CONFIG.num_heads,
        num_kv_heads=CONFIG.num_kv_heads,
        head_dim=CONFIG.head_dim,
    )
    return SelectionRecorder(decoder, planner, texts, held)


def test_exact_reads_the_region_and_nothing_else(recorder: SelectionRecorder):
    (recorded,) = recorder.record([ExactPolicy()], Provenance.here())
    assert (recorded.levels == READ_ALL).all()
    window = WindowSpec()
    for text in range(2):
        for step in range(STEPS):
            region = window.retrieval_region(TOKENS + step + 1)
            units = recorded.units(text, step)
            expected = np.zeros(units.shape[-1], np.bool_)
            expected[region.start // 16 : region.stop // 16] = True
            assert recorded.regions[text, step].tolist() == [region.start // 16, region.stop // 16]
            assert (units == expected).all()


def test_fixed_reads_its_share_for_every_head(recorder: SelectionRecorder, tmp_path: Path):
    policy = FixedPolicy(16, 0.1)
    exact, recorded = recorder.record([ExactPolicy(), policy], Provenance.here())
    assert (exact.levels == READ_ALL).all()
    path = tmp_path / "selections.npz"
    recorded.save(path)
    loaded = RecordedSelections.load(path)
    assert (loaded.policy, loaded.texts, loaded.changes) == (
        "fixed(16, 10 %)",
        ("a", "b"),
        (-1, -1),
    )
    assert loaded.about == recorded.about
    assert np.array_equal(loaded.bits, recorded.bits)
    assert (loaded.levels == 0).all()
    for step in range(STEPS):
        share = policy.num_blocks(WindowSpec().retrieval_region(TOKENS + step + 1))
        assert (loaded.units(1, step).sum(-1) == share).all()
    # Of two texts, and of two steps of one, at least something differs.
    assert not np.array_equal(loaded.bits[0], loaded.bits[1])
    assert not np.array_equal(loaded.bits[0, 0], loaded.bits[0, 1])


def test_blocks_of_a_level_are_read_whole(recorder: SelectionRecorder):
    (recorded,) = recorder.record([ThresholdPolicy(0.4)], Provenance.here())
    levels = recorded.levels
    assert (levels > 0).any()
    begin, end = recorded.regions[0, 0]
    units = recorded.units(0, 0)
    for layer, kv_head in np.argwhere(levels[0, 0] > 0):
        size = 1 << levels[0, 0, layer, kv_head]
        for first in range(begin // size * size, end, size):
            block = units[layer, kv_head, :, max(begin, first) : min(end, first + size)]
            assert (block.all(-1) == block.any(-1)).all()


class _Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_a_text_of_two_files_goes_on_with_the_second_then_with_the_first(tmp_path: Path):
    names = []
    for name, letters in (("one", "abcdefghij"), ("two", "ABCDEFGHIJ")):
        (tmp_path / name).write_text(letters)
        names.append(str(tmp_path / name))
    tokenizer = _Letters()
    text = read_text("+".join(names), tokenizer, 9, 4)  # type: ignore[arg-type]
    assert "".join(map(chr, text.prompt)) == "abcdeABCD"
    assert "".join(map(chr, text.following)) == "EFfg"
    assert text.change == 2
    text = read_text(names[0], tokenizer, 3, 2)  # type: ignore[arg-type]
    assert ("".join(map(chr, text.prompt + text.following)), text.change) == ("abcde", -1)
    with pytest.raises(ConfigError, match="too short"):
        read_text(names[0], tokenizer, 9, 2)  # type: ignore[arg-type]


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="recorded selections"):
        RecordedSelections.load(path)
