"""Which weights a node plans with, and what its levels mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxion_core.errors import ConfigError
from fluxion_core.geometry import WindowSpec
from fluxion_core.models.weights import LoadedModel, load_model
from fluxion_core.planning.cost_model import CostModel
from fluxion_core.planning.network import HeadProfileMlp
from fluxion_core.planning.planner_weights import PlannerWeights
from fluxion_core.planning.policy import ExactPolicy, MarginalPolicy, ThresholdPolicy
from services.decode.planning import Planning, make_planning

WINDOW = WindowSpec()


@pytest.fixture(scope="module")
def model(toy_model_path: Path) -> LoadedModel:
    return load_model(toy_model_path, device=torch.device("cpu"), dtype=torch.float32)


def weights_of(model: LoadedModel) -> PlannerWeights:
    free = PlannerWeights.training_free(model.config.num_layers, model.config.num_heads)
    return replace(
        free,
        network=HeadProfileMlp(),
        cost=CostModel(spread=(0.5, 0.5, 0.5, 0.5)),
        levels={
            "ACCURATE": MarginalPolicy(0.125),
            "BALANCED": MarginalPolicy(0.25),
            "FAST": ThresholdPolicy(0.5),
        },
        model_name=model.name,
        revision_hash=model.revision_hash,
    )


def plan(model: LoadedModel, weights: str, policy: str = "exact") -> Planning:
    return make_planning(weights, policy, model, WINDOW, digest_bits=16)


@pytest.mark.parametrize("setting", ["auto", "none"])
def test_a_model_without_weights_is_training_free(model: LoadedModel, setting: str):
    planning = plan(model, setting)
    assert (planning.planner.mode, planning.weights_fingerprint) == ("training-free", "")
    assert planning.levels["EXACT"] == ExactPolicy()


def test_a_file_brings_its_network_and_levels(model: LoadedModel, tmp_path: Path):
    weights_of(model).save(tmp_path / "w.safetensors")
    planning = plan(model, str(tmp_path / "w.safetensors"), "Fast")
    assert planning.planner.mode == "network"
    assert list(planning.levels) == ["EXACT", "ACCURATE", "BALANCED", "FAST"]
    assert planning.levels["BALANCED"] == MarginalPolicy(0.25)
    assert planning.default_policy == ThresholdPolicy(0.5)
    again = plan(model, str(tmp_path / "w.safetensors"))
    assert again.weights_fingerprint == planning.weights_fingerprint
    weights_of(model).save(tmp_path / "other.safetensors")
    other = plan(model, str(tmp_path / "other.safetensors"))
    assert other.weights_fingerprint != planning.weights_fingerprint


def test_weights_of_another_model_are_refused(model: LoadedModel, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    replace(weights_of(model), model_name="other", revision_hash="ab12").save(path)
    with pytest.raises(ConfigError, match=r"fitted to other \(revision ab12\)"):
        plan(model, str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        plan(model, str(tmp_path / "absent.safetensors"))


def test_levels_that_are_missing_are_named(model: LoadedModel, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    replace(weights_of(model), levels={"FAST": ThresholdPolicy(0.5)}).save(path)
    with pytest.raises(ConfigError, match="ACCURATE, BALANCED"):
        plan(model, str(path))


def test_a_default_that_is_no_policy_is_refused(model: LoadedModel):
    with pytest.raises(ConfigError, match="'best'; one of"):
        plan(model, "none", "best")


def test_only_predicted_policies_need_a_profile(model: LoadedModel):
    planning = plan(model, "none")
    assert planning.profile_window(planning.levels["EXACT"]) is None
    assert planning.profile_window(planning.levels["FAST"]) == WINDOW


def test_the_baselines_share_is_digests_and_a_union(model: LoadedModel, tmp_path: Path):
    weights_of(model).save(tmp_path / "w.safetensors")
    planning = plan(model, str(tmp_path / "w.safetensors"))
    # By hand: 1/16 of digests; two heads to a group, of which the second brings half of its 5 %.
    assert planning.baseline_share == pytest.approx(1 / 16 + 0.05 * 1.5)
