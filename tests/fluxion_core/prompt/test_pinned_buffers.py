"""Pieces come back when nobody holds them, and not before; memory that need not be pinned here."""

from __future__ import annotations

import gc

import numpy as np
import torch
from torch import Tensor

from fluxion_core.prompt import pinned_buffers
from fluxion_core.prompt.pinned_buffers import PinnedBuffers


def plain(num_buffers: int, buffer_bytes: int) -> Tensor:
    return torch.zeros(num_buffers, buffer_bytes, dtype=torch.uint8)


def lent(buffers: PinnedBuffers, value: int, num_bytes: int = 64) -> memoryview:
    piece, view = buffers.take(num_bytes)
    piece[:] = value
    return view


def test_what_is_lent_is_not_written_over_while_it_or_a_part_is_held():
    buffers = PinnedBuffers(64, 2, plain)
    whole, part = lent(buffers, 1), lent(buffers, 2)[2:4]
    array = np.frombuffer(lent(buffers, 3, num_bytes=5), dtype=np.uint8)
    for value in range(4, 20):
        lent(buffers, value)
    assert bytes(whole) == bytes([1] * 64)
    assert bytes(part) == bytes([2] * 2)
    assert array.tolist() == [3] * 5
    # Three are held, and one is enough for all that passed.
    assert buffers.num_buffers == 4


def test_what_nobody_holds_comes_back_at_once():
    gc.disable()
    try:
        buffers = PinnedBuffers(64, 2, plain)
        for value in range(50):
            pair = lent(buffers, value), lent(buffers, value)
            del pair
        assert buffers.num_buffers == 2
    finally:
        gc.enable()


def test_small_pieces_share_a_buffer_until_the_last_of_them_is_let_go():
    # By hand: 100 B take two lines of 64 B, so that a buffer of 512 B has room for four.
    buffers = PinnedBuffers(512, 1, plain)
    held = [lent(buffers, value, num_bytes=100) for value in range(4)]
    assert buffers.num_buffers == 1
    assert [bytes(one) for one in held] == [bytes([value] * 100) for value in range(4)]
    # Three of them have gone, and the buffer is not free yet.
    last = held.pop()
    held.clear()
    others = [lent(buffers, 9, num_bytes=100) for _ in range(4)]
    assert buffers.num_buffers == 2
    assert bytes(last) == bytes([3] * 100)
    # All are gone: both buffers serve again.
    del last
    others.clear()
    held = [lent(buffers, value, num_bytes=100) for value in range(8)]
    assert buffers.num_buffers == 2
    assert [bytes(one) for one in held] == [bytes([value] * 100) for value in range(8)]


def test_a_piece_that_does_not_fit_the_rest_has_a_buffer_of_its_own():
    buffers = PinnedBuffers(512, 2, plain)
    small, large = lent(buffers, 1, num_bytes=64), lent(buffers, 2, num_bytes=512)
    assert buffers.num_buffers == 2
    assert (bytes(small), bytes(large)) == (bytes([1] * 64), bytes([2] * 512))


def test_what_was_lent_cannot_be_written():
    assert lent(PinnedBuffers(64, 1, plain), 1).readonly


def test_memory_doubles_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(pinned_buffers, "GROWTH_BYTES", 256)
    buffers = PinnedBuffers(64, 1, plain)
    held, sizes = [], []
    for value in range(14):
        held.append(lent(buffers, value))
        sizes.append(buffers.num_buffers)
    assert sorted(set(sizes)) == [1, 2, 4, 8, 12, 16]
    assert [bytes(one) for one in held] == [bytes([value] * 64) for value in range(14)]
