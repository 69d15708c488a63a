"""A sequence that grows by generation, with the real model: what it wrote itself is found again."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.host.attention import HybridAttention
from fluxion_core.generation.chat import ChatMessage
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.weights import load_model
from fluxion_core.planning.policy import FixedPolicy
from fluxion_core.pool.cpu_pool import CpuPool
from fluxion_core.prompt.compute import compute_prompt

FACT = "The access code for the plate vault is 7402958."
ASKED = (
    "<|im_end|>\n<|im_start|>user\nWhat is the access code for the plate vault?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
RESUMED = "<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
ASK_AT = (1000, 2500, 4000, 5500, 7000, 8000)
"""Tokens after which it is asked; what it answers becomes part of it. The context has 8,192."""
ANSWER_TOKENS = 24


def prefilled(decoder: Decoder, store: HostKvStore, token_ids: list[int], new: int) -> SequenceKv:
    """A committed sequence that holds this prompt."""
    sequence = store.reserve(token_ids, new)
    compute_prompt(
        decoder,
        store.geometry,
        token_ids,
        emit=lambda f: sequence.write_blocks(f.layer, f.first_token, f.num_tokens, f.payload),
    )
    sequence.commit()
    return sequence


@pytest.mark.model
@pytest.mark.timeout(1800)
@torch.no_grad()
def test_a_growing_sequence_finds_a_fact_of_its_own_text_under_fixed(smollm2_path: Path):
    tokenizer = Tokenizer.load(smollm2_path)
    loaded = load_model(smollm2_path, device=torch.device("cpu"), dtype=torch.float32)
    decoder, config = loaded.decoder, loaded.config
    geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
    store = HostKvStore(geometry, 1 << 30, model_key=b"growth")
    attention = HybridAttention(store, WindowSpec(), num_heads=config.num_heads, pool=CpuPool())
    policy = FixedPolicy(16, 0.05)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    request = "Write down everything that a visitor of the observatory should know. " * 6
    prompt = encode(tokenizer.render_chat([ChatMessage("user", request)]))
    prompt = [*prompt[:88], *prompt[-12:]]
    assert len(prompt) == 100
    document = (resources.files("services.cli") / "demo_document.md").read_text("utf-8")
    # What the sequence "generates": the fact, early, then text that does not hold it.
    filler = "\n".join(line for line in document.splitlines() if "access code" not in line)
    written = iter(encode(f"{FACT} {filler}\n{filler}"))
    sequence = prefilled(decoder, store, prompt, ASK_AT[-1] + 100)

    def step(token_id: int) -> Tensor:
        attention.begin_step([sequence], [policy])
        position = torch.tensor([sequence.num_tokens])
        hidden: Tensor = decoder(torch.tensor([token_id]), position, attention)
        attention.end_step()
        return hidden

    def ask() -> str:
        answer: list[int] = []
        hidden = torch.empty(0)
        for token_id in encode(ASKED):
            hidden = step(token_id)
        while len(answer) < ANSWER_TOKENS:
            answer.append(int(decoder.logits(hidden).argmax()))
            hidden = step(answer[-1])
        return tokenizer.decode(answer)

    answers = {}
    for length in ASK_AT:
        while sequence.num_tokens + len(encode(ASKED)) < length:
            step(next(written))
        answers[length] = ask()
        for token_id in encode(RESUMED):
            step(token_id)
    missed = {length: answer for length, answer in answers.items() if "7402958" not in answer}
    assert not missed
