"""Addresses that nodes of one machine listen on."""

from __future__ import annotations

import socket

import pytest

from fluxion_core.errors import ConfigError
from services.cli.addresses import choose_listen_address


@pytest.fixture
def taken_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_port_zero_becomes_a_port_that_can_be_bound():
    address = choose_listen_address("127.0.0.1:0", preferred="127.0.0.1:1", flag="--listen")
    with socket.create_server((address.host, address.port)):
        assert address.port > 0


def test_a_taken_preference_gives_way_to_a_free_port(taken_address: str):
    address = choose_listen_address(None, preferred=taken_address, flag="--listen")
    assert str(address) != taken_address
    assert address.port > 0


def test_a_taken_wish_is_refused_with_a_remedy(taken_address: str):
    with pytest.raises(ConfigError, match=r"--listen 127.*in use.*port 0 for a free one"):
        choose_listen_address(taken_address, preferred="127.0.0.1:1", flag="--listen")


def test_a_wish_that_is_no_address_is_refused_by_its_flag():
    with pytest.raises(ConfigError, match=r"^--listen 'host:port' is not HOST:PORT: 'port' is no"):
        choose_listen_address("host:port", preferred="", flag="--listen")


def test_a_port_promised_to_another_node_counts_as_taken():
    address = choose_listen_address("127.0.0.1:0", preferred="127.0.0.1:1", flag="--listen")
    with pytest.raises(ConfigError, match="in use"):
        choose_listen_address(str(address), preferred="", flag="--listen", promised=(address.port,))
