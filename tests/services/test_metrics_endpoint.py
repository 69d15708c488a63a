"""The metrics port: what it answers, and that nobody keeps others from it."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from fluxion_core.config.addresses import Address
from fluxion_core.errors import ThreadLimitError
from services import http_server
from services.http_server import MAX_CONNECTIONS, HttpServer, _RequestHandler
from services.metrics import NodeMetrics
from services.metrics_endpoint import MetricsEndpoint


def fetch(address: str, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
        return answer.read().decode()


def connect(address: str) -> socket.socket:
    where = Address.parse(address)
    return socket.create_connection((where.host, where.port), timeout=30)


def is_closed(connection: socket.socket) -> bool:
    """Waits for what comes next, which is the end."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.fixture
def metrics() -> NodeMetrics:
    return NodeMetrics("decode")


@pytest.fixture
def endpoint(metrics) -> Iterator[MetricsEndpoint]:
    served = MetricsEndpoint("127.0.0.1:0", metrics)
    yield served
    served.close()


def test_ready_says_why_a_node_is_not(endpoint, metrics):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        fetch(endpoint.address, "/ready")
    assert refusal.value.code == 503
    assert refusal.value.read() == b"not ready: the model is being loaded\n"
    refusal.value.close()
    metrics.why_not_ready = ""
    assert fetch(endpoint.address, "/ready") == "ready\n"


@pytest.mark.parametrize("listen", ["[::1]:0", "localhost:0"])
def test_it_listens_on_ipv6_and_on_names(metrics, listen: str):
    served = MetricsEndpoint(listen, metrics)
    try:
        assert served.address.rpartition(":")[0] == listen.rpartition(":")[0]
        assert "fluxion_node_ready" in fetch(served.address)
    finally:
        served.close()


def test_all_ipv6_addresses_are_all_addresses(metrics):
    served = MetricsEndpoint("[::]:0", metrics)
    try:
        port = Address.parse(served.address).port
        assert "fluxion_node_ready" in fetch(f"127.0.0.1:{port}")
    finally:
        served.close()


def test_silent_connections_do_not_keep_a_scrape_out(endpoint):
    silent = [connect(endpoint.address) for _ in range(MAX_CONNECTIONS + 5)]
    assert "fluxion_node_ready" in fetch(endpoint.address)
    # The oldest gave way.
    assert all(is_closed(one) for one in silent[:5])
    for one in silent:
        one.close()


def test_more_connections_than_there_may_be_are_closed(metrics, endpoint, monkeypatch):
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 1)
    recording, release = threading.Event(), threading.Event()

    def record(steps: int, seconds: float):
        recording.set()
        release.wait()
        raise ThreadLimitError(user_limit=None, group_limit=None)

    metrics.take_trace = record
    with connect(endpoint.address) as first:
        first.sendall(b"GET /trace HTTP/1.0\r\n\r\n")
        assert recording.wait(60)
        with connect(endpoint.address) as second:
            assert is_closed(second)
        release.set()


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def server(clock) -> Iterator[HttpServer]:
    def endless(environ, start_response):
        start_response("200 OK", [])
        while True:
            yield b"x" * (1 << 20)

    made = HttpServer(
        Address("127.0.0.1", 0), endless, answer_seconds=120.0, clock=lambda: clock[0]
    )
    yield made
    made.server_close()


def test_who_says_nothing_is_disconnected(server, clock):
    with connect(str(server.address)) as silent:
        server.handle_request()
        clock[0] = 9.9
        server.service_actions()
        silent.sendall(b"GET /metri")
        clock[0] = 10.1
        server.service_actions()
        assert is_closed(silent)


def test_who_does_not_read_is_disconnected(server, monkeypatch):
    monkeypatch.setattr(_RequestHandler, "timeout", 0.05)
    with connect(str(server.address)) as deaf:
        deaf.sendall(b"GET / HTTP/1.0\r\n\r\n")
        server.handle_request()
        for thread in threading.enumerate():
            if thread.name == "metrics-request":
                thread.join(60)
                assert not thread.is_alive()
        assert not server._connections


def test_a_thread_that_cannot_start_costs_one_scrape(server, monkeypatch, caplog):
    def refuse(self) -> None:
        raise RuntimeError("can't start new thread")

    with connect(str(server.address)) as client, monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        server.handle_request()
        assert is_closed(client)
    assert "metrics not served" in caplog.text
    assert not server._connections
