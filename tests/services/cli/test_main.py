"""What holds for every command: help, options, how it fails, and its exit statuses."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from fluxion_core import DISTRIBUTION
from fluxion_core.config.commands import Command
from fluxion_core.errors import CapacityError
from services.cli import generate, main
from services.cli.main import BENCHES, COMMANDS, make_fluxion
from tests.services.cli.command_line import invoke

PLACES = {(name,): place for name, place in COMMANDS.items()} | {
    ("bench", name): place for name, place in BENCHES.items()
}
NEEDED = {
    ("pull",): ["smollm2-135m"],
    ("health",): ["127.0.0.1:1"],
    ("top",): ["127.0.0.1:1"],
    ("trace",): ["--address", "127.0.0.1:1"],
    ("eval",): ["ruler"],
    ("train",): ["out"],
    ("completion",): ["bash"],
}
"""Arguments without which a command is wrong usage."""

every_command = pytest.mark.parametrize("words", PLACES, ids="-".join)


def class_of(words: tuple[str, ...]) -> type[Command]:
    module, _, name = PLACES[words].partition(":")
    found = getattr(importlib.import_module(f"services.cli.commands.{module}"), name)
    assert issubclass(found, Command)
    return found


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Runs a command with something else in place of its work."""

    def run(words: tuple[str, ...], work: Callable[[Command], int | None], *more: str):
        monkeypatch.setattr(class_of(words), "__call__", work)
        return invoke([*words, *NEEDED.get(words, []), *more])

    return run


def test_help_names_every_command_and_says_what_it_does():
    for group in ((), ("bench",)):
        result = invoke([*group, "--help"])
        assert result.exit_code == 0
        shown = " ".join(result.stdout.replace("│", " ").split())
        for words in PLACES:
            if words[:-1] == group:
                first = " ".join((class_of(words).__doc__ or "").split("\n\n")[0].split())
                assert f"{words[-1]} {first}" in shown


@every_command
def test_every_command_explains_itself_and_each_of_its_options(words: tuple[str, ...]):
    result = invoke([*words, "--help"])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: fluxion {' '.join(words)}")
    assert "--log-level" in result.stdout
    app = make_fluxion()
    for word in words:
        app = app[word]
    options = app.assemble_argument_collection(parse_docstring=True)
    assert [one.name for one in options if not one.parameter.help] == []


@every_command
def test_figures_as_json_say_their_keys(words: tuple[str, ...]):
    if "json" in {field.name for field in fields(class_of(words))}:
        shown = invoke([*words, "--help"]).stdout.partition("--json")[2].partition("--")[0]
        assert "{" in shown
        assert "standard output" in " ".join(shown.replace("│", " ").split())


@every_command
def test_status_0_is_for_work_that_was_done(words: tuple[str, ...], run_with):
    result = run_with(words, lambda _: None)
    assert (result.exit_code, result.stderr) == (0, "")


@every_command
def test_status_1_is_for_an_error_of_ours_in_one_sentence(words: tuple[str, ...], run_with):
    def refuse(_: Command) -> None:
        raise CapacityError("host KV", needed=2, free=1, unit="B", remedy="retry later")

    result = run_with(words, refuse)
    assert result.exit_code == 1
    assert result.stderr == "fluxion: host KV: need 2 B, 1 B free; retry later\n"


@every_command
@pytest.mark.parametrize(
    "flags", [["--no-such-flag"], ["--log-level", "loud"], ["a", "b", "--no-such-flag"]]
)
def test_status_2_is_for_wrong_usage_in_one_sentence(
    words: tuple[str, ...], flags: list[str], run_with
):
    result = run_with(words, lambda _: None, *flags)
    assert result.exit_code == 2
    assert result.stderr.startswith("fluxion: ")
    assert result.stderr.endswith(f"(see `fluxion {' '.join(words)} --help`)\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [one for one in NEEDED if one != ("pull",)], ids="-".join)
def test_status_2_is_for_what_is_missing(words: tuple[str, ...]):
    result = invoke(words)
    assert result.exit_code == 2
    assert "requires an argument" in result.stderr


@every_command
def test_status_130_is_for_ctrl_c(words: tuple[str, ...], run_with):
    def interrupt(_: Command) -> None:
        raise KeyboardInterrupt

    result = run_with(words, interrupt)
    assert (result.exit_code, result.stderr) == (130, "")


@every_command
def test_a_bug_is_not_dressed_up_as_an_error(words: tuple[str, ...], run_with):
    def fail(_: Command) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_with(words, fail)


@pytest.mark.parametrize("group", [[], ["bench"]])
def test_no_command_is_wrong_usage_and_shows_the_help(group: list[str]):
    result = invoke(group)
    assert result.exit_code == 2
    assert "Usage: fluxion" in result.stdout


def test_an_unknown_command_is_wrong_usage():
    result = invoke(["generat"])
    assert result.exit_code == 2
    assert 'Unknown command "generat". Did you mean "generate"?' in result.stderr


def test_the_version_is_the_installed_packages():
    from importlib.metadata import version

    assert invoke(["--version"]).stdout == f"{version(DISTRIBUTION)}\n"


def test_a_source_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(main, "DISTRIBUTION", "no-such-distribution")
    result = invoke(["--version"])
    assert result.exit_code == 1
    assert result.stderr == "fluxion: no-such-distribution is not installed: this is its source\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_learns_commands_flags_and_values(shell: str):
    script = invoke(["completion", shell]).stdout
    for word in ("decode-step", "max-new-tokens", "balanced", "longbench"):
        assert word in script


def test_bash_takes_the_script_that_it_is_given():
    script = invoke(["completion", "bash"]).stdout
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_figures_on_standard_output_stand_alone(decode_node: SimpleNamespace):
    arguments = ["generate", "Why?", "--address", decode_node.address, "--json", "-"]
    answer = json.loads(invoke(arguments).stdout)
    assert answer["text"] == "The answer."
    assert answer["token_ids"] == [0, 1, 2]
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 7000
    health = json.loads(invoke(["health", decode_node.address, "--json", "-"]).stdout)
    assert health == {
        "address": decode_node.address,
        "healthy": True,
        "services": {"": "SERVING", "fluxion.v1.Generation": "SERVING"},
    }


def test_figures_in_a_file_leave_the_answer_where_it_was(
    decode_node: SimpleNamespace, tmp_path: Path
):
    file = tmp_path / "answer.json"
    result = invoke(["generate", "Why?", "--address", decode_node.address, "--json", str(file)])
    assert result.stdout == "The answer.\n"
    assert json.loads(file.read_text())["text"] == "The answer."


def test_a_prompt_may_begin_like_a_flag_after_two_hyphens(monkeypatch: pytest.MonkeyPatch):
    asked: list[str | None] = []
    monkeypatch.setattr(
        generate, "read_prompt", lambda prompt, *_: asked.append(prompt) or exit_with_error()
    )
    assert invoke(["generate", "--", "--why?"]).exit_code == 1
    assert invoke(["generate", "-"]).exit_code == 1
    assert asked == ["--why?", "-"]
    assert invoke(["generate", "--why?"]).exit_code == 2


def exit_with_error() -> str:
    raise CapacityError("host KV", needed=2, free=1, unit="B", remedy="retry later")
