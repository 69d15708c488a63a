"""Policies by name and in numbers."""

from __future__ import annotations

import pytest

from fluxion_core.errors import ConfigError
from fluxion_core.planning.constants import READ_ALL
from fluxion_core.planning.policy import ExactPolicy, FixedPolicy, StepPlan, parse_policy


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


def test_a_plan_has_a_row_for_every_sequence():
    policies = [ExactPolicy(), FixedPolicy(64, 0.5)]
    plan = StepPlan(policies, [range(64, 640), range(64, 640)], num_kv_heads=2, num_heads=6)
    assert plan.levels.tolist() == [[READ_ALL] * 2, [2, 2]]
    assert plan.budgets.tolist() == [[0] * 6, [5] * 6]
