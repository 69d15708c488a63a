"""The store's memory is registered piece by piece, and given back if it is not wanted any more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fluxion_core.decode.device import pinned
from fluxion_core.decode.device.pinned import PIECE_BYTES, RegisteredStore
from fluxion_core.errors import CapacityError, RequestCancelledError

START = 1 << 40


@pytest.fixture
def held(monkeypatch) -> list[int]:
    """Where pieces are registered now, without a device."""
    pieces: list[int] = []

    def unregister(address: int) -> int:
        pieces.remove(address)
        return 0

    monkeypatch.setattr(pinned, "_register", lambda address, size, _: pieces.append(address))
    runtime = SimpleNamespace(cudaHostUnregister=unregister)
    monkeypatch.setattr(pinned.torch.cuda, "cudart", lambda: runtime)
    return pieces


def store(num_pieces: int):
    return SimpleNamespace(
        arena_address=START,
        arena_bytes=num_pieces * PIECE_BYTES,
        slab_stride_bytes=1 << 20,
        pins_tables=False,
    )


def test_all_pieces_are_held_until_it_closes(held):
    registered = RegisteredStore(store(3))
    assert held == [START + piece * PIECE_BYTES for piece in range(3)]
    registered.close()
    assert held == []


def test_a_store_that_is_not_wanted_any_more_is_given_back(held):
    # By hand: asked before each piece; the third is not begun.
    answers = iter([True, True, False])
    wanted = store(5)
    with pytest.raises(RequestCancelledError):
        RegisteredStore(wanted, lambda: next(answers))
    assert held == []
    assert not wanted.pins_tables


def test_what_cannot_be_pinned_leaves_nothing_pinned(held, monkeypatch):
    def refuse(address: int, size: int, wanted: int) -> None:
        if len(held) == 2:
            raise CapacityError("pinned", needed=wanted, free=0, unit="B", remedy="x")
        held.append(address)

    monkeypatch.setattr(pinned, "_register", refuse)
    with pytest.raises(CapacityError):
        RegisteredStore(store(3))
    assert held == []
