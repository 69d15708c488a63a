"""Sizes of a hand-off frame, for whoever bounds messages without taking frames apart (codec.py)."""

from __future__ import annotations

PREFIX_BYTES = 32
"""In front of every payload."""

MAX_FRAME_PAYLOAD_BYTES = 4 << 20
"""No frame is larger, whatever the layout: four times what a sender aims at, for models whose
single block row of all heads is over 1 MiB."""
