"""Logging as key=value lines, and clocks. Metrics names live with the node that counts them."""

from __future__ import annotations

import logging
import sys
import time


class KeyValueFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO decode request finished request_id=… tokens=64`."""

    def __init__(self, node: str) -> None:
        super().__init__(
            fmt=f"%(asctime)s.%(msecs)03dZ %(levelname)s {node} %(message)s",
            datefmt="%Y-%m-%dT%H:%M:%S",
        )

    converter = time.gmtime  # type: ignore[assignment]


def configure_logging(node: str, level: str) -> None:
    """Send every log line of this process to stderr, marked with the node's name."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValueFormatter(node))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def event(message: str, **fields: object) -> str:
    """Render an event with its fields as `message key=value …`; floats get three decimals.

    Whatever a value holds, the event is one line, and it cannot pass for another field: what cannot
    be printed is escaped, and so are quotes. Never pass prompts, generated text or credentials.
    """
    parts = [message]
    for key, value in fields.items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        if not text.isprintable():
            text = "".join(map(_printable, text))
        if " " in text or '"' in text:
            text = '"' + text.replace('"', '\\"') + '"'
        parts.append(f"{key}={text}")
    return " ".join(parts)


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()
