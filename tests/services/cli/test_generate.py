"""`fluxion generate` against a fake decode node on loopback."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from fluxion_core.errors import InvalidRequestError
from services.cli.generate import read_prompt
from tests.services.cli.command_line import invoke

QUALITY_ACCURATE = 2


def generate(node: SimpleNamespace, *arguments: str, stdin: str | None = None):
    return invoke(["generate", "--address", node.address, *arguments], stdin=stdin)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_answer_is_on_stdout_and_the_figures_are_on_stderr(decode_node: SimpleNamespace):
    result = generate(decode_node, "Why?")
    assert result.exit_code == 0, result.output
    assert result.stdout == "The answer.\n"
    for figure in ("7,000 tokens", "512 of them already held", "2 GB/s", "160.0 MB", "stop"):
        assert figure in result.stderr


def test_no_timings_leaves_stderr_empty(decode_node: SimpleNamespace):
    result = generate(decode_node, "Why?", "--no-timings")
    assert result.stderr == ""
    assert result.stdout == "The answer.\n"


def test_without_a_terminal_the_node_is_not_asked_how_far_it_is(decode_node: SimpleNamespace):
    generate(decode_node, "Why?")
    (request,) = decode_node.generation.requests
    assert not request.report_progress


def test_a_flag_that_is_not_given_is_not_sent(decode_node: SimpleNamespace):
    generate(decode_node, "Why?")
    (request,) = decode_node.generation.requests
    assert [(m.role, m.content) for m in request.chat.messages] == [("user", "Why?")]
    assert request.sampling.temperature == 0
    assert request.quality == 0
    assert not request.HasField("policy")
    for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        assert not request.sampling.HasField(name)


def test_every_flag_arrives(decode_node: SimpleNamespace):
    flags = (
        "--temperature 0.5 --top-k 7 --top-p 0.75 --min-p 0.25 --repetition-penalty 1.5 "
        "--presence-penalty 0.5 --frequency-penalty -0.5 --seed 18446744073709551615 "
        "--max-new-tokens 9 --stop END --stop . --ignore-eos --quality accurate --system Terse."
    )
    result = generate(decode_node, "Why?", *flags.split())
    assert result.exit_code == 0, result.output
    (request,) = decode_node.generation.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 7, 0.75)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert sampling.seed == 2**64 - 1
    assert (request.max_new_tokens, list(request.stop_strings)) == (9, ["END", "."])
    assert request.ignore_eos
    assert request.quality == QUALITY_ACCURATE
    assert [m.role for m in request.chat.messages] == ["system", "user"]


def test_a_policy_arrives_as_it_is_written(decode_node: SimpleNamespace):
    generate(decode_node, "Why?", "--policy", "fixed(16, 5 %)")
    (request,) = decode_node.generation.requests
    assert (request.policy, request.quality) == ("fixed(16, 5 %)", 0)


def test_the_figures_say_what_was_read(decode_node: SimpleNamespace):
    result = generate(decode_node, "Why?")
    for figure in (
        *("20 MB", "threshold(0.1)", "12.5% of exact", "0.50 of fixed(16, 5 %)"),
        *("25% of heads", "16 tokens 10%", "128 tokens 40%", "nothing 50%"),
        "80.0% of K and V",
    ):
        assert figure in " ".join(result.stderr.split()), figure


def test_raw_sends_standard_input_as_it_stands(decode_node: SimpleNamespace):
    generate(decode_node, "--raw", stdin="  Once upon\n")
    assert decode_node.generation.requests[0].text == "  Once upon\n"


def test_a_file_comes_before_the_question(decode_node: SimpleNamespace, tmp_path: Path):
    document = tmp_path / "document.txt"
    document.write_text("A long text.\n", encoding="utf-8")
    generate(decode_node, "--file", str(document), "--raw", "And the question?")
    assert decode_node.generation.requests[0].text == "A long text.\n\nAnd the question?"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "prompt is empty"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "no room"),
        (grpc.StatusCode.UNAVAILABLE, "draining"),
    ],
)
def test_a_refusal_is_one_sentence(decode_node: SimpleNamespace, code: grpc.StatusCode, name: str):
    decode_node.generation.deltas = ()
    decode_node.generation.failure = (code, name)
    result = generate(decode_node, "Why?")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("fluxion: ")
    assert name in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_stream_without_its_last_message_is_an_error(decode_node: SimpleNamespace):
    decode_node.generation.sends_last_message = False
    result = generate(decode_node, "Why?")
    assert result.exit_code == 1
    assert "may be cut short" in result.stderr


def test_no_node_is_one_sentence_with_the_address():
    result = invoke(["generate", "--address", "127.0.0.1:1", "Why?"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "no node accepts connections at 127.0.0.1:1 (Connection refused)" in result.stderr


def test_a_token_file_that_is_not_there_is_one_sentence(
    decode_node: SimpleNamespace, tmp_path: Path
):
    result = generate(decode_node, "--token-file", str(tmp_path / "absent"), "Why?")
    assert result.exit_code == 1
    assert "absent: No such file" in result.stderr


def start_command(*arguments: str) -> subprocess.Popen[str]:
    """The command as a process of its own, as the installed script runs it."""
    return subprocess.Popen(
        [sys.executable, "-m", "services.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_cancels_the_request_and_is_status_130(decode_node: SimpleNamespace):
    decode_node.generation.never_answers = True
    with start_command("generate", "--address", decode_node.address, "Why?") as process:
        assert decode_node.generation.called.wait(60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert decode_node.generation.was_cancelled.wait(60)


def test_a_reader_that_leaves_ends_the_command_without_a_traceback(decode_node: SimpleNamespace):
    decode_node.generation.deltas = ("word ",) * 10
    with start_command("generate", "--address", decode_node.address, "Why?") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 1
    assert errors == ""


@pytest.mark.parametrize(
    "flags", [["--quality", "perfect"], ["--max-new-tokens", "0"], ["--top-k", "-1"], ["--seed=-1"]]
)
def test_wrong_usage_is_status_2(flags: list[str]):
    result = invoke(["generate", *flags, "Why?"])
    assert result.exit_code == 2


def test_a_prompt_is_never_waited_for_at_a_terminal():
    with pytest.raises(InvalidRequestError, match="no prompt; give one"):
        read_prompt(None, None, Terminal())


@pytest.mark.parametrize("blank", ["", " \n\t"])
def test_a_blank_prompt_is_refused(blank: str):
    with pytest.raises(InvalidRequestError, match="empty"):
        read_prompt(None, None, io.StringIO(blank))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"ok \xff")
    with pytest.raises(InvalidRequestError, match=r"not UTF-8 text \(byte 3\)"):
        read_prompt(None, binary, io.StringIO())


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(InvalidRequestError, match="No such file"):
        read_prompt(None, tmp_path / "absent", io.StringIO())
