"""A few thousand cases of each target; `python -m tests.fuzz` runs the full load."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import Progress, make_target, table
from tests.fuzz.harness import Outcome, Tally, ViolationError, run_case

SEED = 20
"""Not the full load's, so that both together see more."""


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        *(("handoff", 1500), ("plane", 7000), ("tickets", 500)),
        *(("gguf", 500), ("safetensors", 500), ("requests", 100)),
    ],
)
def test_whatever_comes_is_refused_by_name_or_accepted_whole(name: str, cases: int):
    target, tally = make_target(name), Tally()
    try:
        # What is loaded at first use is not the case's memory.
        run_case(target, SEED, -1, Tally())
        findings = [run_case(target, SEED, case, tally) for case in range(cases)]
    finally:
        target.close()
    assert [found.what for found in findings if found] == []
    # Damage is found, and what is whole gets through.
    assert 0 < tally.results["accepted"] < cases
    assert f"| {cases:,} |" in table({name: Progress(SEED, tally=tally)})


class Odd:
    """A target that does what its first number says."""

    name = "odd"
    unit = "cases"

    def run(self, random) -> Outcome:
        match int(random.random() * 4):
            case 0:
                raise ViolationError("a broken promise")
            case 1:
                raise KeyError("an error of the code under test")
            case 2:
                self.held = bytes(20 << 20)
        return Outcome("accepted", 1, 10)


def test_a_broken_promise_another_error_and_too_much_memory_are_findings():
    # Every case whose memory is traced is a multiple of 64.
    found = [run_case(Odd(), 0, 64 * case, Tally()) for case in range(40)]
    whats = [each.what if each else "" for each in found]
    for words in ("a broken promise", "KeyError", "B of memory for an input of 10 B"):
        assert any(words in what for what in whats)
    assert "" in whats
    again = [run_case(Odd(), 0, 64 * case, Tally()) for case in range(40)]
    assert [bool(each) for each in again] == [bool(each) for each in found]
