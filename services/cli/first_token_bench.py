"""`fluxion bench first-token`: both nodes on random weights of a shape, a way of KV at a time.

What is measured, and what is made of it: fluxion_core/lab/benchmark/first_token.py.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from fluxion_core.client import NO_RETRIES, AsyncClient
from fluxion_core.errors import ConfigError, FluxionError
from fluxion_core.geometry import KvGeometry
from fluxion_core.lab.benchmark.first_token import (
    Answer,
    Crowd,
    Prompts,
    WayAnswers,
    first_token_report,
)
from fluxion_core.lab.benchmark.model_shapes import shape_named
from fluxion_core.lab.benchmark.random_model import write_random_model
from fluxion_core.lab.benchmark.report import describe_machine
from fluxion_core.lab.provenance import Provenance
from fluxion_core.models.config import ModelConfig
from fluxion_core.planning.policy import PredictedPolicy, parse_policy
from services.cli.commands.bench_first_token import BenchFirstToken
from services.cli.commands.up import Up
from services.cli.logs import LogPrinter
from services.cli.loopback_certificate import write_certificate
from services.cli.node_plans import plan_nodes
from services.cli.prefill_alone import PrefillTimes, measure_alone
from services.cli.processes import NodeGroup, finished_before, stop_signals
from services.cli.timed_requests import STREAM_NEW_TOKENS, Asker, TokenTimes
from services.cli.up import bring_up

_WARM_UP_TOKENS = 8192
"""Of a prompt that does not count, at most."""

_SETTLING_TOKENS = 16
"""Of the stream, which do not count: steps of its kind may be the node's first."""

_SPARE_SLABS = 8
_SLAB_ALIGNMENT_BYTES = 4096


async def bench_first_token(options: BenchFirstToken, console: Console) -> dict[str, object]:
    """Measure computing alone, then each way; print tables, return the report.

    Raises:
        ConfigError: a length, a shape or a way is none, or a prompt does not fit the context.
        FluxionError: the model or a device cannot be used, a node failed, or a request did.
    """
    config = shape_named(options.shape, options.layers)
    _check_lengths(options, config)
    policy = parse_policy(options.policy)
    devices = _devices(options)
    with tempfile.TemporaryDirectory(prefix="fluxion-bench-") as folder:
        model = Path(folder) / options.shape
        write_random_model(model, config)
        computing = await asyncio.to_thread(
            measure_alone,
            model,
            devices[0],
            _computed(options),
            has_profile=isinstance(policy, PredictedPolicy),
        )
        console.print(f"computing alone: {_medians(computing)}", highlight=False)
        measured = [
            await _measure_way(way, options, config, model, devices) for way in options.ways
        ]
    tables = first_token_report(console, computing.seconds, measured)
    about = Provenance.here(
        computing.model, computing.revision, commit=options.commit, gpu=computing.gpu
    )
    return {
        "about": about.as_json(),
        "machine": describe_machine(options.commit) | {"gpu": computing.gpu or "none"},
        "devices": {"prefill": devices[0], "decode": devices[1]},
        "options": _kept(options),
        **tables,
    }


def _check_lengths(options: BenchFirstToken, config: ModelConfig) -> None:
    longest = max((one.tokens for one in _computed(options)), default=0)
    if not longest:
        raise ConfigError("neither --prompt nor --crowd: there is nothing to measure")
    if longest + 1 > config.context_tokens:
        raise ConfigError(f"a prompt of {longest} tokens; the context has {config.context_tokens}")


def _computed(options: BenchFirstToken) -> list[Prompts]:
    """Prompts to be computed alone: the single ones, and the crowd's if none is as long."""
    prompts = list(options.prompts)
    if options.crowd and options.crowd_tokens not in {one.tokens for one in prompts}:
        prompts.append(Prompts(options.crowd_tokens, 1))
    return prompts


def _devices(options: BenchFirstToken) -> tuple[str, str]:
    """The prefill node's, and the decode node's: a GPU each if there are two."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    prefill = options.prefill_device or ("cuda:0" if count else "cpu")
    return prefill, options.decode_device or ("cuda:1" if count > 1 else prefill)


def _medians(computing: PrefillTimes) -> str:
    return ", ".join(f"{n:,} tokens {median(all_):.3f} s" for n, all_ in computing.seconds.items())


def _kept(options: BenchFirstToken) -> dict[str, object]:
    """Options of the report, and the nodes' settings that came from variables."""
    about_printing = ("json", "logs", "log_level", "commit")
    kept = {name: value for name, value in asdict(options).items() if name not in about_printing}
    return kept | {
        "variables": {name: os.environ[name] for name in os.environ if name.startswith("FLUXION_")}
    }


