"""HOST:PORT: what is one, and what is refused for what it is."""

from __future__ import annotations

import pytest

from fluxion_core.config.addresses import Address, address_of, is_loopback
from fluxion_core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7070", "127.0.0.1", 7070),
        ("localhost:1", "localhost", 1),
        ("prefill-0.prefill.fluxion.svc.cluster.local.:65535", None, 65535),
        ("a_b:080", "a_b", 80),
        ("[::1]:7070", "::1", 7070),
        ("[fe80::1%eth0]:7070", "fe80::1%eth0", 7070),
    ],
)
def test_a_host_and_a_port(text: str, host: str | None, port: int):
    address = Address.parse(text)
    assert address == Address(host or text.rpartition(":")[0], port)
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("7420", "it has no port"),
        ("host", "it has no port"),
        (":7420", "it has no host"),
        ("host:", "it has no port"),
        ("host:port", "'port' is no port"),
        ("h:²", "a host has letters of ASCII"),
        ("host:-1", "'-1' is no port"),
        ("host:+1", r"'\+1' is no port"),
        ("host:99999", "port 99999 is beyond 65535"),
        ("host:" + "9" * 5000, "is beyond 65535"),
        ("host:0", "only a listener can take that"),
        ("http://host:1", "it is a URL"),
        ("dns:///host:1", "it is a URL"),
        ("unix:/run/fluxion.sock", "unix sockets are not supported"),
        ("unix:relative", "unix sockets are not supported"),
        ("::1:7070", "stands in brackets"),
        ("ipv4:127.0.0.1:7070", "stands in brackets"),
        ("[::1]7070", "is no IPv6 address in brackets"),
        ("[::1]", "is no IPv6 address in brackets|no port"),
        ("[127.0.0.1]:1", "is no IPv6 address in brackets"),
        ("[::g]:1", "is no IPv6 address in brackets"),
        ("256.0.0.1:1", "256.0.0.1 is no IPv4 address"),
        ("127.1:1", "127.1 is no IPv4 address"),
        ("*:1", r"0\.0\.0\.0 or \[::\]"),
        ("a:1,b:2", "it is a list"),
        ("a b:1", "a host has letters"),
        ("a\n:1", "a host has letters"),
        ("caf\udce9:1", "a host has letters"),
        ("user@host:1", "is no host name"),
        ("host/path:1", "is no host name"),
        ("-host:1", "is no host name"),
        ("a..b:1", "is no host name"),
        ("a" * 64 + ":1", "is no host name"),
        ("a." * 200 + ":1", "is no host name"),
    ],
)
def test_what_is_no_address_is_refused_for_what_it_is(text: str, why: str):
    with pytest.raises(ConfigError, match=rf"(?s)^--address .* is not HOST:PORT: .*({why})"):
        address_of(text, "--address")


def test_only_a_listener_takes_any_port():
    assert Address.parse("[::]:0", may_choose_port=True) == Address("::", 0)


def test_a_listener_on_all_addresses_is_dialled_on_loopback():
    dialled = {
        text: str(Address.parse(text).dialled_from_here())
        for text in ("0.0.0.0:7420", "[::]:7420", "10.0.0.7:7420")
    }
    assert list(dialled.values()) == ["127.0.0.1:7420", "[::1]:7420", "10.0.0.7:7420"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:0", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("decode:1", False),
    ],
)
def test_what_others_can_reach_is_not_loopback(address: str, expected: bool):
    assert is_loopback(address) is expected
