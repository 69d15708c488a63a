"""A step with its dense part on the GPU gives what the step on the CPU gives, whoever attends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.step import StepReads, StepRow
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.planning.policy import parse_policy
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.rows import rows_of
from tests.fluxion_core.decode.small_step import (
    WINDOW,
    random_decoder,
    random_sequence,
    store_for,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTHS = (40, 700, 1500, 3000)
STEPS = 40


def _sequences(store: HostKvStore) -> list[SequenceKv]:
    generator = torch.Generator().manual_seed(2)
    return [
        random_sequence(store, length, STEPS + 1, generator, first=length) for length in LENGTHS
    ]


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def _on_cpu(policy: str, digest_bits: int, tokens: Tensor) -> tuple[Tensor, list[StepReads]]:
    store = store_for(digest_bits)
    sequences = _sequences(store)
    decoder = random_decoder("cpu")
    attention = HostAttention(store, WINDOW, num_heads=8, pool=CpuPool(2))
    logits, reads = [], []
    for token in tokens:
        positions = torch.tensor([sequence.num_tokens for sequence in sequences])
        attention.begin_step(rows_of(sequences, [parse_policy(policy)] * len(sequences)))
        with torch.inference_mode():
            logits.append(decoder.logits(decoder(token, positions, attention)))
        reads = attention.end_step()
    return torch.stack(logits), reads


@pytest.mark.parametrize(
    ("policy", "digest_bits"),
    # Choices by 8-bit digests are the lane kernels' tests: among random keys many bounds are nearly
    # equal, and the CPU's arithmetic is another.
    [("exact", 16), ("exact", 8), ("fixed(16, 10 %)", 16), ("fixed(64, 25 %)", 16)],
)
@pytest.mark.parametrize("tier_bytes", [0, 64 << 20, 1 << 20], ids=["none", "all", "little"])
@pytest.mark.parametrize("lanes", ["cpu", "gpu", "both"])
def test_logits_and_reads_are_those_of_the_cpu(
    lanes: str, policy: str, digest_bits: int, tier_bytes: int
) -> None:
    from fluxion_core.decode.device.step import DeviceStep

    tokens = torch.randint(512, (STEPS, len(LENGTHS)), generator=torch.Generator().manual_seed(3))
    expected, expected_reads = _on_cpu(policy, digest_bits, tokens)
    store = store_for(digest_bits)
    decoder = random_decoder("cuda")
    step = DeviceStep(
        decoder,
        store,
        WINDOW,
        CpuPool(2),
        max_rows=5,
        max_context_tokens=8192,
        lanes=lanes,  # type: ignore[arg-type]
        device_kv_bytes=tier_bytes,
    )
    try:
        sequences = _sequences(store)
        slots = [step.join(sequence) for sequence in sequences]
        chosen = parse_policy(policy)
        got, reads = [], []
        for token in tokens.tolist():
            rows = [
                StepRow(sequence, slot, token_id, chosen)
                for sequence, slot, token_id in zip(sequences, slots, token, strict=True)
            ]
            logits, reads = step.run(rows)
            got.append(logits.clone())
        difference = (torch.stack(got) - expected).norm() / expected.norm()
        # Queries differ in their last bits: of blocks with nearly equal bounds either may be read.
        assert difference < (1e-4 if policy == "exact" else 3e-2)
        for read, wanted in zip(reads, expected_reads, strict=True):
            assert read.scanned_bytes == wanted.scanned_bytes
            assert read.attended_bytes == pytest.approx(wanted.attended_bytes, rel=0.05)
        assert torch.isfinite(torch.stack(got)).all()
        times = step.times()
        assert 0 <= times.waited_idle <= times.waited <= times.total
        resident = sum(read.resident_bytes for read in reads)
        attended = sum(read.attended_bytes for read in reads)
        if tier_bytes == 64 << 20:
            # There is room for all, and in 40 steps all has come, but for what is new.
            assert 0.95 * attended < resident <= attended
        else:
            assert (0 < resident < attended) == bool(tier_bytes) or policy == "fixed(16, 10 %)"
            assert (times.lane_tasks > 0) == (lanes == "gpu") or lanes == "both"
    finally:
        step.close()


def test_cpus_alone_have_no_digests_on_the_device_where_no_tier_selects_by_them() -> None:
    from fluxion_core.decode.device.step import DeviceStep

    # Less than a tier is made for.
    store = store_for(16, 16 << 20)
    options = {"max_rows": 1, "max_context_tokens": 8192, "device_kv_bytes": None}
    step = DeviceStep(random_decoder("cuda"), store, WINDOW, CpuPool(2), lanes="cpu", **options)
    try:
        assert step.selection is None
        assert not step.digests_on_device
    finally:
        step.close()
