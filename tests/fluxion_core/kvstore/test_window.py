"""A slot holds exactly the window's tokens, at any length and while it grows."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.errors import CapacityError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kvstore.store import HostKvStore, SequenceKv
from fluxion_core.kvstore.window import DeviceWindow

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=1, head_dim=16, slab_tokens=128)
SPEC = WindowSpec(sink_tokens=32, recent_tokens=128)


def committed(num_tokens: int) -> SequenceKv:
    """Every key is its position, every value its negative: both exact in bfloat16 up to 256."""
    store = HostKvStore(GEOMETRY, 1 << 20, model_key=b"toy")
    sequence = store.reserve(list(range(num_tokens)), 400)
    blocks = ceil_div(num_tokens, BLOCK_TOKENS)
    position = torch.arange(blocks * BLOCK_TOKENS).bfloat16()
    position[num_tokens:] = 0
    rows = position.view(blocks, 1, BLOCK_TOKENS, 1) * torch.tensor([1, -1]).view(1, 2, 1, 1)
    payload = rows.expand(-1, -1, -1, GEOMETRY.head_dim).bfloat16().contiguous()
    for layer in range(GEOMETRY.num_layers):
        sequence.write_blocks(layer, 0, num_tokens, payload.view(torch.uint8).numpy().tobytes())
    sequence.commit()
    return sequence


def live_positions(window: DeviceWindow, slot: int, num_tokens: int) -> list[float]:
    mask = window.step_mask([num_tokens])[0]
    keys, values = window.keys[1, slot, 0, mask, 3], window.values[1, slot, 0, mask, 3]
    assert torch.equal(keys, -values)
    return sorted(keys.tolist())


def expected(num_tokens: int) -> list[float]:
    start = SPEC.recent_start(num_tokens)
    live = [*range(min(num_tokens, SPEC.sink_tokens)), *range(start, num_tokens)]
    return [float(torch.tensor(float(position)).bfloat16()) for position in live]


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 160, 175, 176, 177, 240, 255])
def test_filling_copies_the_window_and_nothing_else(num_tokens: int):
    window = DeviceWindow(GEOMETRY, SPEC, 3, device=torch.device("cpu"))
    slot = window.take_slot()
    window.fill(slot, committed(num_tokens))
    assert live_positions(window, slot, num_tokens) == expected(num_tokens)


def test_the_window_stays_right_while_a_sequence_grows():
    window = DeviceWindow(GEOMETRY, SPEC, 2, device=torch.device("cpu"))
    window.take_slot()
    slot = window.take_slot()
    window.fill(slot, committed(20))
    for position in range(20, 400):
        row = torch.full((1, 1, GEOMETRY.head_dim), float(position))
        entries = torch.tensor([SPEC.slot_index(position)])
        for layer in range(GEOMETRY.num_layers):
            window.append(layer, torch.tensor([slot]), entries, row, -row)
        assert live_positions(window, slot, position + 1) == expected(position + 1)


def test_slots_run_out_and_come_back():
    window = DeviceWindow(GEOMETRY, SPEC, 2, device=torch.device("cpu"))
    slots = {window.take_slot(), window.take_slot()}
    assert slots == {0, 1}
    with pytest.raises(CapacityError):
        window.take_slot()
    window.free_slot(1)
    assert window.take_slot() == 1
