"""Steps of a known text against attention written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fluxion_core.geometry import BLOCK_SIZES, WindowSpec
from fluxion_core.lab.training.replay import prefill, replay
from fluxion_core.planning.constants import BUDGETS, ERROR_FLOOR, RADII
from fluxion_core.planning.layer_step import LayerStep

POSITIONS = torch.tensor([900, 1333])


class Causal:
    """The attention port in the plainest way, with K and V rounded as the store rounds them."""

    def attend(self, layer, query, key, value):
        group = query.shape[1] // key.shape[1]
        key, value = (x.bfloat16().float().repeat_interleave(group, 1) for x in (key, value))
        heads = [x.transpose(0, 1)[None] for x in (query, key, value)]
        return scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)


def test_replayed_steps_are_those_of_a_whole_pass(decoder, token_ids, window):
    kv = prefill(decoder, token_ids)
    hidden = replay(
        decoder, kv, POSITIONS, window, lambda layer, step: step.full_output.flatten(1, 2)
    )
    count = int(POSITIONS.max()) + 1
    whole = decoder(torch.tensor(token_ids[:count]), torch.arange(count), Causal())
    expected = decoder.logits(whole[POSITIONS])
    torch.testing.assert_close(decoder.logits(hidden), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("level", range(len(BLOCK_SIZES)))
def test_labels_are_the_error_of_attention_over_the_best_blocks_and_the_window(level: int):
    generator = torch.Generator().manual_seed(level)
    tokens, kv_heads, group, dim, window = 1280, 2, 2, 16, WindowSpec()
    key, value = torch.randn(2, kv_heads, tokens, dim, generator=generator)
    query = torch.randn(1, kv_heads * group, dim, generator=generator) * 3
    own_key, own_value = torch.randn(2, 1, kv_heads, dim, generator=generator)
    position = 1111
    step = LayerStep(key, value, query, own_key, own_value, torch.tensor([position]), window)
    found = step.log_squared_errors()[0]

    region = window.retrieval_region(position + 1)
    keys = torch.cat((key[:, :position], own_key[0][:, None]), 1).double()
    values = torch.cat((value[:, :position], own_value[0][:, None]), 1).double()
    size = BLOCK_SIZES[level]
    blocks = range(region.start // size, math.ceil(region.stop / size))
    outputs, sparse = {}, {}
    for head in range(kv_heads * group):
        k, v, q = keys[head // group], values[head // group], query[0, head].double()
        logits = k @ q / math.sqrt(dim)
        outputs[head] = torch.softmax(logits, 0) @ v
        full = key[head // group].double()
        bound = []
        for b in blocks:
            low, high = (
                edge(full[b * size : (b + 1) * size], 0) for edge in (torch.amin, torch.amax)
            )
            bound.append(q @ (low + high) / 2 + RADII[level] * (q.abs() @ (high - low)) / 2)
        order = torch.stack(bound).argsort(descending=True)
        for index, budget in enumerate(BUDGETS):
            seen = torch.ones(position + 1, dtype=torch.bool)
            seen[region.start : region.stop] = False
            for b in order[: math.ceil(budget * len(blocks) - 1e-6)].tolist():
                first = (blocks[b]) * size
                seen[max(first, region.start) : min(first + size, region.stop)] = True
            weights = torch.softmax(logits.masked_fill(~seen, -math.inf), 0)
            sparse[head, index] = weights @ v
    norm = max(output.norm() for output in outputs.values())
    for (head, index), output in sparse.items():
        error = float((output - outputs[head]).norm() / norm)
        expected = 2 * math.log(max(error, ERROR_FLOOR))
        assert float(found[head // group, head % group, level, index]) == pytest.approx(
            expected, abs=2e-2
        )
