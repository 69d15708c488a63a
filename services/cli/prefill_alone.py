"""Prompts computed by the prefill node's model alone, in a process of its own.

The model is loaded as a node loads it, and the process ends before nodes start, so that the device
is theirs. KV stays where it is made: nothing leaves the device but the last logits.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxion_core.config.settings import ModelSettings
from fluxion_core.geometry import WindowSpec
from fluxion_core.lab.benchmark.first_token import Prompts
from fluxion_core.prompt.compute import compute_prompt
from services.node import NodeModel, load_node_model
from services.prefill.config import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS


@dataclass(frozen=True)
class PrefillTimes:
    """Seconds of computing alone, and what computed."""

    seconds: dict[int, list[float]]
    """By length of the prompt, one for each repeat."""
    model: str
    revision: str
    gpu: str
    """Its name; empty on a CPU."""


def measure_alone(
    model: Path, device: str, prompts: Sequence[Prompts], *, has_profile: bool
) -> PrefillTimes:
    """Compute prompts of random tokens; blocks until the process has ended.

    Args:
        model: directory or file.
        device: cpu, cuda or cuda:N.
        prompts: lengths, and how often each is computed.
        has_profile: make each prompt's profile too, as for policies that decide by it.

    Raises:
        FluxionError: the model or the device cannot be used.
    """
    context = multiprocessing.get_context("spawn")
    # Its threads wait as those of nodes do; this is before torch is loaded there.
    passive = ("OMP_WAIT_POLICY", "PASSIVE")
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=os.putenv, initargs=passive
    ) as process:
        return process.submit(_measure, model, device, tuple(prompts), has_profile).result()


def _measure(
    path: Path, device: str, prompts: Sequence[Prompts], has_profile: bool
) -> PrefillTimes:
    model = load_node_model(ModelSettings(model=str(path), device=device))
    # Two chunks: kernels are compiled and memory is taken before the clock starts.
    _seconds_of(model, 2 * _chunk_tokens(model), has_profile)
    seconds: dict[int, list[float]] = {}
    for one in prompts:
        times = [_seconds_of(model, one.tokens, has_profile) for _ in range(one.repeats)]
        seconds.setdefault(one.tokens, []).extend(times)
    where = model.loaded.decoder.embedding.device
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else ""
    return PrefillTimes(seconds, model.loaded.name, model.loaded.revision_hash, gpu)


def _seconds_of(model: NodeModel, num_tokens: int, has_profile: bool) -> float:
    vocab_size = model.loaded.config.vocab_size
    token_ids = [random.randrange(vocab_size) for _ in range(num_tokens)]
    started = time.perf_counter()
    compute_prompt(
        model.loaded.decoder,
        model.geometry(),
        token_ids,
        profile_window=WindowSpec() if has_profile else None,
        chunk_tokens=_chunk_tokens(model),
    )
    return time.perf_counter() - started


def _chunk_tokens(model: NodeModel) -> int:
    is_on_gpu = model.loaded.decoder.embedding.device.type == "cuda"
    return GPU_CHUNK_TOKENS if is_on_gpu else CPU_CHUNK_TOKENS
