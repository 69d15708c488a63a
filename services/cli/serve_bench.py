"""`fluxion bench serve`: sends a workload to a decode node and times what comes back.

Prompts are pieces of the demo's document with random first tokens, so that no two share a prefix
but for what `shared_tokens` asks for. What is measured, and how:
fluxion_core/lab/benchmark/serve.py.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise

from rich.console import Console

from fluxion_core.client import (
    NO_RETRIES,
    AsyncClient,
    Delta,
    Finish,
    GenerationOptions,
    Usage,
)
from fluxion_core.errors import ConfigError, FluxionError
from fluxion_core.lab.benchmark.report import describe_machine
from fluxion_core.lab.benchmark.serve import (
    OK,
    Load,
    LoadFigures,
    Outcome,
    PlannedRequest,
    figures_of,
    plan_requests,
    print_table,
)
from fluxion_core.lab.provenance import Provenance
from fluxion_core.wire.status import status_of
from services.cli.commands.bench_serve import BenchServe
from services.cli.demo import load_document

_RANDOM_TOKENS = 16
"""At the start of what a prompt does not share: other prompts have other ones."""
_WORKLOAD = ("requests", "new_tokens", "shared_tokens", "policy", "deadline_seconds", "seed")
"""What a report keeps of the options, beside lengths, loads and objectives."""


async def bench_serve(
    console: Console, options: BenchServe
) -> tuple[dict[str, object], list[LoadFigures]]:
    """Run all loads, one after the other; prints the table.

    Returns:
        the report, and the figures in it.

    Raises:
        ConfigError: a length is none, or a prompt does not fit the model's context.
        FluxionError: the node cannot be reached, or refuses to say what it serves.
    """
    lengths, loads, objectives = options.lengths, options.loads, options.objectives
    client = options.connection.settings()
    # What is refused is counted, not asked for again.
    async with AsyncClient(options.address, client, retry=NO_RETRIES) as node:
        info = await node.model_info()
        token_ids = await _document_tokens(node, info.context_tokens)
        longest = max(length.tokens for length in lengths) + options.new_tokens
        if longest > info.context_tokens:
            raise ConfigError(
                f"prompts and new tokens are up to {longest}; the context has {info.context_tokens}"
            )
        sender = _Sender(node, options, token_ids, info.vocab_size)
        figures = []
        for number, load in enumerate(loads):
            planned = plan_requests(lengths, load, options.requests, options.seed + number)
            started = time.perf_counter()
            outcomes = await sender.send(load, planned)
            seconds = time.perf_counter() - started
            figures.append(figures_of(load, outcomes, seconds, objectives))
    print_table(console, figures, objectives)
    report: dict[str, object] = {
        "about": Provenance.here(
            info.name, info.revision_hash, info.predictor_fingerprint
        ).as_json(),
        "machine": describe_machine(),
        "model": info.name,
        "device": info.device,
        "policy": options.policy or info.default_policy,
        "options": {
            "lengths": [asdict(one) for one in lengths],
            "loads": [asdict(one) for one in loads],
            "objectives": asdict(objectives),
            **{name: getattr(options, name) for name in _WORKLOAD},
        },
        "figures": [asdict(one) for one in figures],
    }
    return report, figures


async def _document_tokens(node: AsyncClient, context_tokens: int) -> list[int]:
    """The demo's document in tokens, asked for in pieces that fit any context: a token has a byte
    at least."""
    text, token_ids = load_document(), list[int]()
    # A character has four bytes at most.
    size = max(1, context_tokens // 4)
    for start in range(0, len(text), size):
        piece = text[start : start + size]
        token_ids.extend(await node.tokenize(piece))
    return token_ids


class _Sender:
    """Sends planned requests and times them."""

    def __init__(
        self,
        node: AsyncClient,
        options: BenchServe,
        document: Sequence[int],
        vocab_size: int,
    ) -> None:
        self._node = node
        self._options = options
        self._document = document
        self._vocab_size = vocab_size

    async def send(self, load: Load, planned: Sequence[PlannedRequest]) -> list[Outcome]:
        """All of them, as the load says."""
        started = time.perf_counter()
        if load.concurrency is None:

            async def at_its_time(one: PlannedRequest) -> Outcome:
                await asyncio.sleep(max(0.0, started + one.due_seconds - time.perf_counter()))
                return await self._send(one, started + one.due_seconds)

            return list(await asyncio.gather(*map(at_its_time, planned)))
        outcomes: list[Outcome] = []
        left = iter(planned)

        async def client(mine: Iterator[PlannedRequest]) -> None:
            for one in mine:
                outcomes.append(await self._send(one, time.perf_counter()))

        # One iterator for all: each takes the next request when its last one is done.
        await asyncio.gather(*(client(left) for _ in range(load.concurrency)))
        return outcomes

    async def _send(self, one: PlannedRequest, due: float) -> Outcome:
        options = self._options
        asked = GenerationOptions(
            max_new_tokens=options.new_tokens,
            ignore_eos=True,
            policy=options.policy,
            deadline_seconds=options.deadline_seconds,
        )
        arrivals: list[float] = []
        usage: Usage | None = None
        status = OK
        try:
            async for event in self._node.stream(self._prompt(one), asked):
                if isinstance(event, Delta):
                    arrivals += [time.perf_counter()] * len(event.token_ids)
                elif isinstance(event, Finish):
                    usage = event.usage
        except FluxionError as error:
            status = status_of(error).name
        return Outcome(
            prompt_tokens=one.prompt_tokens,
            status=status,
            end_seconds=time.perf_counter() - due,
            first_token_seconds=arrivals[0] - due if arrivals else None,
            token_gaps=tuple(later - earlier for earlier, later in pairwise(arrivals)),
            queue_seconds=usage.queue_seconds if usage else 0.0,
            cached_tokens=usage.cached_tokens if usage else 0,
        )

    def _prompt(self, one: PlannedRequest) -> list[int]:
        generator = random.Random(one.seed)
        shared = self._piece(0, min(self._options.shared_tokens, one.prompt_tokens))
        own = one.prompt_tokens - len(shared)
        drawn = [generator.randrange(self._vocab_size) for _ in range(min(own, _RANDOM_TOKENS))]
        first = generator.randrange(len(self._document))
        return shared + drawn + self._piece(first, own - len(drawn))

    def _piece(self, first: int, count: int) -> list[int]:
        """Tokens of the document, from the start again after its end."""
        document = self._document
        return [document[(first + place) % len(document)] for place in range(count)]
