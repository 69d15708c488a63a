"""`fluxion trace`: the next steps of a decode node, as a file for Perfetto and as a picture.

The node records and writes the file (fluxion_core/observe/trace.py, trace_events.py); this asks for
it, keeps it, and says how busy each track was.
"""

from __future__ import annotations

import json
import urllib.parse
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from rich.console import Console
from rich.table import Table

from fluxion_core.config.addresses import address_of
from fluxion_core.errors import ConfigError, FluxionError, PeerUnavailableError
from fluxion_core.lab.plots.trace import draw_trace
from fluxion_core.observe.trace_events import TraceEvent, TraceFile, tracks_of
from services.cli.http import get, reason_of

_GRACE_SECONDS = 30.0
"""For the node to make the file, and to send it."""


def run_trace(
    address: str, steps: int, seconds: float, out: Path, png: Path | None, console: Console
) -> None:
    """Have a trace recorded, write it, draw it, and print what its tracks did.

    Raises:
        PeerUnavailableError: nothing answers there, or it is no decode node's metrics endpoint.
        FluxionError: the node records another trace, or did no step in the time.
        ConfigError: a file cannot be written, or matplotlib is not installed.
    """
    text = fetch_trace(address, steps, seconds)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None
    file: TraceFile = json.loads(text)
    _print(file, steps, console)
    console.print(f"{out}: open it in ui.perfetto.dev or chrome://tracing", highlight=False)
    if png is not None:
        about = file["otherData"]
        title = f"{about.get('model', '')} on {about.get('device', '')}, {about['steps']} steps"
        try:
            draw_trace(file, png, title=title)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--png {png}: {error}") from None
        console.print(f"{png}: the same as a picture", highlight=False)


def fetch_trace(address: str, steps: int, seconds: float) -> str:
    """A node's next steps, as it tells them.

    Raises:
        PeerUnavailableError: nothing answers there, or it is no decode node's metrics endpoint.
        FluxionError: the node refuses; the text is its own.
        ConfigError: the address is not HOST:PORT.
    """
    query = urllib.parse.urlencode({"steps": steps, "seconds": seconds})
    where = address_of(address, "--address")
    hint = "is it a decode node's server.metrics_listen?"
    try:
        with get(f"http://{where}/trace?{query}", seconds=seconds + _GRACE_SECONDS) as answer:
            return str(answer.read().decode())
    except HTTPError as error:
        with error:
            reason = error.read().decode(errors="replace").strip()
        if error.code in (400, 409):
            raise FluxionError(f"no trace from {address}: {reason}") from None
        raise PeerUnavailableError(f"no trace from {address}: {reason}; {hint}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise PeerUnavailableError(
            f"no trace from {address} ({reason_of(error)}); {hint}"
        ) from None


def _print(file: TraceFile, wanted: int, console: Console) -> None:
    tracks = tracks_of(file)
    work = [event for events in tracks.values() for event in events if event["ph"] == "X"]
    begin = min(event["ts"] for event in work)
    length = max(event["ts"] + event["dur"] for event in work) - begin
    steps, ended_by = file["otherData"]["steps"], file["otherData"]["ended_by"]
    why = {"steps": "", "time": ": the time was over", "spans": ": as many spans as are kept"}
    console.print(
        f"{steps} of {wanted} steps in {length / 1e3:.1f} ms{why[str(ended_by)]}", highlight=False
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("track", "spans", "busy ms", "of the time"):
        table.add_column(heading, justify="left" if heading == "track" else "right")
    for track, events in tracks.items():
        busy = busy_microseconds(events)
        table.add_row(
            track, f"{len(events):,}", f"{busy / 1e3:.1f}", f"{busy / length * 100:.0f} %"
        )
    console.print(table)


def busy_microseconds(events: list[TraceEvent]) -> float:
    """What the spans of a track cover; those that lie in others count once."""
    busy, reached = 0.0, float("-inf")
    for event in events:
        if event["ph"] == "X":
            end = event["ts"] + event["dur"]
            busy += max(0.0, end - max(reached, event["ts"]))
            reached = max(reached, end)
    return busy
