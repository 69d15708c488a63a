"""Jobs of a runner, what it keeps while it does them, and the answers that it hands back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fluxion_core.errors import ConfigError
from fluxion_core.generation.sampling import SamplingParams, TokenSampler
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.lab.evaluation.case import Case
from fluxion_core.planning.planner import PlannerState
from fluxion_core.planning.policy import Policy

EXACT = "exact"
"""Name of the way that all others are held against."""


@dataclass(frozen=True)
class Method:
    """Method of answering a case: a policy, and whose tokens it is fed."""

    name: str
    """Of the policy, as reports call it."""
    policy: Policy
    is_forced: bool = False
    """Fed with the tokens that `exact` generated, whatever it would have said itself."""

    @property
    def key(self) -> str:
        """Name by which the journal knows it."""
        return f"{self.name}, forced" if self.is_forced else self.name


@dataclass(frozen=True)
class CaseJob:
    """A case and how it is to be answered."""

    case: Case
    ways: tuple[Method, ...]
    exact_token_ids: tuple[int, ...] | None = None
    """Tokens that forced ways are fed, where they are known already: what `exact` generated, or a
    text's own. Else a forced way needs an exact one beside it."""
    is_compared: bool = False
    """Whether each step's distribution is held against that of `exact`, fed the same tokens; all
    ways are forced then, and `exact` is among them."""


@dataclass(frozen=True)
class Answer:
    """Answer of one way to one case."""

    case_name: str
    task: str
    length: int
    way: str
    token_ids: tuple[int, ...]
    """Generated; the most likely ones where the way is forced."""
    text: str
    score: float | None
    """0 to 100; None where the case is not scored."""
    steps: int
    """Decode steps: the first token comes from prefill."""
    scanned_bytes: int
    """Digests read of the retrieval region, all steps."""
    attended_bytes: int
    """K and V read of it, all steps."""
    region_bytes: int
    """K and V of the region, all steps: what `exact` reads."""
    streaming_share: float
    """Heads that read nothing of the region, mean over the steps that have one."""
    divergences: tuple[float, ...] = ()
    """Of each step, where it was compared: KL of the next token's distribution against that of
    `exact`, nats."""


@dataclass(eq=False)
class TeacherTokens:
    """Tokens that forced ways are fed, and what `exact` made of them."""

    token_ids: list[int]
    is_ended: bool
    log_probabilities: list[Tensor] = field(default_factory=list)
    """[vocab_size] float32 of each step of `exact`, where ways are compared."""


@dataclass(eq=False)
class Branch:
    """One sequence between prefill and its answer."""

    work: CaseJob
    way: Method
    kv: SequenceKv
    state: PlannerState | None
    token_ids: list[int]
    teacher: TeacherTokens | None
    """To follow, if the way is forced; to write, if it is `exact`."""
    slot: int | None = None
    """Of the step, while it takes part in steps."""
    sampler: TokenSampler = field(default_factory=lambda: TokenSampler(SamplingParams()))
    """Greedy, as a request that says nothing."""
    divergences: list[float] = field(default_factory=list)
    steps: int = 0
    scanned_bytes: int = 0
    attended_bytes: int = 0
    region_bytes: int = 0
    streaming_heads: int = 0
    planned_heads: int = 0

    @property
    def is_reference(self) -> bool:
        """Whether others are compared with it."""
        return self.work.is_compared and self.way.name == EXACT

    @property
    def next_input(self) -> int | None:
        """The token to feed; None: `exact` is not so far yet."""
        if not (self.way.is_forced and self.teacher):
            return self.token_ids[-1]
        made, place = self.teacher.token_ids, len(self.token_ids) - 1
        if self.work.is_compared and not self.is_reference:
            made = made[: len(self.teacher.log_probabilities)]
        return made[place] if place < len(made) else None


def check_ways(work: CaseJob) -> None:
    """Raise ConfigError if a forced way has nothing to follow."""
    is_known = work.exact_token_ids is not None
    if work.is_compared and not (
        is_known
        and all(way.is_forced for way in work.ways)
        and any(way.name == EXACT for way in work.ways)
    ):
        raise ConfigError(f"{work.case.name}: to compare, all ways are fed a text, {EXACT} too")
    has_exact = any(way.name == EXACT and not way.is_forced for way in work.ways)
    for way in work.ways:
        if way.is_forced and not (is_known or has_exact):
            raise ConfigError(f"{work.case.name}: {way.key} needs the way `{EXACT}` beside it")
