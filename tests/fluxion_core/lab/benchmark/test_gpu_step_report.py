"""What is said of a run of `gpu_step` follows from its figures; which batches are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fluxion_core.config.commands import run_module
from fluxion_core.errors import ConfigError
from fluxion_core.lab.benchmark import gpu_step
from fluxion_core.lab.benchmark.gpu_step import GpuStepCommand, GpuStepOptions
from fluxion_core.lab.benchmark.gpu_step_report import GpuStepReport, markdown
from fluxion_core.lab.plots.gpu_step import draw_steps


def _figure(policy: str, lanes: str, milliseconds: float, read_gigabytes: float) -> dict[str, Any]:
    return {
        "batch": "4 x 1,024",
        "policy": policy,
        "lanes": lanes,
        "milliseconds": milliseconds,
        "gpu_milliseconds": milliseconds - 1,
        "idle_milliseconds": 2.0,
        "read_bytes": read_gigabytes * 1e9,
        "lane_bytes": 0.0,
        "dense_milliseconds": 10.0,
        "limit_milliseconds": 20.0,
        "over_limit": milliseconds / 20,
        "counted_pcie_bytes": 0.0,
        "nvml_pcie_bytes": 0.0,
        "sampling_milliseconds": 0.25,
    }


def _report() -> dict[str, Any]:
    rates = {"host_read": 90.0, "uva": 40.0, "host_read_beside_uva": 70.0}
    rates["uva_beside_host_read"] = 30.0
    return {
        "machine": dict.fromkeys(("gpu", "processor", "isa", "python", "torch", "commit"), "x"),
        "options": {"shape": "s", "steps": 3},
        "figures": [
            _figure("all heads streaming", "both", 11.0, 0.0),
            _figure("fixed(16, 5 %)", "both", 30.0, 1.0),
            _figure("fixed(16, 5 %)", "cpu", 45.0, 1.0),
            _figure("fixed(16, 5 %)", "gpu", 60.0, 1.0),
            _figure("marginal(1), recorded", "both", 15.0, 0.5),
        ],
    } | {f"{name}_gigabytes_per_second": rate for name, rate in rates.items()}


def test_ratios_are_those_of_the_figures():
    # By hand: 45 / 30, 30 / 15, 11 / 10; 1 GB at 100 GB/s and the dense step are 20 ms.
    text = "\n".join(markdown("run", _report()))
    assert "fixed(16, 5 %) 1.50 times faster than the better device" in text
    assert "marginal(1), recorded 2.00 times faster than fixed(16, 5 %)" in text
    assert "streaming 1.10 of the dense step alone (10.00 ms), 1.00 from its first kernel" in text
    row = next(line for line in text.splitlines() if "| fixed(16, 5 %) | both |" in line)
    assert row.split(" | ")[4] == "0.25"
    assert row.split(" | ")[9:11] == ["1.50", "1.50"]


def test_runs_whose_steps_did_not_sample_say_so():
    report = _report()
    assert "Steps sample their rows: no." in "\n".join(markdown("run", report))
    for figure in report["figures"]:
        del figure["sampling_milliseconds"]
    text = "\n".join(markdown("run", report | {"sampling": "temperature 1"}))
    assert "Steps sample their rows: temperature 1." in text
    assert "| fixed(16, 5 %) | both | 30.0 |  | 2.0 |" in text


def test_the_picture_is_drawn(tmp_path: Path):
    draw_steps(_report(), tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_batches_are_of_one_length_or_mixed(monkeypatch: pytest.MonkeyPatch):
    asked: list[GpuStepOptions] = []
    monkeypatch.setattr(gpu_step, "run_gpu_step_bench", lambda _, options: asked.append(options))
    flags = ["--contexts", "64,32", "--batches", "1,2", "--mixed", "16+48,32"]
    assert run_module(GpuStepCommand, [*flags, "--no-device-digests"]) == 0
    (options,) = asked
    assert options.cases == [(64,), (64, 64), (32,), (32, 32), (48, 16), (32,)]
    assert not options.device_digests
    with pytest.raises(ConfigError, match=r"mixed '16\+': lengths with \+ between them"):
        _ = GpuStepOptions(mixed=("16+",)).cases


def test_the_report_of_files_is_tables_and_pictures(tmp_path: Path):
    (tmp_path / "run.json").write_text(json.dumps(_report()))
    folder = ["--folder", str(tmp_path)]
    assert run_module(GpuStepReport, [str(tmp_path / "run.json"), *folder]) == 0
    assert (tmp_path / "run.png").exists()
    assert "run.json" in (tmp_path / "tables.md").read_text()
    assert run_module(GpuStepReport, folder) == 2
