"""The bench moves what it says it moves. No test asserts a time."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from fluxion_core.config.command_options import JsonOption
from fluxion_core.lab.benchmark import handoff
from services.cli.handoff_bench import sending

TINY = handoff.Shape("tiny", num_layers=2, num_kv_heads=2, head_dim=16, num_tokens=300)


def test_all_three_ways_are_measured_on_the_same_bytes(tmp_path: Path):
    console = Console(file=io.StringIO(), width=120)
    report = handoff.run_handoff_bench(console, sending, repeats=1, shapes=(TINY,))
    (result,) = report["results"]
    # 304 tokens after padding, 2 layers, 2 heads, K and V of 16 channels in 2 bytes.
    assert result["payload_bytes"] == 304 * 2 * 2 * 2 * 16 * 2
    assert set(result["ways"]) == {"socket", "stream", "hand-off"}
    JsonOption(json=tmp_path / "report.json").write(report)
    assert json.loads((tmp_path / "report.json").read_text())["machine"]["grpcio"]
    assert "hand-off" in console.file.getvalue()
