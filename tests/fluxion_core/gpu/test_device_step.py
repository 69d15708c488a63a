"""A step with its dense part on the GPU gives what the step on the CPU gives, whoever attends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fluxion_core.decode_step import StepReads, StepRow
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec
from fluxion_core.hybrid_attention import HybridAttention
from fluxion_core.kvstore.store import HostKvStore, SequenceKv
from fluxion_core.models.config import ModelConfig, RopeConfig
from fluxion_core.models.decoder import Decoder
from fluxion_core.scheduler.scheduler import CpuPool
from fluxion_core.selector.policy import parse_policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WINDOW = WindowSpec()
LENGTHS = (40, 700, 1500, 3000)
STEPS = 40


def _config() -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        hidden_size=256,
        intermediate_size=512,
        num_layers=3,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=512,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        context_tokens=8192,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=None,
        eos_token_ids=(),
    )


def _decoder(device: str) -> Decoder:
    decoder = Decoder(_config(), torch.device(device), torch.float32)
    generator = torch.Generator().manual_seed(1)
    for weight in decoder.parameters():
        scale = 1.0 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return decoder


def _store(digest_bits: int) -> tuple[HostKvStore, list[SequenceKv]]:
    config = _config()
    geometry = KvGeometry(
        config.num_layers, config.num_kv_heads, config.head_dim, digest_bits=digest_bits
    )
    return HostKvStore(geometry, 64 << 20, model_key=b""), []


def _sequences(store: HostKvStore) -> list[SequenceKv]:
    generator = torch.Generator().manual_seed(2)
    sequences = []
    for length in LENGTHS:
        sequence = store.reserve([length, *range(length - 1)], STEPS + 1)
        blocks = -(-length // BLOCK_TOKENS)
        geometry = store.geometry
        for layer in range(geometry.num_layers):
            shape = (geometry.num_kv_heads, blocks, 2, BLOCK_TOKENS, geometry.head_dim)
            payload = torch.randn(shape, generator=generator).bfloat16()
            if length % BLOCK_TOKENS:
                payload[:, -1, :, length % BLOCK_TOKENS :] = 0
            sequence.write_blocks(layer, 0, length, payload.view(torch.uint8).numpy().tobytes())
        sequence.commit()
        sequences.append(sequence)
    return sequences


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def _on_cpu(policy: str, digest_bits: int, tokens: Tensor) -> tuple[Tensor, list[StepReads]]:
    store, _ = _store(digest_bits)
    sequences = _sequences(store)
    decoder = _decoder("cpu")
    attention = HybridAttention(store, WINDOW, num_heads=8, pool=CpuPool(2))
    logits, reads = [], []
    for token in tokens:
        positions = torch.tensor([sequence.num_tokens for sequence in sequences])
        attention.begin_step(sequences, [parse_policy(policy)] * len(sequences))
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
@pytest.mark.parametrize("lanes", ["cpu", "gpu", "both"])
def test_logits_and_reads_are_those_of_the_cpu(lanes: str, policy: str, digest_bits: int) -> None:
    from fluxion_core.gpu.device_step import DeviceStep

    tokens = torch.randint(512, (STEPS, len(LENGTHS)), generator=torch.Generator().manual_seed(3))
    expected, expected_reads = _on_cpu(policy, digest_bits, tokens)
    store, _ = _store(digest_bits)
    decoder = _decoder("cuda")
    step = DeviceStep(
        decoder,
        store,
        WINDOW,
        CpuPool(2),
        max_rows=5,
        max_context_tokens=8192,
        lanes=lanes,  # type: ignore[arg-type]
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
        assert (times.lane_tasks > 0) == (lanes == "gpu") or lanes == "both"
    finally:
        step.close()
