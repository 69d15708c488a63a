"""A real model whose KV is partly in device memory: hits by policy, time, and equal tokens.

    python -m fluxion_core.lab.benchmark.tier_model --model MODEL --texts FILE,FILE --tokens 24576
    --rows 16 --steps 256 --kv "100 %,20 %,5 %" --json out.json
    python -m fluxion_core.lab.benchmark.tier_model --model MODEL --texts FILE,FILE --tokens 8192
    --rows 4 --compare 64 --dtype float32

Prompts are pieces of the texts, which begin at different places; steps go on with each piece's own
text, then, for the second half, with that of another piece: a change of topic. After the last step
the first prompt, stored as it is, gets a follow-up, computed on the node, and some steps; prompts
of a multiple of 512 tokens are stored whole. With --compare nothing is
timed: every policy decodes greedily, once without a tier and then with each size of it, and the
tokens are compared; and once more without a tier, with the CPUs alone in the place of both.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.console import Console
from torch import Tensor

from fluxion_core.config.command_options import JsonOption, Texts
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.device.step import DeviceStep, Lanes
from fluxion_core.decode.step import StepReads, StepRow
from fluxion_core.errors import ConfigError
from fluxion_core.generation.sampling import sample_rows
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.report import describe_machine
from fluxion_core.lab.benchmark.sampling import STEP_SAMPLING, step_samplers
from fluxion_core.lab.benchmark.tier_figures import KvShare
from fluxion_core.lab.benchmark.tier_step import fill_up, restart
from fluxion_core.lab.held_prompt import PromptMaker
from fluxion_core.lab.provenance import Provenance
from fluxion_core.models.model_options import ModelOptions
from fluxion_core.models.weights import load_model
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import PlannerWeights, shipped_planner_weights
from fluxion_core.planning.policy import ExactPolicy, Policy, parse_policy
from fluxion_core.planning.prompt_profile import PromptProfile
from fluxion_core.pool.thread_choice import make_pool

WARM_UP_STEPS = 32
CHANGE_STEPS = 16
"""From a change of topic on, counted by themselves."""

TURN_STEPS = 32
"""After a follow-up."""

CHUNK_TOKENS = 512
"""Of a follow-up, as the decode engine has it."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TierModelOptions:
    """Measurements to make."""

    texts: Texts
    """Files of text, one after the other; pieces of all of it are prompts."""
    tokens: Annotated[int, within(1)] = 24_576
    """Of each prompt."""
    rows: Annotated[int, within(1)] = 16
    """Sequences of a step."""
    steps: Annotated[int, within(2 * CHANGE_STEPS + WARM_UP_STEPS)] = 256
    """Of each policy and size; the topic changes at half of them."""
    policies: Texts = ("exact", "fixed(16, 5 %)", "threshold(0.215)", "marginal(0.3)")
    """By name; exact runs where all KV is resident."""
    kv: Annotated[Texts, Parameter(metavar="N %,N GiB")] = ("100 %", "20 %", "5 %")
    """KV in device memory, as shares of all prompts' or sizes."""
    turn_tokens: Annotated[int, within(1)] = 50
    """That the follow-up adds."""
    compare: Annotated[int, within(0)] = 0
    """Steps to compare with those without a tier; 0: measure."""
    dtype: str = "bfloat16"
    """Of weights: bfloat16, or float32, which is for comparisons."""
    threads: Annotated[int | None, within(1)] = None
    """Of the CPU pool; as many as a node chooses if not given."""
    commit: str = ""
    """Of the code, where it does not lie in a repository."""

    @property
    def shares(self) -> list[KvShare]:
        """Sizes of KV in device memory.

        Raises:
            ConfigError: one is none.
        """
        return [KvShare.parse(text) for text in self.kv]


@dataclass(frozen=True)
class TierModelFigure:
    """One policy with so much KV in device memory. Rates are of selected bytes."""

    policy: str
    kv: str
    device_kv_bytes: int
    """That KV may take there."""
    milliseconds: float
    """A step, with sampling: median after the warm-up."""
    idle_milliseconds: float
    """Of that, the GPU waited for the host and did nothing: median."""
    selected_share: float
    """Of the regions."""
    hit_rate: float
    """After the warm-up, up to the change of topic."""
    hit_rate_at_change: float
    """In the steps right after it."""
    hit_rate_after_change: float
    """From those on."""
    filled_bytes: float
    """Copied into the tier, a step after the warm-up."""
    first_token_milliseconds: float
    """Of the follow-up."""
    turn_hit_rate: float
    """Of the follow-up's sequence, in the steps after it."""

    def __str__(self) -> str:
        return (
            f"{self.policy:18s} {self.kv:>6s} {self.device_kv_bytes / 2**30:5.2f} GiB  "
            f"{self.milliseconds:7.2f} ms  idle {self.idle_milliseconds:6.2f}  selected "
            f"{self.selected_share:.4f}  hits {self.hit_rate:.4f}, at the change "
            f"{self.hit_rate_at_change:.4f}, after it {self.hit_rate_after_change:.4f}  filled "
            f"{self.filled_bytes / 1e6:.1f} MB  follow-up: {self.first_token_milliseconds:.1f} ms, "
            f"hits {self.turn_hit_rate:.4f}"
        )


