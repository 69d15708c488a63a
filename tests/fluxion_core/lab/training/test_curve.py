"""Ways over replayed steps: limits that must hold for any model."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.lab.training.collect import collect, collect_document
from fluxion_core.lab.training.curve import FixedMethod, MethodSimulator, PlannedMethod, Runs
from fluxion_core.lab.training.direct import DirectMlp
from fluxion_core.lab.training.losses import copied_steps
from fluxion_core.lab.training.replay import prefill
from fluxion_core.lab.training.sensitivity import measure_sensitivity
from fluxion_core.planning.cost_model import CostModel, digest_share
from fluxion_core.planning.network import HeadProfileMlp


def network(level: float) -> HeadProfileMlp:
    """Says the same of every head: this log squared error until everything is read."""
    mlp = HeadProfileMlp()
    for parameter in mlp.parameters():
        torch.nn.init.zeros_(parameter)
    mlp.output_mean[:8] = level
    return mlp


@pytest.fixture(scope="module")
def simulator(decoder, token_ids, window) -> MethodSimulator:
    runs = Runs(prefill(decoder, token_ids), (900, 1200), 3)
    direct = DirectMlp(0.1)
    torch.nn.init.zeros_(direct.layers[-1].weight)
    with torch.no_grad():
        direct.layers[-1].bias.copy_(torch.tensor([5.0, -3.0, 0.0]))
    networks = {"careless": network(-20.0), "anxious": network(5.0), "direct": direct}
    return MethodSimulator(decoder, runs, window, networks, torch.zeros(2, 4, 3), CostModel(), {})


def test_reading_everything_is_exact_and_bytes_are_counted(simulator):
    ways = [FixedMethod(0, 1.0), FixedMethod(2, 0.1)]
    everything, some = simulator.run(ways).values()
    assert everything.kl.abs().max() < 1e-4
    assert everything.attended.tolist() == pytest.approx([1.0] * 6)
    assert everything.scanned.tolist() == pytest.approx([1 / 16] * 6)
    assert some.scanned.tolist() == pytest.approx([1 / 64] * 6)
    assert 0.1 < float(some.attended.mean()) < 0.25


def test_an_oracle_that_tolerates_nothing_loses_nothing(simulator):
    strict, loose = simulator.run(
        [PlannedMethod("threshold", 1e-3, "oracle"), PlannedMethod("threshold", 0.3, "oracle")]
    ).values()
    assert strict.kl.mean() < 0.05 * loose.kl.mean() + 1e-6
    assert strict.squares.max() < 1e-5
    assert loose.share.mean() < strict.share.mean()
    assert (loose.squares <= 0.3**2 + 1e-6).all()


def test_a_network_is_believed_and_the_coarse_scan_is_counted(simulator):
    ways = [PlannedMethod("marginal", 1.0, name) for name in ("careless", "anxious")]
    careless, anxious = simulator.run(ways).values()
    assert careless.attended.max() == 0
    assert careless.streaming.tolist() == [1.0] * 6
    assert careless.scanned.tolist() == pytest.approx([digest_share(3)] * 6)
    assert anxious.attended.tolist() == pytest.approx([1.0] * 6)
    assert anxious.kl.abs().max() < 1e-4


def test_the_papers_form_decides_too(simulator):
    found = simulator.run([PlannedMethod("direct", 0.1, "direct")])
    (result,) = found.values()
    assert result.attended.max() == 0


def test_samples_are_whole_resumable_and_seeded(decoder, workers, token_ids, window, tmp_path):
    told = []
    documents = [("one", token_ids), ("two", token_ids[::-1])]
    paths = collect(workers, documents[:1], window, tmp_path, lambda *done: told.append(done))
    before = paths[0].read_bytes()
    first = collect_document(decoder, token_ids, window, seed=0)
    assert torch.isfinite(first.features).all()
    assert first.log_squares.max() <= 2.0
    paths = collect(workers, documents, window, tmp_path, lambda *done: told.append(done))
    assert [path.stem for path in paths] == ["one", "two"]
    assert paths[0].read_bytes() == before
    assert told == [(1, 1), (1, 2), (2, 2)]
    # Time is up before anything new is begun; what is there is still found.
    late = collect(workers, [*documents, ("three", token_ids)], window, tmp_path, print, seconds=-1)
    assert [path.stem for path in late] == ["one", "two"]


def test_copied_steps_are_found_in_the_region_only(decoder, token_ids, window):
    ids = list(token_ids)
    ids[1000:1002] = [1, 2]
    ids[400:402] = [1, 2]
    # A pair that stands in the recent window alone is no copy of the region.
    ids[1203:1205] = [3, 4]
    ids[1150:1152] = [3, 4]
    for at in range(1100):
        if ids[at : at + 2] == [3, 4]:
            ids[at] = 5
    runs = Runs(prefill(decoder, ids), (1000, 1203), 1)
    assert copied_steps(runs, window).tolist() == [True, False]


def test_heads_that_do_not_reach_the_output_weigh_nothing(decoder, workers, token_ids, window):
    sensitivity = measure_sensitivity(workers, [token_ids], window, steps=3, draws=2)
    assert sensitivity.shape == (2, 4)
    assert (sensitivity > 0).all()
    before = decoder.layers[1].output.clone()
    decoder.layers[1].output[:, :16] = 0
    muted = measure_sensitivity(workers, [token_ids], window, steps=3, draws=2)
    decoder.layers[1].output.copy_(before)
    assert muted[1, 0] == 0
    assert muted[1, 1] > 0
