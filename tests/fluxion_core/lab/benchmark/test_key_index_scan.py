"""The bench of keys of 2 bits, as far as it needs no GPU: what it times, and that it is right."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.errors import ConfigError
from fluxion_core.lab.benchmark.key_index_scan import ScanCase, parse_batch
from fluxion_core.lab.benchmark.model_shapes import LLAMA_8B, shape_named

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def case() -> ScanCase:
    return ScanCase(shape_named("tiny", num_layers=1), 2, 1024, DEVICE, programs=4)


@pytest.mark.parametrize("level", [0, 3])
def test_what_is_timed_is_right(case: ScanCase, level: int):
    assert case.difference(level) < 0.005


def test_it_would_tell_of_scores_that_are_wrong(case: ScanCase):
    before = case.index.clone()
    # The last row has two of four slabs: one of these at least.
    case.index[1:] = 0
    assert case.difference(0) > 0.1
    case.index.copy_(before)


def test_what_a_scan_reads_is_the_regions_groups(case: ScanCase):
    # By hand: tokens 64 to 767 are 11 groups, of 20 * 32 bytes, of 2 rows and 2 KV heads.
    assert case.region == range(64, 768)
    assert case.read_bytes == 4 * 11 * 640
    assert LLAMA_8B.head_dim * 20 * LLAMA_8B.num_kv_heads // 64 == 320


def test_batches_are_rows_and_tokens():
    assert parse_batch("4x131072") == (4, 131072)
    for wrong in ("4", "0x2048", "4x512", "x2048", "4x2048x1"):
        with pytest.raises(ConfigError, match="as in 4x131072"):
            parse_batch(wrong)
