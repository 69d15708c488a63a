"""Plans of a model's heads, step by step: recorded once, replayed for other shapes.

For shapes with random weights a predictor would decide on noise. Their steps follow decisions
recorded from a real model instead, layer by layer in proportion; groups of a shape take those of
the recorded model's groups in turn, each with its own steps, so that a batch is as unequal as real
ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fluxion_core.errors import ConfigError
from fluxion_core.geometry import BLOCK_SIZES, ceil_div
from fluxion_core.lab.benchmark.replayed_policy import ReplayedPolicy
from fluxion_core.models.config import ModelConfig
from fluxion_core.planning.policy import PredictedPolicy


@dataclass(frozen=True)
class RecordedPlans:
    """Decisions of one policy over some steps."""

    policy: str
    source: str
    """Model, texts and lengths, in words."""
    levels: Tensor
    """[steps, layers, kv_heads] int8: index into BLOCK_SIZES, READ_ALL or READ_NOTHING."""
    shares: Tensor
    """[steps, layers, heads] float32, of the region."""

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        save_file(
            {"levels": self.levels, "shares": self.shares},
            path,
            metadata={"policy": self.policy, "source": self.source},
        )

    @classmethod
    def load(cls, path: Path) -> RecordedPlans:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file is not one.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                return cls(
                    about["policy"],
                    about["source"],
                    file.get_tensor("levels"),
                    file.get_tensor("shares"),
                )
        except Exception as error:
            raise ConfigError(f"recorded plans {path}: {error}") from None

    def policy_for(
        self,
        config: ModelConfig,
        region: range,
        step: int,
        row: int,
        behind: PredictedPolicy | None = None,
    ) -> ReplayedPolicy:
        """One row's policy for one step of a shape.

        Args:
            config: of the shape.
            region: in tokens.
            step: any number; the recorded steps are gone through in a circle.
            row: of the batch; rows and groups are at different steps.
            behind: whose plans are made all the same.
        """
        steps, layers, kv_heads = self.levels.shape
        group = self.shares.shape[2] // kv_heads
        new_group = config.num_heads // config.num_kv_heads
        layer = torch.arange(config.num_layers) * layers // config.num_layers
        head = torch.arange(config.num_kv_heads)
        at = (step + 17 * row + 5 * (head // kv_heads)) % steps
        levels = self.levels[at[None, :], layer[:, None], (head % kv_heads)[None, :]].int()
        shares = self.shares.view(steps, layers, kv_heads, group)
        chosen = shares[at[None, :], layer[:, None], (head % kv_heads)[None, :]]
        chosen = chosen[..., torch.arange(new_group) % group]
        sizes = torch.tensor(BLOCK_SIZES)
        totals = torch.tensor(
            [ceil_div(region.stop, int(size)) - region.start // int(size) for size in sizes]
        )
        total = totals[levels.clamp(min=0).long()][..., None]
        budgets = torch.ceil(chosen * total * (1 - 1e-6)).int()
        return ReplayedPolicy(levels.contiguous(), budgets.flatten(1).contiguous(), behind)
