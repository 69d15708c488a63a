"""A node that says nothing is given up; one that only lets a stream wait is not."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from fluxion_core.errors import PeerUnavailableError
from services.decode.silence import ended_when_silent

METHOD = "/test.Frames/Stream"
LIMIT_SECONDS = 0.05


class Streaming:
    """Sends two messages, the second when it may."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()
        self.has_ended = asyncio.Event()

    async def stream(self, request: bytes, context: grpc.aio.ServicerContext):
        try:
            yield b"1"
            await self.goes_on.wait()
            yield b"2"
        finally:
            self.has_ended.set()


@asynccontextmanager
async def call_to(node: Streaming):
    server = grpc.aio.server()
    method = grpc.unary_stream_rpc_method_handler(node.stream)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("test.Frames", {"Stream": method})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel.unary_stream(METHOD)(b"")
    await server.stop(0)


async def messages_of(call, answers, has_come: asyncio.Queue[bytes] | None = None) -> list[bytes]:
    messages = []
    async with ended_when_silent(call, answers, LIMIT_SECONDS) as heard:
        async for message in call:
            heard()
            messages.append(message)
            if has_come is not None:
                has_come.put_nowait(message)
    return messages


async def test_who_neither_sends_nor_answers_is_given_up_and_its_stream_ended():
    async def nobody_answers(seconds: float) -> bool:
        return False

    node = Streaming()
    async with call_to(node) as call:
        with pytest.raises(PeerUnavailableError, match=r"stall_seconds"):
            await messages_of(call, nobody_answers)
        await node.has_ended.wait()


async def test_who_answers_may_let_a_stream_wait():
    node, questions = Streaming(), 0

    async def answers(seconds: float) -> bool:
        nonlocal questions
        questions += 1
        if questions == 5:
            node.goes_on.set()
        return True

    async with call_to(node) as call:
        assert await messages_of(call, answers) == [b"1", b"2"]
    assert questions >= 5


async def test_a_message_that_comes_while_the_node_is_asked_counts():
    node, has_come = Streaming(), asyncio.Queue[bytes]()

    async def sends_in_place_of_an_answer(seconds: float) -> bool:
        node.goes_on.set()
        while await has_come.get() != b"2":
            pass
        return False

    async with call_to(node) as call:
        assert await messages_of(call, sends_in_place_of_an_answer, has_come) == [b"1", b"2"]


async def test_a_reader_that_is_cancelled_is_cancelled():
    async def answers(seconds: float) -> bool:
        return True

    node, has_come = Streaming(), asyncio.Queue[bytes]()
    async with call_to(node) as call:
        reading = asyncio.ensure_future(messages_of(call, answers, has_come))
        await has_come.get()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await node.has_ended.wait()
