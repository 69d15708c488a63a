"""Dense attention against float64."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.errors import ShapeError
from fluxion_core.kernels.dense_attention import cpu, reference


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (8, 1), (7, 1)])
@pytest.mark.parametrize(("tokens", "total"), [(1, 1), (5, 5), (16, 100), (1, 33), (100, 333)])
def test_a_chunk_sees_what_came_before_it_and_itself(
    heads: int, kv_heads: int, tokens: int, total: int
):
    torch.manual_seed(heads * total)
    query = torch.randn(tokens, heads, 64)
    key, value = torch.randn(2, kv_heads, total, 64)
    mask = torch.ones(tokens, total, dtype=torch.bool).tril(total - tokens)
    expected, _ = reference.attend(
        query.transpose(0, 1)[None].double(), key[None].double(), value[None].double(), mask
    )
    found = cpu.attend_chunk(query, key, value)
    torch.testing.assert_close(found.double(), expected[0].transpose(0, 1), atol=3e-6, rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError):
        cpu.attend_chunk(torch.zeros(2, 3, 64), torch.zeros(2, 5, 64), torch.zeros(2, 5, 64))
    with pytest.raises(ShapeError):
        cpu.attend_chunk(torch.zeros(6, 2, 64), torch.zeros(2, 5, 64), torch.zeros(2, 5, 64))
