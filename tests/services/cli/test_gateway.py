"""`fluxion up --gateway`: a child process that answers over HTTP stands for the gateway."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from fluxion_core.errors import ConfigError, PeerUnavailableError
from services.cli import gateway
from services.cli.addresses import choose_listen_address
from services.cli.gateway import GatewayPlan, plan_gateway
from services.cli.health import DECODE_SERVICE, PREFILL_SERVICE
from services.cli.node_plans import NodePlan
from services.cli.up import run_nodes

PlanFakeNode = Callable[..., NodePlan]

# Not ready at the first question; drains at SIGTERM.
FAKE_GATEWAY = """
import http.server, signal, sys
statuses = [503, 200]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/readiness"
        print("asked", flush=True)
        self.send_response(statuses.pop(0))
        self.end_headers()
    def log_message(self, *arguments):
        pass
def drain(*_):
    print("drained", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
host, port = sys.argv[1].split(":")
http.server.HTTPServer((host, int(port)), Handler).serve_forever()
"""


def free_address() -> str:
    return str(choose_listen_address("127.0.0.1:0", preferred="", flag=""))


class EndWhenAnnounced(io.StringIO):
    """Ends this process' run as soon as the gateway is announced."""

    def write(self, text: str) -> int:
        if "OpenAI API" in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


async def test_it_is_started_after_the_nodes_and_ended_before_them(plan_fake_node: PlanFakeNode):
    plans = (plan_fake_node("prefill", PREFILL_SERVICE), plan_fake_node("decode", DECODE_SERVICE))
    address = free_address()
    plan = GatewayPlan((sys.executable, "-c", FAKE_GATEWAY, address), address)
    output = EndWhenAnnounced()
    await run_nodes(plans, Console(file=output, width=200), ready_seconds=60, gateway=plan)
    printed = output.getvalue()
    assert f"OpenAI API at http://{address}/v1" in printed
    assert printed.count("gateway │ asked") == 2
    order = ["decode  │ serving", "gateway │ asked", "gateway │ drained", "decode  │ drained"]
    assert sorted(order, key=printed.index) == order


async def test_one_that_ends_before_it_is_ready_ends_the_nodes_and_says_why(
    plan_fake_node: PlanFakeNode,
):
    plans = (plan_fake_node("prefill", PREFILL_SERVICE), plan_fake_node("decode", DECODE_SERVICE))
    plan = GatewayPlan((sys.executable, "-c", "raise SystemExit('no worker')"), free_address())
    output = io.StringIO()
    with pytest.raises(
        PeerUnavailableError, match="before it was ready; its last words: no worker"
    ):
        await run_nodes(plans, Console(file=output, width=200), ready_seconds=60, gateway=plan)
    assert "decode  │ drained" in output.getvalue()


async def test_one_that_never_gets_ready_is_given_up():
    plan = GatewayPlan((), free_address())
    with pytest.raises(PeerUnavailableError, match="was not ready within"):
        await plan.wait_until_ready(seconds=0.01)


def test_what_is_not_installed_is_told_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(gateway.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="pip install 'smg"):
        plan_gateway(None, "127.0.0.1:7420", promised=())


def test_its_ports_are_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gateway.shutil, "which", lambda *_, **__: "/bin/smg")
    monkeypatch.setattr(gateway.importlib.util, "find_spec", lambda name: name)
    plan = plan_gateway("0.0.0.0:0", "127.0.0.1:7420", promised=(7420,))
    flags = dict(zip(plan.command, plan.command[1:], strict=False))
    assert flags["--worker-urls"] == "grpc://127.0.0.1:7420"
    assert flags["--host"] == "0.0.0.0"
    assert plan.address == f"127.0.0.1:{flags['--port']}"
    assert len({flags["--port"], flags["--prometheus-port"], "7420"}) == 3
    assert flags["--prometheus-host"] == "127.0.0.1"
