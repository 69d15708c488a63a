"""Processor time of another process, as the kernel accounts for it."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_seconds_of(pid: int) -> float:
    """Processor time that a process has used so far, s, all its threads together."""
    # The command's name, in parentheses, may have spaces in it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
