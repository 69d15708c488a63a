"""Bring docker-compose.yml up for real, and show that it works: make compose-test.

Build, up with two prefill nodes, healthy, a Generate from the host and one from a third container,
both prefill nodes used, all KV by sockets, one killed, still served, every metric expression
answered by the composed Prometheus after a minute of load, its rules tested by its own promtool;
then down, and nothing left. Needs docker with compose v2 or docker-compose 1.29, and the ports of
docker-compose.yml.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import expressions

ROOT = Path(__file__).parents[1]
PROJECT = "fluxion-compose-test"
NODE_ADDRESS = f"127.0.0.1:{os.environ.get('FLUXION_PORT', '7420')}"
PROMETHEUS = f"http://127.0.0.1:{os.environ.get('FLUXION_PROMETHEUS_PORT', '9090')}"
FLUXION = Path(sys.executable).with_name("fluxion")
READY_SECONDS = 600
LOAD_SECONDS = 75


class ComposeTestError(Exception):
    """Something that should hold does not."""


def compose(*arguments: str, check: bool = True) -> str:
    """Run docker compose on the project; returns what it printed."""
    has_plugin = (
        subprocess.run(
            ["docker", "compose", "version"], capture_output=True, check=False
        ).returncode
        == 0
    )
    command = ["docker", "compose"] if has_plugin else ["docker-compose"]
    files = ("-f", "docker-compose.yml", "-f", "deploy/compose_test.yml")
    return run(*command, "-p", PROJECT, *files, *arguments, check=check)


def run(*command: str | Path, text: str | None = None, check: bool = True) -> str:
    """Run a command from the repository's root.

    Raises:
        ComposeTestError: it failed.
    """
    result = subprocess.run(
        command, cwd=ROOT, input=text, capture_output=True, text=True, check=False
    )
    if check and result.returncode:
        shown = " ".join(map(str, command))
        raise ComposeTestError(f"{shown}: status {result.returncode}\n{result.stderr[-3000:]}")
    return result.stdout


def step(text: str) -> None:
    """Say what holds now."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def wait_until(what: str, holds: Callable[[], bool], seconds: float = READY_SECONDS) -> None:
    """Poll until something holds.

    Raises:
        ComposeTestError: it does not in time.
    """
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise ComposeTestError(f"{what}: not within {seconds:g} s")
        time.sleep(2)
    step(what)


def containers(service: str) -> list[str]:
    """Ids of a service's containers."""
    return compose("ps", "-q", service).split()


def are_healthy(*services: str) -> bool:
    """Whether every container of these services says so."""
    found = [one for service in services for one in containers(service)]
    states = run("docker", "inspect", "--format", "{{.State.Health.Status}}", *found).split()
    return bool(found) and all(state == "healthy" for state in states)


def generate(number: int, *, characters: int = 3000, quality: str = "exact") -> str:
    """Ask the decode node from the host; another prompt for each number."""
    document = (ROOT / "services" / "cli" / "demo_document.md").read_text()
    prompt = f"Request {number}.\n{document[:characters]}"
    options = ["--address", NODE_ADDRESS, "--quality", quality, "-n", "32", "--no-timings"]
    return run(FLUXION, "generate", *options, text=prompt)


def query(promql: str) -> dict[str, float]:
    """An expression's values now, by their labels as JSON."""
    asked = urllib.parse.urlencode({"query": promql})
    url = f"{PROMETHEUS}/api/v1/query?{asked}"
    with expressions.DIRECTLY.open(url, timeout=30) as answer:
        result = json.load(answer)["data"]["result"]
    return {json.dumps(one["metric"], sort_keys=True): float(one["value"][1]) for one in result}


