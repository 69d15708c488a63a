"""Every program of the lab tells what it is for on --help, and does nothing else then."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import fluxion_core.lab
from fluxion_core.config.commands import Command, run_module

LAB = Path(fluxion_core.lab.__file__).parent

PROGRAMS = sorted(
    ".".join(("fluxion_core.lab", *path.relative_to(LAB).with_suffix("").parts))
    for path in LAB.rglob("*.py")
    if '\nif __name__ == "__main__":\n' in path.read_text("utf-8")
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_the_lab_is_one_command_whose_help_does_nothing_else(
    program: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = importlib.import_module(program)
    (command,) = (
        found
        for found in vars(module).values()
        if isinstance(found, type)
        and issubclass(found, Command)
        and found.__module__ == program
        and f"run_module({found.__name__})" in Path(module.__file__ or "").read_text("utf-8")
    )
    monkeypatch.chdir(tmp_path)

    assert run_module(command, ["--help"]) == 0

    assert (command.__doc__ or "").split()[0] in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
