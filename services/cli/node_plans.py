"""Plans of nodes to start, for `up` and `demo`: command lines, addresses and variables.

The nodes' settings are read here as the nodes themselves will read them, so that what is wrong, or
does not fit the other node, is told before anything runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fluxion_core.config.addresses import DEFAULT_DECODE_ADDRESS, Address
from fluxion_core.config.setting_sources import variables_of
from fluxion_core.config.settings import (
    ClientSettings,
    HandoffSettings,
    NodeSettings,
    ServerSettings,
    SettingsT,
    load_settings,
)
from fluxion_core.errors import ConfigError
from services.cli.addresses import choose_listen_address
from services.cli.commands.up import Up
from services.cli.health import DECODE_SERVICE, PREFILL_SERVICE, wait_until_ready
from services.decode.config import DecodeSettings
from services.prefill.config import PrefillNodeSettings


@dataclass(frozen=True)
class NodePlan:
    """One node to start, and how to tell that it is ready."""

    name: str
    """Shown before its log lines."""
    command: tuple[str, ...]
    """Program and arguments."""
    address: str
    """host:port at which it is reached from this machine."""
    service: str
    """gRPC service whose health says that the node is ready."""
    health_address: str = ""
    """host:port that answers health checks without TLS; empty for `address`."""
    environment: Mapping[str, str] | None = None
    """Variables of the process; none for this process' own."""
    uses_tls: bool = False
    """Its clients must."""
    wants_token: bool = False
    """Its clients must send one."""

    async def wait_until_ready(self, *, seconds: float) -> None:
        """Return as soon as the node serves.

        Raises:
            PeerUnavailableError: it does not within `seconds`.
        """
        address = self.health_address or self.address
        await wait_until_ready(address, self.service, ClientSettings(), seconds=seconds)


def plan_nodes(options: Up) -> tuple[NodePlan, NodePlan]:
    """Settle addresses and command lines: the prefill node first, then the decode node.

    Raises:
        ModelNotFoundError: there is no such model; the text says how to get it.
        ConfigError: an address or another setting cannot be used, or those of the two nodes do not
            fit each other.
    """
    model_path = options.locate()
    prefill_listen = choose_listen_address(
        options.prefill_listen, preferred=options.prefill_listen, flag="--prefill-listen"
    )
    decode_listen = choose_listen_address(
        options.decode_listen,
        preferred=DEFAULT_DECODE_ADDRESS,
        flag="--decode-listen",
        promised=(prefill_listen.port,),
    )
    prefill_address = str(prefill_listen.dialled_from_here())
    device = () if options.device is None else ("--device", options.device)
    lanes = () if options.lanes is None else ("--lanes", options.lanes)
    level = () if options.log_level is None else ("--log.level", options.log_level.upper())
    prefill_flags = (*_flags(model_path, prefill_listen, options.prefill_config), *level)
    decode_flags = (*_flags(model_path, decode_listen, options.decode_config), *level)
    ports = [prefill_listen.port, decode_listen.port]
    prefill, prefill_settings = _plan(
        "prefill", (*prefill_flags, *device), prefill_listen, ports, of=PrefillNodeSettings
    )
    decode, decode_settings = _plan(
        "decode",
        (*decode_flags, *device, *lanes, "--prefill-addresses", prefill_address),
        decode_listen,
        ports,
        of=DecodeSettings,
    )
    _check_handoffs(prefill_settings.server, decode_settings.prefill.client)
    _check_ways(prefill_settings.handoff, decode_settings.handoff)
    if options.has_gateway and (decode.uses_tls or decode_settings.server.auth.token_file):
        raise ConfigError(
            "--gateway: the gateway reaches the decode node without TLS and without a token; "
            "leave server.tls and server.auth out of the decode node's settings"
        )
    return prefill, decode


def _plan(
    name: str,
    flags: tuple[str, ...],
    listen: Address,
    promised: list[int],
    *,
    of: type[SettingsT],
) -> tuple[NodePlan, SettingsT]:
    """A node with these flags, and the settings that it will have.

    With TLS its readiness is asked on a listener of its own: which certificates it accepts, and
    whether it bears this address, is then nothing to know here.
    """
    environment = _environment_of(of)
    settings = load_settings(
        of, flags, program=f"python -m services.{name}", environment=environment
    )
    health = listen
    uses_tls = settings.server.tls.certificate is not None
    if uses_tls:
        wished = Address.parse(settings.server.health_listen or "127.0.0.1:0", may_choose_port=True)
        health = choose_listen_address(
            str(wished), preferred="", flag="server.health_listen", promised=promised
        )
        promised.append(health.port)
        flags = (*flags, "--server.health-listen", str(health))
    # -P: a directory called `services` where the command is run must not be imported.
    command = (sys.executable, "-P", "-m", f"services.{name}", *flags)
    plan = NodePlan(
        name,
        command,
        str(listen.dialled_from_here()),
        PREFILL_SERVICE if name == "prefill" else DECODE_SERVICE,
        health_address=str(health.dialled_from_here()),
        environment=environment,
        uses_tls=uses_tls,
        wants_token=settings.server.auth.token_file is not None,
    )
    return plan, settings


def _flags(model_path: Path, listen: Address, config: Path | None) -> tuple[str, ...]:
    config_flags = () if config is None else ("--config", str(config))
    return (*config_flags, "--listen", str(listen), "--model", str(model_path))


def _environment_of(settings: type[NodeSettings]) -> dict[str, str]:
    """This process' variables without those that only the other node knows."""
    known = variables_of(PrefillNodeSettings) | variables_of(DecodeSettings)
    not_its_own = known - variables_of(settings)
    return {name: value for name, value in os.environ.items() if name.upper() not in not_its_own}


def _check_handoffs(server: ServerSettings, client: ClientSettings) -> None:
    """Whether the decode node will reach the prefill node.

    Raises:
        ConfigError: one of them uses TLS or tokens, and the other does not.
    """
    has_tls, uses_tls = server.tls.certificate is not None, client.tls.authority is not None
    if has_tls and not uses_tls:
        raise ConfigError(
            "the prefill node has TLS (server.tls.certificate): give the decode node the authority "
            "of its certificate (prefill.client.tls.authority)"
        )
    if uses_tls and not has_tls:
        raise ConfigError(
            "the decode node calls with TLS (prefill.client.tls.authority): give the prefill node "
            "a certificate and a key (server.tls)"
        )
    if server.auth.token_file is not None and client.token_file is None:
        raise ConfigError(
            "the prefill node wants a token (server.auth.token_file): give the decode node one of "
            "them (prefill.client.token_file)"
        )


def _check_ways(prefill: HandoffSettings, decode: HandoffSettings) -> None:
    if not set(prefill.ways) & set(decode.ways):
        raise ConfigError(
            f"handoff.ways: the prefill node has {', '.join(prefill.ways)}, the decode node "
            f"{', '.join(decode.ways)}; name one of them in both"
        )
