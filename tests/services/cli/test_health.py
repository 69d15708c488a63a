"""`fluxion health`, and waiting for a node."""

from __future__ import annotations

import socket
from types import ModuleType, SimpleNamespace

import pytest

from fluxion_core.config.settings import ClientSettings
from fluxion_core.errors import PeerUnavailableError
from services.cli.health import DECODE_SERVICE, PREFILL_SERVICE, wait_until_ready
from tests.services.cli.command_line import invoke


def test_a_ready_node_is_status_0(decode_node: SimpleNamespace):
    result = invoke(["health", decode_node.address])
    assert result.exit_code == 0, result.output
    assert DECODE_SERVICE in result.stdout
    assert PREFILL_SERVICE not in result.stdout


def test_a_live_node_that_is_not_ready_is_status_1(fake_node: ModuleType):
    statuses = {"": fake_node.SERVING, PREFILL_SERVICE: fake_node.NOT_SERVING}
    server, port = fake_node.serve(fake_node.FakeGeneration(), statuses, "127.0.0.1:0")
    result = invoke(["health", f"127.0.0.1:{port}"])
    server.stop(None).wait()
    assert result.exit_code == 1
    assert "NOT_SERVING" in result.stdout


def test_a_node_without_our_services_is_status_1(fake_node: ModuleType):
    statuses = {"": fake_node.SERVING}
    server, port = fake_node.serve(fake_node.FakeGeneration(), statuses, "127.0.0.1:0")
    result = invoke(["health", f"127.0.0.1:{port}"])
    server.stop(None).wait()
    assert result.exit_code == 1


def test_no_node_is_one_sentence():
    result = invoke(["health", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert result.stderr.startswith("fluxion: ")
    assert "127.0.0.1:1" in result.stderr


def test_a_server_that_speaks_no_grpc_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        result = invoke(["health", address, "--connect-seconds", "0.2"])
    assert result.exit_code == 1
    assert f"{address} does not answer within 0.2 s" in result.stderr


async def test_waiting_for_a_service_that_never_serves_has_an_end(decode_node: SimpleNamespace):
    with pytest.raises(PeerUnavailableError, match="was not ready within"):
        await wait_until_ready(decode_node.address, PREFILL_SERVICE, ClientSettings(), seconds=0.3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tls-cert", "a.pem"), "--tls-cert and --tls-key go together"),
        (("--tls-ca", "a.pem", "--tls-key", "a.key"), "--tls-cert and --tls-key go together"),
        (("--tls-cert", "a.pem", "--tls-key", "a.key"), "--tls-cert needs --tls-ca"),
        (("--tls-ca", "absent.pem"), "absent.pem: No such file or directory"),
    ],
)
def test_credentials_that_do_not_go_together_are_one_sentence(flags: tuple[str, ...], words: str):
    result = invoke(["health", "127.0.0.1:1", *flags])
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
