"""Prefill's attention port on a GPU: what it attends to, and the frames that leave beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxion_core.errors import RequestCancelledError
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstream.handoff import Frame
from fluxion_core.planning.prompt_profile import PromptProfile, pack
from fluxion_core.prompt.capture import KvCapture, max_piece_bytes
from fluxion_core.prompt.outbox import DeviceOutbox

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_dim=64)
HEADS = 6
TOKENS, CHUNK = 1500, 512


def random_qkv(dtype: torch.dtype) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    heads = (HEADS, GEOMETRY.num_kv_heads, GEOMETRY.num_kv_heads)
    return [
        [
            torch.randn(TOKENS, number, GEOMETRY.head_dim, generator=generator).to(dtype)
            for number in heads
        ]
        for _ in range(GEOMETRY.num_layers)
    ]


def run(
    device: str, dtype: torch.dtype, max_under_way: int = 0
) -> tuple[list[Frame], Tensor, list[PromptProfile]]:
    """All layers of a prompt in chunks: frames, what attention gave, profiles."""
    frames: list[Frame] = []
    outbox = None
    if max_under_way:
        size = max_piece_bytes(GEOMETRY)
        outbox = DeviceOutbox(torch.device(device), size, max_under_way=max_under_way)
    capture = KvCapture(
        GEOMETRY,
        num_tokens=TOKENS,
        kv_from_token=32,
        emit=frames.append,
        is_cancelled=lambda: False,
        device=torch.device(device),
        outbox=outbox,
        profile_window=WindowSpec(64, 256),
    )
    layers = [[part.to(device) for part in layer] for layer in random_qkv(dtype)]
    attended = []
    for first in range(0, TOKENS, CHUNK):
        chunk = slice(first, first + CHUNK)
        capture.begin_chunk(first)
        attended.append(
            torch.stack(
                [
                    capture.attend(number, *(part[chunk] for part in layer))
                    for number, layer in enumerate(layers)
                ]
            )
        )
        capture.finish_chunk()
    assert capture.profile_seconds > 0
    return frames, torch.cat(attended, 1).cpu(), capture.profiles


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("max_under_way", [1, 3, 64])
def test_attention_frames_and_profiles_are_those_of_the_cpu(
    max_under_way: int, dtype: torch.dtype, error: float
) -> None:
    frames, attended, profiles = run("cuda", dtype, max_under_way)
    expected_frames, expected, expected_profiles = run("cpu", dtype)
    assert frames == expected_frames
    difference = (attended.double() - expected.double()).norm() / expected.double().norm()
    assert difference < error
    packed, wanted = (
        torch.frombuffer(bytearray(pack(each)), dtype=torch.float32)
        for each in (profiles, expected_profiles)
    )
    # Of blocks with nearly equal bounds either may be counted as read.
    assert ((packed - wanted).abs() > 1e-2).float().mean() < 0.02


def test_what_is_dropped_is_not_handed_on_and_frees_its_buffers() -> None:
    device = torch.device("cuda")
    outbox = DeviceOutbox(device, 1 << 20, max_under_way=2)
    taken: list[memoryview] = []
    payload = torch.full((1 << 20,), 7, dtype=torch.uint8, device=device)
    outbox.put(payload, taken.append)
    outbox.drop()
    assert taken == []
    for number in range(5):
        outbox.put(torch.full((100,), number, dtype=torch.uint8, device=device), taken.append)
    outbox.drain()
    assert taken == [bytes([number]) * 100 for number in range(5)]


def test_what_is_held_stays_as_it_is_while_others_leave() -> None:
    device = torch.device("cuda")
    outbox = DeviceOutbox(device, 1 << 20, max_under_way=2)
    held: list[memoryview] = []
    passing: list[int] = []
    for number in range(20):
        payload = torch.full((1 << 20,), number, dtype=torch.uint8, device=device)
        outbox.put(payload, held.append)
        outbox.put(payload + 100, lambda piece: passing.append(piece[-1]))
    outbox.drain()
    assert passing == [number + 100 for number in range(20)]
    assert held == [bytes([number]) * (1 << 20) for number in range(20)]


def test_a_cancelled_prompt_stops_before_its_next_layer() -> None:
    capture = KvCapture(
        GEOMETRY,
        num_tokens=TOKENS,
        kv_from_token=0,
        emit=lambda _: None,
        is_cancelled=lambda: True,
        device=torch.device("cuda"),
        outbox=DeviceOutbox(torch.device("cuda"), max_piece_bytes(GEOMETRY)),
    )
    with pytest.raises(RequestCancelledError):
        capture.attend(0, *(part.cuda() for part in random_qkv(torch.float32)[0]))
