"""The circumstances of a figure: the machine, versions and the commit that it comes from."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from fluxion_core.kernels import isa


def describe_machine(commit: str = "") -> dict[str, str]:
    """Processor, cores, and the versions that matter to speed.

    Args:
        commit: of the code, where that does not lie in a repository; found out if empty.
    """
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = f"{len(names)} x {names[0].split(':', 1)[1].strip()}" if names else model
    versions = {name: metadata.version(name) for name in ("grpcio", "protobuf", "torch")}
    return {
        "processor": model,
        "isa": isa.current_isa(),
        "python": platform.python_version(),
        **versions,
        "commit": commit or _commit(),
    }


def _commit() -> str:
    """Of the working tree this runs from; "unknown" for an installed package."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"
