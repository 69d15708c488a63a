"""Both clients against one real node, and against a node that fails as its script says.

The blocking client runs on threads here: the node has the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest

from fluxion_core.client import (
    NO_RETRIES,
    AsyncClient,
    AsyncGenerationStream,
    ChatMessage,
    Client,
    Delta,
    Finish,
    Generation,
    GenerationOptions,
    GenerationStream,
    Progress,
    RetryPolicy,
    asynchronous,
    blocking,
)
from fluxion_core.client.connection import connect, connect_blocking
from fluxion_core.client.retry import Attempts
from fluxion_core.client.stream_state import StreamState
from fluxion_core.errors import (
    CapacityError,
    ContextLengthError,
    FluxionError,
    InvalidRequestError,
    PeerUnavailableError,
    RequestCancelledError,
    StreamTruncatedError,
)
from fluxion_core.wire.status import RemoteUnavailableError
from tests.fluxion_core.client.conftest import END, PROGRESS, Script, ScriptedNode, delta

OPTIONS = GenerationOptions(max_new_tokens=5, ignore_eos=True)
QUICK = RetryPolicy(attempts=3, first_delay_seconds=0.001)
UNAVAILABLE = Script(status=grpc.StatusCode.UNAVAILABLE)
ANSWER = Script((delta("hi", 1), END))

pytestmark = pytest.mark.asyncio(loop_scope="module")


def in_thread(use: Callable, *arguments):
    return asyncio.to_thread(use, *arguments)


async def both(address: str, prompt, options: GenerationOptions, retry: RetryPolicy = QUICK):
    """The answers, or the errors, of both clients."""

    def ask_blocking() -> Generation | FluxionError:
        with Client(address, retry=retry) as client:
            try:
                return client.generate(prompt, options)
            except FluxionError as error:
                return error

    async with AsyncClient(address, retry=retry) as client:
        try:
            answer: Generation | FluxionError = await client.generate(prompt, options)
        except FluxionError as error:
            answer = error
    return answer, await in_thread(ask_blocking)


async def test_both_clients_stream_what_the_node_says(toy_node: str):
    options = replace(OPTIONS, report_progress=True)

    def stream_blocking():
        with Client(toy_node) as client, client.stream("a text", options) as stream:
            return list(stream), stream.result()

    async with AsyncClient(toy_node) as client:
        stream = client.stream("a text", options)
        events = [event async for event in stream]
        answer = await stream.result()
    *begun, last = [event for event in events if not isinstance(event, Progress)]
    assert all(isinstance(event, Delta) and len(event.token_ids) == 1 for event in begun)
    assert isinstance(last, Finish)
    assert (last.finish_reason, last.usage.generated_tokens) == ("length", 5)
    assert "".join(event.text for event in begun) == answer.text
    blocking_events, blocking_answer = await in_thread(stream_blocking)
    assert [one for one in blocking_events if isinstance(one, Delta)] == begun
    assert (blocking_answer.text, blocking_answer.token_ids) == (answer.text, answer.token_ids)


async def test_text_token_ids_and_chat_are_one_prompt_where_their_tokens_are(toy_node: str):
    messages = [ChatMessage("user", "Why?")]
    async with AsyncClient(toy_node) as client:
        token_ids = await client.tokenize("user: Why?\n")
        assert token_ids == await client.tokenize(messages)
        answers = [
            await client.generate(prompt, OPTIONS)
            for prompt in ("user: Why?\n", token_ids, messages)
        ]
    assert len({answer.token_ids for answer in answers}) == 1
    assert answers[0].usage.prompt_tokens == len(token_ids) == 11


async def test_a_node_says_what_it_serves_and_does(toy_node: str):
    def ask_blocking():
        with Client(toy_node) as client:
            return (
                client.model_info(),
                client.load(),
                client.tokenize("ab"),
                client.health(),
                client.health("no.such.Service"),
            )

    async with AsyncClient(toy_node) as client:
        info, load = await client.model_info(), await client.load()
        token_ids, health = await client.tokenize("ab"), await client.health()
        assert await client.health("no.such.Service") is None
    assert (info.context_tokens, info.vocab_size, info.has_chat_template) == (2048, 256, True)
    assert "exact" in info.levels
    assert load.running_requests == 0
    assert load.host_kv_capacity_bytes == load.host_kv_free_bytes + load.host_kv_cached_bytes > 0
    blocking = await in_thread(ask_blocking)
    assert blocking[0] == info
    assert blocking[2:] == (token_ids, health, None)


async def test_one_blocking_client_serves_many_threads(toy_node: str):
    def ask_all(client: Client) -> list[Generation]:
        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(lambda n: client.generate(f"text {n % 2}", OPTIONS), range(8)))

    with Client(toy_node) as client:
        answers = await in_thread(ask_all, client)
    assert len({answer.text for answer in answers[::2]}) == 1
    assert len({answer.text for answer in answers[1::2]}) == 1


async def test_what_the_node_refuses_is_an_error_of_ours_with_its_sentence(toy_node: str):
    for error in await both(toy_node, "x" * 3000, OPTIONS):
        assert isinstance(error, InvalidRequestError)
        assert not isinstance(error, ContextLengthError)
        assert "shorten the prompt" in str(error)


async def test_a_failure_that_may_pass_is_tried_again_until_it_has(scripted: ScriptedNode):
    scripted.scripts = [
        UNAVAILABLE,
        Script(status=grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_ms=1),
        ANSWER,
        UNAVAILABLE,
        ANSWER,
    ]
    for answer in await both(scripted.address, "Why?", OPTIONS):
        assert answer.text == "hi"
    assert len(scripted.requests) == 5
    assert len({request.SerializeToString() for request in scripted.requests}) == 1


async def test_a_node_that_stays_away_is_given_up_after_all_attempts(scripted: ScriptedNode):
    scripted.scripts = [UNAVAILABLE]
    for error in await both(scripted.address, "Why?", OPTIONS):
        assert isinstance(error, RemoteUnavailableError)
        assert str(error) == "the node's sentence"
    assert len(scripted.requests) == 2 * QUICK.attempts


@pytest.mark.parametrize("first", [delta("hi", 1), PROGRESS], ids=["a token", "progress"])
async def test_nothing_is_tried_again_once_something_of_an_answer_came(
    scripted: ScriptedNode, first
):
    scripted.scripts = [Script((first,), grpc.StatusCode.UNAVAILABLE)]
    for error in await both(scripted.address, "Why?", OPTIONS):
        assert isinstance(error, RemoteUnavailableError)
    assert len(scripted.requests) == 2


async def test_a_full_node_is_not_asked_again_where_it_does_not_say_when(scripted: ScriptedNode):
    scripted.scripts = [Script(status=grpc.StatusCode.RESOURCE_EXHAUSTED)]
    for error in await both(scripted.address, "Why?", OPTIONS):
        assert isinstance(error, CapacityError)
    assert len(scripted.requests) == 2


async def test_who_gives_up_knows_when_to_come_again(scripted: ScriptedNode):
    scripted.scripts = [Script(status=grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_ms=90_000)]
    for error in await both(scripted.address, "Why?", OPTIONS):
        assert isinstance(error, CapacityError)
        assert error.retry_after_seconds == 90.0


async def test_calls_that_generate_nothing_are_tried_again_too(scripted: ScriptedNode):
    scripted.scripts = [UNAVAILABLE, ANSWER, UNAVAILABLE, ANSWER]

    def ask_blocking() -> tuple[int, ...]:
        with Client(scripted.address, retry=QUICK) as client:
            return client.tokenize("a")

    async with AsyncClient(scripted.address, retry=QUICK) as client:
        assert await client.tokenize("a") == (7,)
    assert await in_thread(ask_blocking) == (7,)


async def test_a_stream_without_its_end_is_an_error(scripted: ScriptedNode):
    scripted.scripts = [Script((delta("hi", 1),))]
    for error in await both(scripted.address, "Why?", OPTIONS):
        assert isinstance(error, StreamTruncatedError)
    assert len(scripted.requests) == 2


@pytest.mark.parametrize("how", ["close", "drop", "client"])
async def test_who_leaves_a_blocking_stream_ends_its_request(scripted: ScriptedNode, how: str):
    scripted.scripts = [Script((delta("hi", 1),), waits=True)]

    def leave() -> None:
        with Client(scripted.address) as client:
            stream = client.stream("Why?")
            assert next(stream) == Delta("hi", (1,))
            if how == "close":
                stream.close()
                assert list(stream) == []
                assert stream.is_over
            elif how == "drop":
                del stream
            if how != "client":
                assert scripted.was_cancelled.wait(60)
        assert scripted.was_cancelled.wait(60)

    await in_thread(leave)


@pytest.mark.parametrize("how", ["close", "drop", "client", "task"])
async def test_who_leaves_an_asyncio_stream_ends_its_request(scripted: ScriptedNode, how: str):
    scripted.scripts = [Script((delta("hi", 1),), waits=True)]
    async with AsyncClient(scripted.address) as client:
        stream = client.stream("Why?")
        assert await anext(stream) == Delta("hi", (1,))
        if how == "close":
            await stream.aclose()
            assert [event async for event in stream] == []
        elif how == "drop":
            del stream
        elif how == "task":
            reading = asyncio.create_task(stream.result())
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        if how != "client":
            assert await in_thread(scripted.was_cancelled.wait, 60)
    assert await in_thread(scripted.was_cancelled.wait, 60)


async def test_cancel_from_elsewhere_ends_whoever_reads(scripted: ScriptedNode):
    scripted.scripts = [Script((delta("hi", 1),), waits=True)]
    with Client(scripted.address) as client:
        stream = client.stream("Why?")
        assert await in_thread(next, stream) == Delta("hi", (1,))
        reading = in_thread(stream.result)
        stream.cancel()
        with pytest.raises(RequestCancelledError, match="by this client"):
            await reading
    assert await in_thread(scripted.was_cancelled.wait, 60)
    scripted.was_cancelled.clear()
    async with AsyncClient(scripted.address) as client:
        stream = client.stream("Why?")
        assert await anext(stream) == Delta("hi", (1,))
        reading = asyncio.create_task(stream.result())
        await asyncio.sleep(0)
        stream.cancel()
        with pytest.raises(RequestCancelledError, match="by this client"):
            await reading


async def test_cancel_ends_the_wait_for_the_next_attempt(
    scripted: ScriptedNode, monkeypatch: pytest.MonkeyPatch
):
    scripted.scripts = [Script(status=grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_ms=60_000)]
    slow = RetryPolicy(max_delay_seconds=120)

    def cancel_before_waiting(stream: GenerationStream | AsyncGenerationStream) -> None:
        delay_after = StreamState.delay_after

        def cancelled(state: StreamState, failure: FluxionError) -> float:
            stream.cancel()
            delay = delay_after(state, failure)
            assert delay >= 60
            return delay

        monkeypatch.setattr(StreamState, "delay_after", cancelled)

    with Client(scripted.address, retry=slow) as client:
        stream = client.stream("Why?")
        cancel_before_waiting(stream)
        with pytest.raises(RequestCancelledError):
            await in_thread(next, stream)
    monkeypatch.undo()
    async with AsyncClient(scripted.address, retry=slow) as client:
        stream = client.stream("Why?")
        cancel_before_waiting(stream)
        with pytest.raises(RequestCancelledError):
            await anext(stream)
    assert len(scripted.requests) == 2


async def test_cancel_while_a_stream_connects_is_no_less_heard(
    scripted: ScriptedNode, monkeypatch: pytest.MonkeyPatch
):
    def connect_then_cancel(*arguments):
        channel = connect_blocking(*arguments)
        blocking_stream.cancel()
        return channel

    async def connect_then_cancel_async(*arguments):
        channel = await connect(*arguments)
        stream.cancel()
        return channel

    monkeypatch.setattr(blocking, "connect_blocking", connect_then_cancel)
    monkeypatch.setattr(asynchronous, "connect", connect_then_cancel_async)
    with Client(scripted.address) as client:
        blocking_stream = client.stream("Why?")
        with pytest.raises(RequestCancelledError, match="by this client"):
            await in_thread(next, blocking_stream)
    async with AsyncClient(scripted.address) as client:
        stream = client.stream("Why?")
        with pytest.raises(RequestCancelledError, match="by this client"):
            await anext(stream)


async def test_a_client_closed_before_the_next_attempt_makes_none(
    scripted: ScriptedNode, monkeypatch: pytest.MonkeyPatch
):
    scripted.scripts = [UNAVAILABLE]

    def closing(attempts: Attempts, failure: FluxionError) -> float:
        closers.pop()()
        return 0.0

    monkeypatch.setattr(Attempts, "delay_after", closing)
    with Client(scripted.address) as client:
        closers = [client.close]
        with pytest.raises(InvalidRequestError, match="was closed"):
            await in_thread(client.tokenize, "a")
    async with AsyncClient(scripted.address) as client:
        closing_tasks = []
        closers = [
            lambda: closing_tasks.append(asyncio.create_task(client.close())),
        ]
        with pytest.raises(InvalidRequestError, match="was closed"):
            await client.tokenize("a")
        await asyncio.gather(*closing_tasks)


async def test_closing_a_client_ends_who_reads_from_it_elsewhere(scripted: ScriptedNode):
    scripted.scripts = [Script((delta("hi", 1),), waits=True)]
    with Client(scripted.address) as client:
        stream = client.stream("Why?")
        assert await in_thread(next, stream) == Delta("hi", (1,))
        reading = asyncio.create_task(in_thread(stream.result))
        await asyncio.sleep(0)
    with pytest.raises(RequestCancelledError):
        await reading
    assert await in_thread(scripted.was_cancelled.wait, 60)
    scripted.was_cancelled.clear()
    async with AsyncClient(scripted.address) as client:
        stream = client.stream("Why?")
        assert await anext(stream) == Delta("hi", (1,))
        reading = asyncio.create_task(stream.result())
        await asyncio.sleep(0)
    with pytest.raises(RequestCancelledError):
        await reading


async def test_an_address_at_which_nobody_listens_is_told_at_once(unused_tcp_port: int):
    address = f"127.0.0.1:{unused_tcp_port}"
    for error in await both(address, "Why?", OPTIONS, RetryPolicy(first_delay_seconds=1e6)):
        assert isinstance(error, PeerUnavailableError)
        assert f"no node accepts connections at {address}" in str(error)


async def test_a_closed_client_says_so(scripted: ScriptedNode):
    client = Client(scripted.address, retry=NO_RETRIES)
    await in_thread(client.tokenize, "a")
    client.close()
    client.close()
    with pytest.raises(InvalidRequestError, match="was closed"):
        client.tokenize("a")
    other = AsyncClient(scripted.address)
    await other.close()
    with pytest.raises(InvalidRequestError, match="was closed"):
        await other.tokenize("a")
