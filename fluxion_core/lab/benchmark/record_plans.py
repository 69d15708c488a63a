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
from fluxion_core.decode.host.attention import HybridAttention
from fluxion_core.errors import ConfigError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import BLOCK_SIZES, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.recorded_plans import RecordedPlans
from fluxion_core.lab.held_prompt import PromptMaker
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.model_options import ModelOptions
from fluxion_core.models.weights import LoadedModel, load_model
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import shipped_planner_weights
from fluxion_core.planning.policy import parse_policy
from fluxion_core.pool.cpu_pool import CpuPool


class _RecordingAttention(HybridAttention):
    """Keeps each layer's plan of the one sequence of a step."""

    plans: list[list[tuple[int, list[int]]]]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort."""
        output = super().attend(layer, query, key, value)
        assert self._step is not None
        heads = range(self._geometry.num_kv_heads)
        self.plans.append([self._step.tasks.plan(0, head) for head in heads])
        return output


def _shares(plans: list[list[tuple[int, list[int]]]], region: range) -> tuple[Tensor, Tensor]:
    """Levels [layers, kv_heads] int8 and shares of the region [layers, heads] float32."""
    totals = [ceil_div(region.stop, size) - region.start // size for size in BLOCK_SIZES]
    levels = torch.tensor([[level for level, _ in layer] for layer in plans], dtype=torch.int8)
    shares = [
        [
            (blocks / totals[level] if level >= 0 else float(level == -1))
            for level, budgets in layer
            for blocks in budgets
        ]
        for layer in plans
    ]
    return levels, torch.tensor(shares)


def record(
    decoder: Decoder, planner: Planner, prompts: list[list[int]], policy: str, steps: int
) -> tuple[Tensor, Tensor]:
    """Plans of `steps` steps after each prompt: levels and shares, see RecordedPlans."""
    config = decoder.config
    geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
    window = WindowSpec()
    levels, shares = [], []
    for prompt in prompts:
        held = PromptMaker(decoder, geometry).make(prompt, profile_window=window)
        token = held.first_token_id
        slabs = geometry.slabs_for(len(prompt) + steps)
        store = HostKvStore(geometry, slabs * (geometry.slab_bytes + 4096), model_key=b"")
        sequence = held.store_into(store, prompt, steps)
        state = planner.new_state(held.profiles)
        attention = _RecordingAttention(
            store, window, num_heads=config.num_heads, pool=CpuPool(), planner=planner
        )
        for _ in range(steps):
            attention.plans = []
            region = window.retrieval_region(sequence.num_tokens + 1)
            attention.begin_step([sequence], [parse_policy(policy)], [state])
            with torch.inference_mode():
                hidden = decoder(
                    torch.tensor([token]), torch.tensor([sequence.num_tokens]), attention
                )
                token = int(decoder.logits(hidden).argmax())
            attention.end_step()
            step_levels, step_shares = _shares(attention.plans, region)
            levels.append(step_levels)
            shares.append(step_shares)
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
