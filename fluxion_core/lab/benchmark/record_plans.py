"""Record what a policy decides on real texts, for `recorded_plans.py`.

    python -m fluxion_core.lab.benchmark.record_plans --model MODEL --texts FILE,FILE
    --policy "marginal(0.3)" --tokens 7000 --steps 16 --out plans.safetensors

Every text's beginning is prefilled on the CPU and decoded greedily under the policy; each step's
plans of all layers and heads are kept, budgets as shares of the region.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from fluxion_core.config.command_options import Texts
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.bodies import step_for
from fluxion_core.decode.step import StepRow
from fluxion_core.errors import ConfigError
from fluxion_core.generation.sampling import SamplingParams, TokenSampler
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import BLOCK_SIZES, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kernels import _native
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.recorded_plans import RecordedPlans
from fluxion_core.lab.held_prompt import PromptMaker
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.model_options import ModelOptions
from fluxion_core.models.weights import LoadedModel, load_model
from fluxion_core.observe.device_usage import PolicyKind
from fluxion_core.planning.constants import READ_ALL
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import shipped_planner_weights
from fluxion_core.planning.policy import PlanInputs, Policy, PredictedPolicy, parse_policy
from fluxion_core.pool.cpu_pool import CpuPool


@dataclass(frozen=True, eq=False)
class _KeptPlans(Policy):
    """A policy whose plans are kept, a step's at a time."""

    of: PredictedPolicy
    steps: list[_native.PlanRecorder]

    @property
    def kind(self) -> PolicyKind:
        """Kind of the policy whose plans are kept."""
        return self.of.kind

    @property
    def needs_profile(self) -> bool:
        """Whether its sequences need head profiles."""
        return True

    def plans(self, inputs: PlanInputs) -> _native.PlanSource:
        """Source of one row's plans in one step."""
        source = _native.PlanRecorder(self.of.plans(inputs), inputs.num_kv_heads, inputs.num_heads)
        self.steps.append(source)
        return source


def _shares(plans: _native.PlanRecorder, region: range, num_layers: int) -> tuple[Tensor, Tensor]:
    """Levels [layers, kv_heads] int8 and shares of the region [layers, heads] float32."""
    totals = [ceil_div(region.stop, size) - region.start // size for size in BLOCK_SIZES]
    levels = torch.tensor(plans.levels).view(num_layers, -1)
    budgets = torch.tensor(plans.budgets).view(*levels.shape, -1)
    of_level = torch.tensor(totals)[levels.clamp(min=0)][..., None]
    shares = torch.where(levels[..., None] >= 0, budgets / of_level, levels[..., None] == READ_ALL)
    return levels.to(torch.int8), shares.float().flatten(1)


def record(
    decoder: Decoder, planner: Planner, prompts: list[list[int]], policy: str, steps: int
) -> tuple[Tensor, Tensor]:
    """Plans of `steps` steps after each prompt: levels and shares, see RecordedPlans.

    Args:
        decoder: the model, on the CPU; it cannot be used any more.
        planner: of the model.
        prompts: token ids.
        policy: one that needs head profiles.
        steps: after each prompt.

    Raises:
        ConfigError: the policy needs no head profiles: its plans are not worth a record.
    """
    chosen = parse_policy(policy)
    if not isinstance(chosen, PredictedPolicy):
        raise ConfigError(f"policy {policy} plans nothing; record threshold or marginal")
    config = decoder.config
    geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
    window = WindowSpec()
    held = [PromptMaker(decoder, geometry).make(one, profile_window=window) for one in prompts]
    slabs = sum(geometry.slabs_for(len(prompt) + steps) for prompt in prompts)
    store = HostKvStore(geometry, slabs * (geometry.slab_bytes + 4096), model_key=b"")
    step = step_for(decoder, store, window, CpuPool(), planner=planner, max_rows=1)
    levels, shares = [], []
    for prompt, kv in zip(prompts, held, strict=True):
        token = kv.first_token_id
        sequence = kv.store_into(store, prompt, steps)
        state = planner.new_state(kv.profiles)
        kept = _KeptPlans(chosen, [])
        slot, greedy = step.join(sequence), TokenSampler(SamplingParams())
        for _ in range(steps):
            region = window.retrieval_region(sequence.num_tokens + 1)
            logits, _ = step.run([StepRow(sequence, slot, token, kept, state)])
            token = greedy.sample(logits[0])
            step_levels, step_shares = _shares(kept.steps[-1], region, config.num_layers)
            levels.append(step_levels)
            shares.append(step_shares)
        step.leave(slot)
        sequence.release()
    return torch.stack(levels), torch.stack(shares)


@dataclass(frozen=True, kw_only=True)
class RecordPlans(ModelOptions, Command):
    """Record what a policy decides on real texts."""

    texts: Texts
    """Files of texts; their beginnings are the prompts."""
    policy: str
    """As marginal(0.3)."""
    out: Path
    """Takes the plans, as safetensors."""
    tokens: Annotated[int, within(1)] = 7000
    """Of each prompt."""
    steps: Annotated[int, within(1)] = 16
    """Decoded after each prompt."""

    def __call__(self) -> None:
        """Write the plans."""
        path = self.locate()
        model = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
        tokenizer = Tokenizer.load(path)
        texts = [Path(name) for name in self.texts]
        prompts = [tokenizer.encode(text.read_text())[: self.tokens] for text in texts]
        if short := [
            text.name for text, ids in zip(texts, prompts, strict=True) if len(ids) < self.tokens
        ]:
            raise ConfigError(f"texts of fewer than {self.tokens} tokens: {', '.join(short)}")
        planner = _planner_of(model)
        levels, shares = record(model.decoder, planner, prompts, self.policy, self.steps)
        source = (
            f"{model.name}, {len(texts)} texts, prompts of {self.tokens} tokens, {self.steps} "
            f"steps each ({', '.join(text.stem for text in texts)})"
        )
        RecordedPlans(self.policy, source, levels, shares).save(self.out)


def _planner_of(model: LoadedModel) -> Planner:
    weights = shipped_planner_weights(model.revision_hash)
    if weights is None:
        raise ConfigError(f"there are no predictor weights for {model.name}")
    config = model.config
    return Planner(
        weights,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )


if __name__ == "__main__":
    sys.exit(run_module(RecordPlans))
