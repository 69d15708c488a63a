"""Steps on a GPU choose the same blocks wherever digests are: in device memory or in the store."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.step import StepReads, StepRow
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.observe.device_usage import DeviceUsage
from fluxion_core.planning.policy import parse_policy
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.small_step import (
    CONFIG,
    WINDOW,
    random_decoder,
    random_sequence,
    store_for,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 48
CHANGE, RETURN = 16, 32
"""Steps before which a sequence takes another one's place, and before which that one comes back."""
LENGTHS = (40, 700, 1500, 3000, 2200)
SLABS = 1 + 3 + 6 + 4
"""Of the regions of all but the first, which has none."""


@dataclass
class Run:
    """What a series of steps chose and gave."""

    scores: list[Tensor] = field(default_factory=list)
    """Of the first layer, of each row of each step: [heads, blocks of its region]. They depend on
    tokens and digests alone, not on the order of any sum."""
    logits: list[Tensor] = field(default_factory=list)
    reads: list[list[StepReads]] = field(default_factory=list)
    usage: DeviceUsage = field(default_factory=DeviceUsage)


def _present(number: int) -> list[int]:
    return [0, 1, 2, 4] if CHANGE <= number < RETURN else [0, 1, 2, 3]


def _sequences(store: HostKvStore) -> list[SequenceKv]:
    generator = torch.Generator().manual_seed(2)
    return [
        random_sequence(store, length, STEPS + 1, generator, first=length) for length in LENGTHS
    ]


def _run(lanes: str, digest_bits: int, max_slabs: int | None) -> Run:
    from fluxion_core.decode.device.step import DeviceStep

    done = Run()
    kept: dict[str, Tensor] = {}

    def keep(layer: int, scores: Tensor, step: Tensor) -> None:
        del step
        if layer == 0:
            if "scores" not in kept:
                kept["scores"] = torch.zeros_like(scores)
            kept["scores"].copy_(scores)

    store = store_for(digest_bits)
    step = DeviceStep(
        random_decoder("cuda"),
        store,
        WINDOW,
        CpuPool(2),
        max_rows=4,
        max_context_tokens=8192,
        lanes=lanes,  # type: ignore[arg-type]
        device_kv_bytes=1 << 20,
        max_digest_slabs=max_slabs,
        scores_hook=keep,
    )
    try:
        assert step.digests_on_device == (max_slabs is None)
        sequences = _sequences(store)
        slots = {index: step.join(sequences[index]) for index in range(4)}
        tokens = torch.randint(512, (STEPS, 4), generator=torch.Generator().manual_seed(3))
        for number, token in enumerate(tokens.tolist()):
            for gone in slots.keys() - set(_present(number)):
                step.leave(slots.pop(gone))
            for new in set(_present(number)) - slots.keys():
                slots[new] = step.join(sequences[new])
            rows = [
                StepRow(sequences[index], slots[index], token_id, parse_policy("fixed(16, 10 %)"))
                for index, token_id in zip(_present(number), token, strict=True)
            ]
            regions = [WINDOW.retrieval_region(row.sequence.num_tokens + 1) for row in rows]
            logits, reads = step.run(rows)
            torch.cuda.synchronize()
            done.logits.append(logits.clone())
            done.reads.append(reads)
            for scores, region in zip(kept["scores"].cpu(), regions, strict=True):
                done.scores.append(scores[:, : len(region) // 16])
        done.usage = step.usage
    finally:
        step.close()
    return done


@pytest.mark.parametrize("digest_bits", [16, 8])
@pytest.mark.parametrize("max_slabs", [1, 5, SLABS - 1])
@pytest.mark.parametrize("lanes", ["cpu", "both"])
def test_steps_with_places_for_some_digests_read_what_those_with_all_read(
    lanes: str, max_slabs: int, digest_bits: int
) -> None:
    expected, got = _run(lanes, digest_bits, None), _run(lanes, digest_bits, max_slabs)
    assert len(got.scores) == 4 * STEPS
    assert all(map(torch.equal, got.scores, expected.scores))
    assert got.scores[3].shape == (CONFIG.num_heads, (3000 + 1 - 256) // 16 - 4)
    for reads, wanted in zip(got.reads, expected.reads, strict=True):
        for read, other in zip(reads, wanted, strict=True):
            assert read.scanned_bytes == other.scanned_bytes
            assert read.attended_bytes == pytest.approx(other.attended_bytes, rel=0.05)
    # What a step finds in the tier depends on when a fill ends, and with it the order of sums.
    logits, others = torch.stack(got.logits), torch.stack(expected.logits)
    assert (logits - others).norm() / others.norm() < 3e-2


def test_who_watches_sees_where_digests_are_read() -> None:
    whole, part = _run("cpu", 16, None).usage, _run("cpu", 16, 5).usage
    assert whole.tier is not None
    assert part.tier is not None
    slab = store_for(16).geometry.digest_bytes
    assert part.tier.digest_capacity_bytes == part.tier.digest_bytes["device"] == 5 * slab
    assert part.tier.digest_bytes["host"] > 0 == whole.tier.digest_bytes["host"]
    assert sum(part.tier.digest_bytes.values()) == sum(whole.tier.digest_bytes.values())
    digests = "host_to_device", "digests"
    assert part.pcie_bytes[digests] > whole.pcie_bytes[digests] > 0
