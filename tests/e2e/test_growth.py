"""A sequence that grows by generation, with the real model: what it wrote itself is found again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import pytest
import torch

from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.host.step import HostStep
from fluxion_core.decode.step import StepRow
from fluxion_core.generation.chat import ChatMessage
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.weights import load_model
from fluxion_core.planning.policy import FixedPolicy
from fluxion_core.pool.cpu_pool import CpuPool

FACT = "The access code for the plate vault is 7402958."
ASKED = (
    "<|im_end|>\n<|im_start|>user\nWhat is the access code for the plate vault?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
RESUMED = "<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
ASK_AT = (1000, 2500, 5000, 8000)
"""Tokens after which it is asked; what it answers becomes part of it. The context has 8,192."""
ANSWER_TOKENS = 24
CHUNK_TOKENS = 32
POLICY = FixedPolicy(16, 0.05)


class GrowingText:
    """A sequence under POLICY, that steps lengthen, or turns whose text is computed in chunks.

    Args:
        model: its file.
        token_ids: that it begins with.
        room: for tokens in all.
    """

    def __init__(self, model: Path, token_ids: Sequence[int], room: int) -> None:
        loaded = load_model(model, device=torch.device("cpu"), dtype=torch.bfloat16)
        config = loaded.config
        geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
        self._store = HostKvStore(geometry, 1 << 30, model_key=b"growth")
        pool = CpuPool()
        attention = HostAttention(self._store, WindowSpec(), num_heads=config.num_heads, pool=pool)
        self._step = HostStep(HostDecoder(loaded.decoder, pool), attention)
        self._room = room
        self.token_ids: list[int] = []
        self._take_turn(token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    def add_by_steps(self, token_ids: Sequence[int]) -> int:
        """As if it had generated them; returns the token that it would go on with."""
        likeliest = -1
        for token_id in token_ids:
            row = StepRow(self._sequence, 0, token_id, POLICY)
            self.token_ids.append(token_id)
            logits, _ = self._step.run([row])
            likeliest = int(logits[0].argmax())
        return likeliest

    def add_as_turn(self, token_ids: Sequence[int]) -> None:
        """As a session's next turn, which goes on from all that is stored."""
        stored = len(self)
        self._sequence.keep(self.token_ids[self._sequence.num_prompt_tokens :])
        self._sequence.release()
        self._take_turn(token_ids)
        assert self._sequence.shared_tokens == stored

    def _take_turn(self, token_ids: Sequence[int]) -> None:
        self.token_ids += token_ids
        self._sequence = self._store.reserve(
            self.token_ids, self._room - len(self), approximation=str(POLICY)
        )
        self._sequence.begin_prompt()
        for first in range(self._sequence.num_tokens, len(self), CHUNK_TOKENS):
            self._step.compute_chunk(
                self._sequence, self.token_ids[first : first + CHUNK_TOKENS], None
            )


@pytest.mark.model
@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(True, id="by steps, later by turns too"),
        pytest.param(False, id="by steps alone", marks=pytest.mark.load),
    ],
)
@pytest.mark.timeout(1800)
def test_a_growing_sequence_finds_a_fact_of_its_own_text_under_fixed(
    smollm2_path: Path, turns: bool
):
    tokenizer = Tokenizer.load(smollm2_path)

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
    text = GrowingText(smollm2_path, prompt, ASK_AT[-1] + 100)

    def ask() -> str:
        answer = [text.add_by_steps(encode(ASKED))]
        while len(answer) < ANSWER_TOKENS:
            answer.append(text.add_by_steps(answer[-1:]))
        text.add_by_steps(answer[-1:])
        return tokenizer.decode(answer)

    answers = {}
    for length in ASK_AT:
        missing = length - len(encode(ASKED)) - len(text)
        if turns and answers:
            text.add_as_turn(take(written, missing))
        else:
            text.add_by_steps(take(written, missing))
        answers[length] = ask()
        text.add_by_steps(encode(RESUMED))
    missed = {length: answer for length, answer in answers.items() if "7402958" not in answer}
    assert not missed


def take(token_ids: Iterator[int], count: int) -> list[int]:
    """The next so many."""
    return [next(token_ids) for _ in range(count)]
