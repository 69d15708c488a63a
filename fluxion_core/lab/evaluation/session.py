"""The common part of all evaluations: the model, its policies, and cases answered with a journal.

A case is made only if an answer of it is missing, on the prefill thread, so that making prompts
overlaps with decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fluxion_core.decode.bodies import step_for
from fluxion_core.decode.step import DecodeStep
from fluxion_core.errors import ConfigError, ContextLengthError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import KvGeometry, WindowSpec, ceil_div
from fluxion_core.kvstore.store import SLAB_ALIGNMENT_BYTES, HostKvStore
from fluxion_core.lab.evaluation.case import Case, PromptEncoder
from fluxion_core.lab.evaluation.journal import Journal
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.runner import Runner, RunStatistics
from fluxion_core.lab.evaluation.work import EXACT, Answer, CaseJob, Method
from fluxion_core.lab.held_prompt import PromptMaker
from fluxion_core.machine.cpus import num_usable_cpus
from fluxion_core.models.config import ModelConfig
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.locate import default_models_dir, locate_model
from fluxion_core.models.weights import load_model
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import (
    LEVEL_NAMES,
    PlannerWeights,
    load_planner_weights,
    shipped_planner_weights,
)
from fluxion_core.planning.policy import Policy, parse_policy
from fluxion_core.pool.thread_choice import make_pool

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

OnAnswer = Callable[[int, int, Answer], None]
"""Gets how many are done, of how many, and the newest."""


@dataclass(frozen=True)
class CaseSource:
    """A case that has not been made yet."""

    task: str
    length: int
    number: int
    make: Callable[[], Case]
    fed_token_ids: tuple[int, ...] | None = None
    """Tokens of the case's own text that all ways are fed, where ways are compared step by step."""

    @property
    def name(self) -> str:
        """Name of the case, as the journal knows it."""
        return f"{self.task}/{self.length}/{self.number}"


