"""Benches of the tier, as far as they need no GPU: sizes, groups that fit, pieces of texts."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from fluxion_core.config.commands import run_module
from fluxion_core.decode.device.pinned import RegisteredStore
from fluxion_core.decode.device.tier import DeviceTier
from fluxion_core.errors import ConfigError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.exact_step import ExactFigure
from fluxion_core.lab.benchmark.model_shapes import fill_sequences
from fluxion_core.lab.benchmark.tier_figures import (
    ExactRate,
    KvShare,
    TierStepFigure,
    batch_name,
    groups_that_fit,
)
from fluxion_core.lab.benchmark.tier_model import forced_tokens, pieces_of
from fluxion_core.lab.benchmark.tier_step import (
    TierStepOptions,
    _StepNumbers,
    fill_up,
    restart,
)
from fluxion_core.lab.benchmark.tier_step_report import TierStepReport, markdown


def test_kv_in_device_memory_is_a_share_or_a_size():
    assert [KvShare.parse(text).of(1000) for text in ("20 %", "0%", "2.5 %")] == [200, 0, 25]
    assert KvShare.parse("8 GiB").of(1000) == 8 << 30
    assert [str(KvShare.parse(text)) for text in ("20%", "8 GiB", "0.5 GiB")] == [
        "20 %",
        "8 GiB",
        "0.5 GiB",
    ]
    with pytest.raises(ConfigError, match="20 GB"):
        KvShare.parse("20 GB")


def test_batches_are_of_one_length_or_mixed():
    options = TierStepOptions(contexts=(32, 64), batches=(1, 2), mixed=("16+48",))
    assert options.cases == [(64, 64), (32, 32), (64,), (48, 16), (32,)]
    assert [batch_name(case) for case in options.cases[::3]] == ["2 x 64", "48 + 16"]


def test_sequences_that_fit_take_turns_in_groups():
    assert groups_that_fit([64] * 3, 64) == [(64,), (64,), (64,)]
    assert groups_that_fit([16, 64, 32, 48], 80) == [(64, 16), (48, 32)]
    assert groups_that_fit([65, 10], 64) == [(10,)]


def test_pieces_begin_at_different_places_and_go_on_in_the_text():
    pieces = pieces_of(range(100), 3, 50, 10)
    assert [piece.prompt[0] for piece in pieces] == [0, 20, 40]
    assert all(len(piece.prompt) == 50 for piece in pieces)
    assert [piece.following[0] for piece in pieces] == [50, 70, 90]
    assert pieces[2].following == list(range(90, 100))
    with pytest.raises(ConfigError, match="need 62"):
        pieces_of(range(61), 3, 50, 10)


def test_the_topic_changes_at_half_of_the_steps():
    pieces = pieces_of(range(100), 2, 50, 10)
    assert forced_tokens(pieces, 8) == [
        [50, 51, 52, 53, 94, 95, 96, 97],
        [90, 91, 92, 93, 54, 55, 56, 57],
    ]


def figure(**changed: object) -> TierStepFigure:
    values = dict.fromkeys((one.name for one in fields(TierStepFigure)), 0.0)
    return TierStepFigure(**values | changed)  # type: ignore[arg-type]


def test_a_report_has_a_row_for_every_figure(tmp_path: Path):
    # By hand: 3 of 4 GB are resident, and two rows in 20 ms are 100 tokens a second.
    of_policy = figure(
        lengths=(32, 32),
        policy="threshold(0.215)",
        is_recorded=True,
        kv="20 %",
        device_kv_bytes=2 << 30,
        held_bytes=1 << 30,
        milliseconds=20.0,
        selected_bytes=4e9,
        missed_bytes=1e9,
    )
    assert (of_policy.hit_rate, of_policy.tokens_per_second) == (0.75, 100.0)
    assert figure(lengths=(1,), milliseconds=1.0).hit_rate == 1
    exact = ExactFigure("sdpa", 2, 32, 40.0, 10 << 30, 30.0)
    rate = ExactRate((32, 32), "8 GiB", ((32,), (32,)), 80.0)
    report = {
        "machine": dict.fromkeys(("gpu", "processor", "isa", "python", "torch", "commit"), "x"),
        "options": {"shape": "s", "steps": 3},
        "sampling": "no",
        "exact": [asdict(exact)],
        "exact_rates": [asdict(rate) | {"tokens_per_second": rate.tokens_per_second}],
        "figures": [of_policy.as_json()],
    } | dict.fromkeys(
        (f"{name}_gigabytes_per_second" for name in ("copy", "host_read", "uva")), 1000.0
    )
    file, out = tmp_path / "run.json", tmp_path / "tables.md"
    file.write_text(json.dumps(report))
    assert run_module(TierStepReport, [str(file), "--out", str(out)]) == 0
    text = out.read_text()
    assert "| threshold(0.215), recorded | 20 % | 1.0 / 2.0 | 20.00 | 100 | 0.750 | 4.00 |" in text
    assert "| 2 x 32 | sdpa | 10.0 | 40.00 | 50 | 30.00 |" in text
    assert "2 sequences in 2 groups that take turns: 80.00 ms for a token of each, 25 tok" in text
    assert "### 2 x 32" in text
    without = markdown("run", report | {"exact": [], "exact_rates": []})
    assert not any("exact in HBM" in line for line in without)


def test_a_tier_is_filled_up_with_regions_as_far_as_there_is_room():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    geometry = KvGeometry(num_layers=2, num_kv_heads=1, head_dim=16, slab_tokens=128)
    size = 12 * (geometry.slab_bytes // 4096 + 1) * 4096
    store = HostKvStore(geometry, size, model_key=b"")
    pinned = RegisteredStore(store) if device.type == "cuda" else None
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    step = torch.zeros(1, dtype=torch.int32, device=device)
    tier = DeviceTier(store, 60 * geometry.block_bytes, step, stream)
    sequences = fill_sequences(store, (512, 384), 16, threads=1)
    regions = [range(64, 256), range(64, 128)]  # 32 units of two layers
    for capacity, held in ((60, 32), (20, 20), (60, 32)):
        restart(tier, capacity * geometry.block_bytes)
        for slot, (sequence, region) in enumerate(zip(sequences, regions, strict=True)):
            tier.join(slot, sequence, region)
        fill_up(tier)
        assert int((tier.table >= 0).sum()) == held
        assert tier.statistics().held_bytes == held * geometry.block_bytes
        for slot in range(2):
            tier.leave(slot)
    tier.close()
    if pinned is not None:
        pinned.close()


def test_steps_that_warm_up_run_some_times_each_and_timed_ones_follow():
    numbers = _StepNumbers.after(range(3), 2, 2)
    assert numbers.all == [0, 0, 1, 1, 2, 2, 3, 4]
    assert len(numbers.warm_up) == 6
