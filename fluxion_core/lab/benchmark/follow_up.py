"""Time to the first token of a follow-up whose text before it is stored.

python -m fluxion_core.lab.benchmark.follow_up --shape llama-3.1-8b --stored 24576 --new 50

A conversation over a stored text: each turn adds so many tokens, which the node computes itself, in
the chunks that the decode engine makes, and a step after them gives the second token. Stored KV,
and the weights of a shape, are random; a model's are its own (--weights). With --streams others of
the same length decode meanwhile, and the table says how far apart their tokens are.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch

from fluxion_core.config.command_options import JsonOption, Numbers
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.bodies import step_for
from fluxion_core.decode.step import StepRow
from fluxion_core.geometry import KvGeometry, WindowSpec, ceil_div
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.model_shapes import (
    fill_sequences,
    random_decoder,
    shape_named,
)
from fluxion_core.lab.machine import describe_machine
from fluxion_core.machine.cpus import usable_cpus
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.weights import load_model
from fluxion_core.planning.policy import ExactPolicy, Policy, parse_policy
from fluxion_core.pool.thread_choice import make_pool

_STREAM_STEPS = 8
"""Of the streams before the first turn, for the time of a step."""

_GATHERED_CHUNK_TOKENS, _HOST_CHUNK_TOKENS = 512, 32
"""The decode engine's, where a body gathers and where it does not."""


@dataclass(frozen=True)
class FollowUpFigures:
    """Turns over one stored text. Medians, milliseconds."""

    stored: int
    """Tokens before the first turn."""
    new: int
    """Tokens that each turn adds."""
    streams: int
    turns: int
    first_token_ms: float
    """From the new tokens to what follows them."""
    longest_first_token_ms: float
    second_token_ms: float
    """From there: joining, and a step."""
    calls: int
    """Chunks, or parts of chunks, of a turn."""
    stream_gap_ms: float
    """From one token of the streams to the next before the turns; 0 without streams."""
    longest_stream_gap_ms: float
    """The longest of the turns, median over turns."""
    gathered_bytes: float
    """Over the link for stored keys and values, of a turn."""


@dataclass
class _Turn:
    first_token: float = 0.0
    second_token: float = 0.0
    calls: int = 0
    gaps: list[float] = field(default_factory=list)
    """Between the streams' tokens."""


class FollowUps:
    """A node's step, a stored text and streams beside it. Close it.

    Args:
        decoder: the model; on a CPU it cannot be used any more.
        stored: tokens of the text and of each stream, a multiple of 16.
        turns: that the text has room for.
        new: tokens of each turn.
        streams: beside it.
        policy: of the streams.
        threads: of the pool; None for its default.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        stored: int,
        turns: int,
        new: int,
        streams: int,
        policy: Policy,
        threads: int | None,
    ) -> None:
        config = decoder.config
        geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
        # A chunk of a turn is done in a call a layer at most, and a stream's token follows each.
        calls = config.num_layers * ceil_div(new, _HOST_CHUNK_TOKENS)
        room = turns * (new + calls + 2) + _STREAM_STEPS + 2
        slabs = (streams + 1) * geometry.slabs_for(stored + room) + 1
        self._store = HostKvStore(geometry, slabs * (geometry.slab_bytes + 4096), model_key=b"")
        pool, _ = make_pool(threads)
        self.step = step_for(decoder, self._store, WindowSpec(), pool, max_rows=streams + 1)
        lengths = [stored] * (streams + 1)
        text, *others = fill_sequences(self._store, lengths, room, threads=len(usable_cpus()))
        self._text = [0, *range(1, stored)]
        text.keep([])
        text.release()
        self._new, self._vocab_size = new, config.vocab_size
        self._generator = torch.Generator().manual_seed(1)
        self._rows = [StepRow(one, self.step.join(one), 1, policy) for one in others]
        self._last_token = time.perf_counter()
        self.stream_gaps = [self._run_streams() for _ in range(_STREAM_STEPS if others else 0)]
        """Seconds from one token of the streams to the next, before there was a turn."""

    def turn(self) -> _Turn:
        """Add tokens to the text, and take the two that follow."""
        turn = _Turn()
        shape = (self._new,)
        new = torch.randint(self._vocab_size, shape, generator=self._generator).tolist()
        prompt = self._text + new
        sequence = self._store.reserve(prompt, 2)
        if self._rows:
            self._run_streams()
        started = time.perf_counter()
        token = self._compute(sequence, prompt, turn)
        turn.first_token = time.perf_counter() - started
        slot = self.step.join(sequence)
        self.step.run([StepRow(sequence, slot, token, ExactPolicy()), *self._rows])
        turn.second_token = time.perf_counter() - started - turn.first_token
        turn.gaps.append(time.perf_counter() - self._last_token)
        self.step.leave(slot)
        sequence.keep([token])
        sequence.release()
        self._text = [*prompt, token]
        return turn

    def _compute(self, sequence: SequenceKv, prompt: list[int], turn: _Turn) -> int:
        """Compute what is missing, with a step of the streams after each call."""
        sequence.begin_prompt()
        most = _GATHERED_CHUNK_TOKENS if self.step.gathers_prompts else _HOST_CHUNK_TOKENS
        seconds = median(self.stream_gaps) if self.stream_gaps else None
        end = None
        while end is None:
            first = sequence.num_tokens
            chunk = prompt[first : first + most]
            end = self.step.compute_chunk(sequence, chunk, None, seconds=seconds)
            turn.calls += 1
            if end is None and self._rows:
                turn.gaps.append(self._run_streams())
        return int(end.logits.argmax())

    def _run_streams(self) -> float:
        """A step of the streams; returns how long after the one before its tokens came."""
        self.step.run(self._rows)
        before, self._last_token = self._last_token, time.perf_counter()
        return self._last_token - before

    def gathered_bytes(self) -> int:
        """Bytes of stored keys and values that came over the link so far; 0 without a GPU."""
        usage = self.step.usage
        return 0 if usage is None else usage.pcie_bytes["host_to_device", "missing_kv"]

    def close(self) -> None:
        """Let go of the device, and of what is pinned."""
        self.step.close()


def run_follow_ups(
    decoder: Decoder,
    *,
    stored: int,
    new: int,
    turns: int,
    streams: int = 0,
    policy: Policy | None = None,
    threads: int | None = None,
) -> FollowUpFigures:
    """Measure turns over one stored text; see `FollowUps`. The first turn of two or more is not
    counted: a GPU's kernels are compiled in it."""
    bench = FollowUps(
        decoder,
        stored=stored,
        turns=turns,
        new=new,
        streams=streams,
        policy=policy or ExactPolicy(),
        threads=threads,
    )
    try:
        all_turns = []
        gathered = 0
        for _ in range(turns):
            before = bench.gathered_bytes()
            all_turns.append(bench.turn())
            gathered = bench.gathered_bytes() - before
    finally:
        bench.close()
    counted = all_turns[1:] or all_turns
    firsts = [turn.first_token * 1e3 for turn in counted]
    return FollowUpFigures(
        stored=stored,
        new=new,
        streams=streams,
        turns=len(counted),
        first_token_ms=median(firsts),
        longest_first_token_ms=max(firsts),
        second_token_ms=median(turn.second_token for turn in counted) * 1e3,
        calls=max(turn.calls for turn in counted),
        stream_gap_ms=median(bench.stream_gaps) * 1e3 if streams else 0.0,
        longest_stream_gap_ms=median(max(t.gaps) for t in counted) * 1e3 if streams else 0.0,
        gathered_bytes=gathered,
    )


