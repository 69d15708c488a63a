"""What every evaluation has in common: the model, its policies, and cases answered with a journal.

A case is made only if an answer of it is missing, on the prefill thread, so that making prompts
overlaps with decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fluxion_core.errors import ConfigError, ContextLengthError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry, ceil_div
from fluxion_core.kvstore.store import SLAB_ALIGNMENT_BYTES
from fluxion_core.lab.evaluation.case import Case, PromptEncoder
from fluxion_core.lab.evaluation.journal import Journal
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.runner import Runner, RunStatistics
from fluxion_core.lab.evaluation.work import EXACT, Answer, Way, Work
from fluxion_core.machine.cpus import num_usable_cpus
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.locate import default_models_dir, locate_model
from fluxion_core.models.weights import LoadedModel, load_model
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import (
    LEVEL_NAMES,
    PlannerWeights,
    load_planner_weights,
    shipped_planner_weights,
)
from fluxion_core.planning.policy import Policy, parse_policy

OnAnswer = Callable[[int, int, Answer], None]
"""Gets how many are done, of how many, and the newest."""


@dataclass(frozen=True)
class CaseSource:
    """A case that has not been made yet."""

    task: str
    length: int
    number: int
    make: Callable[[], Case]

    @property
    def name(self) -> str:
        """Of the case, as the journal knows it."""
        return f"{self.task}/{self.length}/{self.number}"


@dataclass
class EvaluationModel:
    """A model with all that turns prompts into answers."""

    loaded: LoadedModel
    prefill_decoder: Decoder
    tokenizer: Tokenizer
    encoder: PromptEncoder
    weights: PlannerWeights
    planner: Planner

    @classmethod
    def load(cls, options: EvaluationOptions) -> EvaluationModel:
        """Find and load everything. Sets torch's number of threads.

        Raises:
            ModelError: the model cannot be used.
            ConfigError: the weights cannot.
        """
        path = locate_model(options.model, options.models_dir or default_models_dir())
        torch.set_num_threads(num_usable_cpus())
        tokenizer = Tokenizer.load(path)
        device = torch.device(options.device_name)
        loaded = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
        tokenizer.check_fits(loaded.config.vocab_size)
        prefill_decoder = loaded.decoder
        if device.type != "cpu":
            prefill_decoder = load_model(path, device=device, dtype=torch.float32).decoder
        config = loaded.config
        weights = (
            load_planner_weights(options.weights)
            if options.weights
            else shipped_planner_weights(loaded.revision_hash)
            or PlannerWeights.training_free(config.num_layers, config.num_heads)
        )
        planner = Planner(
            weights,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
        )
        is_chat = options.chat and tokenizer.has_chat_template
        encoder = PromptEncoder(tokenizer, is_chat=is_chat)
        return cls(loaded, prefill_decoder, tokenizer, encoder, weights, planner)

    def policy(self, name: str) -> Policy:
        """A policy from a quality level or from its own name."""
        level = name.strip().upper()
        return self.weights.levels[level] if level in LEVEL_NAMES else parse_policy(name)

    def ways(self, names: Sequence[str]) -> tuple[Way, ...]:
        """Ways by name; levels keep theirs.

        Raises:
            ConfigError: a policy does not exist, is named twice, or `exact` is missing.
        """
        ways = []
        for name in names:
            policy = self.policy(name)
            is_level = name.strip().upper() in LEVEL_NAMES
            ways.append(Way(name.strip().lower() if is_level else str(policy), policy))
        found = [way.name for way in ways]
        if len(set(found)) < len(found):
            raise ConfigError(f"policies {', '.join(found)}: one is named twice")
        if EXACT not in found:
            raise ConfigError(f"policies {', '.join(found)}: {EXACT} is what they are held against")
        return tuple(ways)


@dataclass
class Session:
    """A run: answers cases that the journal lacks.

    Args:
        model: that answers.
        options: of the run.
        benchmark_settings: what else makes two runs the same.
        on_answer: called after each answer.
        longest_tokens: of prompt and answer together.
    """

    model: EvaluationModel
    options: EvaluationOptions
    benchmark_settings: dict[str, str]
    on_answer: OnAnswer
    longest_tokens: int
    ways: tuple[Way, ...] = ()
    notes: list[str] = field(default_factory=list)
    statistics: list[RunStatistics] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ways = self.model.ways(self.options.policies)
        self.settings = self._settings()
        self.journal = Journal(self.options.journal, self.settings, resume=self.options.resume)
        self._started = time.monotonic()
        self._too_long: set[tuple[str, int]] = set()

    def answer(self, sources: Sequence[CaseSource], ways: Sequence[Way]) -> None:
        """Answer what is missing of these cases."""
        missing = [(source, self._missing(source, ways)) for source in sources]
        missing = [(source, needed) for source, needed in missing if needed]
        total = sum(len(needed) for _, needed in missing)
        if not total:
            return
        runner = Runner(
            self.model.loaded.decoder,
            self.model.tokenizer,
            prefill_decoder=self.model.prefill_decoder,
            host_kv_bytes=self._host_kv_bytes(len(ways)),
            batch=self.options.batch,
            planner=self.model.planner,
        )
        done = 0

        def take(answer: Answer) -> None:
            nonlocal done
            done += 1
            self.journal.add(answer)
            self.on_answer(done, total, answer)

        try:
            runner.run(self._work(missing), take)
        finally:
            self.statistics.append(runner.statistics)

    def scores(self, source_names: Sequence[str], way: str) -> list[float]:
        """Of those that are answered."""
        found = [self.journal.answers.get((name, way)) for name in source_names]
        return [answer.score for answer in found if answer and answer.score is not None]

    def _work(self, missing: Sequence[tuple[CaseSource, tuple[Way, ...]]]) -> Iterator[Work]:
        for index, (source, needed) in enumerate(missing):
            limit = self.options.stop_after_seconds
            if limit and time.monotonic() - self._started > limit:
                self.notes.append(
                    f"stopped after {limit:g} s with {len(missing) - index} cases to do: resume"
                )
                return
            if (source.task, source.length) in self._too_long:
                continue
            try:
                case = source.make()
            except ContextLengthError as error:
                self._too_long.add((source.task, source.length))
                self.notes.append(f"{source.task} does not fit {source.length} tokens: {error}")
                continue
            exact = self.journal.answers.get((source.name, EXACT))
            yield Work(case, needed, exact.token_ids if exact else None)

    def _missing(self, source: CaseSource, ways: Sequence[Way]) -> tuple[Way, ...]:
        return tuple(way for way in ways if (source.name, way.key) not in self.journal.answers)

    def _host_kv_bytes(self, num_ways: int) -> int:
        """Room for the batch and for what is prefilled beside it."""
        if self.options.host_kv_gib:
            return int(self.options.host_kv_gib * 2**30)
        config = self.model.loaded.config
        geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
        cases = ceil_div(self.options.batch, num_ways) + 2
        # Branches share full slabs; each has its own last slab of the prompt, and the next.
        slabs = cases * (geometry.slabs_for(self.longest_tokens) + 2 * num_ways)
        stride = ceil_div(geometry.slab_bytes, SLAB_ALIGNMENT_BYTES) * SLAB_ALIGNMENT_BYTES
        return slabs * stride

    def _settings(self) -> dict[str, str]:
        return {
            "benchmark": self.options.benchmark,
            "model": self.model.loaded.name,
            "revision": self.model.loaded.revision_hash,
            "prompts": "chat template" if self.model.encoder.is_chat else "plain text",
            "seed": str(self.options.seed),
            "planner": self.model.weights.mode,
            "weights": self.model.weights.fingerprint or "none",
            "cost model": str(self.model.weights.cost),
            # One journal may gather several policies, run after run; a level must stay the same.
            **{f"level {n.lower()}": str(p) for n, p in sorted(self.model.weights.levels.items())},
            **self.benchmark_settings,
        }
