"""Completion of a call in a repository, whose function stands far above in another file.

Most of the repository is source of the running Python's standard library, read where it lies. Some
modules between are made up: names that no model has seen, so that they must be looked up.
"""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.tasks.haystack import insert_at_random
from fluxion_core.lab.evaluation.tasks.question import Question
from fluxion_core.lab.evaluation.tasks.vocabulary import ADJECTIVES, NOUNS, VERBS

MODULES = 4
"""Made-up files."""

FUNCTIONS = 3
"""In each of them."""

PARAMETERS = 3
"""Of each function."""

FILE_LINES = 60
"""Lines that are taken of a file of the standard library, at most."""

_MEASURES = ("width", "depth", "count", "limit", "share", "level")


@dataclass(frozen=True)
class MadeUpFunction:
    """A function whose name does not follow from the comment above it."""

    name: str
    parameters: tuple[str, ...]
    purpose: str

    @property
    def definition(self) -> str:
        """Source."""
        total = " + ".join(self.parameters)
        head = f"def {self.name}({', '.join(self.parameters)}):"
        return f"# {self.purpose}\n{head}\n    return {total}\n"


def completion_question(size: int, generator: random.Random) -> Question:
    """A call to complete after `size` lines of a repository.

    The function is in the first made-up file.
    """
    names = generator.sample(NOUNS, MODULES)
    functions = iter(_functions(generator, MODULES * FUNCTIONS))
    modules = {name: [next(functions) for _ in range(FUNCTIONS)] for name in names}
    files = [
        f"# file: depot/{name}.py\n" + "\n\n".join(function.definition for function in defined)
        for name, defined in modules.items()
    ]
    asked = generator.choice(modules[names[0]])
    filler = random.Random(generator.getrandbits(64))
    repository = "\n\n".join(insert_at_random(_library_files(size, filler), files, generator))
    text = (
        "Complete the last line of this repository: call the function that has the same comment "
        "above it, with all arguments by name: function(first=1, second=2, third=3)."
        f"\n\n{repository}\n\n"
        f"# file: main.py\nfrom depot import {names[0]}\n\n# {asked.purpose}"
    )
    return Question(text, (asked.name, *asked.parameters), f"result = {names[0]}.")


def library_lines() -> int:
    """Lines that there are, at most."""
    return FILE_LINES * len(_library_paths())


def _functions(generator: random.Random, count: int) -> list[MadeUpFunction]:
    verbs, nouns = generator.sample(VERBS, count), iter(generator.sample(NOUNS, 3 * count))
    return [
        MadeUpFunction(
            f"{verb}_{next(nouns)}",
            tuple(
                f"{generator.choice(NOUNS)}_{measure}"
                for measure in generator.sample(_MEASURES, PARAMETERS)
            ),
            f"The {generator.choice(ADJECTIVES)} {next(nouns)} of the {next(nouns)}.",
        )
        for verb in verbs
    ]


def _library_files(lines: int, generator: random.Random) -> list[str]:
    """Beginnings of files, of so many lines together."""
    paths = list(_library_paths())
    generator.shuffle(paths)
    files: list[str] = []
    for path in paths:
        if lines <= 0:
            break
        source = path.read_text(encoding="utf-8", errors="replace").splitlines()
        taken = source[: min(lines, FILE_LINES)]
        files.append("\n".join([f"# file: lib/{path.name}", *taken]))
        lines -= len(taken)
    return files


@cache
def _library_paths() -> tuple[Path, ...]:
    directory = Path(sysconfig.get_path("stdlib"))
    paths = tuple(sorted(path for path in directory.glob("*.py") if path.stat().st_size > 2000))
    if len(paths) < 50:
        raise ConfigError(f"{directory} holds the source of {len(paths)} modules; 50 are needed")
    return paths