def load(seconds: float) -> None:
    """Two clients that ask one after the other, all quality levels, prompts of all lengths."""
    end = time.monotonic() + seconds
    failures: list[BaseException] = []

    def client(first: int) -> None:
        number = first
        try:
            while time.monotonic() < end:
                quality = ("exact", "accurate", "balanced", "fast")[number % 4]
                generate(number, characters=2500 + number * 397 % 4000, quality=quality)
                number += 1
        except ComposeTestError as error:
            failures.append(error)

    clients = [threading.Thread(target=client, args=(1001 * place,)) for place in (1, 2)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    if failures:
        raise ComposeTestError(f"under load: {failures[0]}")


def from_a_third_container() -> str:
    """Generate from a container of its own on the composed network."""
    return run(
        *("docker", "run", "--rm", "--network", f"{PROJECT}_default", "--entrypoint", "fluxion"),
        *("fluxion-decode", "generate", "--address", "decode:7070", "-n", "8", "Say hello."),
    )


def check_hand_offs() -> None:
    """Both prefill nodes were used, and all KV came over their port for it."""
    used = query("fluxion_handoffs_total")
    labels = [json.loads(one) for one in used]
    if len({one["node"] for one in labels}) != 2 or min(used.values()) < 1:
        raise ComposeTestError(f"not both prefill nodes were used: {used}")
    if {one["way"] for one in labels} != {"sockets"}:
        raise ComposeTestError(f"between containers KV comes by sockets; it came so: {used}")
    step(f"hand-offs by prefill node: {sorted(map(int, used.values()))}, all KV by sockets")


def lose_a_prefill_node() -> None:
    """Kill one of two; requests go on."""
    run("docker", "kill", containers("prefill")[0])
    step("one prefill node killed")
    for number in range(4):
        if not generate(100 + number, characters=1500):
            raise ComposeTestError("an empty answer after a prefill node was killed")
    step("4 requests served without it")


def sizes_of_images() -> list[str]:
    """Of what was built, the base image included."""
    named = ("--filter", "reference=fluxion-*:latest", "--format", "{{.Repository}} {{.Size}}")
    return run("docker", "images", *named).splitlines()


def check_nothing_is_left() -> None:
    """No container, volume or network of the project."""
    label = f"label=com.docker.compose.project={PROJECT}"
    left = run("docker", "ps", "-aq", "--filter", label)
    left += run("docker", "volume", "ls", "-q", "--filter", label)
    left += run("docker", "network", "ls", "-q", "--filter", label)
    if left:
        raise ComposeTestError(f"left after down: {left.split()}")
    step("down, nothing left")


def bring_up_and_use() -> None:
    """Everything between build and down."""
    compose("up", "-d", "--scale", "prefill=2")
    wait_until("two prefill nodes and the decode node are healthy", _all_healthy)
    step(f"from the host: {generate(0)[:60]!r}")
    step(f"from a third container: {from_a_third_container()[:60]!r}")
    wait_until(
        "both prefill nodes are scraped and ready",
        lambda: query('sum(fluxion_node_ready{kind="prefill"})').get("{}") == 2,
        60,
    )
    load(LOAD_SECONDS)
    step(f"{LOAD_SECONDS} s of load")
    check_hand_offs()
    if expressions.main(PROMETHEUS):
        raise ComposeTestError("some expressions have no data")
    rules = "/etc/prometheus/rules/fluxion.test.yml"
    compose("exec", "-T", "prometheus", "promtool", "test", "rules", rules)
    step("rule tests pass in the Prometheus that runs them")
    lose_a_prefill_node()


def _all_healthy() -> bool:
    return len(containers("prefill")) == 2 and are_healthy("prefill", "decode")


def main() -> int:
    """Run it; returns the exit status. The cluster is taken down whatever happens."""
    if shutil.which("docker") is None:
        print("compose-test needs docker, and docker compose v2 or docker-compose 1.29")
        return 1
    try:
        compose("build")
        step("built: " + ", ".join(sizes_of_images()))
        bring_up_and_use()
    except ComposeTestError as error:
        print(compose("logs", "--tail", "40", check=False))
        print(f"FAILED: {error}")
        return 1
    finally:
        compose("down", "-v", "--timeout", "40", check=False)
    check_nothing_is_left()
    return 0


if __name__ == "__main__":
    sys.exit(main())
