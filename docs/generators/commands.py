"""Commands and their options, from the command line itself."""

from __future__ import annotations

import re
from collections.abc import Iterator

from generators.text import entry, paragraph
from services.cli.main import make_fluxion

_OF_ALL = "--log-level"
"""Every command has it; the page says so once."""
_OPTION = re.compile(r"\* `([^`]+)`(?:: (.*))?")


def _commands() -> str:
    """A section for each command; those of `fluxion bench` last, as they are only for measuring."""
    made = make_fluxion().generate_docs(output_format="markdown")
    sections = re.split(r"^#{2,} (?=fluxion )", made, flags=re.MULTILINE)[1:]
    sections.sort(key=lambda section: section.startswith("fluxion bench"))
    return "\n".join("".join(_section(section)) for section in sections)


def _section(section: str) -> Iterator[str]:
    title, *blocks = re.split(r"\n{2,}", section.strip())
    yield f"## {title}\n\n"
    for block in blocks:
        if block.startswith("```"):
            yield block + "\n\n"
        elif block.startswith("* "):
            for option in re.split(r"\n(?=\* )", block):
                if not option.startswith(f"* `{_OF_ALL}"):
                    yield _option(" ".join(option.split()))
        elif block.startswith("**"):
            # Without the empty line a group's name would be the last option's text.
            yield "" if block.startswith(("**Parameters", "**Arguments")) else f"\n{block}\n\n"
        else:
            yield paragraph(block) + "\n\n"


def _option(text: str) -> str:
    found = _OPTION.fullmatch(text)
    if found is None:
        return text + "\n"
    about, _, notes = (found[2] or "").partition(" *[")
    return entry(found[1], notes.replace("]*", "").replace(" *[", "; "), about)


REGIONS = {"commands": _commands}
