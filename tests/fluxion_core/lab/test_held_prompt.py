"""A prompt that is held: every sequence it is stored into has the same KV, shared slabs or not."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.errors import CapacityError
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.digest_index import gather_kv
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.held_prompt import PromptMaker
from fluxion_core.models.decoder import Decoder
from fluxion_core.prompt.compute import compute_prompt
from tests.fluxion_core.lab.evaluation.conftest import CONFIG

GEOMETRY = KvGeometry(CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim)
TOKENS = 1100
"""Two full slabs of 512, which the first frame of 1,024 tokens spans, and a part of a third."""


@pytest.fixture
def decoder() -> Decoder:
    decoder = Decoder(CONFIG, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(5)
    for parameter in decoder.parameters():
        parameter.normal_(std=0.2, generator=generator)
    return decoder


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    generator = torch.Generator().manual_seed(6)
    ids: list[int] = torch.randint(0, 250, (TOKENS,), generator=generator).tolist()
    return ids


def make_store(slabs: int) -> HostKvStore:
    return HostKvStore(GEOMETRY, slabs * (GEOMETRY.slab_bytes + 4096), model_key=b"")


def kv_of(sequence: SequenceKv) -> torch.Tensor:
    heads = [
        torch.stack(gather_kv(sequence, layer, head))
        for layer in range(GEOMETRY.num_layers)
        for head in range(GEOMETRY.num_kv_heads)
    ]
    return torch.stack(heads)


@pytest.mark.parametrize("shared_tokens", [0, 512, 1024])
def test_a_sequence_that_shares_slabs_has_the_same_kv(
    decoder: Decoder, token_ids: list[int], shared_tokens: int
):
    store = make_store(8)
    held = PromptMaker(decoder, GEOMETRY).make(token_ids)
    if shared_tokens:
        before = [*token_ids[:shared_tokens], *([255] * (TOKENS - shared_tokens))]
        PromptMaker(decoder, GEOMETRY).make(before).store_into(store, before, 1)
    sequence = held.store_into(store, token_ids, 4)
    assert sequence.kv_from_token == shared_tokens
    expected = compute_prompt(decoder, GEOMETRY, token_ids).kv
    assert torch.equal(kv_of(sequence), expected.transpose(1, 2).flatten(0, 1))


def test_what_does_not_fit_holds_nothing(decoder: Decoder, token_ids: list[int]):
    store = make_store(2)
    held = PromptMaker(decoder, GEOMETRY).make(token_ids)
    with pytest.raises(CapacityError):
        held.store_into(store, token_ids, 4)
    assert store.statistics().reserved_bytes == 0


def test_profiles_and_first_token_are_those_of_the_prompt(decoder: Decoder, token_ids: list[int]):
    held = PromptMaker(decoder, GEOMETRY).make(token_ids, profile_window=WindowSpec())
    computed = compute_prompt(decoder, GEOMETRY, token_ids, profile_window=WindowSpec())
    assert held.first_token_id == int(computed.logits.argmax())
    for found, expected in zip(held.profiles, computed.profiles, strict=True):
        for name, part in vars(expected).items():
            assert torch.equal(getattr(found, name), part)
