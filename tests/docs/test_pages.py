"""Pages for people: their lines, what they name, and whether a stranger finds an answer.

Links and anchors within the site are checked where it is built, strictly (`make docs`).
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHANGELOG = ROOT / "CHANGELOG.md"
MAX_COLUMNS = 110

NO_PAGES = ("tables.md", "demo_document.md")
"""Made by a program; a prompt."""
LIST_OF_PAGES = "SUMMARY.md"
"""Pages by their places in the site, some of which lie elsewhere in the repository."""

QUESTIONS = {
    "how much memory": ("guides/size.md", "286 GiB"),
    "quality level": ("guides/quality-levels.md", "For RAG take"),
    "TLS": ("guides/tls.md", "--server.tls.certificate"),
    "add a model": ("guides/models.md", "fluxion up --model"),
    "not supported": ("guides/not-supported.md", "one list"),
}
"""Words of the front page's line, the page that it links to, and words of the answer."""

_LINK = re.compile(r"\]\(([^)\s#:]+)[)#]|^\[[^\]]+\]:\s+([^\s#:]+)(?:#\S*)?$", re.MULTILINE)
_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(
    r"(?<![\w/.<$~-])((?:[\w.*-]+/)+[\w.*-]+\.[a-z]\w*|[\w*-]+\.(?:py|md|toml|ya?ml))\b"
)
_MODULE = re.compile(r"\b((?:fluxion_core|services|tests)(?:\.[a-zA-Z_]\w*)+)")
_CLASS = re.compile(r"`(_?(?:[A-Z][a-z0-9]+){2,})`")
_MAKE = re.compile(r"(?:`|^\$ )make ([a-z-]+)", re.MULTILINE)
_EXAMPLE = re.compile(r"out/.*|.*\b(NAME|LEVAL|LONGBENCH|MODEL)\b.*")
_WRITTEN = re.compile(r"https?://\S+|--(json|markdown|plot|journal|out|png|config)[= ]\S+")
"""Addresses, and what a command writes."""


@cache
def files() -> frozenset[str]:
    """Files of the repository, those that are not committed yet too."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return frozenset(path for path in listed.stdout.split("\n") if (ROOT / path).is_file())


@cache
def folders() -> frozenset[str]:
    return frozenset(str(parent) for path in files() for parent in Path(path).parents)


@cache
def pages() -> Mapping[Path, str]:
    """Text of every page."""
    paths = sorted(ROOT / path for path in files() if path.endswith(".md"))
    return {path: path.read_text() for path in paths if path.name not in NO_PAGES}


def faults(find: Callable[[Path, str], Iterable[object]]) -> dict[str, list[object]]:
    """What `find` has to say about each page, pages without a fault left out."""
    found = {str(page.relative_to(ROOT)): list(find(page, text)) for page, text in pages().items()}
    return {page: of_page for page, of_page in found.items() if of_page}


def is_there(path: str) -> bool:
    """Whether some file's path ends so; a star stands for a part of a name."""
    pattern = re.compile(r"(?:.*/)?" + re.escape(path).replace(r"\*", "[^/]*"))
    return any(map(pattern.fullmatch, files()))


def is_module_or_member(dotted: str) -> bool:
    """Whether a package, a module, or a name that a module writes down."""
    parts = dotted.split(".")
    if "/".join(parts) in folders():
        return True
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        for file in {f"{path}.py", f"{path}/__init__.py"} & files():
            source = (ROOT / file).read_text()
            return end == len(parts) or re.search(rf"\b{parts[end]}\b", source) is not None
    return False


def test_there_are_pages():
    assert len(pages()) > 40


def test_no_line_is_longer_than_a_page_is_wide():
    assert (
        faults(
            lambda _, text: (
                number
                for number, line in enumerate(text.splitlines(), 1)
                if len(line) > MAX_COLUMNS
            )
        )
        == {}
    )


def test_files_that_pages_name_are_there():
    def missing(page: Path, text: str) -> list[str]:
        if page.name == LIST_OF_PAGES:
            return []
        if page == CHANGELOG:
            text = "## ".join(text.split("\n## ")[:2])  # what is released names what was there
        named = set(_FILE.findall(_WRITTEN.sub("", _LINK.sub("", text))))
        return sorted(p for p in named if not _EXAMPLE.fullmatch(p) and not is_there(p))

    assert faults(missing) == {}


def test_files_that_pages_link_to_are_there():
    def missing(page: Path, text: str) -> list[str]:
        linked = {one or other for one, other in _LINK.findall(_CODE.sub("", text))}
        return sorted(path for path in linked if not (page.parent / path).exists())

    assert {
        page: of_page
        for page, of_page in faults(missing).items()
        if not page.endswith(LIST_OF_PAGES)
    } == {}


def test_modules_that_pages_name_are_there():
    assert (
        faults(
            lambda _, text: (
                dotted for dotted in _MODULE.findall(text) if not is_module_or_member(dotted)
            )
        )
        == {}
    )


def test_classes_and_messages_that_pages_name_are_there():
    sources = (ROOT / path for path in files() if path.endswith((".py", ".h", ".cpp", ".proto")))
    known = set().union(*(re.findall(r"\w+", path.read_text()) for path in sources))

    def missing(page: Path, text: str) -> set[str]:
        return set() if page == CHANGELOG else set(_CLASS.findall(text)) - known

    assert faults(missing) == {}


def test_verbs_of_make_that_pages_name_are_there():
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert faults(lambda _, text: set(_MAKE.findall(text)) - verbs) == {}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_strangers_question_is_answered_from_the_front_page(question: str):
    front = (ROOT / "docs" / "index.md").read_text()
    where, answer = QUESTIONS[question]
    asked = next(line for line in front.splitlines() if line.startswith("|") and question in line)
    if (named := re.search(r"\]\[(\w+)\]", asked)) is not None:
        asked = next(line for line in front.splitlines() if line.startswith(f"[{named[1]}]: "))
    assert where in asked
    assert answer in (ROOT / "docs" / where).read_text()
    assert f"docs/{where}" in (ROOT / "README.md").read_text()


def test_every_extra_is_in_the_table_of_the_installation():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    page = (ROOT / "docs" / "guides" / "install.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(extras)


def test_what_follows_a_list_is_no_part_of_its_last_item():
    swallowed = re.compile(r"^(?:- |  ).*\n([^\s\-*|<`\d].*|\*\*.*)$", re.MULTILINE)

    assert faults(lambda _, text: swallowed.findall(_CODE.sub("", text))) == {}
