"""The curve of what a byte buys, by policy: KL of the next token against exact, over bytes read.

Teacher-forced steps of texts that were not trained on. Every policy decides in every layer, with
the hidden states that its own decisions made; each step starts from exact KV (see replay.py).
Decisions come from the truth of the step (oracle), from a network, or from prefill's estimates
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES, WindowSpec
from fluxion_core.lab.training.collect import select
from fluxion_core.lab.training.direct import DirectMlp
from fluxion_core.lab.training.replay import DocumentKv, replay
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.choice_reference import GroupPlans, by_price, by_threshold
from fluxion_core.planning.cost_model import COARSE_LEVEL, CostModel, digest_share
from fluxion_core.planning.features import (
    features,
)
from fluxion_core.planning.head_profile import log_squared_errors
from fluxion_core.planning.layer_step import LayerStep, no_memory, profile_prompts
from fluxion_core.planning.network import HeadProfileMlp
from fluxion_core.planning.profiled_queries import PROFILED_QUERIES
from fluxion_core.planning.prompt_profile import PromptProfile


@dataclass(frozen=True)
class FixedMethod:
    """Every head the same block size and budget."""

    level: int
    budget: float

    def __str__(self) -> str:
        return f"fixed({BLOCK_SIZES[self.level]}, {self.budget * 100:g} %)"


@dataclass(frozen=True)
class PlannedMethod:
    """Plans by a policy, from decisions of some source."""

    policy: str
    """threshold, direct, marginal, or a name for marginal with other weights of heads."""
    number: float
    """The threshold, or the price."""
    source: str
    """oracle, prefill, or the name of a network."""

    def __str__(self) -> str:
        return f"{self.policy}({self.number:g}), {self.source}"


Method = FixedMethod | PlannedMethod


@dataclass(frozen=True)
class Runs:
    """Runs of consecutive steps of one document."""

    kv: DocumentKv
    starts: tuple[int, ...]
    steps: int

    @property
    def positions(self) -> Tensor:
        """[steps * runs]: all runs' first steps, then all second ones."""
        device = self.kv.keys.device
        starts = torch.tensor(self.starts, device=device)
        return (torch.arange(self.steps, device=device)[:, None] + starts).flatten()


@dataclass(frozen=True)
class MethodResult:
    """Result of one way, per step."""

    kl: Tensor
    """[rows]: nats."""
    agrees: Tensor
    """[rows] bool: the same most likely token as exact attention."""
    scanned: Tensor
    """[rows]: bytes of digests, as a share of the region's KV, mean over layers and KV heads."""
    attended: Tensor
    """[rows]: of K and V, likewise."""
    squares: Tensor
    """[rows, layers, heads]: squared head output errors."""
    streaming: Tensor
    """[rows]: share of heads that read nothing."""

    @property
    def share(self) -> Tensor:
        """[rows]: all bytes."""
        return self.scanned + self.attended


@torch.no_grad()
def profile_runs(decoder: Decoder, runs: Runs, window: WindowSpec) -> list[PromptProfile]:
    """Per layer, the profile of the prompt that ends where each run starts."""
    device = runs.kv.keys.device
    count = len(runs.starts)
    starts = torch.tensor(runs.starts, device=device)
    positions = (starts[:, None] + torch.arange(-PROFILED_QUERIES, 0, device=device)).flatten()
    found: list[PromptProfile] = []

    def attend(layer: int, step: LayerStep) -> Tensor:
        keys, values = runs.kv.keys[layer], runs.kv.values[layer]
        found.append(profile_prompts(step, count, keys, values, runs.starts))
        return step.full_output.flatten(1, 2)

    replay(decoder, runs.kv, positions, window, attend)
    return found


