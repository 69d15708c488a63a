"""`fluxion up`: a prefill node and a decode node on this machine, in one terminal; with them, if
wanted, a gateway that gives the OpenAI API.

The nodes are ordinary processes, `python -m services.prefill` and `python -m services.decode`,
exactly what runs on two machines. This process starts them, shows their logs, and ends them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rich.console import Console

from fluxion_core.config.addresses import DEFAULT_DECODE_ADDRESS, Address
from fluxion_core.errors import PeerUnavailableError
from services.cli.commands.up import Up
from services.cli.gateway import GatewayPlan, plan_gateway
from services.cli.logs import LogPrinter
from services.cli.node_plans import NodePlan, plan_nodes
from services.cli.processes import NodeGroup, NodeProcess, finished_before, stop_signals


async def run_up(options: Up) -> None:
    """Run both nodes until SIGINT or SIGTERM, then end them; a second signal ends them at once.

    Raises:
        FluxionError: the model or an address cannot be used, or a node ended by itself.
    """
    plans = plan_nodes(options)
    gateway = None
    if options.has_gateway:
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
                _announce(plans[-1], gateway, console)
                ending = asyncio.create_task(nodes.first_exit())
                if await finished_before(ending, stop_requested):
                    raise ended_early(ending.result(), "while it was serving")
            console.print("Ending what was started; Ctrl-C again ends them at once.", style="bold")


async def bring_up(
    nodes: NodeGroup, plans: Sequence[NodePlan | GatewayPlan], *, ready_seconds: float
) -> list[NodeProcess]:
    """Start every planned node in `nodes` and return them when all of them are ready.

    Raises:
        PeerUnavailableError: a node ended before it was ready, or the time ran out.
    """
    started = [await nodes.start(plan.name, plan.command, plan.environment) for plan in plans]
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


def _announce(decode: NodePlan, gateway: GatewayPlan | None, console: Console) -> None:
    flags = "" if decode.address == DEFAULT_DECODE_ADDRESS else f" --address {decode.address}"
    flags += " --tls-ca CA.crt" if decode.uses_tls else ""
    flags += " --token-file FILE" if decode.wants_token else ""
    console.print(f"Ready at {decode.address}. In another terminal:", style="bold green")
    # A command that is to be copied stays one line, however narrow the terminal is.
    console.print(
        f'  fluxion generate{flags} "Why is the sky dark at night?"',
        highlight=False,
        soft_wrap=True,
    )
    if gateway is not None:
        console.print(f"OpenAI API at http://{gateway.address}/v1", style="bold green")
