"""The full load: `python -m tests.fuzz [TARGET ...] --journal build/fuzz.json` (`make fuzz`).

Cases run in one child process per target, with a bound on its memory; a child that crashes, hangs
or runs out of memory is a finding, and another one goes on behind the case that did it. With a
journal, a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import mmap
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fuzz.harness import Finding, Tally, Target, run_case

HANG_SECONDS = 20.0
"""Of processor time; no case takes a hundredth of it."""
STUCK_SECONDS = 600.0
"""Without a processor's help, such as for a lock."""
REPORTED_EVERY = 500
SPARE_ADDRESS_BYTES = 2 << 30
"""Address space that a child may take beyond what it has after its first case."""
MAX_FINDINGS = 50

_POSITION = struct.Struct("<q")
_NOT_STARTED = _POSITION.pack(-1)


def make_target(name: str) -> Target:
    """The target of this name."""
    if name == "handoff":
        from tests.fuzz.handoff_streams import HandoffStreams

        return HandoffStreams()
    if name == "plane":
        from tests.fuzz.plane_frames import PlaneFrames

        return PlaneFrames()
    if name == "tickets":
        from tests.fuzz.tickets import Tickets

        return Tickets()
    if name == "gguf":
        from tests.fuzz.gguf_files import GgufFiles

        return GgufFiles()
    if name == "safetensors":
        from tests.fuzz.model_directories import ModelDirectories

        return ModelDirectories()
    if name == "requests":
        from tests.fuzz.node_requests import NodeRequests

        return NodeRequests()
    raise SystemExit(f"no target {name!r}; there are {', '.join(DEFAULT_UNITS)}")


DEFAULT_UNITS = {
    "handoff": 1_000_000,
    "plane": 1_000_000,
    "tickets": 100_000,
    "gguf": 50_000,
    "safetensors": 50_000,
    "requests": 20_000,
}
"""Units of each target that a full run takes."""


@dataclass
class Progress:
    """How far a target has come."""

    seed: int
    next_case: int = 0
    seconds: float = 0.0
    peak_resident_bytes: int = 0
    tally: Tally = field(default_factory=Tally)
    findings: list[Finding] = field(default_factory=list)


def main() -> int:
    """Run what the command line asks for; returns 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(DEFAULT_UNITS), metavar="TARGET")
    parser.add_argument("--units", type=int, help="of each target; its own full load if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone, in this process")
    parser.add_argument("--journal", type=Path, help="keep progress here, and go on with it")
    parser.add_argument("--child", nargs=2, metavar=("FIRST", "POSITION"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        run_child(asked.targets[0], asked.seed, int(asked.child[0]), Path(asked.child[1]))
        return 0
    if asked.case is not None:
        return _run_one(asked.targets, asked.seed, asked.case)
    journal = _read_journal(asked.journal, asked.seed)
    for name in asked.targets:
        progress = journal.setdefault(name, Progress(asked.seed))
        goal = asked.units or DEFAULT_UNITS[name]
        try:
            fuzz(name, progress, goal, lambda: _write_journal(asked.journal, journal))
        except KeyboardInterrupt:
            break
    print(table(journal))
    found = [finding for progress in journal.values() for finding in progress.findings]
    for finding in found:
        print(f"\n{finding.target} --seed {finding.seed} --case {finding.case}\n{finding.what}")
    return 1 if found else 0


def fuzz(name: str, progress: Progress, goal: int, save: Callable[[], None]) -> None:
    """Run a target's cases, from where it is, until it has had `goal` units."""
    with tempfile.TemporaryDirectory(prefix="fluxion-fuzz-") as directory:
        position = Path(directory) / "position"
        while progress.tally.units < goal and len(progress.findings) < MAX_FINDINGS:
            how = _watch_child(name, progress, goal, position, save)
            if how:
                (case,) = _POSITION.unpack(position.read_bytes())
                progress.findings.append(Finding(name, progress.seed, case, how))
                progress.next_case = case + 1
            save()


