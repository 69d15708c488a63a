"""What prefill attends to, and the bytes that leave: against float64, and byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxion_core.errors import RequestCancelledError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kernels.dense_attention import reference
from fluxion_core.kvstream.handoff import FRAME_PAYLOAD_BYTES, Frame
from fluxion_core.planning.profiled_queries import ProfiledPositions
from fluxion_core.planning.prompt_estimate import PromptEstimator, padded_tokens
from fluxion_core.planning.prompt_profile import PromptProfile, pack
from fluxion_core.prompt.capture import KvCapture

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=16)
HEADS = 6


def random_qkv(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)

    def values(heads: int) -> Tensor:
        return torch.randn(num_tokens, heads, GEOMETRY.head_dim, generator=generator)

    return values(HEADS), values(GEOMETRY.num_kv_heads), values(GEOMETRY.num_kv_heads)


def run(
    num_tokens: int, chunk_tokens: int, kv_from_token: int = 0, geometry: KvGeometry = GEOMETRY
) -> tuple[list[Frame], Tensor]:
    """One layer of a prompt in chunks: frames of layer 1, and what attention gave."""
    query, key, value = random_qkv(num_tokens)
    frames: list[Frame] = []
    capture = KvCapture(
        geometry,
        num_tokens=num_tokens,
        kv_from_token=kv_from_token,
        emit=frames.append,
        is_cancelled=lambda: False,
        device=torch.device("cpu"),
    )
    attended = []
    for first in range(0, num_tokens, chunk_tokens):
        chunk = slice(first, first + chunk_tokens)
        capture.begin_chunk(first)
        attended.append(capture.attend(1, query[chunk], key[chunk], value[chunk]))
    return frames, torch.cat(attended)


@pytest.mark.parametrize("chunk_tokens", [16, 48, 512])
@pytest.mark.parametrize("num_tokens", [1, 16, 100])
def test_attention_is_causal_over_the_rounded_keys_and_values(num_tokens: int, chunk_tokens: int):
    query, key, value = random_qkv(num_tokens)
    _, attended = run(num_tokens, chunk_tokens)

    def as_sent(x: Tensor) -> Tensor:
        return x.bfloat16().double().transpose(0, 1)[None]

    expected, _ = reference.attend(
        query.double().transpose(0, 1)[None],
        as_sent(key),
        as_sent(value),
        torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril(),
    )
    # Keys that are not rounded miss by 1e-3 and more.
    torch.testing.assert_close(attended.double(), expected[0].transpose(0, 1), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("kv_from_token", [0, 32])
@pytest.mark.parametrize("num_tokens", [48, 55])
def test_payload_is_head_block_key_value_token_channel(num_tokens: int, kv_from_token: int):
    _, key, value = random_qkv(num_tokens)
    frames, _ = run(num_tokens, 16, kv_from_token)
    seen = []
    for frame in frames:
        assert frame.layer == 1
        payload = torch.from_numpy(np.frombuffer(frame.payload, dtype=np.uint16).copy())
        numbers = iter(payload.view(torch.bfloat16).tolist())
        blocks = range(frame.first_token, frame.first_token + frame.num_tokens, BLOCK_TOKENS)
        for head in range(GEOMETRY.num_kv_heads):
            for block in blocks:
                for source in (key, value):
                    for token in range(block, block + BLOCK_TOKENS):
                        for channel in range(GEOMETRY.head_dim):
                            expected = (
                                float(source[token, head, channel].bfloat16())
                                if token < num_tokens
                                else 0.0
                            )
                            assert next(numbers) == expected
        assert next(numbers, None) is None
        seen += range(frame.first_token, frame.first_token + frame.num_tokens)
    assert seen == list(range(kv_from_token, num_tokens))


def test_a_chunk_larger_than_a_frame_leaves_as_several():
    wide = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=16 * 1024)
    frames: list[Frame] = []
    capture = KvCapture(
        wide,
        num_tokens=40,
        kv_from_token=0,
        emit=frames.append,
        is_cancelled=lambda: False,
        device=torch.device("cpu"),
    )
    capture.begin_chunk(0)
    capture.attend(0, *(torch.zeros(40, 2, wide.head_dim) for _ in range(3)))
    # By hand: a block of both heads is 2 x 2 x 16 x 16,384 x 2 B = 2 MiB, so one block a frame.
    assert wide.num_kv_heads * wide.block_bytes == 2 * FRAME_PAYLOAD_BYTES
    assert [(frame.first_token, frame.num_tokens) for frame in frames] == [
        (0, 16),
        (16, 16),
        (32, 8),
    ]


def test_frames_that_leave_together_are_those_that_leave_alone():
    wide = KvGeometry(num_layers=1, num_kv_heads=2, head_dim=512)
    query, key, value = (torch.randn(600, 2, wide.head_dim) for _ in range(3))
    frames: list[Frame] = []
    capture = KvCapture(
        wide,
        num_tokens=600,
        kv_from_token=0,
        emit=frames.append,
        is_cancelled=lambda: False,
        device=torch.device("cpu"),
    )
    capture.begin_chunk(0)
    capture.attend(0, query, key, value)
    # By hand: a block of both heads is 64 KiB, so that 256 tokens are a frame of 1 MiB.
    assert [(one.first_token, one.num_tokens) for one in frames] == [
        (0, 256),
        (256, 256),
        (512, 88),
    ]
    for one in frames:
        numbers = torch.from_numpy(np.frombuffer(one.payload, dtype=np.int16).copy())
        kv = numbers.view(torch.bfloat16).view(2, -1, 2, BLOCK_TOKENS, wide.head_dim)
        for side, source in enumerate((key, value)):
            # [heads, blocks, tokens of a block, channels] to [tokens, heads, channels].
            sent = kv[:, :, side].flatten(1, 2).transpose(0, 1)[: one.num_tokens]
            tokens = source[one.first_token : one.first_token + one.num_tokens]
            assert torch.equal(sent, tokens.bfloat16())


def profile_of(num_tokens: int, chunk_tokens: int) -> list[PromptProfile]:
    query, key, value = random_qkv(num_tokens)
    capture = KvCapture(
        GEOMETRY,
        num_tokens=num_tokens,
        kv_from_token=0,
        emit=lambda _: None,
        is_cancelled=lambda: False,
        device=torch.device("cpu"),
        profile_window=WindowSpec(),
    )
    for first in range(0, num_tokens, chunk_tokens):
        chunk = slice(first, first + chunk_tokens)
        capture.begin_chunk(first)
        for layer in range(GEOMETRY.num_layers):
            capture.attend(layer, query[chunk], key[chunk] * (layer + 1), value[chunk])
    return capture.profiles


# 519 in chunks of 512 leaves 7 queries of the profile's last 16 for the last chunk; chunks of 16,
# none. 2,200 has spread queries of three chunks of 512.
@pytest.mark.parametrize("num_tokens", [9, 512, 519, 2200])
def test_the_profile_does_not_depend_on_chunks(num_tokens: int):
    query, key, value = random_qkv(num_tokens)
    padding = (0, 0, 0, padded_tokens(num_tokens) - num_tokens)

    def as_sent(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x.bfloat16().float().transpose(0, 1), padding)
        return padded.contiguous()

    estimator = PromptEstimator(num_tokens, WindowSpec())
    profiled = query[list(ProfiledPositions.of(num_tokens))]
    expected = pack(
        [
            estimator.estimate(profiled, as_sent(key * (layer + 1)), as_sent(value))
            for layer in range(GEOMETRY.num_layers)
        ]
    )
    for chunk_tokens in (16, 48, 512, 1024):
        assert pack(profile_of(num_tokens, chunk_tokens)) == expected


def test_no_profile_is_made_unless_it_is_wanted():
    query, key, value = random_qkv(64)
    capture = KvCapture(
        GEOMETRY,
        num_tokens=64,
        kv_from_token=0,
        emit=lambda _: None,
        is_cancelled=lambda: False,
        device=torch.device("cpu"),
    )
    capture.begin_chunk(0)
    capture.attend(0, query, key, value)
    assert capture.profiles == []


def test_a_cancelled_prompt_stops_at_the_next_layer():
    query, key, value = random_qkv(16)
    frames: list[Frame] = []
    capture = KvCapture(
        GEOMETRY,
        num_tokens=16,
        kv_from_token=0,
        emit=frames.append,
        is_cancelled=lambda: bool(frames),
        device=torch.device("cpu"),
    )
    capture.begin_chunk(0)
    capture.attend(0, query, key, value)
    with pytest.raises(RequestCancelledError):
        capture.attend(1, query, key, value)
    assert [frame.layer for frame in frames] == [0]
