"""Markdown of the generated regions: entries that are wrapped like the pages around them."""

from __future__ import annotations

import textwrap

WIDTH = 106


def entry(name: str, kind: str, meaning: str) -> str:
    """One item of a list: what it is called, what kind of thing it is, what it means."""
    first = f"- **`{name}`**" + (f": {kind}" if kind else "")
    lines = textwrap.wrap(
        first, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    if meaning:
        lines[-1] += "<br>"
        lines += textwrap.wrap(
            " ".join(meaning.split()),
            WIDTH,
            initial_indent="  ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines) + "\n"


def paragraph(text: str) -> str:
    """Text of a docstring or comment, wrapped."""
    return textwrap.fill(
        " ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False
    )