async def _measure_way(
    way: str,
    options: BenchFirstToken,
    config: ModelConfig,
    model: Path,
    devices: tuple[str, str],
) -> WayAnswers:
    files = [model.parent / f"{node}.toml" for node in ("prefill", "decode")]
    settings = (
        _prefill_settings(way, devices[0]),
        _decode_settings(way, options, config, devices),
    )
    tls = _tls_settings(model.parent) if options.tls else ("", "")
    for file, *parts in zip(files, settings, tls, strict=True):
        file.write_text("".join(parts), encoding="utf-8")
    plans = plan_nodes(
        Up(
            model=str(model),
            decode_listen="127.0.0.1:0",
            prefill_config=files[0],
            decode_config=files[1],
        )
    )
    nodes = NodeGroup(NodeLog(has_all=options.logs))
    started = time.perf_counter()
    with stop_signals(nodes.kill) as stop_requested:
        async with nodes:
            processes = await bring_up(nodes, plans, ready_seconds=options.ready_seconds)
            ready_seconds = time.perf_counter() - started
            async with AsyncClient(plans[1].address, retry=NO_RETRIES) as client:
                asker = Asker(client, processes, config.vocab_size, options.policy)
                measuring = asyncio.create_task(_measure(asker, options))
                if not await finished_before(measuring, stop_requested):
                    raise FluxionError("stopped by a signal")
                single, crowd = measuring.result()
    return WayAnswers(way, ready_seconds, tuple(single), crowd)


def _prefill_settings(way: str, device: str) -> str:
    return f'[model]\ndevice = "{device}"\n[handoff]\nways = ["{way}"]\n'


def _decode_settings(
    way: str, options: BenchFirstToken, config: ModelConfig, devices: tuple[str, str]
) -> str:
    """Every prompt by the prefill node; memory for all prompts that are there at once."""
    device_kv = options.device_kv or ("0" if devices[0] == devices[1] else "auto")
    return (
        f'[model]\ndevice = "{devices[1]}"\n[handoff]\nways = ["{way}"]\n'
        f"[engine]\nlocal_prefill_tokens = 0\n"
        f'[store]\nhost_kv_bytes = "{options.host_kv or _kv_bytes(options, config)}"\n'
        f'device_kv_bytes = "{device_kv}"\n'
    )


def _tls_settings(folder: Path) -> tuple[str, str]:
    """More settings of the prefill node and of the decode node."""
    certificate, key = write_certificate(folder)
    return (
        f'[server.tls]\ncertificate = "{certificate}"\nkey = "{key}"\n',
        f'[prefill.client.tls]\nauthority = "{certificate}"\n',
    )


def _kv_bytes(options: BenchFirstToken, config: ModelConfig) -> int:
    geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
    slabs = max((geometry.slabs_for(one.tokens + 1) for one in options.prompts), default=0)
    if options.crowd:
        together = [options.crowd_tokens] * options.crowd + [options.short_tokens]
        together.append(options.stream_tokens + STREAM_NEW_TOKENS)
        slabs = max(slabs, sum(geometry.slabs_for(one + 1) for one in together))
    return (slabs + _SPARE_SLABS) * (geometry.slab_bytes + _SLAB_ALIGNMENT_BYTES)


class NodeLog:
    """Prints what nodes log, on standard error: all of it, or warnings and errors."""

    def __init__(self, *, has_all: bool) -> None:
        self._has_all = has_all
        self._print = LogPrinter(Console(stderr=True))

    def __call__(self, node: str, line: str) -> None:
        """Print a line, if it is wanted; what is in no log format always is."""
        if self._has_all or " INFO " not in line:
            self._print(node, line)


async def _measure(asker: Asker, options: BenchFirstToken) -> tuple[list[Answer], Crowd | None]:
    longest = max(one.tokens for one in _computed(options))
    await asker.ask(asker.prompt(min(_WARM_UP_TOKENS, longest)))
    single = [
        await asker.ask(asker.prompt(one.tokens))
        for one in options.prompts
        for _ in range(one.repeats)
    ]
    return single, await _ask_crowd(asker, options) if options.crowd else None


async def _ask_crowd(asker: Asker, options: BenchFirstToken) -> Crowd:
    # Made before the stream, whose tokens' arrivals are seen on this thread too.
    long_prompts = [asker.prompt(options.crowd_tokens) for _ in range(options.crowd)]
    short_prompts = [asker.prompt(options.short_tokens) for _ in range(options.short)]
    stream = TokenTimes(asker, options.stream_tokens)

    known = [asyncio.Event() for _ in long_prompts]

    async def one_after_the_other() -> list[Answer]:
        # Behind: a long prompt takes longer to read, and would else come after a short one.
        for one in known:
            await one.wait()
        return [await asker.ask(prompt) for prompt in short_prompts]

    try:
        await stream.wait_for(_SETTLING_TOKENS + options.quiet_steps)
        quiet, first = stream.gaps_from(_SETTLING_TOKENS), len(stream.arrivals) - 1
        long = asyncio.gather(*map(asker.ask, long_prompts, known))
        short = asyncio.ensure_future(one_after_the_other())
        answers = await long
        gaps = stream.gaps_from(first)
        in_order = sorted(answers, key=lambda one: one.first_token_seconds)
        return Crowd(tuple(in_order), tuple(await short), tuple(quiet), tuple(gaps))
    finally:
        await stream.cancel()
