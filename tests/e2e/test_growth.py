"""A sequence that grows by generation, with the real model: what it wrote itself is found again."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch

from fluxion_core.generation.chat import ChatMessage
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.hybrid_attention import HybridAttention
from fluxion_core.kvstore.store import HostKvStore, SequenceKv
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.weights import load_model
from fluxion_core.scheduler.scheduler import CpuPool
from fluxion_core.selector.policy import FixedPolicy
from services.prefill.kv_capture import KvCapture

FACT = "The access code for the plate vault is 7402958."
QUESTION = "What is the access code for the plate vault?"
ASK_AT = (1000, 3000, 8000)
"""Tokens after which a copy of the sequence is asked; 8,192 is the model's context."""


def prefilled(decoder: Decoder, store: HostKvStore, token_ids: list[int], new: int) -> SequenceKv:
    """A committed sequence that holds this prompt."""
    sequence = store.reserve(token_ids, new)
    first = sequence.shared_tokens
    capture = KvCapture(
        store.geometry,
        num_tokens=len(token_ids),
        kv_from_token=first,
        emit=lambda f: sequence.write_blocks(f.layer, f.first_token, f.num_tokens, f.payload),
        is_cancelled=lambda: False,
        device=torch.device("cpu"),
    )
    capture.begin_chunk(0)
    decoder(torch.tensor(token_ids), torch.arange(len(token_ids)), capture)
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

    request = "Write down everything that a visitor of the observatory should know. " * 6
    prompt = tokenizer.encode(
        tokenizer.render_chat([ChatMessage("user", request)]), add_special_tokens=False
    )
    prompt = [*prompt[:88], *prompt[-12:]]
    assert len(prompt) == 100
    document = (resources.files("services.cli") / "demo_document.md").read_text("utf-8")
    # What the sequence "generates": the fact, early, then text that does not hold it.
    filler = "\n".join(line for line in document.splitlines() if "access code" not in line)
    written = tokenizer.encode(
        f"To begin with: {FACT} {filler}\n{filler}", add_special_tokens=False
    )
    asked = tokenizer.encode(
        f"<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        add_special_tokens=False,
    )

    sequences = [prefilled(decoder, store, prompt, length + 150) for length in ASK_AT]
    forced = [[*written[: length - len(prompt) - len(asked)], *asked] for length in ASK_AT]
    answers: list[list[int]] = [[] for _ in ASK_AT]
    step = 0
    running = list(range(len(ASK_AT)))
    while running:
        tokens = [forced[i][step] if step < len(forced[i]) else answers[i][-1] for i in running]
        positions = torch.tensor([sequences[i].num_tokens for i in running])
        attention.begin_step([sequences[i] for i in running], [policy] * len(running))
        hidden = decoder(torch.tensor(tokens), positions, attention)
        attention.end_step()
        for row, i in enumerate(running):
            if step >= len(forced[i]) - 1:
                answers[i].append(int(decoder.logits(hidden[row : row + 1]).argmax()))
        running = [i for i in running if len(answers[i]) < 24]
        step += 1
    for length, answer in zip(ASK_AT, answers, strict=True):
        assert "7402958" in tokenizer.decode(answer), (length, tokenizer.decode(answer))
