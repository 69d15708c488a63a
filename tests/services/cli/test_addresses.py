"""Addresses that nodes of one machine listen on."""

from __future__ import annotations

import socket

import pytest

from fluxion_core.errors import ConfigError
from services.cli.addresses import choose_listen_address, dial_address, split_address


@pytest.fixture
def taken_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_port_zero_becomes_a_port_that_can_be_bound():
    address = choose_listen_address("127.0.0.1:0", preferred="127.0.0.1:1", flag="--listen")
    host, port = split_address(address, flag="--listen")
    with socket.create_server((host, port)):
        assert port > 0


def test_a_taken_preference_gives_way_to_a_free_port(taken_address: str):
    address = choose_listen_address(None, preferred=taken_address, flag="--listen")
    assert address != taken_address
    assert not address.endswith(":0")


def test_a_taken_wish_is_refused_with_a_remedy(taken_address: str):
    with pytest.raises(ConfigError, match=r"--listen 127.*in use.*port 0 for a free one"):
        choose_listen_address(taken_address, preferred="127.0.0.1:1", flag="--listen")


@pytest.mark.parametrize(
    "address", ["", "7420", ":7420", "host:", "host:port", "host:65536", "h:²"]
)
def test_what_is_not_host_and_port_is_refused(address: str):
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        split_address(address, flag="--listen")


def test_a_wildcard_is_dialled_on_loopback():
    assert dial_address("0.0.0.0:7420") == "127.0.0.1:7420"
    assert dial_address("[::]:7420") == "[::1]:7420"
    assert dial_address("10.0.0.7:7420") == "10.0.0.7:7420"


def test_a_port_promised_to_another_node_counts_as_taken():
    address = choose_listen_address("127.0.0.1:0", preferred="127.0.0.1:1", flag="--listen")
    _, port = split_address(address, flag="--listen")
    with pytest.raises(ConfigError, match="in use"):
        choose_listen_address(address, preferred=address, flag="--listen", promised=(port,))
