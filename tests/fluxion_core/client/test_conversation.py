"""A conversation keeps what was said, and its follow-ups read the KV that the node has stored."""

from __future__ import annotations

import asyncio

import pytest

from fluxion_core.client import (
    AsyncClient,
    AsyncConversation,
    ChatMessage,
    Client,
    Conversation,
    GenerationOptions,
)
from fluxion_core.errors import InvalidRequestError
from tests.fluxion_core.client.conftest import END, Script, ScriptedNode, delta

DOCUMENT = "A document of some length. " * 40
OPTIONS = GenerationOptions(max_new_tokens=8, ignore_eos=True, cache_salt="mine")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_follow_up_reads_the_stored_kv_of_the_document(toy_node: str):
    async with AsyncClient(toy_node) as client:
        conversation = AsyncConversation(client, DOCUMENT, options=OPTIONS)
        first = await conversation.ask("What?")
        second = await conversation.ask("Why?")
        others = AsyncConversation(client, DOCUMENT)
        foreign = await others.ask("What?", GenerationOptions(max_new_tokens=1))
    assert first.usage.cached_tokens == 0
    # A token is a byte here, and of a text that goes on otherwise slabs of 128 are found. (What a
    # random model says is seldom text; said again it is other tokens.)
    assert second.usage.cached_tokens > len(DOCUMENT) - 128
    assert [message.role for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[1].content == first.text
    # Another salt, another store.
    assert foreign.usage.cached_tokens == 0

    def again_blocking() -> int:
        with Client(toy_node) as client:
            return Conversation(client, DOCUMENT, options=OPTIONS).ask("How?").usage.cached_tokens

    assert await asyncio.to_thread(again_blocking) > len(DOCUMENT) - 128


def test_every_turn_sends_all_that_was_said(scripted: ScriptedNode):
    with Client(scripted.address) as client:
        conversation = Conversation(client, "The text.\n", system="Terse.")
        conversation.ask("What?")
        conversation.ask("Why?")
    said = [(one.role, one.content) for one in scripted.requests[-1].chat.messages]
    assert said == [
        ("system", "Terse."),
        ("user", "The text.\n\nWhat?"),
        ("assistant", "hi"),
        ("user", "Why?"),
    ]


def test_a_turn_that_was_left_or_failed_is_forgotten(scripted: ScriptedNode):
    scripted.scripts = [Script((delta("hi", 1),), waits=True), Script((delta("hi", 1), END))]
    with Client(scripted.address) as client:
        conversation = Conversation(client)
        stream = conversation.stream("What?")
        next(stream)
        with pytest.raises(InvalidRequestError, match="has not ended"):
            conversation.ask("Why?")
        stream.close()
        conversation.ask("Why?")
    assert conversation.messages == (ChatMessage("user", "Why?"), ChatMessage("assistant", "hi"))
