"""The largest numbers that settings and options take: what they are handed to must hold them."""

from __future__ import annotations

MAX_BYTES = 1 << 50
"""1 PiB: above any machine's memory, and below what 64 bits hold."""
MAX_INT32 = (1 << 31) - 1
"""What gRPC's options and the native code's counts hold."""
MAX_SECONDS = 7 * 86_400.0
"""A week, above any wait that makes sense; in milliseconds it fits 32 bits."""