@dataclass
class EvaluationModel:
    """A model with all that turns prompts into answers."""

    name: str
    revision_hash: str
    config: ModelConfig
    new_decoder: Callable[[], Decoder]
    """Makes the model of a step, which may take its weights."""
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
            ConfigError: the weights cannot, or there is no CUDA device for the step.
        """
        device, dtype = torch.device(options.device_name), _DTYPES[options.dtype_name]
        if options.step == "device" and device.type != "cuda":
            raise ConfigError(f"step device needs a CUDA device, and device is {device}; use host")
        path = locate_model(options.model, options.models_dir or default_models_dir())
        torch.set_num_threads(num_usable_cpus())
        tokenizer = Tokenizer.load(path)
        loaded = load_model(path, device=device, dtype=dtype)
        config, prefill_decoder = loaded.config, loaded.decoder
        tokenizer.check_fits(config.vocab_size)

        def new_decoder() -> Decoder:
            if options.step == "device":
                return prefill_decoder
            return load_model(path, device=torch.device("cpu"), dtype=dtype).decoder

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
        return cls(
            loaded.name,
            loaded.revision_hash,
            config,
            new_decoder,
            prefill_decoder,
            tokenizer,
            PromptEncoder(tokenizer, is_chat=is_chat),
            weights,
            planner,
        )

    @property
    def geometry(self) -> KvGeometry:
        """Geometry of its KV."""
        config = self.config
        return KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)

    def policy(self, name: str) -> Policy:
        """A policy from a quality level or from its own name."""
        level = name.strip().upper()
        return self.weights.levels[level] if level in LEVEL_NAMES else parse_policy(name)

    def ways(self, names: Sequence[str]) -> tuple[Method, ...]:
        """Ways by name; levels keep theirs.

        Raises:
            ConfigError: a policy does not exist, is named twice, or `exact` is missing.
        """
        ways = []
        for name in names:
            policy = self.policy(name)
            is_level = name.strip().upper() in LEVEL_NAMES
            ways.append(Method(name.strip().lower() if is_level else str(policy), policy))
        found = [way.name for way in ways]
        if len(set(found)) < len(found):
            raise ConfigError(f"policies {', '.join(found)}: one is named twice")
        if EXACT not in found:
            raise ConfigError(f"policies {', '.join(found)}: {EXACT} is what they are held against")
        return tuple(ways)


@dataclass
class Session:
    """A run: answers cases that the journal lacks. To be closed.

    Args:
        model: that answers.
        options: of the run.
        benchmark_settings: what else makes two runs the same.
        on_answer: called after each answer.
        longest_tokens: of prompt and answer together.
        most_ways: that a case is answered in; None for one for each policy.
    """

    model: EvaluationModel
    options: EvaluationOptions
    benchmark_settings: dict[str, str]
    on_answer: OnAnswer
    longest_tokens: int
    most_ways: int | None = None
    ways: tuple[Method, ...] = ()
    notes: list[str] = field(default_factory=list)
    statistics: RunStatistics = field(default_factory=RunStatistics)

    def __post_init__(self) -> None:
        self.ways = self.model.ways(self.options.policies)
        self.settings = self._settings()
        self.journal = Journal(self.options.journal, self.settings, resume=self.options.resume)
        self._started = time.monotonic()
        self._too_long: set[tuple[str, int]] = set()
        self._step: DecodeStep | None = None
        self._runner: Runner | None = None

    def close(self) -> None:
        """Let go of the step. Idempotent."""
        if self._step is not None:
            self._step.close()
        self._step = self._runner = None

    def answer(self, sources: Sequence[CaseSource], ways: Sequence[Method]) -> None:
        """Answer what is missing of these cases."""
        self.answer_each([(source, ways) for source in sources])

    def answer_each(self, asked: Sequence[tuple[CaseSource, Sequence[Method]]]) -> None:
        """Answer what is missing of cases that have ways of their own."""
        missing = [(source, self._missing(source, ways)) for source, ways in asked]
        missing = [(source, needed) for source, needed in missing if needed]
        total = sum(len(needed) for _, needed in missing)
        if not total:
            return
        done = 0

        def take(answer: Answer) -> None:
            nonlocal done
            done += 1
            self.journal.add(answer)
            self.on_answer(done, total, answer)

        self._the_runner().run(self._work(missing), take)

    def _the_runner(self) -> Runner:
        """One for all calls of `answer`: a step on a GPU takes a while to make."""
        if self._runner is None:
            model, batch = self.model, self.options.batch
            store = HostKvStore(model.geometry, self._host_kv_bytes(), model_key=b"evaluation")
            window = WindowSpec()
            pool, _ = make_pool(None)
            self._step = step_for(
                model.new_decoder(), store, window, pool, planner=model.planner, max_rows=batch
            )
            self._runner = Runner(
                self._step,
                store,
                PromptMaker(model.prefill_decoder, model.geometry),
                model.tokenizer,
                model.config,
                batch=batch,
                planner=model.planner,
                window=window,
            )
            self.statistics = self._runner.statistics
        return self._runner

    def _work(self, missing: Sequence[tuple[CaseSource, tuple[Method, ...]]]) -> Iterator[CaseJob]:
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
            if source.fed_token_ids is not None:
                yield CaseJob(case, needed, source.fed_token_ids, is_compared=True)
                continue
            exact = self.journal.answers.get((source.name, EXACT))
            yield CaseJob(case, needed, exact.token_ids if exact else None)

    def _missing(self, source: CaseSource, ways: Sequence[Method]) -> tuple[Method, ...]:
        missing = [way for way in ways if (source.name, way.key) not in self.journal.answers]
        if source.fed_token_ids is not None and missing:
            # Distributions are not in the journal: those of `exact` are computed again.
            return tuple(way for way in ways if way in missing or way.name == EXACT)
        return tuple(missing)

    def _host_kv_bytes(self) -> int:
        """Room for the batch and for what is prefilled beside it."""
        if self.options.host_kv_gib:
            return int(self.options.host_kv_gib * 2**30)
        geometry = self.model.geometry
        # A pilot's cases have one way each.
        return max(
            self._slabs_for(num_ways, geometry) * _stride_bytes(geometry)
            for num_ways in (1, self.most_ways or len(self.ways))
        )

    def _slabs_for(self, num_ways: int, geometry: KvGeometry) -> int:
        cases = ceil_div(self.options.batch, num_ways) + 2
        # Branches share full slabs; each has its own last slab of the prompt, and the next.
        return cases * (geometry.slabs_for(self.longest_tokens) + 2 * num_ways)

    def _settings(self) -> dict[str, str]:
        return {
            "benchmark": self.options.benchmark,
            "model": self.model.name,
            "revision": self.model.revision_hash,
            "step": f"{self.options.step}, {self.options.dtype_name}",
            "prompts": "chat template" if self.model.encoder.is_chat else "plain text",
            "seed": str(self.options.seed),
            "planner": self.model.weights.mode,
            "weights": self.model.weights.fingerprint or "none",
            "cost model": str(self.model.weights.cost),
            # One journal may gather several policies, run after run; a level must stay the same.
            **{f"level {n.lower()}": str(p) for n, p in sorted(self.model.weights.levels.items())},
            **self.benchmark_settings,
        }


def _stride_bytes(geometry: KvGeometry) -> int:
    return ceil_div(geometry.slab_bytes, SLAB_ALIGNMENT_BYTES) * SLAB_ALIGNMENT_BYTES
