"""The paper's predictor, for comparison: class, base budget and slope, straight from the network.

One network for one threshold (arXiv:2605.07719): whether a head is streaming, else the smallest
budget at block size 16 and its growth per doubling of the block size. Labels are those of single
steps, so a retrieval head gets what it needs on average, not what it may need.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.lab.training.fit import TrainingSet, minimise
from fluxion_core.planning.choice_reference import GroupPlans, by_budgets
from fluxion_core.planning.constants import BUDGETS, CLIP_DEVIATIONS, NUM_FEATURES
from fluxion_core.planning.cost_model import CostModel
from fluxion_core.planning.head_profile import smallest_budgets
from fluxion_core.planning.network import HIDDEN

_SLOPE_SCALE = 10.0


class DirectMlp(nn.Module):
    """Features to [..., 3]: logit of streaming, log2 of the base budget, slope times 10."""

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("feature_mean", torch.zeros(NUM_FEATURES))
        self.register_buffer("feature_scale", torch.ones(NUM_FEATURES))
        self.layers = nn.Sequential(
            nn.Linear(NUM_FEATURES, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, 3),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[..., 3] for [..., NUM_FEATURES]."""
        scaled = (features - self.feature_mean) * self.feature_scale
        out: Tensor = self.layers(scaled.clamp(-CLIP_DEVIATIONS, CLIP_DEVIATIONS))
        return out

    def plans(self, features: Tensor, kv_heads: int, cost: CostModel) -> GroupPlans:
        """Plans for [rows, heads, NUM_FEATURES]."""
        streaming, base, slope = self(features).unbind(-1)
        levels = torch.arange(len(BLOCK_SIZES), device=features.device)
        budgets = base.exp2()[..., None] + slope[..., None] / _SLOPE_SCALE * levels
        budgets = budgets.clamp(BUDGETS[1], 1.0) * (streaming <= 0)[..., None]
        return by_budgets(torch.unflatten(budgets, 1, (kv_heads, -1)), cost)


def fit_direct(
    data: TrainingSet,
    threshold: float,
    *,
    epochs: float = 10.0,
    batch: int = 16_384,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> DirectMlp:
    """Train one; arguments as for fit.fit."""
    device = data.features.device
    torch.manual_seed(seed)
    network = DirectMlp(threshold).to(device)
    rows = data.features.shape[0]
    seen = data.features[torch.randint(0, rows, (min(rows, 1_000_000),), device=device)]
    network.feature_mean.copy_(seen.mean(0))
    network.feature_scale.copy_(1 / seen.std(0).clamp(min=1e-3))
    limit = torch.tensor(threshold, device=device)

    def batch_loss(features: Tensor, log_squares: Tensor) -> Tensor:
        budgets = smallest_budgets(log_squares, limit)
        streaming, base, slope = network(features).unbind(-1)
        is_streaming = (budgets[:, 0] == 0).float()
        growth = (budgets[:, -1] - budgets[:, 0]) / (len(BLOCK_SIZES) - 1) * _SLOPE_SCALE
        error = (base - budgets[:, 0].clamp(min=BUDGETS[1]).log2()) ** 2 + (slope - growth) ** 2
        total: Tensor = ((1 - is_streaming) * error).mean()
        return total + F.binary_cross_entropy_with_logits(streaming, is_streaming)

    minimise(network, data, batch_loss, epochs=epochs, batch=batch, learning_rate=learning_rate)
    return network.eval()
