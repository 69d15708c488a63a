"""`fluxion bench prefill`: what it costs that a prompt's KV leaves the GPU while it is computed.

Three ways in turns, on one GPU, one prompt of random tokens at a time through the prefill engine's
own attention port: KV stays (the limit), KV leaves on a stream of its own (what the engine does),
and each layer's KV is copied before the next layer begins (the rival). Weights are random: time
does not depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from fluxion_core.errors import ConfigError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kvstream.handoff import Frame
from fluxion_core.lab.benchmark.model_shapes import random_decoder, shape_named
from fluxion_core.lab.benchmark.report import describe_machine
from fluxion_core.lab.provenance import Provenance
from fluxion_core.models.decoder import Decoder
from fluxion_core.prompt.capture import KvCapture, max_piece_bytes
from fluxion_core.prompt.compute import PromptComputation
from fluxion_core.prompt.outbox import DeviceOutbox

STAYS, BESIDE, BETWEEN = "KV stays", "KV leaves beside", "KV leaves between layers"
WAYS = (STAYS, BESIDE, BETWEEN)


def bench_prefill(
    console: Console, shape: str, lengths: Sequence[int], *, chunk_tokens: int, repeats: int
) -> dict[str, object]:
    """Measure, print a table, and return the report.

    Args:
        console: takes the table.
        shape: of the model: see model_shapes.
        lengths: of prompts, tokens.
        chunk_tokens: computed at a time.
        repeats: of every way; medians are reported.

    Raises:
        ConfigError: there is no CUDA device, or no such shape.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench prefill needs a CUDA device; torch finds none here")
    device = torch.device("cuda")
    config = shape_named(shape)
    decoder = random_decoder(config, device)
    geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
    outbox = DeviceOutbox(device, max_piece_bytes(geometry))
    table = Table("tokens", "way", "seconds", "tokens/s", "of KV stays", "KV GB/s")
    rows: list[dict[str, object]] = []
    for length in lengths:
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(repeats + 1):
            for way in WAYS:
                taken = _run(decoder, geometry, length, chunk_tokens, way, outbox)
                if number:
                    # The first round compiles and allocates.
                    seconds[way].append(taken)
        medians = {way: median(times) for way, times in seconds.items()}
        for way, middle in medians.items():
            row = {
                "tokens": length,
                "way": way,
                "seconds": middle,
                "tokens_per_second": length / middle,
                "of_kv_stays": middle / medians[STAYS],
                "kv_bytes_per_second": length * geometry.token_bytes / middle,
            }
            rows.append(row)
            rate = f"{length * geometry.token_bytes / middle / 1e9:.2f}" if way != STAYS else ""
            table.add_row(
                *(str(length), way, f"{middle:.3f}", f"{length / middle:.0f}"),
                *(f"{middle / medians[STAYS]:.3f}", rate),
            )
    console.print(table)
    return {
        "about": Provenance.of_shape(shape, gpu=torch.cuda.get_device_name(device)).as_json(),
        "machine": describe_machine() | {"gpu": torch.cuda.get_device_name(device)},
        "shape": shape,
        "chunk_tokens": chunk_tokens,
        "repeats": repeats,
        "rows": rows,
    }


def _run(
    decoder: Decoder,
    geometry: KvGeometry,
    num_tokens: int,
    chunk_tokens: int,
    way: str,
    outbox: DeviceOutbox,
) -> float:
    """Seconds of one prompt, until its last KV has left and its last logits are there."""
    device = decoder.embedding.device
    received = 0

    def take(frame: Frame) -> None:
        nonlocal received
        received += len(frame.payload)

    capture = KvCapture(
        geometry,
        num_tokens=num_tokens,
        kv_from_token=num_tokens if way == STAYS else 0,
        emit=take,
        is_cancelled=lambda: False,
        device=device,
        outbox=_Blocking(outbox) if way == BETWEEN else outbox,
    )
    token_ids = torch.randint(decoder.config.vocab_size, (num_tokens,)).tolist()
    computation = PromptComputation(decoder, token_ids, capture)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    while computation.advance(chunk_tokens) is None:
        pass
    seconds = time.perf_counter() - started
    assert received == (0 if way == STAYS else num_tokens * geometry.token_bytes)
    return seconds


class _Blocking:
    """The rival: nothing goes on before what was put in has left."""

    def __init__(self, outbox: DeviceOutbox) -> None:
        self._outbox = outbox

    def put(self, payload: torch.Tensor, take: Callable[[memoryview], None]) -> None:
        """Copy, and wait."""
        self._outbox.put(payload, take)
        self._outbox.drain()

    def drain(self) -> None:
        """Nothing is under way."""
