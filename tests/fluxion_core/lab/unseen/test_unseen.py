"""Rules over traces of a toy: limits that hold for any model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxion_core.geometry import WindowSpec
from fluxion_core.lab.training.curve import FixedMethod, MethodSimulator, Runs
from fluxion_core.lab.training.replay import prefill, replay
from fluxion_core.lab.unseen import curves, outcomes, second_look
from fluxion_core.lab.unseen.assess import Assess, training_free_rules, universal_rule
from fluxion_core.lab.unseen.outcomes import Outcome, Point, between, choose, gain, read
from fluxion_core.lab.unseen.traces import LAST, PAIRS, SPREAD, STEPS, Trace, asking, trace_prompt
from fluxion_core.lab.unseen.universal import (
    CorrectionMlp,
    fit_universal,
    samples_of,
    unitless_features,
    universal,
)
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.choice_reference import GroupPlans
from fluxion_core.planning.constants import FEATURE_NAMES
from fluxion_core.planning.cost_model import CostModel

PROMPT, RAN = 1536, 6


@pytest.fixture(scope="module")
def trace(decoder, token_ids) -> Trace:
    return trace_prompt(decoder, prefill(decoder, token_ids), PROMPT, RAN, WindowSpec())


def test_a_trace_holds_the_errors_of_its_steps_and_is_read_as_it_was_written(
    trace: Trace, decoder: Decoder, token_ids: list[int], tmp_path: Path
):
    errors = []

    def attend(layer, step):
        errors.append(step.log_squared_errors().flatten(1, 2))
        return step.full_output.flatten(1, 2)

    kv = prefill(decoder, token_ids)
    replay(decoder, kv, torch.arange(PROMPT, PROMPT + RAN), WindowSpec(), attend)
    torch.testing.assert_close(trace.logs[STEPS].float(), torch.stack(errors, 1), atol=0.02, rtol=0)
    trace.save(tmp_path / "a.safetensors")
    again = Trace.load(tmp_path / "a.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(vars(of).values() for of in (trace, again)), strict=True)
    )


def test_layers_that_are_not_looked_at_change_nothing_for_the_others(
    decoder: Decoder, token_ids: list[int]
):
    kv = prefill(decoder, token_ids)
    # Layer 2 of three sees what the skipped layer 1 put out.
    decoder.layers.append(decoder.layers[0])
    try:
        decoder.config = replace(decoder.config, num_layers=3)
        kv = replace(kv, keys=kv.keys[[0, 1, 0]], values=kv.values[[0, 1, 0]])
        whole, some = (
            trace_prompt(decoder, kv, PROMPT, 2, WindowSpec(), every_layer=every)
            for every in (1, 2)
        )
    finally:
        decoder.config = replace(decoder.config, num_layers=2)
        del decoder.layers[2]
    assert some.layers.tolist() == [0, 2]
    torch.testing.assert_close(some.logs, whole.logs[:, [0, 2]], atol=0.02, rtol=0)


def test_fixed_is_what_the_simulator_of_training_says(trace, decoder, token_ids):
    runs = Runs(prefill(decoder, token_ids), (PROMPT,), RAN)
    simulator = MethodSimulator(
        decoder, runs, WindowSpec(), {}, torch.zeros(2, 4, 3), CostModel(), {}
    )
    (result,) = simulator.run([FixedMethod(0, 0.05)]).values()
    # In the first layer hidden states are the same; later ones follow from what was read.
    assert float(trace.fixed_square[:, 0].mean()) == pytest.approx(
        float(result.squares[:, 0].mean()), rel=1e-3
    )


def test_reading_everything_costs_the_region_and_its_digests(trace: Trace):
    shape = (RAN * 2, 2)
    everything = GroupPlans(torch.full(shape, 1), torch.ones(*shape, 2))
    nothing = GroupPlans(torch.full(shape, -2), torch.zeros(*shape, 2))
    assert read(trace, everything, scans_coarse=False) == Point(0.0, pytest.approx(1 + 1 / 32))
    mean = float(trace.logs[STEPS][..., 0, 0].float().exp().mean())
    assert read(trace, nothing) == Point(pytest.approx(mean, rel=1e-3), pytest.approx(1 / 128))


def test_the_oracle_is_best_at_every_price(trace: Trace):
    def cost(known: torch.Tensor) -> float:
        point = read(trace, choose(trace, known, "price", 0.1))
        return point.square + 0.1 / 2 * point.share

    best = cost(curves.oracle(trace))
    for known in (curves.prompt_mean(trace, SPREAD), curves.ridge(trace)):
        # The selector's union is a model; within it the oracle is best, nearly so in truth.
        assert best < cost(known) * 1.02


def test_the_prompts_mean_is_that_of_its_squares(trace: Trace):
    mean = curves.prompt_mean(trace, LAST)
    assert mean.shape == trace.logs[STEPS].shape
    assert float(mean[3, 0, 1, 2, 4].exp()) == pytest.approx(
        float(trace.logs[LAST][:, 0, 1, 2, 4].float().exp().mean()), rel=1e-4
    )


def test_a_ridge_finds_what_is_linear_and_without_a_clue_says_the_mean():
    generator = torch.Generator().manual_seed(0)
    prompt, steps = (torch.randn(128, 1, 1, 3, generator=generator) for _ in range(2))
    linear = curves.fit_ridge(prompt, prompt[..., :1] - 4, steps, 1e-3)
    torch.testing.assert_close(linear, steps[..., :1] - 4, atol=1e-2, rtol=0)
    noise = torch.randn(128, 1, 1, 1, generator=generator)
    blind = curves.fit_ridge(prompt, noise, steps, 1e9)
    torch.testing.assert_close(blind, noise.exp().mean().log().expand_as(blind), atol=1e-3, rtol=0)


@pytest.mark.parametrize("of_layer", [False, True])
def test_a_ridge_keeps_the_mean_of_the_prompts_squares(trace: Trace, of_layer: bool):
    # Asked about the prompt's own queries.
    rows = torch.arange(SPREAD.start, SPREAD.stop)
    again = replace(
        trace,
        features=torch.cat((trace.features[: STEPS.start], trace.features[rows])),
        logs=torch.cat((trace.logs[: STEPS.start], trace.logs[rows])),
    )
    predicted = curves.ridge(again, of_layer=of_layer).exp().mean(0).log()
    observed = trace.logs[SPREAD].float().exp().mean(0).log()
    torch.testing.assert_close(predicted[..., 0, :], observed[..., 0, :], atol=1e-2, rtol=0)


def test_evidence_moves_an_expectation_towards_the_truth(trace: Trace):
    truth = curves.oracle(trace).exp().mean(0).log().expand_as(curves.oracle(trace))
    # Ten times too high a square, so that much is read and the rest is seen.
    wrong = truth + 2.3
    corrected = curves.with_evidence(trace, wrong, 1e-3)
    assert torch.equal(corrected[0], wrong[0])
    assert (corrected[-1] - truth[-1])[..., 0].abs().mean() < 0.9 * 2.3
    assert (corrected[-1] <= wrong[-1] + 0.5).float().mean() > 0.9


def test_distances_of_a_trace_obey_the_triangle(trace: Trace):
    errors = trace.logs.float().div(2).exp()
    for number, (smaller, larger) in enumerate(PAIRS):
        apart = trace.moved[..., number].float().div(2).exp()
        most = errors[..., smaller] + errors[..., larger]
        assert (apart <= most * 1.01 + 3e-4).all()


def test_a_network_begins_as_training_free_and_learns(trace: Trace):
    samples = samples_of([trace], with_ridge=True, every=1)
    network = CorrectionMlp(samples.features.shape[1], 8)
    network.scale.copy_(1 / samples.features.std(0).clamp(min=1e-3))
    untrained = universal(trace, network, with_ridge=True)
    assert torch.equal(untrained, curves.ridge(trace))
    trained = fit_universal([samples, samples], steps=60, batch=256, hidden=16)
    off = [
        float((universal(trace, of, with_ridge=True) - curves.oracle(trace)).abs().mean())
        for of in (network, trained)
    ]
    assert off[1] < 0.9 * off[0]


def test_units_of_a_model_change_no_feature(trace: Trace):
    scaled = trace.features.clone()
    for name in ("key_scale", "value_scale", "query_scale"):
        scaled[..., FEATURE_NAMES.index(name)] += 3.0
    other = replace(trace, features=scaled)
    torch.testing.assert_close(
        unitless_features(other, with_ridge=True),
        unitless_features(trace, with_ridge=True),
        atol=2e-2,
        rtol=1e-3,
    )


def test_every_rule_reads_more_at_a_lower_price(trace: Trace):
    network = CorrectionMlp(samples_of([trace], with_ridge=False).features.shape[1], 8)
    rules = training_free_rules() | {"universal": universal_rule(network, with_ridge=False)}
    for name, rule in rules.items():
        points = rule(trace).points
        assert points[0].share > points[-1].share, name
        assert points[0].square < points[-1].square, name


def test_gains_are_read_between_points():
    # By hand: square 1 / share, so fixed's error of 2 is met at a share of a half.
    line = tuple(Point(1 / share, share) for share in (0.125, 0.25, 0.5, 1.0))
    found = gain(dict.fromkeys("abc", Outcome(Point(2.0, 1.0), line)))
    assert found.bytes_at_fixed_error == pytest.approx((0.5, 0.5, 0.5))
    assert found.error_at_half_bytes == pytest.approx((1.0, 1.0, 1.0))
    assert found.line[0] == pytest.approx((0.125, 4.0))
    assert found.of_texts["b"] == pytest.approx((0.5, 1.0))
    assert between([(1, 1), (4, 16)], 2) == pytest.approx(4.0)
    assert between([(1, 1), (4, 16)], 5) != between([(1, 1), (4, 16)], 5)


def test_what_lies_beyond_the_prices_is_null_in_a_report():
    cheap = tuple(Point(1 / share, share) for share in (0.125, 0.25))
    told = gain({"a": Outcome(Point(0.5, 1.0), cheap)}).as_json()
    assert told["bytes_at_fixed_error"] == [None, None, None]
    assert told["of_texts"] == {"a": [None, None]}
    assert json.loads(json.dumps(told, allow_nan=False))["line"][0] == [0.125, 16.0]


def test_asking_writes_into_the_prompt_and_after_it():
    ids = [0] * 2400
    asked = asking(ids, 2048, lambda text: [ord(letter) for letter in text], 3)
    assert len(asked) == len(ids)
    assert any(asked[96:1600])
    assert not any(asked[1800:2048])
    assert all(asked[2048:2080])


def test_models_and_texts_that_were_left_out_are_told_apart(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in (outcomes, second_look):
        monkeypatch.setattr(module, "PRICES", (0.001, 3.0))
    for model, texts in {"a": ("one", "two"), "b": ("one",)}.items():
        (tmp_path / model).mkdir()
        for text in texts:
            trace.save(tmp_path / model / f"{text}.safetensors")
    Assess(
        tmp_path / "unseen.json",
        (tmp_path / "a", tmp_path / "b"),
        own="none",
        updates=2,
        hidden=4,
        batch=32,
    )()
    report = json.loads((tmp_path / "unseen.json").read_text())
    rules = report["figures"]["a"]
    assert {"network of the model", "network of all models, on the ridge", "ridge"} <= set(rules)
    assert all(set(rules[name]["of_texts"]) == {"one", "two"} for name in ("ridge", "oracle"))
    # Its only text was left out, so that nothing of the model is left to train on.
    other = report["figures"]["b"]
    assert "network of the model" not in other
    assert set(other["network of other models"]["of_texts"]) == {"one"}
    assert "shipped network, its own priors" not in other
