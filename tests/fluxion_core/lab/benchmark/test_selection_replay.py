"""Replayed selections: marks are the recorded units, stretched, and plans count what is marked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fluxion_core.errors import ConfigError
from fluxion_core.geometry import ceil_div
from fluxion_core.lab.benchmark.model_shapes import LLAMA_8B
from fluxion_core.lab.benchmark.recorded_selections import RecordedSelections
from fluxion_core.lab.benchmark.selection_replay import (
    HEAD_STEPS,
    ROW_STEPS,
    MarkedScores,
    SelectionReplay,
    reflected,
)
from fluxion_core.planning.constants import READ_ALL, READ_NOTHING

TEXTS, STEPS, LAYERS, KV_HEADS, GROUP = 2, 9, 3, 2, 3
SHAPE = replace(LLAMA_8B, num_layers=4, num_heads=8, num_kv_heads=4)
UNTOUCHED = -7.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def recorded() -> RecordedSelections:
    """Random blocks of random levels in regions that grow."""
    random = np.random.default_rng(3)
    levels = random.choice(
        np.array([READ_NOTHING, READ_ALL, 0, 1, 2, 3], np.int8), (TEXTS, STEPS, LAYERS, KV_HEADS)
    )
    regions = np.zeros((TEXTS, STEPS, 2), np.int32)
    regions[..., 0] = 4
    regions[..., 1] = 61 + np.arange(STEPS) // 4
    units = np.zeros((*levels.shape, GROUP, 64), np.bool_)
    for index in np.ndindex(levels.shape):
        begin, end = regions[index[:2]]
        for head in range(GROUP):
            level = levels[index]
            if level == READ_ALL:
                units[index][head, begin:end] = True
            elif level >= 0:
                for first in range(begin >> level << level, end, 1 << level):
                    chosen = random.random() < 0.3
                    units[index][head, max(first, begin) : min(first + (1 << level), end)] = chosen
    bits = np.packbits(units, axis=-1, bitorder="little")
    return RecordedSelections("fixed(16, 30 %)", ("a", "b"), (-1, -1), {}, bits, levels, regions)


def expected_marks(
    recorded: RecordedSelections, region: range, step: int, row: int, layer: int, head: int
) -> tuple[int, list[bool]]:
    """Level, and a mark for each of its blocks in the region: by hand, one after the other."""
    kv_head, member = head // 2, head % 2
    turn = kv_head // KV_HEADS
    text = (row + turn) % TEXTS
    at = reflected(step + ROW_STEPS * (row // TEXTS) + HEAD_STEPS * turn, STEPS)
    place = (layer * LAYERS // SHAPE.num_layers, kv_head % KV_HEADS)
    level = int(recorded.levels[text, at][place])
    if level < 0:
        return level, []
    size = 1 << level
    begin, end = recorded.regions[text, at]
    recorded_blocks = [
        recorded.units(text, at)[place][member, max(first, begin)]
        for first in range(begin // size * size, end, size)
    ]
    count = ceil_div(region.stop, 16 * size) - region.start // (16 * size)
    return level, [recorded_blocks[b * len(recorded_blocks) // count] for b in range(count)]


@pytest.mark.parametrize(("region", "step"), [(range(64, 1008), 5), (range(64, 5120), 29)])
def test_marks_are_the_recorded_blocks_and_budgets_count_them(
    recorded: RecordedSelections, region: range, step: int
):
    replay = SelectionReplay(recorded, SHAPE)
    scores = MarkedScores([recorded], SHAPE, 3, DEVICE)
    regions = [region, range(64, 400)]
    scores.follow(replay, regions)
    scores.begin_step(step)
    policies = [replay.policy(of_row, step, row) for row, of_row in enumerate(regions)]
    number = torch.ones(1, dtype=torch.int32, device=DEVICE)
    seen = set()
    for layer in range(SHAPE.num_layers):
        marks = torch.full((3, SHAPE.num_heads, 320), UNTOUCHED, device=DEVICE)
        scores(layer, marks, number)
        assert (marks[2] == UNTOUCHED).all()  # padding
        for row, of_row in enumerate(regions):
            for head in range(SHAPE.num_heads):
                level, expected = expected_marks(recorded, of_row, step, row, layer, head)
                seen.add(level)
                assert policies[row].levels[layer, head // 2] == level
                assert policies[row].budgets[layer, head] == sum(expected)
                own = marks[row, head].cpu()
                assert own[: len(expected)].bool().tolist() == expected
                assert (own[len(expected) :] == UNTOUCHED).all()
    assert READ_NOTHING in seen
    assert len(seen) > 2


def test_scores_stay_where_nothing_is_followed(recorded: RecordedSelections):
    scores = MarkedScores([recorded], SHAPE, 1, DEVICE)
    scores.follow(None, [range(64, 1008)])
    scores.begin_step(3)
    marks = torch.full((1, SHAPE.num_heads, 64), UNTOUCHED, device=DEVICE)
    scores(0, marks, torch.ones(1, dtype=torch.int32, device=DEVICE))
    assert (marks == UNTOUCHED).all()


def test_recordings_of_different_shapes_are_refused(recorded: RecordedSelections):
    other = replace(recorded, bits=recorded.bits[:, :3])
    with pytest.raises(ConfigError, match="different shapes"):
        MarkedScores([recorded, other], SHAPE, 1, DEVICE)


def test_a_recording_is_gone_through_forwards_and_backwards():
    assert [reflected(step, 4) for step in range(8)] == [0, 1, 2, 3, 2, 1, 0, 1]
    assert [reflected(step, 1) for step in range(3)] == [0, 0, 0]


def test_the_policy_is_counted_as_the_one_that_was_recorded(recorded: RecordedSelections):
    assert SelectionReplay(recorded, SHAPE).policy(range(64, 704), 0, 0).kind == "fixed"
