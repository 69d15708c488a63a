"""What is gathered beside a chunk's attention is in order on every schedule that streams allow.

Streams are clocks here: each knows how far it is behind each other one, as events tell it. A piece
must be gathered before it is attended to, and attended to before its buffer takes another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fluxion_core.decode.device import prompts as prompts_module
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, ceil_div

GEOMETRY = KvGeometry(3, 1, 16, slab_tokens=128)


class Clocks:
    """A device's module of streams and events."""

    def __init__(self) -> None:
        clocks = self
        clocks.all: list[Stream] = []

        class Stream:
            def __init__(self) -> None:
                self.seen: Counter[Stream] = Counter()
                clocks.all.append(self)

            def __hash__(self) -> int:
                return id(self)

            def work(self) -> tuple[Stream, int]:
                """Something is done; a mark by which others can tell whether they are behind it."""
                self.seen[self] += 1
                return self, self.seen[self]

            def is_behind(self, mark: tuple[Stream, int]) -> bool:
                return self.seen[mark[0]] >= mark[1]

            def wait_stream(self, other: Stream) -> None:
                self.seen |= other.seen

        class Event:
            def __init__(self) -> None:
                self.seen: Counter[Stream] = Counter()

            def record(self) -> None:
                self.seen = clocks.current.seen.copy()

            def wait(self) -> None:
                clocks.current.seen |= self.seen

            def synchronize(self) -> None:
                clocks.host.seen |= self.seen

        self.Stream, self.Event = Stream, Event
        self.current = Stream()
        self.host = Stream()
        """What the host has waited for."""

    @contextmanager
    def stream(self, stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self):
        return self.current


class Gather:
    """Writes which tokens of which layer it was asked for into a buffer, and looks at the order."""

    geometry = GEOMETRY

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.written: dict[int, tuple[object, int]] = {}
        self.read: dict[int, tuple[object, int]] = {}
        self.tables: list[tuple[object, int]] = []
        """Marks of who read the table of resident units."""
        self.table_written = None

    def buffer(self, tokens: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(2, 1, tokens, 16)

    def launch(self, slabs, layer, tokens, kv, host_units, resident) -> None:
        stream, place = self.clocks.current, kv.data_ptr()
        assert stream is not self.clocks.all[0]
        assert stream.is_behind(self.table_written)
        if place in self.read:
            assert stream.is_behind(self.read[place])
        kv[:, :, : len(tokens)] = torch.tensor(list(tokens))[None, None, :, None] + 1000.0 * layer
        self.written[place] = stream.work()
        self.tables.append(self.written[place])

    def attend(self, key: torch.Tensor, layer: int) -> list[int]:
        """Tokens of a piece that the current stream reads."""
        stream, place = self.clocks.current, key.data_ptr()
        assert stream.is_behind(self.written[place])
        self.read[place] = stream.work()
        return (key[0, :, 0] - 1000.0 * layer).int().tolist()


@pytest.mark.parametrize("tokens", [0, 7, 16, 33, 100, 128])
@pytest.mark.parametrize("blocks", [1, 2, 100])
def test_pieces_are_gathered_before_and_overwritten_after_they_are_attended_to(
    monkeypatch, tokens: int, blocks: int
):
    clocks = Clocks()
    monkeypatch.setattr(prompts_module.torch, "get_device_module", lambda device: clocks)
    gather = Gather(clocks)
    piece_bytes = blocks * GEOMETRY.block_bytes
    pieces = prompts_module._StoredPieces(gather, torch.device("cpu"), piece_bytes)
    table = torch.zeros(2, dtype=torch.int64)
    waits = clocks.current, clocks.host
    for _ in range(2):
        gather.table_written = clocks.current.work()
        pieces.begin(SimpleNamespace(num_tokens=tokens, slab_table=table))
        pieces.resume(None)
        for layer in range(GEOMETRY.num_layers):
            found = [
                token for key, _ in pieces.of_next_layer() for token in gather.attend(key, layer)
            ]
            assert found == list(range(tokens))
            if layer == 1:
                # A step of the others, which may move units of the tier: nothing reads the table.
                pieces.rest()
                assert all(waiting.is_behind(mark) for mark in gather.tables for waiting in waits)
                gather.table_written = clocks.current.work()
                pieces.resume(None)
        pieces.rest()
        assert all(waiting.is_behind(mark) for mark in gather.tables for waiting in waits)
    runs = ceil_div(ceil_div(tokens, BLOCK_TOKENS), blocks)
    assert len(gather.tables) == 2 * GEOMETRY.num_layers * runs
