"""Make the screenshots of the console pages: two nodes under load, and a GPU's recorded figures.

    python deploy/screenshots/make.py [SECONDS OF LOAD]

The nodes are real and run on this machine's CPU. Beside them a third is scraped that is none: it
replays a GPU whose figures were measured on an H100 (llama-3.1-8b.json of the lab's results
gpu-step-h100, four sequences of 32K tokens, one policy after another), step for step. Of the bytes
over PCIe that file has the sum and what the GPU read of host memory; the rest is called queries and
attention states. There was no tier in device memory: its panels say that they are empty.

Needs Debian's prometheus and chromium, and the model smollm2-135m; ends everything that it starts.
"""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from fluxion_core.observe.device_usage import DeviceUsage
from services.cli.addresses import choose_listen_address
from services.gpu_metrics import (
    NVML_ACTIVITY,
    NVML_LINK,
    NVML_PCIE_BYTES,
    NVML_UTILIZATION,
    device_families,
)
from services.metrics import NODE_READY

HERE = Path(__file__).parent
DEPLOY = HERE.parent
RECORDED = DEPLOY.parent / "fluxion_core" / "lab" / "results" / "gpu-step-h100"
PAGES = {"overview": 1250, "overlap": 1470, "traffic": 1470}
"""By name: their heights in pixels."""
WIDTH = 1200
SCRAPE_SECONDS = 2
PHASE_SECONDS = 80
LINK_BYTES_PER_SECOND = 63e9
"""PCIe 5 x16, as NVML tells it."""


class ReplayedGpu:
    """Exports what a GPU's node would, at the pace of the steps recorded."""

    def __init__(self) -> None:
        figures = json.loads((RECORDED / "llama-3.1-8b.json").read_text())["figures"]
        self._phases = [
            one
            for one in figures
            if one["lanes"] == "both" and one["batch"] == "4 x 32,768" and one["read_bytes"] > 0
        ]
        self._usage = DeviceUsage()
        self._wire = {"host_to_device": 0.0, "device_to_host": 0.0}
        self._started = self._until = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        """Catch up with the clock, and tell."""
        now = time.monotonic()
        phase = self._phases[int((now - self._started) / PHASE_SECONDS) % len(self._phases)]
        # At the end of each phase there is nothing to decode.
        rests = (now - self._started) % PHASE_SECONDS > PHASE_SECONDS * 3 / 4
        self._pass(now - self._until, None if rests else phase)
        self._until = now
        yield NODE_READY.render({("decode",): 1})
        yield from device_families(self._usage)
        yield NVML_PCIE_BYTES.render({(way,): count for way, count in self._wire.items()})
        yield NVML_LINK.render_value(LINK_BYTES_PER_SECOND)
        busy = 0.0 if rests else 1 - phase["idle_milliseconds"] / phase["milliseconds"]
        yield NVML_UTILIZATION.render_value(float(not rests))
        yield NVML_ACTIVITY.render({("graphics",): busy, ("sm",): busy})

    def _pass(self, seconds: float, phase: dict[str, float] | None) -> None:
        usage = self._usage
        if phase is None:
            usage.idle_seconds["no_work"] += seconds
            return
        steps = seconds * 1000 / phase["milliseconds"]
        for_host = phase["idle_milliseconds"]
        usage.busy_seconds += steps * (phase["gpu_milliseconds"] - for_host) / 1000
        usage.idle_seconds["host_attention"] += steps * for_host / 1000
        between = phase["milliseconds"] - phase["gpu_milliseconds"]
        usage.idle_seconds["host_step"] += steps * between / 1000
        rest = phase["counted_pcie_bytes"] - phase["lane_bytes"]
        usage.pcie_bytes["host_to_device", "selected_kv"] += int(steps * phase["lane_bytes"])
        usage.pcie_bytes["host_to_device", "attention_states"] += int(steps * rest / 2)
        usage.pcie_bytes["device_to_host", "queries"] += int(steps * rest / 2)
        self._wire["host_to_device"] += steps * (phase["nvml_pcie_bytes"] - rest / 2)
        self._wire["device_to_host"] += steps * rest / 2


@contextmanager
def served(gpu: ReplayedGpu) -> Iterator[int]:
    """The port at which it can be scraped."""
    registry = CollectorRegistry()
    registry.register(gpu)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = generate_latest(registry)
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            del arguments

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def free_ports(*names: str) -> dict[str, int]:
    """A port of this machine for each name."""
    ports: dict[str, int] = {}
    for name in names:
        address = choose_listen_address(
            None, preferred="127.0.0.1:0", flag="", promised=ports.values()
        )
        ports[name] = address.port
    return ports


@contextmanager
def running(*command: str | Path) -> Iterator[None]:
    """A program, for as long as it is wanted."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def prometheus_configuration(targets: dict[str, int]) -> str:
    """What is scraped, by job and port, with the rules of deploy/."""
    configuration: str = yaml.safe_dump(
        {
            "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": "2s"},
            "rule_files": [str(DEPLOY / "rules" / "fluxion.yml")],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
                for job, port in targets.items()
            ],
        }
    )
    return configuration


def take(page: str, port: int, minutes: int, scratch: str) -> None:
    """One page, as a browser shows it."""
    subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--hide-scrollbars", f"--user-data-dir={scratch}/browser-{page}"),
            *(f"--window-size={WIDTH},{PAGES[page]}", "--virtual-time-budget=8000"),
            f"--screenshot={HERE / page}.png",
            f"http://127.0.0.1:{port}/consoles/{page}.html?minutes={minutes}",
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )


def main(load_seconds: int) -> None:
    """Start, load, look, end."""
    command = (sys.executable, "-m", "services.cli")
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        ports = free_ports("prefill", "decode", "up", "prometheus")
        gpu_port = stack.enter_context(served(ReplayedGpu()))
        settings = []
        for kind in ("prefill", "decode"):
            path = Path(scratch) / f"{kind}.toml"
            path.write_text(f'[server]\nmetrics_listen = "127.0.0.1:{ports[kind]}"\n')
            settings += [f"--{kind}-config", str(path)]
        decode = f"127.0.0.1:{ports['up']}"
        stack.enter_context(running(*command, "up", "--decode-listen", decode, *settings))
        configuration = Path(scratch) / "prometheus.yml"
        configuration.write_text(
            prometheus_configuration(
                {"prefill": ports["prefill"], "decode": ports["decode"], "gpu": gpu_port}
            )
        )
        stack.enter_context(
            running(
                *("prometheus", f"--config.file={configuration}"),
                f"--storage.tsdb.path={scratch}/prometheus",
                f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
                f"--web.console.templates={DEPLOY / 'consoles'}",
            )
        )
        while True:
            time.sleep(1)
            health = subprocess.run([*command, "health", decode], capture_output=True, check=False)
            if health.returncode == 0:
                break
        print("ready", flush=True)
        lengths = ("--prompt", "300", "--prompt", "700", "--prompt", "1400")
        load = (*command, "bench", "serve", "--address", decode, *lengths, "--new-tokens", "96")
        with running(
            *load, "--concurrency", "3", "--requests", "10000", "--policy", "marginal(0.3)"
        ):
            time.sleep(load_seconds)
            for page in PAGES:
                take(page, ports["prometheus"], max(1, load_seconds // 60), scratch)
                print(HERE / f"{page}.png", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
