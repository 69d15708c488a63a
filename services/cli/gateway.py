"""The Shepherd Model Gateway beside a decode node: it gives users the OpenAI API.

`smg` is a program of its own, from the package of that name; this module finds it, says how it is
started for one decode node, and tells when it serves.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sys
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path

from fluxion_core.errors import ConfigError, PeerUnavailableError
from services.cli.addresses import (
    DEFAULT_GATEWAY_ADDRESS,
    choose_listen_address,
)
from services.cli.http import get

INSTALL = "pip install 'smg>=1.13' 'smg-grpc-proto>=0.4.28'"

_GRACE_SECONDS = 25
"""For requests that still run when the gateway is ended; less than its process is given."""

_RETRY_SECONDS = 0.2
_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class GatewayPlan:
    """A gateway to start."""

    command: tuple[str, ...]
    """Program and arguments."""
    address: str
    """host:port of its HTTP API as reached from this machine."""
    name: str = "gateway"
    """Shown before its log lines."""
    environment: None = None
    """Of its process: this process' own."""

    async def wait_until_ready(self, *, seconds: float) -> None:
        """Return once it has found its node and fetched the tokenizer.

        Raises:
            PeerUnavailableError: it has not within `seconds`.
        """
        try:
            async with asyncio.timeout(seconds):
                # It announces nothing: asking again is all there is.
                while not await asyncio.to_thread(_is_ready, self.address):  # noqa: ASYNC110
                    await asyncio.sleep(_RETRY_SECONDS)
        except TimeoutError:
            raise PeerUnavailableError(
                f"the gateway at {self.address} was not ready within {seconds:g} s; its log says "
                f"what it waits for"
            ) from None


def plan_gateway(
    listen: str | None, decode_address: str, *, promised: Collection[int]
) -> GatewayPlan:
    """A gateway for one decode node.

    Args:
        listen: host:port wished for; none for the default, or a free port if that is taken.
        decode_address: host:port of the node.
        promised: ports given to others.

    Raises:
        ConfigError: it is not installed, or the address cannot be used.
    """
    beside_python = str(Path(sys.executable).parent)
    program = shutil.which("smg", path=os.pathsep.join((beside_python, *os.get_exec_path())))
    if program is None or importlib.util.find_spec("smg_grpc_proto") is None:
        raise ConfigError(f"--gateway needs the Shepherd Model Gateway and its messages: {INSTALL}")
    address = choose_listen_address(
        listen, preferred=DEFAULT_GATEWAY_ADDRESS, flag="--gateway-listen", promised=promised
    )
    metrics = choose_listen_address(
        "127.0.0.1:0", preferred="", flag="", promised=(*promised, address.port)
    )
    command = (
        *(program, "launch", "--worker-urls", f"grpc://{decode_address}"),
        *("--host", address.host, "--port", str(address.port)),
        *("--prometheus-host", metrics.host, "--prometheus-port", str(metrics.port)),
        *("--shutdown-grace-period-secs", str(_GRACE_SECONDS)),
        # There is no second node to turn to.
        "--disable-circuit-breaker",
        *("--log-level", "warn"),
    )
    return GatewayPlan(command, str(address.dialled_from_here()))


def _is_ready(address: str) -> bool:
    try:
        with get(f"http://{address}/readiness", seconds=_ANSWER_SECONDS) as answer:
            return bool(answer.status == HTTPStatus.OK)
    except (OSError, HTTPException):
        return False