@dataclass(frozen=True, kw_only=True)
class FollowUpBench(JsonOption, Command):
    """Time the first token of follow-ups over stored texts."""

    shape: str = "llama-3.1-8b"
    """Model shape with random weights."""
    layers: Annotated[int | None, within(1)] = None
    """Fewer than the shape has, for a quick look."""
    weights: Path | None = None
    """GGUF file or model directory, in place of a shape."""
    stored: Numbers = (24_576,)
    """Tokens of the stored text; multiples of 16."""
    new: Numbers = (50,)
    """Tokens that a turn adds."""
    streams: Numbers = (0,)
    """Sequences of the stored length that decode beside it."""
    policy: str = "fixed(16, 5 %)"
    """Of the streams."""
    turns: Annotated[int, within(2)] = 6
    """The first one does not count."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of the model; auto is the GPU if there is one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of a file's weights on a GPU; a CPU has float32."""
    threads: Annotated[int | None, within(1)] = None
    """Of the CPU pool; as many as a node chooses if not given."""

    def __call__(self) -> None:
        """Print a line for each case; keep the figures."""
        console = self.console(width=400)
        machine = describe_machine()
        console.print("  ".join(f"{name} {value}" for name, value in machine.items()))
        figures = []
        for stored, new, streams in product(self.stored, self.new, self.streams):
            one = run_follow_ups(
                self._decoder(),
                stored=stored,
                new=new,
                turns=self.turns,
                streams=streams,
                policy=parse_policy(self.policy),
                threads=self.threads,
            )
            gc.collect()
            figures.append(asdict(one))
            console.print(_line(one), highlight=False)
        name = self.shape if self.weights is None else self.weights.name
        self.write({"machine": machine, "model": name, "figures": figures})

    def _decoder(self) -> Decoder:
        has_gpu = torch.cuda.is_available() if self.device == "auto" else self.device == "cuda"
        device = torch.device("cuda" if has_gpu else "cpu")
        if self.weights is None:
            return random_decoder(shape_named(self.shape, self.layers), device)
        dtype = getattr(torch, self.dtype) if has_gpu else torch.float32
        return load_model(self.weights, device=device, dtype=dtype).decoder


def _line(one: FollowUpFigures) -> str:
    beside = (
        f"; {one.streams} streams' tokens {one.stream_gap_ms:.1f} ms apart before, at most "
        f"{one.longest_stream_gap_ms:.1f} beside it"
        if one.streams
        else ""
    )
    return (
        f"{one.new} tokens on {one.stored}: first token {one.first_token_ms:.1f} ms (longest of "
        f"{one.turns}: {one.longest_first_token_ms:.1f}), second {one.second_token_ms:.1f} ms "
        f"later; {one.calls} calls, {one.gathered_bytes / 1e9:.2f} GB gathered{beside}"
    )


if __name__ == "__main__":
    sys.exit(run_module(FollowUpBench))
