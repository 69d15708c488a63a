"""Requests, checked: stop strings that are special tokens, which no text holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from fluxion_core.errors import InvalidRequestError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.planning.policy import parse_policy
from fluxion_proto.v1 import generate_pb2
from services.decode.prompt_queue import finish
from services.decode.request import GenerationRequest, read_request

TURN_ID = 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocabulary = ["<|end|>", "<|turn|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in vocabulary[:2]])
    return Tokenizer(backend, None, bos_token_id=None, eos_token_ids=[0])


def check(tokenizer: Tokenizer, stop_strings: list[str]) -> GenerationRequest:
    config = SimpleNamespace(vocab_size=300, context_tokens=64, eos_token_ids=(0,))
    planning = SimpleNamespace(default_policy=parse_policy("exact"))
    message = generate_pb2.GenerateRequest(text="hi", stop_strings=stop_strings)
    return finish(
        read_request(message, tokenizer, config, default_max_new_tokens=4, planning=planning)
    )


def test_a_special_token_as_a_stop_string_is_looked_for_by_its_id(tokenizer):
    stop = check(tokenizer, ["user:", "<|turn|>", "<|tu"]).stop
    assert stop.stop_strings == ("user:", "<|tu")
    assert stop.stop_tokens == {TURN_ID: "<|turn|>"}
    assert TURN_ID in stop.ending_token_ids


@pytest.mark.parametrize("stop", ["<|turn|>\n", "x<|turn|>", "<|turn|><|turn|>", "<|turn|><|end|>"])
def test_a_stop_string_that_holds_a_special_token_is_refused_with_the_remedy(tokenizer, stop):
    with pytest.raises(InvalidRequestError, match=r"never end anything; give '<\|(turn|end)\|>'"):
        check(tokenizer, [stop])
