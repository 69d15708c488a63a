"""The command's frame: help, and how errors look."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from fluxion_core.errors import CapacityError
from services.cli import generate
from services.cli.main import app

runner = CliRunner()


def test_help_names_every_command():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "up", "generate", "pull", "health", "bench"):
        assert command in result.stdout


@pytest.mark.parametrize("command", ["demo", "up", "generate", "pull", "health", "bench"])
def test_every_command_explains_itself(command: str):
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_an_error_raised_on_purpose_is_one_line_and_status_1(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> str:
        raise CapacityError("host KV", needed=2, free=1, unit="B", remedy="retry later")

    monkeypatch.setattr(generate, "read_prompt", refuse)
    result = runner.invoke(app, ["generate", "Why?"])
    assert result.exit_code == 1
    assert result.stderr == "fluxion: host KV: need 2 B, 1 B free; retry later\n"


def test_a_bug_is_not_dressed_up_as_an_error(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(generate, "read_prompt", fail)
    result = runner.invoke(app, ["generate", "Why?"])
    assert isinstance(result.exception, ZeroDivisionError)
