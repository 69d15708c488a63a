"""Policies by name and in numbers."""

from __future__ import annotations

import pytest

from fluxion_core.errors import ConfigError
from fluxion_core.kernels import _native
from fluxion_core.observe.device_usage import POLICY_KINDS
from fluxion_core.planning.constants import READ_ALL
from fluxion_core.planning.policy import ExactPolicy, FixedPolicy, PlanInputs, Policy, parse_policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("exact", ExactPolicy()),
        ("fixed(16, 5 %)", FixedPolicy(16, 0.05)),
        ("fixed(128,100%)", FixedPolicy(128, 1.0)),
        (" fixed( 32 , 0.02 ) ", FixedPolicy(32, 0.02)),
    ],
)
def test_policies_are_read_by_name_and_print_it(text: str, policy):
    assert parse_policy(text) == policy
    assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize("kind", POLICY_KINDS)
def test_a_kind_is_the_name_without_its_numbers(kind: str):
    policies = ("exact", "fixed(16, 5 %)", "threshold(0.1)", "marginal(0.3)")
    policy = next(parse_policy(text) for text in policies if text.startswith(kind))
    assert policy.kind == kind


@pytest.mark.parametrize(
    "text",
    ["", "fixed", "fixed(17, 5 %)", "fixed(16, 0 %)", "fixed(16, 101 %)", "fixed(16, 1.2.3)"],
)
def test_what_is_no_policy_is_refused(text: str):
    with pytest.raises(ConfigError):
        parse_policy(text)


def test_budgets_are_shares_of_the_regions_blocks_rounded_up():
    # By hand: tokens 64 to 1664 are 100 blocks of 16, and 13 of 128 (the first and last in part).
    region = range(64, 1664)
    assert FixedPolicy(16, 0.05).num_blocks(region) == 5
    assert FixedPolicy(16, 0.051).num_blocks(region) == 6
    assert FixedPolicy(128, 1.0).num_blocks(region) == 13
    assert FixedPolicy(128, 0.01).num_blocks(region) == 1
    assert FixedPolicy(16, 0.5).num_blocks(range(64, 64)) == 0


def test_policies_that_need_no_profile_give_all_heads_and_layers_the_same_plan():
    def no_network(policy: Policy) -> _native.PlanSource:
        raise AssertionError(policy)

    inputs = PlanInputs(range(64, 640), num_kv_heads=2, num_heads=6, predicted=no_network)
    for layer in (0, 7):
        assert ExactPolicy().plans(inputs).plan(layer) == ([READ_ALL] * 2, [0] * 6)
        assert FixedPolicy(64, 0.5).plans(inputs).plan(layer) == ([2, 2], [5] * 6)
