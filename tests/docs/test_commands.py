"""Commands that pages show: each is one, and takes the options that it is shown with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fluxion_core.config.setting_sources import settings_of
from fluxion_core.config.settings import _SHORTHANDS
from services.cli.main import BENCHES, COMMANDS, make_fluxion
from services.decode.config import DecodeSettings
from services.prefill.config import PrefillNodeSettings

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "deploy/*.md", "protos/*.md", "fluxion_core/**/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "demo_document.md"
)

_INLINE = re.compile(r"`(fluxion [^`]+)`")
_BLOCK = re.compile(r"^ *```(?:console|sh|bash)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_NODE = re.compile(r"(?:python -m )services\.(decode|prefill)\b(.*)")


def shown(page: Path) -> Iterator[str]:
    """Command lines of a page, without comments; those that go on over lines as one."""
    text = page.read_text()
    yield from _INLINE.findall(text)
    for block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"\s#.*", "", line).strip().removeprefix("$ ")


@cache
def options_of(command: str) -> frozenset[str]:
    app = make_fluxion()
    for name in command.split():
        app = app[name]
    arguments = app.assemble_argument_collection()
    return frozenset(name for one in arguments for name in one.names) | {"--help"}


def faults_of(line: str) -> Iterator[str]:
    given = re.findall(r"(?<=\s)(--?[a-z][\w.-]*)", line)
    if node := _NODE.search(line):
        settings = DecodeSettings if node[1] == "decode" else PrefillNodeSettings
        known = {f"--{name.replace('_', '-')}" for name in settings_of(settings)}
        known |= {*_SHORTHANDS, "--config", "--help", "-m"}
        yield from (f"{line}: {flag}" for flag in given if flag not in known)
    elif line.startswith("fluxion ") and not line.startswith("fluxion --"):
        words = line.split()
        names = [words[1]] + (words[2:3] if words[1] == "bench" else [])
        if words[1] not in {*COMMANDS, "bench", "COMMAND"} or not {*names[1:]} <= {*BENCHES, "…"}:
            yield f"{line}: no such command"
        elif {"COMMAND", "…"}.isdisjoint(names) and names != ["bench"]:
            known = options_of(" ".join(names))
            yield from (f"{line}: {flag}" for flag in given if flag not in known)


def test_pages_show_commands():
    lines = [line for page in PAGES for line in shown(page)]
    assert sum(line.startswith("fluxion ") for line in lines) > 40
    assert sum("-m services.decode" in line for line in lines) > 3


def test_commands_and_options_that_pages_show_are_there():
    faults = {
        str(page.relative_to(ROOT)): found
        for page in PAGES
        if (found := [fault for line in shown(page) for fault in faults_of(line)])
    }
    assert faults == {}


def test_a_command_or_an_option_that_is_not_there_is_a_fault():
    assert list(faults_of("fluxion sing")) == ["fluxion sing: no such command"]
    assert list(faults_of("fluxion bench sleep")) == ["fluxion bench sleep: no such command"]
    assert list(faults_of("fluxion up --loud")) == ["fluxion up --loud: --loud"]
    line = "python -m services.decode --store.colour red"
    assert list(faults_of(line)) == [f"{line}: --store.colour"]
