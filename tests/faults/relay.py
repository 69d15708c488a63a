"""A TCP relay in front of a node, so that a client's connection can be broken under it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Relay:
    """Passes bytes on, both ways, until it is cut."""

    def __init__(self, target: str, port: int = 0) -> None:
        """port: that it listens on; 0 for a free one."""
        self._listens_on = port
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self.address = ""
        self.may_pass = asyncio.Event()
        """While it is not set, connections are made, and nothing passes."""
        self.may_pass.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.may_pass.wait()
        there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, there_writer]
        pumps = self._pump(reader, there_writer), self._pump(there_reader, writer)
        await asyncio.gather(*pumps)

    async def start(self) -> None:
        """Listen on `address`."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._listens_on)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"

    @property
    def num_connections(self) -> int:
        """Connections that have been made."""
        return len(self._writers) // 2

    def cut(self, count: int | None = None) -> None:
        """Break every connection at once, or so many, without a goodbye."""
        for writer in self._writers[: None if count is None else 2 * count]:
            writer.transport.abort()

    def close(self) -> None:
        """Break what there is, and listen no more."""
        self.may_pass.set()
        self.cut()
        assert self._server is not None
        self._server.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await reader.read(1 << 16):
                await self.may_pass.wait()
                writer.write(piece)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def relay_to(target: str, port: int = 0) -> AsyncIterator[Relay]:
    """A relay to host:port, from a port of this machine, or a free one."""
    relay = Relay(target, port)
    await relay.start()
    try:
        yield relay
    finally:
        relay.close()
