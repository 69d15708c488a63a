"""The decode-step benchmark measures what it says: its tokens are those of plain attention."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fluxion_core.errors import ConfigError
from fluxion_core.lab.benchmark import decode_step
from fluxion_core.lab.benchmark.decode_step import run_decode_step_bench
from fluxion_core.models.config import ModelConfig, RopeConfig
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.planner_weights import PlannerWeights
from tests.fluxion_core.planning.random_planner import random_network

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=97,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=96,
    rms_norm_eps=1e-5,
    rope=RopeConfig(1e4),
    context_tokens=2048,
    tie_word_embeddings=False,
    attention_bias=False,
    bos_token_id=None,
    eos_token_ids=(0,),
)


@pytest.fixture
def decoder() -> Decoder:
    decoder = Decoder(CONFIG, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(5)
    for parameter in decoder.parameters():
        parameter.normal_(std=0.2, generator=generator)
    return decoder


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    return torch.randint(1, 97, (700,), generator=torch.Generator().manual_seed(6)).tolist()


class PlainAttention:
    """Attention port over everything so far, all of it at hand."""

    def __init__(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.transpose(0, 1).bfloat16().float() for x in (key, value))
        if layer in self.kv:
            before = self.kv[layer]
            key, value = torch.cat((before[0], key), 1), torch.cat((before[1], value), 1)
        self.kv[layer] = (key, value)
        is_causal = query.shape[0] > 1
        output = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1), key, value, is_causal=is_causal, enable_gqa=True
        )
        return output.transpose(0, 1)


@torch.inference_mode()
def plain_tokens(decoder: Decoder, token_ids: list[int], count: int) -> list[int]:
    port = PlainAttention()
    hidden = decoder(torch.tensor(token_ids), torch.arange(len(token_ids)), port)
    tokens = [int(decoder.logits(hidden[-1:]).argmax())]
    while len(tokens) < count:
        position = torch.tensor([len(token_ids) + len(tokens) - 1])
        hidden = decoder(torch.tensor(tokens[-1:]), position, port)
        tokens.append(int(decoder.logits(hidden).argmax()))
    return tokens


def test_the_bench_decodes_the_tokens_of_plain_attention(decoder, token_ids, monkeypatch):
    seen: dict[str, list[int]] = {}
    step = decode_step._Bench.step

    def recorded(self, row, policy, token_id):
        turn = step(self, row, policy, token_id)
        seen.setdefault(str(policy), [token_id]).append(turn.token_id)
        return turn

    monkeypatch.setattr(decode_step._Bench, "step", recorded)
    policies = ("exact", "fixed(16, 100 %)", "fixed(64, 5 %)")
    expected = plain_tokens(decoder, token_ids, 9)
    report = run_decode_step_bench(
        Console(file=io.StringIO()), decoder, token_ids, steps=6, policies=policies
    )
    assert seen["exact"] == expected
    assert seen["fixed(16, 100 %)"] == expected
    assert seen["fixed(64, 5 %)"] != expected

    figures = {figure["name"]: figure for figure in report["figures"]}
    assert set(figures) == {"without attention", *policies}
    # Region of 708 tokens: 64 to 448, in both layers and KV heads, K and V of 64 bfloat16.
    assert figures["exact"]["read_bytes"] == (448 - 64) * 2 * 2 * 2 * 64 * 2
    assert figures["fixed(16, 100 %)"]["read_bytes"] > figures["exact"]["read_bytes"]
    assert 0 < figures["fixed(64, 5 %)"]["read_bytes"] < figures["exact"]["read_bytes"]
    assert report["tokens_equal"] is None
    assert report["sampling"] == "temperature 0.7, top_p 0.9"
    for figure in figures.values():
        assert 0 < figure["sampling_milliseconds"] < figure["milliseconds"]


@pytest.mark.parametrize("mode", ["network", "training-free"])
def test_predicted_policies_report_what_planning_costs(decoder, token_ids, mode):
    network = random_network(3) if mode == "network" else None
    layers, heads = CONFIG.num_layers, CONFIG.num_heads
    weights = replace(PlannerWeights.training_free(layers, heads), network=network)
    report = run_decode_step_bench(
        Console(file=io.StringIO()),
        decoder,
        token_ids,
        steps=2,
        policies=("exact", "threshold(1e-30)", "marginal(1e30)"),
        weights=weights,
    )
    assert report["planner"] == mode
    figures = {figure["name"]: figure for figure in report["figures"]}
    exact, all_read, none_read = (
        figures[name] for name in ("exact", "threshold(1e-30)", "marginal(1e+30)")
    )
    assert exact["plan_share"] == 0.0
    # Two layers and KV heads, blocks 0 to 3 of 128 tokens in one slab: one record of 4 blocks.
    coarse = 2 * 2 * 4 * 64 * 4 if mode == "network" else 0
    assert all_read["read_bytes"] == exact["read_bytes"] + coarse
    assert none_read["read_bytes"] == coarse
    for figure in (all_read, none_read):
        assert (figure["predict_milliseconds"] > 0) == (mode == "network")
        assert (figure["select_milliseconds"] > 0) == (mode == "network")
        assert figure["region_share"] == figure["read_bytes"] / exact["read_bytes"]


def test_no_policies_are_refused(decoder, token_ids):
    with pytest.raises(ConfigError, match="no policies"):
        run_decode_step_bench(Console(file=io.StringIO()), decoder, token_ids, policies=())


def test_the_plot_is_a_picture(tmp_path):
    report = {
        "tokens": 7500,
        "figures": [{"name": "exact", "milliseconds": 60.0}, {"name": "fixed", "milliseconds": 40}],
    }
    decode_step.plot(report, tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
