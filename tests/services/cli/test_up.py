"""`fluxion up`: real child processes that serve health, and nothing else, stand for the nodes."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fluxion_core.client import AsyncClient, GenerationOptions
from fluxion_core.config.settings import ClientSettings, ClientTlsSettings
from fluxion_core.errors import ConfigError, PeerUnavailableError
from services.cli.commands.up import Up
from services.cli.health import DECODE_SERVICE, PREFILL_SERVICE
from services.cli.node_plans import NodePlan, plan_nodes
from services.cli.processes import NodeGroup
from services.cli.up import bring_up, run_nodes
from tests.certificates import Authority, write_secret
from tests.services.cli.command_line import invoke

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


async def test_the_command_to_copy_is_one_line_in_a_narrow_terminal(plan_fake_node: PlanFakeNode):
    decode = replace(plan_fake_node("decode", DECODE_SERVICE), uses_tls=True, wants_token=True)
    output = WatchedOutput("at night?", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    await run_nodes((decode,), Console(file=output, width=40), ready_seconds=60)
    command = (
        f"  fluxion generate --address {decode.address} --tls-ca CA.crt --token-file FILE "
        '"Why is the sky dark at night?"'
    )
    assert command in output.getvalue().splitlines()


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
    result = invoke(["up", "--models-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("fluxion: ")
    assert "fluxion pull smollm2-135m" in result.stderr


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.gguf"
    path.touch()
    return str(path)


def write_config(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


TLS = '[server.tls]\ncertificate = "c.crt"\nkey = "c.key"\n'
CLIENT_TLS = '[prefill.client.tls]\nauthority = "ca.crt"\n'


def test_with_tls_readiness_is_asked_on_a_listener_of_its_own(model: str, tmp_path: Path):
    prefill, decode = plan_nodes(
        Up(
            model=model,
            prefill_config=write_config(tmp_path / "prefill.toml", TLS),
            decode_config=write_config(tmp_path / "decode.toml", TLS + CLIENT_TLS),
        )
    )
    for plan in (prefill, decode):
        assert plan.command[-2:] == ("--server.health-listen", plan.health_address)
        assert plan.uses_tls
    assert len({p for plan in (prefill, decode) for p in (plan.address, plan.health_address)}) == 4
    plain, _ = plan_nodes(Up(model=model))
    assert plain.health_address == plain.address
    assert "--server.health-listen" not in plain.command


@pytest.mark.parametrize(
    ("prefill", "decode", "gateway", "words"),
    [
        (TLS, "", False, "give the decode node the authority of its certificate"),
        ("", CLIENT_TLS, False, "give the prefill node a certificate and a key"),
        ('[server.auth]\ntoken_file = "t"', "", False, "wants a token (server.auth.token_file)"),
        ("", TLS, True, "--gateway: the gateway reaches the decode node without TLS"),
        (
            '[handoff]\nways = ["shared_memory", "sockets"]',
            '[handoff]\nways = ["grpc"]',
            False,
            "the prefill node has shared_memory, sockets, the decode node grpc",
        ),
        ("", "[store]\nhost_kv_byts = 1", False, "the nearest is store.host_kv_bytes"),
        ("[server]\ngrace_seconds = inf", "", False, "server.grace_seconds (from"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_anything_starts(
    model: str, tmp_path: Path, prefill: str, decode: str, gateway: bool, words: str
):
    with pytest.raises(ConfigError) as failure:
        plan_nodes(
            Up(
                model=model,
                prefill_config=write_config(tmp_path / "prefill.toml", prefill),
                decode_config=write_config(tmp_path / "decode.toml", decode),
                gateway=gateway,
            )
        )
    assert words in str(failure.value)


def test_each_node_gets_the_variables_that_it_knows(model: str, monkeypatch):
    monkeypatch.setenv("FLUXION_STORE__HOST_KV_BYTES", "64MiB")
    monkeypatch.setenv("FLUXION_ENGINE__CHUNK_TOKENS", "64")
    monkeypatch.setenv("FLUXION_LOG__LEVEL", "WARNING")
    prefill, decode = (plan.environment for plan in plan_nodes(Up(model=model)))
    names = ("FLUXION_STORE__HOST_KV_BYTES", "FLUXION_ENGINE__CHUNK_TOKENS", "FLUXION_LOG__LEVEL")
    assert [name in prefill for name in names] == [False, True, True]
    assert [name in decode for name in names] == [True, False, True]
    assert decode["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("FLUXION_STOER__HOST_KV_BYTES", "64MiB")
    with pytest.raises(ConfigError, match="nearest is FLUXION_"):
        plan_nodes(Up(model=model))


async def test_both_nodes_get_ready_with_tls_and_tokens_and_hand_off(
    toy_model_path: Path, tmp_path: Path
):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("nodes")
    handoff_token, client_token = "h" * 32, "c" * 32
    tls = f'[server.tls]\ncertificate = "{certificate}"\nkey = "{key}"\n'
    mutual = f'client_authority = "{authority.path}"\n'
    tokens = {
        name: write_secret(tmp_path / name, text)
        for name, text in {
            "handoff-tokens": f"decode {handoff_token}\n",
            "handoff-token": handoff_token,
            "client-tokens": f"alice {client_token}\n",
            "client-token": client_token,
        }.items()
    }
    small = "[engine]\nattention_threads = 1\nlocal_prefill_tokens = 0\n"
    options = Up(
        model=str(toy_model_path),
        decode_listen="127.0.0.1:0",
        device="cpu",
        prefill_config=write_config(
            tmp_path / "prefill.toml",
            tls + mutual + f'[server.auth]\ntoken_file = "{tokens["handoff-tokens"]}"\n',
        ),
        decode_config=write_config(
            tmp_path / "decode.toml",
            tls
            + f'[server.auth]\ntoken_file = "{tokens["client-tokens"]}"\n'
            + small
            + '[store]\nhost_kv_bytes = "8MiB"\nslab_tokens = 128\n'
            + f'[prefill.client]\ntoken_file = "{tokens["handoff-token"]}"\n'
            + f'[prefill.client.tls]\nauthority = "{authority.path}"\n'
            + f'certificate = "{certificate}"\nkey = "{key}"\n',
        ),
    )
    plans = plan_nodes(options)
    client = ClientSettings(
        tls=ClientTlsSettings(authority=authority.path), token_file=tokens["client-token"]
    )
    lines: list[str] = []
    async with NodeGroup(lambda name, line: lines.append(f"{name} {line}")) as nodes:
        await bring_up(nodes, plans, ready_seconds=120)
        async with AsyncClient(plans[-1].address, client) as node:
            answer = await node.generate(
                "over the wire", GenerationOptions(max_new_tokens=3, ignore_eos=True)
            )
    assert len(answer.token_ids) == 3
    assert answer.usage.handoff_bytes > 0


def test_device_and_lanes_are_handed_to_the_nodes_that_have_them(tmp_path: Path):
    model = tmp_path / "model.gguf"
    model.touch()
    prefill, decode = (
        plan.command for plan in plan_nodes(Up(model=str(model), device="cuda:1", lanes="both"))
    )
    assert prefill[-2:] == ("--device", "cuda:1")
    where = decode.index("--device")
    assert decode[where : where + 4] == ("--device", "cuda:1", "--lanes", "both")
    for plan in plan_nodes(Up(model=str(model))):
        assert "--device" not in plan.command
        assert "--log.level" not in plan.command
        assert "--lanes" not in plan.command


def test_a_log_level_is_the_nodes_too(model: str):
    for plan in plan_nodes(Up(model=model, log_level="debug")):
        where = plan.command.index("--log.level")
        assert plan.command[where + 1] == "DEBUG"


def test_an_address_of_the_gateway_turns_it_on():
    assert Up(gateway_listen="127.0.0.1:0").has_gateway
    assert not Up().has_gateway