class MethodSimulator:
    """Ways over the runs of one document.

    Args:
        decoder: float32.
        runs: which steps.
        window: the default window.
        networks: by name.
        priors: [layers, heads, 3].
        cost: the selector's cost model.
        weights: by policy, [layers, heads]: what squared errors count; all the same if absent.
    """

    def __init__(
        self,
        decoder: Decoder,
        runs: Runs,
        window: WindowSpec,
        networks: Mapping[str, HeadProfileMlp | DirectMlp],
        priors: Tensor,
        cost: CostModel,
        weights: Mapping[str, Tensor],
    ) -> None:
        self._decoder, self._runs, self._window = decoder, runs, window
        self._networks, self._cost = networks, cost
        self._priors = priors.to(runs.kv.keys.device)
        self._weights = {name: each.to(runs.kv.keys.device) for name, each in weights.items()}
        self._profiles = profile_runs(decoder, runs, window)
        with torch.no_grad():
            self._exact = self._log_probabilities(self._hidden(self._attend_exact))

    def _hidden(self, attend: Callable[[int, LayerStep], Tensor], copies: int = 1) -> Tensor:
        runs = self._runs
        positions = runs.positions.repeat(copies)
        return replay(self._decoder, runs.kv, positions, self._window, attend)

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        return F.log_softmax(self._decoder.logits(hidden), dim=-1)

    def _differences(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """KL and equal tokens of the runs' rows in one way, [rows] each."""
        exact, own = self._exact, self._log_probabilities(hidden)
        return (exact.exp() * (exact - own)).sum(-1), exact.argmax(-1) == own.argmax(-1)

    @staticmethod
    def _attend_exact(layer: int, step: LayerStep) -> Tensor:
        del layer
        return step.full_output.flatten(1, 2)

    def run(self, ways: Sequence[Method]) -> dict[Method, MethodResult]:
        """All steps of all ways; those that differ in their number alone go together."""
        alike: dict[tuple[str, ...], list[Method]] = {}
        for way in ways:
            key: tuple[str, ...] = (str(way),)
            if isinstance(way, PlannedMethod) and way.policy != "direct":
                key = (way.policy, way.source)
            alike.setdefault(key, []).append(way)
        found: dict[Method, MethodResult] = {}
        for group in alike.values():
            found |= zip(group, self._run_alike(group), strict=True)
        return {way: found[way] for way in ways}

    @torch.no_grad()
    def _run_alike(self, ways: Sequence[Method]) -> list[MethodResult]:
        scanned, attended, squares, streaming = [], [], [], []

        def attend(layer: int, step: LayerStep) -> Tensor:
            plans, chosen = self._decide(ways, layer, step)
            output, _ = step.attend(chosen)
            region = step.in_region.sum(-1).clamp(min=1)[:, None]
            attended.append((chosen.any(2).sum(-1) / region).mean(-1))
            scanned.append(self._scanned(ways[0], plans).mean(-1))
            error = torch.linalg.vector_norm(output - step.full_output.flatten(1, 2), dim=-1)
            squares.append((error / step.norm[:, None]) ** 2)
            streaming.append((chosen.sum(-1) == 0).float().mean((1, 2)))
            return output

        hidden = self._hidden(attend, len(ways))
        # Way by way: distributions over a vocabulary of 150,000 are the largest tensors here.
        kls, equals = zip(*map(self._differences, hidden.chunk(len(ways))), strict=True)
        whole = MethodResult(
            kl=torch.cat(kls),
            agrees=torch.cat(equals),
            scanned=torch.stack(scanned).mean(0),
            attended=torch.stack(attended).mean(0),
            squares=torch.stack(squares, 1),
            streaming=torch.stack(streaming).mean(0),
        )
        parts = {
            f.name: getattr(whole, f.name).cpu().chunk(len(ways)) for f in fields(MethodResult)
        }
        return [MethodResult(**{n: part[i] for n, part in parts.items()}) for i in range(len(ways))]

    def _scanned(self, way: Method, plans: GroupPlans) -> Tensor:
        """Digest bytes per group, as a share of the region: [rows, kv_heads]."""
        bits = self._cost.digest_bits
        shares = [digest_share(level, bits) for level in range(len(BLOCK_SIZES))]
        table = torch.tensor([*shares, 0.0], device=plans.levels.device)
        total = table[torch.where(plans.levels < 0, len(shares), plans.levels)]
        if isinstance(way, FixedMethod) or way.source == "oracle":
            return total
        # The coarse scan is for every group; one that chooses by it scans nothing more.
        return torch.where(plans.levels == COARSE_LEVEL, 0.0, total) + shares[COARSE_LEVEL]

    def _decide(
        self, ways: Sequence[Method], layer: int, step: LayerStep
    ) -> tuple[GroupPlans, Tensor]:
        way = ways[0]
        if isinstance(way, FixedMethod):
            shape = (step.rows, step.kv_heads)
            device = step.mass.device
            levels = torch.full(shape, way.level, device=device)
            plans = GroupPlans(levels, torch.full((*shape, step.group), way.budget, device=device))
            step = step.by_quest()
        elif way.source == "oracle":
            plans = self._select(ways, layer, step.log_squared_errors())
        elif way.source == "prefill":
            profile = self._profiles[layer].log_squares
            logs = torch.unflatten(profile, 1, (step.kv_heads, step.group))
            copies = step.rows // logs.shape[0]
            plans = self._select(ways, layer, logs.repeat(copies, 1, 1, 1, 1))
        else:
            return self._predict(ways, way.source, layer, step)
        return plans, step.chosen_blocks(plans.levels, plans.budgets)

    def _predict(
        self, ways: Sequence[Method], source: str, layer: int, step: LayerStep
    ) -> tuple[GroupPlans, Tensor]:
        """Step after step of all runs: each sees what the one before has read."""
        runs, steps, network = len(self._runs.starts), self._runs.steps, self._networks[source]
        _, heads, head_dim = step.full_output.flatten(1, 2).shape
        device = step.mass.device
        memory = no_memory(runs * len(ways), heads, head_dim, device)
        profiles = select(
            self._profiles[layer], torch.arange(runs, device=device).repeat(len(ways))
        )
        rows = torch.arange(step.rows, device=device).view(len(ways), steps, runs)
        levels = torch.zeros(step.rows, step.kv_heads, dtype=torch.int64, device=device)
        budgets = torch.zeros(step.rows, step.kv_heads, step.group, device=device)
        chosen = torch.zeros_like(step.mass, dtype=torch.bool)
        assert step.bounds
        for number in range(steps):
            here = rows[:, number].flatten()
            part = step.rows_of(here)
            seen = part.observe(
                layer, self._decoder.config.num_layers, profiles, memory, self._priors[layer]
            )
            if isinstance(network, DirectMlp):
                plans = network.plans(features(seen), step.kv_heads, self._cost)
            else:
                logs = log_squared_errors(network(features(seen)))
                logs = torch.unflatten(logs, 1, (step.kv_heads, step.group))
                plans = self._select(ways, layer, logs)
            blocks = part.chosen_blocks(plans.levels, plans.budgets)
            memory = part.remember(blocks, part.attend(blocks)[1])
            levels[here], budgets[here], chosen[here] = plans.levels, plans.budgets, blocks
        return GroupPlans(levels, budgets), chosen

    def _select(self, ways: Sequence[Method], layer: int, log_squares: Tensor) -> GroupPlans:
        """Rows are those of the first way, then those of the second, and so on."""
        numbers = torch.tensor(
            [way.number for way in ways if isinstance(way, PlannedMethod)],
            device=log_squares.device,
        ).repeat_interleave(log_squares.shape[0] // len(ways))
        assert isinstance(ways[0], PlannedMethod)
        policy = ways[0].policy
        if policy == "threshold":
            return by_threshold(log_squares, numbers, self._cost)
        weights = self._weights.get(policy)
        of_layer = None if weights is None else weights[layer].view(log_squares.shape[1:3])
        return by_price(log_squares, numbers, self._cost, of_layer)


def join(results: Sequence[MethodResult]) -> MethodResult:
    """One way over several documents."""
    return MethodResult(
        *(torch.cat([getattr(result, f.name) for result in results]) for f in fields(MethodResult))
    )
