"""`fluxion up`: a prefill node and a decode node on this machine, in one terminal; with them, if
wanted, a gateway that gives the OpenAI API.

The nodes are ordinary processes, `python -m services.prefill` and `python -m services.decode`,
exactly what runs on two machines. This process starts them, shows their logs, and ends them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fluxion_core.addresses import Address
from fluxion_core.config import ClientSettings
from fluxion_core.errors import PeerUnavailableError
from services.cli.addresses import (
    DEFAULT_DECODE_ADDRESS,
    choose_listen_address,
)
from services.cli.gateway import GatewayPlan, plan_gateway
from services.cli.health import DECODE_SERVICE, PREFILL_SERVICE, wait_until_ready
from services.cli.logs import LogPrinter
from services.cli.processes import NodeGroup, NodeProcess, finished_before, stop_signals


@dataclass(frozen=True)
class UpOptions:
    """What `up` was asked for."""

    model: str = "smollm2-135m"
    """A pulled model's name, or a path."""
    models_dir: Path | None = None
    """Where pulled models are; none for the user's data directory."""
    decode_listen: str | None = None
    """host:port; none for the default address, or a free port if that is taken."""
    prefill_listen: str = "127.0.0.1:0"
    """host:port; port 0 for a free one."""
    decode_config: Path | None = None
    """TOML file with more of the decode node's settings."""
    prefill_config: Path | None = None
    """TOML file with more of the prefill node's settings."""
    device: str | None = None
    """Of both nodes: auto, cpu, cuda or cuda:N; none for what their settings say."""
    lanes: str | None = None
    """Who attends to host KV: auto, cpu, gpu or both; none for what the settings say."""
    gateway: bool = False
    """Start a gateway too."""
    gateway_listen: str | None = None
    """host:port; none for the default address, or a free port if that is taken."""
    ready_seconds: float = 300.0
    """Time for both nodes to get ready, and then for the gateway."""


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

    async def wait_until_ready(self, *, seconds: float) -> None:
        """Return as soon as the node serves.

        Raises:
            PeerUnavailableError: it does not within `seconds`.
        """
        await wait_until_ready(self.address, self.service, ClientSettings(), seconds=seconds)


async def run_up(options: UpOptions) -> None:
    """Run both nodes until SIGINT or SIGTERM, then end them; a second signal ends them at once.

    Raises:
        FluxionError: the model or an address cannot be used, or a node ended by itself.
    """
    plans = plan_nodes(options)
    gateway = None
    if options.gateway:
        ports = [Address.parse(plan.address).port for plan in plans]
        gateway = plan_gateway(options.gateway_listen, plans[-1].address, promised=ports)
    await run_nodes(
        plans, Console(stderr=True), ready_seconds=options.ready_seconds, gateway=gateway
    )


async def run_nodes(
    plans: Sequence[NodePlan],
    console: Console,
    *,
    ready_seconds: float,
    gateway: GatewayPlan | None = None,
) -> None:
    """Run the planned nodes until a signal; see `run_up`. The last plan is the one to talk to.

    The gateway is started when they are ready, and ended before them.
    """
    nodes = NodeGroup(LogPrinter(console))
    with stop_signals(nodes.kill) as stop_requested:
        async with nodes:
            starting = asyncio.create_task(
                _bring_all_up(nodes, plans, gateway, ready_seconds=ready_seconds)
            )
            if await finished_before(starting, stop_requested):
                starting.result()
                _announce(plans[-1].address, gateway, console)
                ending = asyncio.create_task(nodes.first_exit())
                if await finished_before(ending, stop_requested):
                    raise ended_early(ending.result(), "while it was serving")
            console.print("Ending what was started; Ctrl-C again ends them at once.", style="bold")


def plan_nodes(options: UpOptions) -> tuple[NodePlan, NodePlan]:
    """Settle addresses and command lines: the prefill node first, then the decode node.

    Raises:
        ModelNotFoundError: there is no such model; the text says how to get it.
        ConfigError: an address cannot be used.
    """
    from fluxion_core.models.locate import default_models_dir, locate_model

    model_path = locate_model(options.model, options.models_dir or default_models_dir())
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
    prefill = _node_command("prefill", model_path, prefill_listen, options.prefill_config)
    decode = _node_command("decode", model_path, decode_listen, options.decode_config)
    prefill, decode = (*prefill, *device), (*decode, *device, *lanes)
    return (
        NodePlan("prefill", prefill, prefill_address, PREFILL_SERVICE),
        NodePlan(
            "decode",
            (*decode, "--prefill-addresses", prefill_address),
            str(decode_listen.dialled_from_here()),
            DECODE_SERVICE,
        ),
    )


async def bring_up(
    nodes: NodeGroup, plans: Sequence[NodePlan | GatewayPlan], *, ready_seconds: float
) -> list[NodeProcess]:
    """Start every planned node in `nodes` and return them when all of them are ready.

    Raises:
        PeerUnavailableError: a node ended before it was ready, or the time ran out.
    """
    started = [await nodes.start(plan.name, plan.command) for plan in plans]
    readiness = asyncio.gather(*(plan.wait_until_ready(seconds=ready_seconds) for plan in plans))
    exit_watch = asyncio.create_task(nodes.first_exit())
    try:
        await asyncio.wait((readiness, exit_watch), return_when=asyncio.FIRST_COMPLETED)
        if exit_watch.done():
            raise ended_early(exit_watch.result(), "before it was ready")
        readiness.result()
    finally:
        exit_watch.cancel()
        readiness.cancel()
        await asyncio.gather(readiness, exit_watch, return_exceptions=True)
    return started


def ended_early(node: NodeProcess, when: str) -> PeerUnavailableError:
    """The error for a node that ended by itself, with its last line of output."""
    status = node.exit_status
    how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
    last = next((line.strip() for line in reversed(node.recent_lines) if line.strip()), "")
    said = f"; its last words: {last}" if last else "; it printed nothing"
    return PeerUnavailableError(f"the {node.name} node ended with {how} {when}{said}")


def _node_command(
    node: str, model_path: Path, listen: Address, config: Path | None
) -> tuple[str, ...]:
    config_flags = () if config is None else ("--config", str(config))
    return (
        # -P: a directory called `services` where the command is run must not be imported.
        *(sys.executable, "-P", "-m", f"services.{node}"),
        *config_flags,
        *("--listen", str(listen), "--model", str(model_path)),
    )


async def _bring_all_up(
    nodes: NodeGroup,
    plans: Sequence[NodePlan],
    gateway: GatewayPlan | None,
    *,
    ready_seconds: float,
) -> None:
    await bring_up(nodes, plans, ready_seconds=ready_seconds)
    if gateway is not None:
        await bring_up(nodes, (gateway,), ready_seconds=ready_seconds)


def _announce(address: str, gateway: GatewayPlan | None, console: Console) -> None:
    default = "" if address == DEFAULT_DECODE_ADDRESS else f" --address {address}"
    console.print(f"Ready at {address}. In another terminal:", style="bold green")
    console.print(f'  fluxion generate{default} "Why is the sky dark at night?"', highlight=False)
    if gateway is not None:
        console.print(f"OpenAI API at http://{gateway.address}/v1", style="bold green")
