"""Runs `fluxion` in this process, for the tests of the command."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

from services.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a command left."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Both streams."""
        return self.stdout + self.stderr


def invoke(arguments: Sequence[str], stdin: str | None = None) -> Result:
    """Run the command with these arguments; a bug in it is raised."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(stdout),
        redirect_stderr(stderr),
        mock.patch.object(sys, "stdin", io.StringIO(stdin or "")),
    ):
        exit_code = main(list(arguments))
    return Result(exit_code, stdout.getvalue(), stderr.getvalue())
