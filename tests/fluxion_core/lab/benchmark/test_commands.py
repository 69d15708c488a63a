"""Benches that are commands of their own: each explains itself and each of its options."""

from __future__ import annotations

import importlib

import pytest

from fluxion_core.config.commands import Command, make_app, run_module

COMMANDS = {
    "follow_up": "FollowUpBench",
    "gpu_step": "GpuStepCommand",
    "gpu_step_report": "GpuStepReport",
    "key_index_scan": "KeyIndexScanCommand",
    "head_errors": "HeadErrorsBench",
    "nvml_agreement": "NvmlAgreementBench",
    "offloaded_cache": "OffloadedCacheBench",
    "prompt_profile": "PromptProfileBench",
    "random_model": "RandomModel",
    "record_plans": "RecordPlans",
    "record_selections": "RecordSelections",
    "resident_attention": "ResidentAttentionCommand",
    "sampling": "SamplingBench",
    "selection_cache": "SelectionCacheBench",
    "shared_cpus": "SharedCpusCommand",
    "tier_model": "TierModelCommand",
    "tier_step": "TierStepCommand",
    "tier_step_report": "TierStepReport",
}
"""Class of each module."""


@pytest.mark.parametrize("module", COMMANDS)
def test_it_explains_itself_and_each_option(module: str, capsys: pytest.CaptureFixture[str]):
    place = importlib.import_module(f"fluxion_core.lab.benchmark.{module}")
    command: type[Command] = getattr(place, COMMANDS[module])
    assert run_module(command, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert " ".join((command.__doc__ or "").split()) in " ".join(shown.split())
    assert "--log-level" in shown
    app = make_app(module)
    app.default(command)
    options = app.assemble_argument_collection(parse_docstring=True)
    assert [one.name for one in options if not one.parameter.help] == []


@pytest.mark.parametrize("module", COMMANDS)
def test_what_it_does_not_know_is_wrong_usage(module: str, capsys: pytest.CaptureFixture[str]):
    place = importlib.import_module(f"fluxion_core.lab.benchmark.{module}")
    assert run_module(getattr(place, COMMANDS[module]), ["--no-such-flag"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
