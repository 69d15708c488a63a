"""The network: one shared MLP from a head's features to its profile."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fluxion_core.planning.constants import CLIP_DEVIATIONS, NUM_FEATURES, NUM_OUTPUTS

HIDDEN = 312
"""Makes 114 thousand parameters; the paper's network has 0.112 million."""


class HeadProfileMlp(nn.Module):
    """Features in, profile out. The same weights for all layers and heads.

    The mean and deviation of the features and of the outputs in training belong to it.
    """

    feature_mean: Tensor
    feature_scale: Tensor
    output_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(NUM_FEATURES))
        self.register_buffer("feature_scale", torch.ones(NUM_FEATURES))
        self.register_buffer("output_mean", torch.zeros(NUM_OUTPUTS))
        self.layers = nn.Sequential(
            nn.Linear(NUM_FEATURES, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, NUM_OUTPUTS),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[..., NUM_OUTPUTS] for [..., NUM_FEATURES]; see head_profile.py for what they are."""
        scaled = (features - self.feature_mean) * self.feature_scale
        hidden: Tensor = self.layers(scaled.clamp(-CLIP_DEVIATIONS, CLIP_DEVIATIONS))
        return hidden + self.output_mean

    @property
    def num_parameters(self) -> int:
        """Weights and biases that are trained."""
        return sum(parameter.numel() for parameter in self.parameters())
