"""Log lines of both nodes in one terminal: `decode  │ 12:00:00.123 request finished …`."""

from __future__ import annotations

import re

from rich.console import Console
from rich.text import Text

NODE_COLOURS = {"prefill": "magenta", "decode": "cyan", "gateway": "green"}
"""Colour of each node's prefix."""

_LEVEL_COLOURS = {"DEBUG": "dim", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}
_NAME_WIDTH = max(map(len, NODE_COLOURS))
# `2026-01-31T12:00:00.123Z INFO decode request finished tokens=64`: fluxion_core/observe/log.py.
_LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\dT(?P<time>\d\d:\d\d:\d\d\.\d{3})Z (?P<level>[A-Z]+) \S+ (?P<message>.*)"
)
_FIELD = re.compile(r"(?<=\s)([A-Za-z_][\w.]*=)(\"[^\"]*\"|\S*)")


class LogPrinter:
    """Prints each line behind its node's coloured name; plain text where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, node: str, line: str) -> None:
        """Print one line of one node. Never wraps: a line in is a line out."""
        self._console.print(render_log_line(node, line), soft_wrap=True, highlight=False)


def render_log_line(node: str, line: str) -> Text:
    """Mark a line with its node. The date and an INFO are left out, other levels are coloured.

    What is not in the nodes' log format (a traceback, a library's own message) is kept whole; its
    colours, if it has any, are shown where there is a terminal.
    """
    text = Text()
    text.append(f"{node:<{_NAME_WIDTH}} │ ", style=NODE_COLOURS.get(node, "blue"))
    match = _LOG_LINE.fullmatch(line)
    if match is None:
        return text.append_text(Text.from_ansi(line))
    level = match["level"]
    text.append(match["time"] + " ", style="dim")
    if level != "INFO":
        text.append(level + " ", style=_LEVEL_COLOURS.get(level, ""))
    message = Text(match["message"])
    for field in _FIELD.finditer(match["message"]):
        message.stylize("dim", field.start(1), field.end(1))
    return text.append_text(message)
