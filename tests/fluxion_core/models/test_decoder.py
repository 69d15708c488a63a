"""The decoder: tokens know nothing of each other but through the attention port."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor

from fluxion_core.models.config import ModelConfig, RopeConfig
from fluxion_core.models.decoder import Decoder, linear, rms_norm, tensor_shapes

CONFIG = ModelConfig(
    architecture="qwen2",
    vocab_size=50,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    rms_norm_eps=1e-5,
    rope=RopeConfig(1e4),
    context_tokens=64,
    tie_word_embeddings=False,
    attention_bias=True,
    bos_token_id=None,
    eos_token_ids=(0,),
)


@pytest.fixture
def decoder() -> Decoder:
    decoder = Decoder(CONFIG, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(5)
    for parameter in decoder.parameters():
        parameter.normal_(std=0.3, generator=generator)
    return decoder


class Recorder:
    """Answers with the query, and notes what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.calls.append((layer, query, key, value))
        return query


def test_the_port_is_called_once_per_layer_in_order_with_whole_heads(decoder):
    port = Recorder()
    hidden = decoder(tensor([3, 4, 5]), tensor([0, 1, 7]), port)
    assert [layer for layer, *_ in port.calls] == [0, 1]
    for _, query, key, value in port.calls:
        assert query.shape == (3, 4, 8)
        assert key.shape == value.shape == (3, 2, 8)
    assert hidden.shape == (3, 32)
    assert decoder.logits(hidden[-1:]).shape == (1, 50)


def test_a_token_does_not_depend_on_its_neighbours_in_the_batch(decoder):
    token_ids, positions = tensor([3, 9, 21, 40]), tensor([5, 0, 63, 17])
    together = decoder(token_ids, positions, Recorder())
    for row in range(4):
        alone = decoder(token_ids[row : row + 1], positions[row : row + 1], Recorder())
        torch.testing.assert_close(together[row : row + 1], alone)


def test_positions_turn_queries_and_keys_but_not_values(decoder):
    here, there = Recorder(), Recorder()
    decoder(tensor([3]), tensor([0]), here)
    decoder(tensor([3]), tensor([9]), there)
    _, query, key, value = here.calls[0]
    _, turned_query, turned_key, same_value = there.calls[0]
    assert torch.equal(value, same_value)
    assert not torch.allclose(query, turned_query)
    assert not torch.allclose(key, turned_key)
    torch.testing.assert_close(query.norm(dim=-1), turned_query.norm(dim=-1))


def test_every_weight_has_a_place_of_its_own(decoder):
    # Writing a mark to every named weight must fill all parameters, none twice.
    for mark, (name, shape) in enumerate(tensor_shapes(CONFIG).items(), start=1):
        place = decoder.weight(name)
        assert place.shape == shape, name
        place.fill_(mark)
    for mark, name in enumerate(tensor_shapes(CONFIG), start=1):
        assert bool((decoder.weight(name) == mark).all()), name
    assert all(bool((parameter > 0).all()) for parameter in decoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 40])
def test_a_product_is_the_same_whichever_way_round_it_goes(rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 32, generator=generator).to(dtype)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    exact = x.double() @ weight.double().T
    product = linear(x, weight)
    assert product.dtype == dtype
    assert product.is_contiguous()
    # bfloat16 rounds each result once, by half of its 8th bit; sums stay in float32.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(product.double(), exact, rtol=tolerance, atol=1e-2 * tolerance * 32)


def test_rms_norm_by_hand():
    # By hand: mean square of (3, 4) is 12.5.
    normed = rms_norm(tensor([[3.0, 4.0]]), tensor([1.0, 2.0]), 0.0)
    assert normed[0].tolist() == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5])


def test_rms_norm_of_bfloat16_works_in_float32():
    # Its square overflows no float32, and rounding happens once before the weight.
    x = torch.full((1, 4), 3e18, dtype=torch.bfloat16)
    normed = rms_norm(x, torch.ones(4, dtype=torch.bfloat16), 1e-5)
    assert normed.dtype == torch.bfloat16
    assert normed[0].tolist() == [1.0] * 4
