"""One document of the curve, for a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fluxion_core.geometry import WindowSpec
from fluxion_core.lab.training.collect import RUN_STEPS
from fluxion_core.lab.training.curve import Method, MethodResult, MethodSimulator, Runs
from fluxion_core.lab.training.direct import DirectMlp
from fluxion_core.lab.training.losses import copied_steps
from fluxion_core.lab.training.replay import prefill
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.cost_model import CostModel
from fluxion_core.planning.network import HeadProfileMlp


@dataclass(frozen=True)
class CurveErrand:
    """Errand of a worker: its part of a curve; tensors on the CPU."""

    token_ids: Sequence[int]
    starts: tuple[int, ...]
    """Prompt lengths; each is followed by RUN_STEPS steps."""
    window: WindowSpec
    ways: Sequence[Method]
    networks: Mapping[str, HeadProfileMlp | DirectMlp]
    priors: Tensor
    cost: CostModel
    weights: Mapping[str, Tensor]
    """By policy, see MethodSimulator."""
    steps: int = RUN_STEPS


def run_curve_errand(
    decoder: Decoder, errand: CurveErrand
) -> tuple[dict[Method, MethodResult], Tensor]:
    """Results of all ways, and which steps copy something of the region."""
    device = decoder.embedding.device
    runs = Runs(prefill(decoder, errand.token_ids), errand.starts, errand.steps)
    networks = {name: network.to(device) for name, network in errand.networks.items()}
    simulator = MethodSimulator(
        decoder, runs, errand.window, networks, errand.priors, errand.cost, errand.weights
    )
    return simulator.run(errand.ways), copied_steps(runs, errand.window)
