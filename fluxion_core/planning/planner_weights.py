"""Weights that are fitted to one model: the predictor's network and priors, what heads weigh, what
plans cost, and what the quality levels mean. One safetensors file; `fluxion train` writes it.

Without weights for a model there is the training-free mode: a head's profile is what prefill
estimated from some of the prompt's queries, all heads weigh the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fluxion_core.errors import ConfigError
from fluxion_core.planning.constants import NUM_FEATURES, NUM_OUTPUTS
from fluxion_core.planning.cost_model import CostModel
from fluxion_core.planning.network import HeadProfileMlp
from fluxion_core.planning.policy import Policy, parse_policy

LEVEL_NAMES = ("ACCURATE", "BALANCED", "FAST")
"""Quality levels below EXACT, best first."""

TRAINING_FREE_LEVELS = {
    "ACCURATE": "threshold(0.05)",
    "BALANCED": "threshold(0.1)",
    "FAST": "threshold(0.2)",
}
"""For models without weights. Not chosen by task quality, which GetModelInfo says."""

SHIPPED = Path(__file__).parent / "weights"

_FORMAT = "fluxion-planner"


@dataclass(frozen=True)
class PlannerWeights:
    """Weights of one model; see the module's docstring."""

    network: HeadProfileMlp | None
    """None: training-free."""
    priors: Tensor
    """[layers, heads, 3] float32: see features.py; zeros if training-free."""
    head_weights: Tensor
    """[layers, heads] float32: what a head's squared output error counts under `marginal`."""
    cost: CostModel
    levels: Mapping[str, Policy]
    """By LEVEL_NAMES."""
    model_name: str = ""
    revision_hash: str = ""
    """Of the model that they were fitted to."""

    @property
    def mode(self) -> str:
        """`network` or `training-free`."""
        return "training-free" if self.network is None else "network"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what was fitted, hex, its first 16 digits; empty if training-free.

        Of the network, the priors and the heads' weights, as float32. What a file calls the model,
        its levels and the selector's cost are not in it.
        """
        if self.network is None:
            return ""
        digest = hashlib.sha256()
        tensors = {**self.network.state_dict(), "priors": self.priors}
        tensors["head_weights"] = self.head_weights
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @staticmethod
    def training_free(num_layers: int, num_heads: int, digest_bits: int = 16) -> PlannerWeights:
        """Weights for a model that nothing was fitted to."""
        return PlannerWeights(
            network=None,
            priors=torch.zeros(num_layers, num_heads, 3),
            head_weights=torch.ones(num_layers, num_heads),
            cost=CostModel(digest_bits=digest_bits),
            levels={name: parse_policy(text) for name, text in TRAINING_FREE_LEVELS.items()},
        )

    def save(self, path: Path) -> None:
        """Write the file; the network must be there."""
        assert self.network is not None
        tensors = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        tensors |= {"priors": self.priors, "head_weights": self.head_weights}
        metadata = {
            "format": _FORMAT,
            "model_name": self.model_name,
            "revision_hash": self.revision_hash,
            "spread": json.dumps(self.cost.spread),
            "levels": json.dumps({name: str(policy) for name, policy in self.levels.items()}),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.float().cpu().contiguous() for n, t in tensors.items()}, path, metadata)


def load_planner_weights(path: Path, *, digest_bits: int = 16) -> PlannerWeights:
    """Read a file that `save` wrote.

    Raises:
        ConfigError: it is not there, is none, or was made for other features or outputs.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"predictor weights {path} cannot be read: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise ConfigError(f"{path} holds no predictor weights; `fluxion train` writes them")
    network = HeadProfileMlp()
    prefix = "network."
    state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    try:
        network.load_state_dict(state)
        spread = json.loads(metadata["spread"])
        levels = {n: parse_policy(text) for n, text in json.loads(metadata["levels"]).items()}
        priors, head_weights = tensors["priors"], tensors["head_weights"]
    except (RuntimeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"predictor weights {path} are not for {NUM_FEATURES} features and {NUM_OUTPUTS} "
            f"outputs; train them again with this version: {error}"
        ) from None
    return PlannerWeights(
        network.eval().requires_grad_(requires_grad=False),
        priors,
        head_weights,
        CostModel((spread[0], spread[1], spread[2], spread[3]), digest_bits),
        levels,
        metadata.get("model_name", ""),
        metadata.get("revision_hash", ""),
    )


def shipped_planner_weights(revision_hash: str, *, digest_bits: int = 16) -> PlannerWeights | None:
    """The package's weights for a model, if it has them."""
    for path in sorted(SHIPPED.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("revision_hash") != revision_hash:
                continue
        return load_planner_weights(path, digest_bits=digest_bits)
    return None
