"""Bytes moved beside a card's, with a card and a clock of our own."""

from __future__ import annotations

import pytest

from fluxion_core.lab.benchmark.nvml_agreement import measure, wire_factor
from fluxion_core.observe.nvml import NvmlReadings


class Card:
    """Sees packets of 128 bytes, and a request for every one; knows only what it has looked at."""

    def __init__(self) -> None:
        self.moved = 0
        self.seen = 0
        self.looks = 0

    def look(self) -> None:
        self.seen, self.looks = self.moved, self.looks + 1

    def read(self) -> NvmlReadings:
        self.look()
        counts = {
            "host_to_device": self.seen * 148 // 128,
            "device_to_host": self.seen * 24 // 128,
        }
        return NvmlReadings(counts, 63e9, 1.0, {})


def test_only_what_moves_between_two_readings_counts():
    card, now = Card(), [0.0]
    card.moved = 10**12

    def move() -> int:
        now[0] += 0.5
        card.moved += 128_000
        return 128_000

    row = measure(
        *("in place", "host_to_device", move, card, 4.0),
        sleep=lambda seconds: None,
        clock=lambda: now[0],
    )
    # By hand: eight moves of 0.5 s; looked at in between about every second.
    assert row.payload_bytes == 1_024_000
    assert (row.card_bytes, row.opposite_bytes) == (1_184_000, 192_000)
    assert row.ratio == pytest.approx(wire_factor(128))
    assert row.seconds == pytest.approx(4.0)
    assert card.looks == 2 + 2


def test_headers_weigh_less_on_larger_packets():
    assert wire_factor(128) == 1.15625
    assert wire_factor(256) == 1.078125
