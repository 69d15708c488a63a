"""Device windows hold the tokens that their sequences' windows are, for any length."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.decode.device.windows import DeviceWindows
from fluxion_core.errors import CapacityError
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.digest_index import gather_kv
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=3, head_dim=64, slab_tokens=128)
WINDOW = WindowSpec(sink_tokens=32, recent_tokens=128)


def _sequence(store: HostKvStore, num_tokens: int) -> SequenceKv:
    sequence = store.reserve(list(range(num_tokens)), 16)
    blocks = -(-num_tokens // 16)
    for layer in range(GEOMETRY.num_layers):
        payload = torch.randn(GEOMETRY.num_kv_heads, blocks, 2, 16, 64).bfloat16()
        tail = num_tokens % 16
        if tail:
            payload[:, -1, :, tail:] = 0
        raw = payload.view(torch.uint8).numpy().tobytes()
        sequence.write_blocks(layer, 0, num_tokens, raw)
    sequence.commit()
    return sequence


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 175, 176, 177, 500, 511])
def test_a_joined_slot_holds_every_token_that_the_window_attends_to(num_tokens: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        pytest.skip("the arena of this test is not registered with the device")
    store = HostKvStore(GEOMETRY, 1 << 24, model_key=b"")
    sequence = _sequence(store, num_tokens)
    windows = DeviceWindows(GEOMETRY, WINDOW, 3, device)
    slot = windows.join(sequence)
    first = WINDOW.recent_start(num_tokens)
    positions = [p for p in range(num_tokens) if p < WINDOW.sink_tokens or p >= first]
    entries = [WINDOW.slot_index(position) for position in positions]
    for layer in range(GEOMETRY.num_layers):
        for head in range(GEOMETRY.num_kv_heads):
            keys, values = gather_kv(sequence, layer, head)
            assert torch.equal(windows.key(layer)[slot, head, entries], keys[positions])
            assert torch.equal(windows.value(layer)[slot, head, entries], values[positions])


def test_slots_are_taken_once_and_refused_when_all_are_taken() -> None:
    if torch.cuda.is_available():
        pytest.skip("the arena of this test is not registered with the device")
    store = HostKvStore(GEOMETRY, 1 << 24, model_key=b"")
    sequence = _sequence(store, 40)
    windows = DeviceWindows(GEOMETRY, WINDOW, 2, torch.device("cpu"))
    slots = {windows.join(sequence), windows.join(sequence)}
    assert slots == {0, 1}
    with pytest.raises(CapacityError, match="max_running_sequences"):
        windows.join(sequence)
    windows.leave(1)
    assert windows.join(sequence) == 1
