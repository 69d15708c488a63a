"""Arguments that are no text or no number, places that cannot be used, terminals that show less."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.generate import write_now
from tests.services.cli.command_line import invoke

ROOT = Path(__file__).parents[3]
RUN = [sys.executable, "-m", "services.cli"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--connect-seconds", "inf"], "--connect-seconds is inf; it must be a"),
        (["generate", "x", "--temperature", "nan"], "--temperature is nan; it must be a finite"),
        (["generate", "x", "--deadline-seconds", "1e300"], "must be at most 604800, a week"),
        (["generate", "caf\udce9"], "argument PROMPT is not UTF-8 text (byte 3); convert it"),
        (["generate", "x", "--stop", "a", "--stop", "\udce9"], "argument STOP is not UTF-8 text"),
        (["generate", "x", "--address", "http://a:1"], "address 'http://a:1' is not HOST:PORT"),
        (["health", "a:99999"], "port 99999 is beyond 65535"),
        (["top", "a:0"], "'a:0' is not HOST:PORT: port 0"),
        (["top", "127.0.0.1:1"], "no metrics at 127.0.0.1:1 (Connection refused)"),
        (["trace", "--address", "a"], "it has no port"),
        (["up", "--decode-listen", "a"], "it has no port"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: list[str], words: str, tmp_path: Path):
    model = tmp_path / "model.gguf"
    model.touch()
    more = ["--model", str(model)] if arguments[0] == "up" else []
    result = invoke([*arguments, *more])
    assert result.exit_code == 1
    assert result.stderr.startswith("fluxion: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def run(*arguments: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The command in the C locale, where Python keeps bytes that are no UTF-8 as surrogates."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LC_", "LANG", "PYTHONUTF8", "PYTHONIO"))
    }
    return subprocess.run(
        [*RUN, *arguments],
        cwd=ROOT,
        env=environment | {"LC_ALL": "C"},
        input=stdin,
        capture_output=True,
        check=False,
        timeout=120,
    )


def test_standard_input_that_is_not_utf_8_is_one_sentence():
    result = run("generate", "-", stdin=b"caf\xe9\n")
    assert result.returncode == 1
    assert result.stderr.startswith(b"fluxion: standard input is not UTF-8 text (byte 3)")


def test_an_answer_goes_on_where_the_terminal_cannot_show_a_character(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="latin-1"))
    write_now("é \U0001f642 a")
    assert shown.getvalue() == b"\xe9 \\U0001f642 a"


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    pulled = invoke(["pull", "smollm2-135m", "--models-dir", str(file / "x")])
    assert pulled.exit_code == 1
    assert pulled.stderr.startswith("fluxion: smollm2-135m cannot be stored in ")
    assert "Not a directory; give a directory that can be written and has room" in pulled.stderr


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    import pwd

    def nobody(uid: int):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    result = invoke(["pull", "smollm2-135m"])
    assert result.exit_code == 1
    assert result.stderr.startswith("fluxion: ~: this user has no home directory")
    up = invoke(["up", "--model", "~/m.gguf", "--models-dir", "/tmp"])
    assert up.stderr.startswith("fluxion: ~/m.gguf: this user has no home directory")


@pytest.mark.parametrize("command", [["top", "{}", "--updates", "1"], ["trace", "--address", "{}"]])
def test_no_proxy_stands_before_a_nodes_metrics(monkeypatch, command: list[str]):
    from services.metrics import NodeMetrics
    from services.metrics_endpoint import MetricsEndpoint

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    served = MetricsEndpoint("127.0.0.1:0", NodeMetrics("decode"))
    try:
        arguments = [one.format(served.address) for one in command]
        result = invoke([*arguments, *(["--interval-seconds", "0.1"] * (command[0] == "top"))])
    finally:
        served.close()
    # It was reached: the trace is refused by the node itself.
    assert result.exit_code == 0 or "this node records no traces" in result.stderr
