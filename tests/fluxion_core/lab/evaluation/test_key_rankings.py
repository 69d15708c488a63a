"""Rankings of blocks against each other, on steps that can be worked out."""

from __future__ import annotations

import math

import pytest
import torch

from fluxion_core.geometry import WindowSpec
from fluxion_core.kernels.key_index import reference
from fluxion_core.lab.evaluation.key_rankings import (
    CODES,
    KeyCode,
    best_blocks,
    key_scores,
    needed_blocks,
)
from fluxion_core.planning.layer_step import LayerStep

WINDOW = WindowSpec(sink_tokens=16, recent_tokens=128)


def random_step(rows: int = 3, tokens: int = 512, seed: int = 1) -> tuple[LayerStep, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, tokens, 16, generator=generator)
    query = 3 * torch.randn(rows, 6, 16, generator=generator)
    own = torch.randn(2, rows, 2, 16, generator=generator)
    positions = torch.tensor([tokens - 40 * row - 1 for row in range(rows)])
    return LayerStep(keys, values, query, own[0], own[1], positions, WINDOW), keys


def test_exact_keys_score_a_block_by_its_share_of_attention():
    step, keys = random_step()
    scores = key_scores(step, keys)
    expected = (step.mass.log() + step.highest[..., None]).masked_fill(
        ~step.in_region[:, None, None], -math.inf
    )
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


def test_needed_blocks_are_the_fewest_that_keep_the_error():
    step, keys = random_step()
    scores = key_scores(step, keys)
    (needed,) = needed_blocks(step, scores, [0.1])
    region = int(step.in_region[0].sum())
    row, kv_head, member = 0, 1, 2
    errors = []
    for count in range(region + 1):
        # A share half a block short of the next count is rounded up to this one.
        chosen = best_blocks(step, scores, max(0.0, count - 0.5) / region)
        assert int(chosen[row, kv_head, member].sum()) == count
        output, _ = step.attend(chosen)
        lost = output.view_as(step.full_output) - step.full_output
        errors.append(float(lost[row, kv_head, member].norm() / step.norm[row]))
    assert int(needed[row, kv_head, member]) == next(
        count for count, error in enumerate(errors) if error <= 0.1
    )


def test_needed_blocks_stay_within_each_rows_region():
    step, keys = random_step()
    (needed,) = needed_blocks(step, key_scores(step, keys), [1e-5])
    assert (needed <= step.in_region.sum(-1)[:, None, None]).all()
    assert needed.float().mean() > 1


def test_the_code_of_the_engine_is_one_of_them():
    _, keys = random_step()
    engine = reference.dequantize(reference.quantize(keys))
    assert CODES[0] == KeyCode(2, 64, "range")
    torch.testing.assert_close(CODES[0].approximate(keys), engine, atol=1e-5, rtol=0)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_more_bits_and_smaller_groups_lose_less(code: KeyCode):
    keys = torch.randn(2, 256, 16, generator=torch.Generator().manual_seed(2))

    def lost(other: KeyCode) -> float:
        return float((other.approximate(keys) - keys).square().mean())

    assert lost(code) < 0.35
    assert lost(KeyCode(code.bits + 1, code.tokens, code.fit)) < 0.5 * lost(code)


def test_least_squares_lose_less_than_the_range():
    keys = torch.randn(2, 256, 16, generator=torch.Generator().manual_seed(2))
    lost = [
        float((KeyCode(2, 64, fit).approximate(keys) - keys).square().mean())
        for fit in ("range", "refit")
    ]
    assert lost[1] < 0.8 * lost[0]
    assert KeyCode(2, 64, "range").bytes_a_channel == 0.3125
