"""The `fluxion` command: which subcommands there are.

Each is a dataclass in a file of `commands`, imported when it is named, or when help lists all; what
it needs to do its work is imported when it runs, so that `--help` loads neither torch nor grpc.
How a command line is read, and how it fails: fluxion_core/config/commands.py.
"""

from __future__ import annotations

import sys

from cyclopts import App

from fluxion_core import DISTRIBUTION
from fluxion_core.config.commands import make_app, run_app, show_what_the_terminal_can
from fluxion_core.errors import ConfigError

COMMANDS = {
    "demo": "demo:Demo",
    "up": "up:Up",
    "generate": "generate:Generate",
    "pull": "pull:Pull",
    "health": "health:Health",
    "info": "info:Info",
    "top": "top:Top",
    "trace": "trace:TraceSteps",
    "eval": "evaluate:Evaluate",
    "train": "train:Train",
    "completion": "completion:Completion",
}
"""File and class of each subcommand."""

BENCHES = {
    "handoff": "bench_handoff:BenchHandoff",
    "kernels": "bench_kernels:BenchKernels",
    "serve": "bench_serve:BenchServe",
    "first-token": "bench_first_token:BenchFirstToken",
    "prefill": "bench_prefill:BenchPrefill",
    "decode-step": "bench_decode_step:BenchDecodeStep",
    "telemetry": "bench_telemetry:BenchTelemetry",
}
"""The same of `fluxion bench`."""


def make_fluxion() -> App:
    """The whole command line."""
    app = make_app(
        "fluxion",
        "Long-context generation with the KV cache in host memory.",
        version=_version,
    )
    bench = make_app("bench", "Measure this machine; every figure beside its limit.")
    app.command(bench)
    for group, commands in ((app, COMMANDS), (bench, BENCHES)):
        for name, place in commands.items():
            group.command(f"services.cli.commands.{place}", name=name)
    return app


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        raise ConfigError(f"{DISTRIBUTION} is not installed: this is its source") from None


def main(arguments: list[str]) -> int:
    """Run one command.

    Returns:
        The exit status; see fluxion_core/config/commands.py.
    """
    return run_app(make_fluxion(), arguments)


def run() -> None:
    """Entry point of the installed command."""
    show_what_the_terminal_can()
    sys.exit(main(sys.argv[1:]))
