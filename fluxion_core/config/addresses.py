"""HOST:PORT, as every address of a node and of the `fluxion` command is written and checked.

A host is a name, an IPv4 address, or an IPv6 address in brackets. Nothing else is an address here:
no scheme, no path, no unix socket, no list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, ip_address
from typing import Self

from fluxion_core.errors import ConfigError

DEFAULT_DECODE_ADDRESS = "127.0.0.1:7420"
"""Where clients look for a decode node, and where `fluxion up` puts one if it can."""

MAX_PORT = 65535

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,254}}$){_LABEL}(?:\.{_LABEL})*\.?", re.ASCII)
_DIGITS_AND_DOTS = re.compile(r"[0-9.]+", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/", re.ASCII)
_LOOPBACK_OF_ALL = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Address:
    """A host and a port; `str` writes it as HOST:PORT."""

    host: str
    """A name or an address; an IPv6 address without its brackets."""
    port: int
    """0 for a free one, where a node listens."""

    @classmethod
    def parse(cls, text: str, *, may_choose_port: bool = False) -> Self:
        """Take HOST:PORT apart.

        Args:
            text: as it was written.
            may_choose_port: port 0 stands for a free one, which makes sense for listeners only.

        Raises:
            ValueError: it is something else; the text says what is wrong and what to write.
        """
        if why := _what_else(text):
            raise _refusal(text, why)
        host, _, port_text = text.rpartition(":")
        if not host:
            raise _refusal(text, "it has no host" if port_text != text else "it has no port")
        if host.startswith("["):
            host = _bracketed(text, host)
        elif ":" in host:
            raise _refusal(text, "an IPv6 address stands in brackets, as in [::1]:7070")
        elif why := _why_no_host(host):
            raise _refusal(text, why)
        return cls(host, _port(text, port_text, may_choose_port=may_choose_port))

    @property
    def is_loopback(self) -> bool:
        """Whether it can only be reached from this machine."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_literal(self) -> bool:
        """Whether the host is an address, not a name to look up."""
        try:
            ip_address(self.host)
        except ValueError:
            return False
        return True

    def dialled_from_here(self) -> Self:
        """The address at which a node that listens here is reached from this machine."""
        return type(self)(_LOOPBACK_OF_ALL.get(self.host, self.host), self.port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def address_of(text: str, flag: str, *, may_choose_port: bool = False) -> Address:
    """The address that a flag of the command was given; see `Address.parse`.

    Raises:
        ConfigError: it is not HOST:PORT.
    """
    try:
        return Address.parse(text, may_choose_port=may_choose_port)
    except ValueError as error:
        raise ConfigError(f"{flag} {error}") from None


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT, checked before, can only be reached from this machine."""
    return Address.parse(address, may_choose_port=True).is_loopback


def _refusal(text: str, why: str) -> ValueError:
    return ValueError(f"{text!r} is not HOST:PORT: {why}; write for example 127.0.0.1:7070")


def _what_else(text: str) -> str:
    """What it is, if it is plainly something other than an address."""
    if not text:
        return "it is empty"
    if text.startswith("unix:"):
        return "unix sockets are not supported"
    if _SCHEME.match(text):
        return "it is a URL, and an address has neither scheme nor path"
    if "," in text:
        return "it is a list, and one address is wanted"
    if not text.isascii() or not text.isprintable() or " " in text:
        return (
            "a host has letters of ASCII, digits, hyphens and dots (other names: their xn-- form)"
        )
    return ""


def _bracketed(text: str, host: str) -> str:
    inner = host[1:-1]
    try:
        is_address = host.endswith("]") and ip_address(inner).version == 6
    except ValueError:
        is_address = False
    if not is_address:
        raise _refusal(text, f"{host} is no IPv6 address in brackets")
    return inner


def _why_no_host(host: str) -> str:
    if host == "*":
        return "all addresses of this machine are 0.0.0.0 or [::]"
    if _DIGITS_AND_DOTS.fullmatch(host):
        try:
            IPv4Address(host)
        except AddressValueError:
            return f"{host} is no IPv4 address"
        return ""
    return "" if _NAME.fullmatch(host) else f"{host!r} is no host name"


def _port(text: str, port_text: str, *, may_choose_port: bool) -> int:
    if not port_text:
        raise _refusal(text, "it has no port")
    if not (port_text.isascii() and port_text.isdigit()):
        raise _refusal(text, f"{port_text!r} is no port")
    # More digits than a port can have are not made a number.
    port = int(port_text) if len(port_text.lstrip("0")) <= 5 else MAX_PORT + 1
    if port > MAX_PORT:
        raise _refusal(text, f"port {port_text} is beyond {MAX_PORT}")
    if port == 0 and not may_choose_port:
        raise _refusal(text, "port 0 means any free one, and only a listener can take that")
    return port
