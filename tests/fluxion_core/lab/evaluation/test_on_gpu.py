"""Through a device's step, evaluation finds what it finds through the host's."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.decode.bodies import step_for
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.evaluation.case import Case
from fluxion_core.lab.evaluation.runner import Runner
from fluxion_core.lab.evaluation.work import Answer, CaseJob, Method
from fluxion_core.lab.held_prompt import PromptMaker
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.policy import parse_policy
from fluxion_core.pool.cpu_pool import CpuPool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=64)
WAYS = tuple(
    Method(name, parse_policy(name), is_forced=True) for name in ("exact", "fixed(128, 1 %)")
)
FED = 8


def copy_on(device: str, decoder: Decoder) -> Decoder:
    made = Decoder(decoder.config, torch.device(device), torch.float32)
    made.load_state_dict(decoder.state_dict())
    return made


def answers_on(device: str, decoder: Decoder, tokenizer: Tokenizer) -> dict[str, Answer]:
    ids = torch.randint(0, 250, (900,), generator=torch.Generator().manual_seed(2)).tolist()
    case = Case("divergence", 900, 0, tuple(ids[:-FED]), (), None, FED)
    prompts = PromptMaker(copy_on(device, decoder), GEOMETRY)
    store = HostKvStore(GEOMETRY, 20 * (GEOMETRY.slab_bytes + 4096), model_key=b"")
    own = copy_on(device, decoder)
    step = step_for(own, store, WindowSpec(), CpuPool(2), max_rows=2)
    try:
        runner = Runner(step, store, prompts, tokenizer, decoder.config, batch=2)
        found: list[Answer] = []
        runner.run([CaseJob(case, WAYS, tuple(ids[-FED:]), is_compared=True)], found.append)
    finally:
        step.close()
    return {answer.way: answer for answer in found}


def test_a_device_finds_the_host_s_tokens_reads_and_divergences_in_float32(
    decoder: Decoder, tokenizer: Tokenizer
):
    host = answers_on("cpu", decoder, tokenizer)
    device = answers_on("cuda", decoder, tokenizer)
    for way, expected in host.items():
        assert device[way].token_ids == expected.token_ids
        assert device[way].attended_bytes == expected.attended_bytes
        assert device[way].divergences == pytest.approx(expected.divergences, rel=0.02, abs=1e-5)