@dataclass(frozen=True)
class TokenComparison:
    """Greedy tokens of one policy with a tier, beside those without."""

    policy: str
    kv: str
    rows: int
    equal_rows: int
    steps: int
    first_difference: int
    """Step of the first one in any row; -1: there is none."""

    def __str__(self) -> str:
        return (
            f"{self.policy:18s} {self.kv:>6s}  {self.equal_rows} of {self.rows} rows equal over "
            f"{self.steps} steps"
            + (f"; the first difference at {self.first_difference}" * (self.first_difference >= 0))
        )


@dataclass(frozen=True)
class Piece:
    """A prompt, and what follows it in the text."""

    prompt: list[int]
    following: list[int]


def pieces_of(ids: Sequence[int], rows: int, tokens: int, following: int) -> list[Piece]:
    """Pieces that begin at different places, spread over the text.

    Raises:
        ConfigError: the text is too short.
    """
    room = len(ids) - tokens - following
    if room < rows - 1:
        raise ConfigError(
            f"texts of {len(ids)} tokens; {rows} prompts of {tokens} and {following} after them "
            f"need {tokens + following + rows - 1}"
        )
    starts = [room * row // max(1, rows - 1) for row in range(rows)]
    return [
        Piece(
            list(ids[start : start + tokens]),
            list(ids[start + tokens : start + tokens + following]),
        )
        for start in starts
    ]


def forced_tokens(pieces: Sequence[Piece], steps: int) -> list[list[int]]:
    """Tokens of each row: its own text's, then, from half of the steps on, those of another."""
    half, rows = steps // 2, len(pieces)
    return [
        piece.following[:half] + pieces[(row + max(1, rows // 2)) % rows].following[half:steps]
        for row, piece in enumerate(pieces)
    ]


@dataclass(frozen=True)
class _Step:
    """One step that was run."""

    seconds: float
    idle_seconds: float
    reads: list[StepReads]
    filled_bytes: int
    """So far."""


@dataclass
class _StoredPrompt:
    """A prompt in the store."""

    piece: Piece
    sequence: SequenceKv
    profiles: list[PromptProfile]
    first_token: int


class TierModelBench:
    """A model on a GPU, and prompts in its store.

    Args:
        path: of the model.
        options: what to measure.
        console: takes notes of progress.
    """

    def __init__(self, path: Path, options: TierModelOptions, console: Console) -> None:
        self.options, self._console = options, console
        if options.dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"dtype {options.dtype!r}: bfloat16 or float32")
        tokenizer = Tokenizer.load(path)
        text = "\n\n".join(Path(name).read_text() for name in options.texts)
        self._room = max(options.steps, options.compare) + options.turn_tokens + TURN_STEPS
        self._pieces = pieces_of(
            tokenizer.encode(text), options.rows, options.tokens, options.steps
        )
        self.device = torch.device("cuda")
        self.model = load_model(path, device=self.device, dtype=getattr(torch, options.dtype))
        config = self.model.config
        self.geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
        weights = shipped_planner_weights(self.model.revision_hash)
        self.weights_name = weights.fingerprint if weights else "training-free"
        self.planner = Planner(
            weights or PlannerWeights.training_free(config.num_layers, config.num_heads),
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        self.window = WindowSpec()
        # One more, for the follow-up: it shares a prompt's full slabs.
        slabs = (options.rows + 1) * self.geometry.slabs_for(options.tokens + self._room)
        size = slabs * (self.geometry.slab_bytes + 4096)
        self.store = HostKvStore(self.geometry, size, model_key=b"bench")
        self._kv_bytes = options.rows * options.tokens * self.geometry.token_bytes
        self._held: list[_StoredPrompt] = []

    def measure(self) -> list[TierModelFigure]:
        """Hits and times of every policy and size."""
        figures: list[TierModelFigure] = []
        for share in self.options.shares:
            with self._device_step(share.of(self._kv_bytes)) as step:
                if not figures:
                    # What a chunk and a step after it launch is compiled.
                    self._follow_up(step, ExactPolicy())
                for name in self.options.policies:
                    if name == "exact" and share.of(self._kv_bytes) < self._kv_bytes:
                        continue
                    figures.append(self._figure(step, share, parse_policy(name)))
                    self._note(str(figures[-1]))
        return figures

    def compare(self) -> list[TokenComparison]:
        """Greedy tokens with and without a tier; and, for what rounding alone may change, without
        one twice, by other devices."""
        policies = [parse_policy(name) for name in self.options.policies]
        with self._device_step(0) as step:
            plain = [self._greedy(step, policy) for policy in policies]
        comparisons = []
        for share in (None, *self.options.shares):
            size = share.of(self._kv_bytes) if share is not None else 0
            with self._device_step(size, "cpu" if share is None else "both") as step:
                for policy, expected in zip(policies, plain, strict=True):
                    tokens = self._greedy(step, policy)
                    kv = "no tier, by CPUs" if share is None else str(share)
                    comparisons.append(compared(str(policy), kv, tokens, expected))
                    self._note(str(comparisons[-1]))
        return comparisons

    @contextmanager
    def _device_step(self, device_kv_bytes: int, lanes: Lanes = "both") -> Iterator[DeviceStep]:
        started = time.perf_counter()
        step = DeviceStep(
            self.model.decoder,
            self.store,
            self.window,
            make_pool(self.options.threads)[0],
            max_rows=self.options.rows,
            max_context_tokens=self.options.tokens + self._room,
            lanes=lanes,
            planner=self.planner,
            device_kv_bytes=device_kv_bytes,
        )
        self._note(f"step with {device_kv_bytes / 2**30:.2f} GiB for KV: {_since(started)}")
        try:
            if not self._held:
                self._compute_prompts()
            yield step
        finally:
            step.close()

    def _compute_prompts(self) -> None:
        """Compute and store all prompts; the store must be pinned, so that their tables are."""
        started = time.perf_counter()
        maker = PromptMaker(self.model.decoder, self.geometry)
        for piece in self._pieces:
            held = maker.make(piece.prompt, profile_window=self.window)
            sequence = held.store_into(self.store, piece.prompt, self._room)
            self._held.append(_StoredPrompt(piece, sequence, held.profiles, held.first_token_id))
        self._note(f"{len(self._held)} prompts of {self.options.tokens:,}: {_since(started)}")

    def _restart(self, step: DeviceStep) -> None:
        assert step.selection is not None, "there is no room for digests"
        tier = step.selection.tier
        restart(tier, tier.num_slots * self.geometry.block_bytes)

    def _rows(self, step: DeviceStep, policy: Policy) -> list[StepRow]:
        """Every prompt as it was before its first step, in a slot."""
        rows = []
        for held in self._held:
            held.sequence.num_tokens = len(held.piece.prompt)
            state = self.planner.new_state(held.profiles)
            slot = step.join(held.sequence)
            rows.append(StepRow(held.sequence, slot, held.first_token, policy, state))
        if step.selection is not None:
            fill_up(step.selection.tier)
        return rows

    def _greedy(self, step: DeviceStep, policy: Policy) -> Tensor:
        """Tokens [rows, steps]."""
        rows = self._rows(step, policy)
        chosen = []
        for _ in range(self.options.compare):
            logits, _ = step.run(rows)
            tokens = logits.argmax(-1).tolist()
            chosen.append(tokens)
            rows = [_with_token(row, token) for row, token in zip(rows, tokens, strict=True)]
        for row in rows:
            step.leave(row.slot)
        return torch.tensor(chosen).T

    def _figure(self, step: DeviceStep, share: KvShare, policy: Policy) -> TierModelFigure:
        self._restart(step)
        rows = self._rows(step, policy)
        tokens = forced_tokens([held.piece for held in self._held], self.options.steps)
        steps = self._run(step, rows, self.options.steps, lambda row, number: tokens[row][number])
        for row in rows:
            step.leave(row.slot)
        first_token, turn_steps = self._follow_up(step, policy)
        change = self.options.steps // 2
        timed = steps[WARM_UP_STEPS:]
        filled = timed[-1].filled_bytes - steps[WARM_UP_STEPS - 1].filled_bytes
        regions = sum(read.region_bytes for one in timed for read in one.reads)
        selected = sum(read.attended_bytes for one in timed for read in one.reads)
        return TierModelFigure(
            policy=str(policy),
            kv=str(share),
            device_kv_bytes=share.of(self._kv_bytes),
            milliseconds=median(one.seconds for one in timed) * 1e3,
            idle_milliseconds=median(one.idle_seconds for one in timed) * 1e3,
            selected_share=selected / regions,
            hit_rate=_hit_rate(steps[WARM_UP_STEPS:change]),
            hit_rate_at_change=_hit_rate(steps[change : change + CHANGE_STEPS]),
            hit_rate_after_change=_hit_rate(steps[change + CHANGE_STEPS :]),
            filled_bytes=filled / len(timed),
            first_token_milliseconds=first_token * 1e3,
            turn_hit_rate=_hit_rate(turn_steps),
        )

    def _run(
        self,
        step: DeviceStep,
        rows: Sequence[StepRow],
        count: int,
        token: Callable[[int, int], int],
    ) -> list[_Step]:
        """Run steps whose tokens are given, by row and number of the step."""
        assert step.selection is not None
        samplers, steps = step_samplers(len(rows)), []
        for number in range(count):
            now = [_with_token(row, token(index, number)) for index, row in enumerate(rows)]
            started = time.perf_counter()
            logits, reads = step.run(now)
            sample_rows(logits, samplers, step.pool)
            seconds = time.perf_counter() - started
            filled = step.selection.tier.statistics().filled_bytes
            steps.append(_Step(seconds, step.times().waited_idle, reads, filled))
        return steps

    def _follow_up(self, step: DeviceStep, policy: Policy) -> tuple[float, list[_Step]]:
        """Seconds to the first token of a turn after the first prompt, and steps after it."""
        held, added = self._held[0], self.options.turn_tokens
        # A question about the text, as far as locality goes: some of its own words.
        prompt = held.piece.prompt + held.piece.prompt[:added]
        started = time.perf_counter()
        sequence = self.store.reserve(prompt, TURN_STEPS)
        sequence.begin_prompt()
        end = None
        while end is None:
            first = sequence.num_tokens
            end = step.compute_chunk(sequence, prompt[first : first + CHUNK_TOKENS], None)
        token = int(end.logits.argmax())
        seconds = time.perf_counter() - started
        state = self.planner.new_state(held.profiles)
        row = StepRow(sequence, step.join(sequence), token, policy, state)
        following = held.piece.prompt[added:]
        steps = self._run(step, [row], TURN_STEPS, lambda _, number: following[number])
        step.leave(row.slot)
        sequence.release()
        return seconds, steps

    def _note(self, text: str) -> None:
        self._console.print(text, highlight=False)


def compared(policy: str, kv: str, tokens: Tensor, expected: Tensor) -> TokenComparison:
    """Tokens [rows, steps] beside others."""
    differs = (tokens != expected).any(0).nonzero()
    return TokenComparison(
        policy,
        kv,
        len(tokens),
        int((tokens == expected).all(1).sum()),
        tokens.shape[1],
        int(differs[0]) if len(differs) else -1,
    )


def _with_token(row: StepRow, token: int) -> StepRow:
    return StepRow(row.sequence, row.slot, token, row.policy, row.state)


def _hit_rate(steps: Sequence[_Step]) -> float:
    selected = sum(read.attended_bytes for one in steps for read in one.reads)
    resident = sum(read.resident_bytes for one in steps for read in one.reads)
    return resident / selected if selected else 1.0


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"


@dataclass(frozen=True, kw_only=True)
class TierModelCommand(ModelOptions, JsonOption, Command):
    """Run a real model whose KV is partly in device memory."""

    options: TierModelOptions
    """What is measured."""

    def __call__(self) -> None:
        """Print figures as they come; keep them."""
        console = self.console(width=220)
        bench = TierModelBench(self.locate(), self.options, console)
        name = "comparisons" if self.options.compare else "figures"
        results = bench.compare() if self.options.compare else bench.measure()
        gpu = torch.cuda.get_device_name()
        commit = self.options.commit
        about = Provenance.here(
            bench.model.name,
            bench.model.revision_hash,
            bench.weights_name,
            commit=commit,
            gpu=gpu,
        )
        self.write(
            {
                "about": about.as_json(),
                "machine": describe_machine(commit) | {"gpu": gpu},
                "options": asdict(self.options),
                "sampling": STEP_SAMPLING,
                name: [asdict(one) for one in results],
            }
        )


if __name__ == "__main__":
    sys.exit(run_module(TierModelCommand))
