"""What identifies fitted weights."""

from __future__ import annotations

from dataclasses import replace

from fluxion_core.planning.planner_weights import (
    SHIPPED,
    PlannerWeights,
    load_planner_weights,
)
from tests.fluxion_core.planning.random_planner import random_network


def test_each_fitted_number_changes_the_fingerprint_and_names_do_not():
    free = PlannerWeights.training_free(2, 4)
    assert free.fingerprint == ""
    fitted = replace(free, network=random_network(3))
    others = [
        replace(fitted, network=random_network(4)),
        replace(fitted, priors=fitted.priors + 1),
        replace(fitted, head_weights=fitted.head_weights * 2),
    ]
    assert len({weights.fingerprint for weights in (fitted, *others)}) == 4
    assert replace(fitted, model_name="other", levels={}).fingerprint == fitted.fingerprint


def test_the_shipped_weights_are_known_by_their_fingerprint():
    # Of result files that name them: changes with the weights, not with how it is computed.
    found = {
        path.stem: load_planner_weights(path).fingerprint for path in SHIPPED.glob("*.safetensors")
    }
    assert found == {"smollm2-135m": "ad4ab417b632efa7"}
