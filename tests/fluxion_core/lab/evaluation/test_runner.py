"""Answers are those of plain greedy decoding, whatever else is in the batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fluxion_core.decode.bodies import step_for
from fluxion_core.errors import CapacityError, ConfigError, ContextLengthError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.evaluation.case import Case
from fluxion_core.lab.evaluation.metrics import Metric
from fluxion_core.lab.evaluation.runner import Runner
from fluxion_core.lab.evaluation.work import Answer, CaseJob, Method
from fluxion_core.lab.held_prompt import PromptMaker
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.policy import parse_policy
from fluxion_core.pool.cpu_pool import CpuPool

EXACT = Method("exact", parse_policy("exact"))
FIXED = Method("fixed(16, 5 %)", parse_policy("fixed(16, 5 %)"))

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=64)


def case(number: int, tokens: int, *, metric: Metric | None = None, new: int = 12) -> Case:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 250, (tokens,), generator=generator).tolist()
    return Case("toy", tokens, number, tuple(ids), ("never",), metric, new)


def run(
    decoder: Decoder,
    tokenizer: Tokenizer,
    work: Sequence[CaseJob],
    *,
    slabs: int = 40,
    batch: int = 4,
) -> dict[tuple[str, str], Answer]:
    store = HostKvStore(GEOMETRY, slabs * (GEOMETRY.slab_bytes + 4096), model_key=b"")
    step = step_for(copy.deepcopy(decoder), store, WindowSpec(), CpuPool(1), max_rows=batch)
    prompts = PromptMaker(decoder, GEOMETRY)
    runner = Runner(step, store, prompts, tokenizer, decoder.config, batch=batch)
    answers: list[Answer] = []
    runner.run(work, answers.append)
    found = {(answer.case_name, answer.way): answer for answer in answers}
    assert len(found) == len(answers)
    return found


class _RoundedCausal:
    """Plain causal attention over keys and values rounded to bfloat16."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = (x.bfloat16().float().repeat_interleave(group, dim=1) for x in (key, value))
        heads = [x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
        return scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)


def greedy(decoder: Decoder, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The whole text anew for every token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens = torch.tensor(ids)
            hidden = decoder(tokens, torch.arange(len(ids)), _RoundedCausal())
            ids.append(int(decoder.logits(hidden[-1:]).argmax()))
    return tuple(ids[len(prompt) :])


def test_exact_answers_are_those_of_plain_greedy_decoding(decoder: Decoder, tokenizer: Tokenizer):
    asked = case(1, 700)
    answers = run(decoder, tokenizer, [CaseJob(asked, (EXACT,))])
    assert answers[asked.name, "exact"].token_ids == greedy(decoder, asked.prompt_token_ids, 12)


def test_an_answer_does_not_depend_on_what_runs_beside_it(decoder: Decoder, tokenizer: Tokenizer):
    work = [CaseJob(case(i, 300 + 150 * i, new=5 + 3 * i), (EXACT, FIXED)) for i in range(5)]
    together = run(decoder, tokenizer, work)
    assert len(together) == 10
    for item in work:
        for way in item.ways:
            alone = run(decoder, tokenizer, [CaseJob(item.case, (way,))])
            assert alone[item.case.name, way.key] == together[item.case.name, way.key]


def test_a_small_store_makes_cases_wait_and_loses_none(decoder: Decoder, tokenizer: Tokenizer):
    work = [CaseJob(case(i, 600), (EXACT, FIXED)) for i in range(4)]
    # Room for one case at a time: two full slabs of 512 are not shared by what is not there.
    small = run(decoder, tokenizer, work, slabs=4)
    assert small == run(decoder, tokenizer, work)


def test_a_store_that_cannot_hold_a_case_is_an_error(decoder: Decoder, tokenizer: Tokenizer):
    with pytest.raises(CapacityError, match="host KV store"):
        run(decoder, tokenizer, [CaseJob(case(1, 600), (EXACT,))], slabs=1)


def test_a_prompt_beyond_the_context_is_an_error(decoder: Decoder, tokenizer: Tokenizer):
    with pytest.raises(ContextLengthError, match="2045 tokens plus 12"):
        run(decoder, tokenizer, [CaseJob(case(1, 2045), (EXACT,))])


def test_exact_reads_the_whole_region_and_fixed_a_part(decoder: Decoder, tokenizer: Tokenizer):
    asked = case(1, 1200)
    answers = run(decoder, tokenizer, [CaseJob(asked, (EXACT, FIXED))])
    exact, fixed = answers[asked.name, "exact"], answers[asked.name, FIXED.name]
    assert exact.steps == len(exact.token_ids) - 1
    assert exact.scanned_bytes == 0
    assert exact.attended_bytes == exact.region_bytes
    assert fixed.scanned_bytes > 0
    assert 0 < fixed.attended_bytes < fixed.region_bytes / 4


def test_a_forced_way_follows_the_tokens_of_exact(decoder: Decoder, tokenizer: Tokenizer):
    asked = case(1, 700)
    forced_exact = Method("exact", parse_policy("exact"), is_forced=True)
    forced = Method(FIXED.name, FIXED.policy, is_forced=True)
    answers = run(decoder, tokenizer, [CaseJob(asked, (forced, forced_exact, EXACT))])
    exact = answers[asked.name, "exact"]
    assert answers[asked.name, "exact, forced"].token_ids == exact.token_ids
    other = answers[asked.name, forced.key]
    assert len(other.token_ids) == len(exact.token_ids)
    # With exact's tokens known beforehand, as from a journal, nothing changes.
    again = run(decoder, tokenizer, [CaseJob(asked, (forced,), exact.token_ids)])
    assert again[asked.name, forced.key] == other


def test_a_forced_way_needs_something_to_follow(decoder: Decoder, tokenizer: Tokenizer):
    forced = Method(FIXED.name, FIXED.policy, is_forced=True)
    with pytest.raises(ConfigError, match="needs the way `exact`"):
        run(decoder, tokenizer, [CaseJob(case(1, 300), (forced,))])


def test_an_answer_ends_when_its_score_cannot_change(decoder: Decoder, tokenizer: Tokenizer):
    long = case(1, 400, new=30)
    whole = run(decoder, tokenizer, [CaseJob(long, (EXACT,))])[long.name, "exact"]
    wanted = tokenizer.decode(whole.token_ids[2:5])
    short = Case("toy", 400, 1, long.prompt_token_ids, (wanted,), Metric.MATCH_ALL, 30)
    answer = run(decoder, tokenizer, [CaseJob(short, (EXACT,))])[short.name, "exact"]
    assert answer.score == 100.0
    assert len(answer.token_ids) <= 5
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]


def test_one_line_answers_end_at_their_first_line_break():
    one_line = Case("toy", 0, 0, (), ("x",), Metric.F1, 9, is_one_line=True)
    assert not one_line.cannot_change("\n half")
    assert one_line.cannot_change("\n first\nsecond")
    assert one_line.answer_of("\n first\nsecond") == "first"


def test_a_code_answer_ends_after_its_first_line_of_code():
    code = Case("toy", 0, 0, (), ("x",), Metric.CODE_SIMILARITY, 9)
    assert not code.cannot_change("# comment\n    return")
    assert code.cannot_change("# comment\n    return x\n")
