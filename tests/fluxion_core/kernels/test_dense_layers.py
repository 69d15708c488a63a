"""The native dense part: torch's decoder, and the same bits for a row whatever is beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.kernels.packed_weight import PANEL_COLUMNS, pack, packed_rows, padded
from fluxion_core.models.config import ModelConfig, RopeConfig
from fluxion_core.models.decoder import Decoder
from fluxion_core.pool.cpu_pool import CpuPool

# Nothing here fills whole panels, and the products are large enough to wake a second thread.
ODD = ModelConfig(
    architecture="qwen2",
    vocab_size=1003,
    hidden_size=200,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=20,
    intermediate_size=345,
    rms_norm_eps=1e-5,
    rope=RopeConfig(1e4),
    context_tokens=4096,
    tie_word_embeddings=True,
    attention_bias=True,
    bos_token_id=None,
    eos_token_ids=(0,),
)
# Sums over more inputs than stay in the cache at a time.
DEEP = replace(ODD, vocab_size=83, hidden_size=2500, intermediate_size=48, num_layers=1, head_dim=4)


def random_decoder(config: ModelConfig) -> Decoder:
    decoder = Decoder(config, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(5)
    for parameter in decoder.parameters():
        parameter.normal_(generator=generator)
        if parameter.dim() == 2:
            parameter.mul_(2 * parameter.shape[1] ** -0.5)
    return decoder


class EachTokenAlone:
    """An attention port in which tokens know nothing of each other; keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.seen.append(torch.cat([part.flatten(1) for part in (query, key, value)], dim=1))
        group = query.shape[1] // key.shape[1]
        return query.sin() * key.repeat_interleave(group, 1) + value.repeat_interleave(group, 1)


def everything(decoder: Decoder | HostDecoder, ids: Tensor, positions: Tensor) -> Tensor:
    """[tokens, …]: what attention is given in every layer, and the logits."""
    port = EachTokenAlone()
    logits = decoder.logits(decoder(ids, positions, port))
    return torch.cat([*port.seen, logits], dim=1)


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 64, 83])
def test_packed_rows_are_the_matrix(outputs: int):
    weight = torch.randn(outputs, 7, generator=torch.Generator().manual_seed(outputs))
    panels = torch.full((padded(outputs) // PANEL_COLUMNS, 7, PANEL_COLUMNS), torch.nan)
    pack(weight, panels)
    assert torch.equal(packed_rows(panels, torch.arange(outputs)), weight)
    assert float(packed_rows(panels, torch.arange(outputs, padded(outputs))).sum()) == 0.0


@pytest.mark.parametrize("config", [ODD, DEEP], ids=["odd", "deep"])
@pytest.mark.usefixtures("each_isa")
def test_products_of_any_number_of_rows_and_threads_are_the_same_bits(config: ModelConfig):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(70, config.hidden_size, generator=generator)
    decoder = random_decoder(config)
    weight = decoder.head.double()
    decoders = [HostDecoder(decoder, CpuPool(1))]
    for threads in (2, 3):
        decoders.append(HostDecoder(random_decoder(config), CpuPool(threads)))
    alone = torch.cat([decoders[0].logits(x[row : row + 1]) for row in range(70)])
    for each in decoders:
        for rows in range(1, 71):
            assert torch.equal(each.logits(x[:rows]), alone[:rows])
    # Each of n roundings is at most 2^-24 of a partial sum, and they point anywhere: not n of them.
    exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    assert ((alone.double() - exact).abs() <= 16 * 2**-24 * magnitude).all()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.usefixtures("each_isa")
def test_it_is_torchs_decoder(has_bias: bool, is_tied: bool):
    config = replace(ODD, attention_bias=has_bias, tie_word_embeddings=is_tied)
    ids, positions = torch.tensor([3, 9, 1002, 40, 9]), torch.tensor([5, 0, 4095, 17, 1])
    expected = everything(random_decoder(config), ids, positions)
    found = everything(HostDecoder(random_decoder(config), CpuPool(2)), ids, positions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("each_isa")
def test_a_token_is_the_same_bits_whatever_is_in_the_batch():
    decoder = HostDecoder(random_decoder(ODD), CpuPool(2))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, ODD.vocab_size, (70,), generator=generator)
    positions = torch.randint(0, ODD.context_tokens, (70,), generator=generator)
    alone = torch.cat(
        [everything(decoder, ids[i : i + 1], positions[i : i + 1]) for i in range(70)]
    )
    for rows in (2, 3, 8, 9, 17, 64, 70):
        first = 70 - rows
        assert torch.equal(everything(decoder, ids[first:], positions[first:]), alone[first:])


@pytest.mark.usefixtures("each_isa")
def test_weights_in_bfloat16_are_the_same_values_in_float32():
    narrow, wide = random_decoder(ODD).bfloat16(), random_decoder(ODD)
    for parameter in wide.parameters():
        parameter.copy_(parameter.bfloat16())
    ids, positions = torch.arange(9), torch.arange(9) * 50
    found = everything(HostDecoder(narrow, CpuPool(2)), ids, positions)
    assert torch.equal(found, everything(HostDecoder(wide, CpuPool(2)), ids, positions))


def test_weights_are_taken_not_copied():
    decoder = random_decoder(ODD)
    HostDecoder(decoder, CpuPool(1))
    matrices = [parameter for parameter in decoder.parameters() if parameter.shape != (200,)]
    biases = [parameter for parameter in matrices if parameter.dim() == 1 and parameter.numel()]
    assert sum(parameter.numel() for parameter in matrices) == sum(b.numel() for b in biases)
    assert decoder.embedding.device.type == "cpu"


def test_layers_come_in_order():
    decoder = HostDecoder(random_decoder(ODD), CpuPool(1))
    native, pool = decoder._native, decoder._pool.native
    config, qkv = decoder.config, torch.zeros(1, native.qkv_width).numpy()
    native.begin(
        *(pool, torch.zeros(1, config.hidden_size).numpy(), torch.zeros(1).long().numpy(), qkv, 0)
    )
    attended = torch.zeros(1, config.num_heads, config.head_dim).numpy()
    with pytest.raises(ValueError, match="in order"):
        native.advance(pool, 1, attended, torch.zeros(1, native.hidden_width).numpy(), 0)
