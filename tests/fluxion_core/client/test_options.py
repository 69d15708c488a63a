"""Prompts and options become messages, and what cannot be sent is refused before it is."""

from __future__ import annotations

from dataclasses import fields

import pytest

from fluxion_core.client import ChatMessage, GenerationOptions
from fluxion_core.client.options import build_request, build_tokenize_request
from fluxion_core.errors import InvalidRequestError
from fluxion_proto.v1 import generate_pb2


def test_what_is_not_chosen_is_left_to_the_node():
    request = build_request("Why?", GenerationOptions())
    assert request == generate_pb2.GenerateRequest(
        text="Why?", max_new_tokens=256, sampling=generate_pb2.Sampling(temperature=0)
    )


def test_every_option_is_sent():
    sampling = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.75,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 2**64 - 1,
    }
    others = {
        "max_new_tokens": 9,
        "stop_strings": ("END", "."),
        "stop_token_ids": (3,),
        "ignore_eos": True,
        "cache_salt": "user 7",
        "request_id": "r-1",
        "report_progress": True,
    }
    options = GenerationOptions(**sampling, **others, quality="accurate", priority="high")
    assert build_request([1, 2], options) == generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=[1, 2]),
        sampling=generate_pb2.Sampling(**sampling),
        **others,
        quality=generate_pb2.QUALITY_LEVEL_ACCURATE,
        priority=generate_pb2.PRIORITY_HIGH,
    )
    sent = {*sampling, *others, "quality", "priority", "policy", "deadline_seconds"}
    assert {field.name for field in fields(GenerationOptions)} == sent
    assert build_request("a", GenerationOptions(policy="exact")).policy == "exact"


def test_messages_go_through_the_chat_template():
    messages = [ChatMessage("system", "Terse."), ChatMessage("user", "Why?")]
    for request in (
        build_request(messages, GenerationOptions()),
        build_tokenize_request(messages),
    ):
        sent = [(one.role, one.content) for one in request.chat.messages]
        assert sent == [("system", "Terse."), ("user", "Why?")]


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        (["user: Why?"], {}, "it holds str"),
        ([1, -2], {}, "cannot be sent"),
        ("a\udc80", {}, "cannot be sent"),
        ("a", {"max_new_tokens": -1}, "cannot be sent"),
        ("a", {"top_k": 2**40}, "cannot be sent"),
        ("a", {"quality": "perfect"}, "QUALITY_LEVEL_PERFECT"),
        ("a", {"priority": "urgent"}, "PRIORITY_URGENT"),
    ],
)
def test_what_cannot_be_sent_is_refused_here(prompt, options, words):
    with pytest.raises(InvalidRequestError, match=words):
        build_request(prompt, GenerationOptions(**options))
