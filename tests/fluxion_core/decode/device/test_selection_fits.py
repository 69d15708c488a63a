"""Whether there is selection on a device: limits that are known before memory is looked at."""

from __future__ import annotations

import logging

import pytest
import torch

from fluxion_core.decode.device import selection as selection_module
from fluxion_core.decode.device.selection import selection_if_it_fits
from fluxion_core.decode.device.windows import DeviceWindows
from fluxion_core.errors import CapacityError, ConfigError
from tests.fluxion_core.decode.small_step import CONFIG, WINDOW, store_for

LONGEST = 32768 * 16
"""Tokens of the longest region that the top-k takes."""


def made(device_kv_bytes: int | None, context_tokens: int = 8192):
    """With digests nowhere."""
    store = store_for(16)
    return selection_if_it_fits(
        store,
        DeviceWindows(store.geometry, WINDOW, 4, torch.device("cpu")),
        CONFIG.num_heads,
        None,
        device_kv_bytes,
        capacity=4,
        max_context_tokens=context_tokens,
        step=torch.zeros(1, dtype=torch.int32),
        stream=None,
    )


def test_a_context_beyond_what_a_gpu_selects_from_is_no_tier_and_a_size_is_refused(
    caplog: pytest.LogCaptureFixture,
):
    with caplog.at_level(logging.INFO):
        assert made(None, LONGEST + 4096) is None
    assert "no device tier" in caplog.text
    assert made(0, LONGEST + 4096) is None
    with pytest.raises(ConfigError, match=r"device_kv_bytes is 4096, .* 32768 blocks.*auto or 0"):
        made(4096, LONGEST + 4096)


def test_a_store_beyond_the_table_is_no_tier(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection_module, "MAX_TABLE_ENTRIES", 100)
    assert made(None) is None
    with pytest.raises(ConfigError, match="more than the 100"):
        made(4096)


def test_digests_that_do_not_fit_are_told_by_the_half_that_they_may_take(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 5000))
    assert made(None) is None
    with pytest.raises(CapacityError, match=r"digests.*50%.*, 500 B free; .*host_kv_bytes"):
        made(4096)
