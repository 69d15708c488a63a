"""`fluxion up`: real child processes that serve health, and nothing else, stand for the nodes."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fluxion_core.errors import PeerUnavailableError
from services.cli.health import DECODE_SERVICE, PREFILL_SERVICE
from services.cli.main import app
from services.cli.up import NodePlan, UpOptions, plan_nodes, run_nodes

PlanFakeNode = Callable[..., NodePlan]
ANNOUNCEMENT = "Why is the sky dark"


class WatchedOutput(io.StringIO):
    """Calls `action` once with all that was printed, as soon as `text` is in it."""

    def __init__(self, text: str, action: Callable[[str], None]) -> None:
        super().__init__()
        self._text = text
        self._action: Callable[[str], None] | None = action

    def write(self, text: str) -> int:
        written = super().write(text)
        printed = self.getvalue()
        if self._action is not None and self._text in printed:
            action, self._action = self._action, None
            action(printed)
        return written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_both_nodes_serve_until_a_signal_and_then_drain(
    plan_fake_node: PlanFakeNode, number: signal.Signals
):
    plans = (plan_fake_node("prefill", PREFILL_SERVICE), plan_fake_node("decode", DECODE_SERVICE))
    output = WatchedOutput(ANNOUNCEMENT, lambda _: os.kill(os.getpid(), number))
    await run_nodes(plans, Console(file=output, width=200), ready_seconds=60)
    printed = output.getvalue()
    assert f"--address {plans[1].address}" in printed
    for line in ("prefill │ serving, pid", "decode  │ serving, pid", "decode  │ drained"):
        assert line in printed
    assert printed.index("decode  │ drained") < printed.index("prefill │ drained")


async def test_a_node_that_fails_at_start_ends_the_other_and_says_why(plan_fake_node: PlanFakeNode):
    failing = NodePlan(
        "decode",
        (sys.executable, "-c", "raise SystemExit('decode: no such model')"),
        "127.0.0.1:1",
        DECODE_SERVICE,
    )
    output = io.StringIO()
    with pytest.raises(PeerUnavailableError) as failure:
        await run_nodes(
            (plan_fake_node("prefill", PREFILL_SERVICE), failing),
            Console(file=output, width=200),
            ready_seconds=60,
        )
    assert str(failure.value) == (
        "the decode node ended with status 1 before it was ready; "
        "its last words: decode: no such model"
    )
    assert "decode  │ decode: no such model" in output.getvalue()


async def test_a_node_that_dies_while_serving_is_an_error(plan_fake_node: PlanFakeNode):
    plans = (plan_fake_node("prefill", PREFILL_SERVICE), plan_fake_node("decode", DECODE_SERVICE))

    def kill_prefill(printed: str) -> None:
        (pid,) = re.findall(r"prefill │ serving, pid (\d+)", printed)
        os.kill(int(pid), signal.SIGKILL)

    output = WatchedOutput(ANNOUNCEMENT, kill_prefill)
    with pytest.raises(PeerUnavailableError, match="prefill node ended with signal 9 while it was"):
        await run_nodes(plans, Console(file=output, width=200), ready_seconds=60)
    assert "decode  │ drained" in output.getvalue()


def test_a_model_that_is_not_there_is_one_sentence_with_the_remedy(tmp_path: Path):
    result = CliRunner().invoke(app, ["up", "--models-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("fluxion: ")
    assert "fluxion pull smollm2-135m" in result.stderr


def test_device_and_lanes_are_handed_to_the_nodes_that_have_them(tmp_path: Path):
    model = tmp_path / "model.gguf"
    model.touch()
    prefill, decode = (
        plan.command for plan in plan_nodes(UpOptions(str(model), device="cuda:1", lanes="both"))
    )
    assert prefill[-2:] == ("--device", "cuda:1")
    where = decode.index("--device")
    assert decode[where : where + 4] == ("--device", "cuda:1", "--lanes", "both")
    for plan in plan_nodes(UpOptions(str(model))):
        assert "--device" not in plan.command
        assert "--lanes" not in plan.command