def _watch_child(
    name: str, progress: Progress, goal: int, position: Path, save: Callable[[], None]
) -> str:
    """Run one child until the goal is reached or it ends; returns how it failed, or nothing."""
    arguments = [name, "--seed", str(progress.seed)]
    arguments += ["--child", str(progress.next_case), str(position)]
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    before, started = progress.seconds, time.monotonic()
    last, since, busy_since = _NOT_STARTED, started, 0.0
    position.write_bytes(_NOT_STARTED)
    buffered = b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(timeout=1.0):
                    piece = os.read(child.stdout.fileno(), 1 << 16)
                    if not piece:
                        if (status := child.wait()) > 0:
                            raise SystemExit("the harness failed; see above")
                        return f"the process ended by signal {-status}"
                    *lines, buffered = (buffered + piece).split(b"\n")
                    for line in lines:
                        _take_line(progress, json.loads(line))
                    progress.seconds = before + time.monotonic() - started
                    save()
                    too_many = len(progress.findings) >= MAX_FINDINGS
                    if progress.tally.units >= goal or too_many:
                        return ""
                now = position.read_bytes()
                if now != last:
                    last, since, busy_since = now, time.monotonic(), _processor_seconds(child.pid)
                elif now != _NOT_STARTED:
                    busy = _processor_seconds(child.pid) - busy_since
                    if busy > HANG_SECONDS or time.monotonic() - since > STUCK_SECONDS:
                        child.send_signal(signal.SIGABRT)
                        child.wait()
                        return f"no end after {busy:.0f} s of processor time"
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _processor_seconds(pid: int) -> float:
    """Processor time of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _take_line(progress: Progress, line: dict) -> None:
    for finding in line["findings"]:
        progress.findings.append(Finding(**finding))
    progress.tally.add(Tally(**line["tally"]))
    progress.next_case = line["next_case"]
    progress.peak_resident_bytes = max(progress.peak_resident_bytes, line["peak_resident_bytes"])


def run_child(name: str, seed: int, first: int, position_path: Path) -> None:
    """Run cases for ever, with a bound on memory; a line of JSON on stdout tells of every 500."""
    faulthandler.enable()
    # Nodes warn of every hand-off that is damaged.
    logging.disable(logging.WARNING)
    target = make_target(name)
    # Libraries that are loaded at first use are not the cases' memory.
    run_case(target, seed, -1, Tally())
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = taken + SPARE_ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with position_path.open("r+b") as file, mmap.mmap(file.fileno(), _POSITION.size) as position:
        while True:
            tally, findings = Tally(), []
            for case in range(first, first + REPORTED_EVERY):
                _POSITION.pack_into(position, 0, case)
                finding = run_case(target, seed, case, tally)
                if finding is not None:
                    findings.append(asdict(finding))
            first += REPORTED_EVERY
            report = {
                "next_case": first,
                "tally": asdict(tally),
                "findings": findings,
                "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            }
            print(json.dumps(report), flush=True)


def table(journal: dict[str, Progress]) -> str:
    """What every target came to, as Markdown."""
    rows = [
        "| target | units | cases | input | accepted | refused | findings | slowest case "
        "| peak Python memory of a case | peak resident | time |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, progress in journal.items():
        tally = progress.tally
        refused = Counter(tally.results)
        accepted = refused.pop("accepted", 0)
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in refused.most_common())
        rows.append(
            f"| {name} | {tally.units:,} | {tally.cases:,} | {tally.input_bytes / 1e9:.2f} GB "
            f"| {accepted:,} | {reasons} | {len(progress.findings)} "
            f"| {tally.slowest_seconds * 1e3:.0f} ms (case {tally.slowest_case}) "
            f"| {tally.peak_bytes / 1e6:.2f} MB | {progress.peak_resident_bytes / 1e6:.0f} MB "
            f"| {progress.seconds:.0f} s |"
        )
    return "\n".join(rows)


def _run_one(targets: Sequence[str], seed: int, case: int) -> int:
    status = 0
    for name in targets:
        target = make_target(name)
        tally = Tally()
        finding = run_case(target, seed, case, tally)
        target.close()
        print(f"{name}: {finding.what if finding else dict(tally.results)}")
        status |= finding is not None
    return status


def _read_journal(path: Path | None, seed: int) -> dict[str, Progress]:
    if path is None or not path.is_file():
        return {}
    journal = {}
    for name, values in json.loads(path.read_text()).items():
        if values["seed"] != seed:
            raise SystemExit(f"{path} is of seed {values['seed']}; give another file")
        values["tally"] = Tally(**values["tally"])
        values["findings"] = [Finding(**finding) for finding in values["findings"]]
        journal[name] = Progress(**values)
    return journal


def _write_journal(path: Path | None, journal: dict[str, Progress]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({name: asdict(each) for name, each in journal.items()}))
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
