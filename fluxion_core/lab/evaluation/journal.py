"""Answers as they are finished, one JSON object a line, so that a run can go on where it ended.

The first line says what the run is: model, tasks' seed and wording, policies by their numbers. A
journal of another run is refused, not mixed in.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.work import Answer


class Journal:
    """Answers of a run, in memory and, if there is a path, in a file.

    Args:
        path: of the file; None keeps nothing.
        settings: what makes two runs the same.
        resume: go on with what the file holds; else it must not hold anything.

    Raises:
        ConfigError: the file is of a run with other settings, damaged, or there without `resume`.
    """

    def __init__(self, path: Path | None, settings: dict[str, str], *, resume: bool) -> None:
        self.answers: dict[tuple[str, str], Answer] = {}
        """By case and way."""
        self._path = path
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            if not resume:
                raise ConfigError(f"journal {path} exists; resume it, or name another file")
            self._read(path, settings)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write({"settings": settings})

    def add(self, answer: Answer) -> None:
        """Keep one; it is in the file when this returns."""
        self.answers[answer.case_name, answer.way] = answer
        self._write(asdict(answer))

    def _write(self, line: dict[str, object]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _read(self, path: Path, settings: dict[str, str]) -> None:
        whole = path.read_text()
        lines = whole.splitlines()
        if not whole.endswith("\n"):
            # The run was cut off while it wrote: that answer is made again.
            lines = lines[:-1]
            path.write_text("".join(f"{line}\n" for line in lines))
        try:
            head, *rest = [json.loads(line) for line in lines]
            found = head["settings"]
            answers = [_answer_of(line) for line in rest]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"journal {path} is damaged: {error!r}; start anew") from None
        for name in sorted({*found, *settings}):
            if found.get(name) != settings.get(name):
                raise ConfigError(
                    f"journal {path} is of another run: {name} was {found.get(name)!r}, "
                    f"is {settings.get(name)!r}; name another file"
                )
        self.answers = {(answer.case_name, answer.way): answer for answer in answers}


def _answer_of(line: dict[str, Any]) -> Answer:
    lists = {name: tuple(value) for name, value in line.items() if isinstance(value, list)}
    return Answer(**{**line, **lists})
