"""Divergence from exact: of exact itself none, of others the KL of distributions along one text."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxion_core.decode.bodies import step_for
from fluxion_core.errors import ConfigError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.evaluation.case import Case
from fluxion_core.lab.evaluation.divergence import compare_divergence
from fluxion_core.lab.evaluation.journal import Journal
from fluxion_core.lab.evaluation.runner import Runner
from fluxion_core.lab.evaluation.work import Answer, CaseJob, Method
from fluxion_core.lab.held_prompt import PromptMaker
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.policy import parse_policy
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.lab.training.test_replay import Causal

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=64)
EXACT = Method("exact", parse_policy("exact"), is_forced=True)
WINDOW_ONLY = Method("fixed(128, 1 %)", parse_policy("fixed(128, 1 %)"), is_forced=True)
FED = 6


def fed_work(tokens: int, ways: tuple[Method, ...]) -> tuple[CaseJob, list[int]]:
    ids = torch.randint(0, 250, (tokens,), generator=torch.Generator().manual_seed(2)).tolist()
    case = Case("divergence", tokens, 0, tuple(ids[:-FED]), (), None, FED)
    return CaseJob(case, ways, tuple(ids[-FED:]), is_compared=True), ids


def run(decoder: Decoder, tokenizer: Tokenizer, work: CaseJob, batch: int = 4) -> dict[str, Answer]:
    store = HostKvStore(GEOMETRY, 20 * (GEOMETRY.slab_bytes + 4096), model_key=b"")
    step = step_for(copy.deepcopy(decoder), store, WindowSpec(), CpuPool(1), max_rows=batch)
    prompts = PromptMaker(decoder, GEOMETRY)
    runner = Runner(step, store, prompts, tokenizer, decoder.config, batch=batch)
    answers: list[Answer] = []
    runner.run([work], answers.append)
    return {answer.way: answer for answer in answers}


@pytest.mark.parametrize("batch", [1, 4])
def test_all_ways_are_fed_the_text_and_exact_differs_from_itself_by_nothing(
    decoder: Decoder, tokenizer: Tokenizer, batch: int
):
    work, ids = fed_work(900, (WINDOW_ONLY, EXACT))
    answers = run(decoder, tokenizer, work, batch)
    exact, other = answers["exact, forced"], answers["fixed(128, 1 %), forced"]
    # The first token is the prompt's; then one step for each token that is fed but the last.
    assert (exact.steps, other.steps) == (FED - 1, FED - 1)
    assert exact.divergences == (0.0,) * (FED - 1)
    assert min(other.divergences) > 1e-6
    with torch.inference_mode():
        hidden = decoder(torch.tensor(ids), torch.arange(len(ids)), Causal())
        likeliest = decoder.logits(hidden[-FED - 1 : -1]).argmax(-1)
    assert exact.token_ids == tuple(likeliest.tolist())


def test_ways_are_compared_only_with_exact_and_a_text(decoder: Decoder, tokenizer: Tokenizer):
    for ways in ((WINDOW_ONLY,), (EXACT, replace(WINDOW_ONLY, is_forced=False))):
        with pytest.raises(ConfigError, match="all ways are fed a text"):
            run(decoder, tokenizer, fed_work(300, ways)[0])


def test_rows_are_means_of_documents_and_shares_of_bytes(answer: Callable[..., Answer]):
    def fed(number: int, way: str, tokens: tuple[int, ...], kl: tuple[float, ...], read: int):
        made = answer(
            "divergence", number, f"{way}, forced", None, token_ids=tokens, read=(0, read)
        )
        return replace(made, divergences=kl)

    answers = [
        fed(0, "exact", (1, 2, 3), (0.0, 0.0), 1000),
        fed(0, "fixed(16, 5 %)", (1, 2, 4), (0.1, 0.3), 200),
        fed(0, "fast", (1, 5, 6), (0.2, 0.4), 50),
        fed(1, "exact", (1, 2, 3), (0.0, 0.0), 1000),
        fed(1, "fixed(16, 5 %)", (1, 2, 3), (0.0, 0.0), 200),
        fed(1, "fast", (1, 2, 3), (0.0, 0.2), 50),
        # Without an answer of `fast`, a document does not count.
        fed(2, "exact", (1, 2, 3), (0.0, 0.0), 1000),
        fed(2, "fixed(16, 5 %)", (9, 9, 9), (9.0, 9.0), 200),
    ]
    rows = {
        row.way: row for row in compare_divergence(answers, ("exact", "fixed(16, 5 %)", "fast"))
    }
    assert set(rows) == {"fixed(16, 5 %)", "fast"}
    fast = rows["fast"]
    assert (fast.documents, fast.steps) == (2, 4)
    assert math.isclose(fast.divergence.mean, (0.3 + 0.1) / 2)
    assert (fast.of_exact, fast.of_fixed) == (0.05, 0.25)
    assert (fast.same_token.mean, rows["fixed(16, 5 %)"].same_token.mean) == (0.5, 0.75)


def test_a_journal_keeps_divergences(tmp_path: Path, answer: Callable[..., Answer]):
    path = tmp_path / "journal.jsonl"
    kept = replace(answer("divergence", 0, "fast, forced", None), divergences=(0.25, 0.5))
    Journal(path, {}, resume=False).add(kept)
    assert json.loads(path.read_text().splitlines()[1])["divergences"] == [0.25, 0.5]
    assert list(Journal(path, {}, resume=True).answers.values()) == [kept]
