"""`fluxion trace`: the next steps of a decode node, as a file for Perfetto and as a picture.

The node records and writes the file (fluxion_core/observe/trace.py, trace_events.py); this asks for
it, keeps it, and says how busy each track was.
"""

from __future__ import annotations

import json
import urllib.parse
from http.client import HTTPException
from typing import TypedDict
from urllib.error import HTTPError

from rich.console import Console
from rich.table import Table

from fluxion_core.config.addresses import address_of
from fluxion_core.errors import ConfigError, FluxionError, PeerUnavailableError
from fluxion_core.lab.plots.trace import draw_trace
from fluxion_core.observe.trace_events import TraceEvent, TraceFile, tracks_of
from services.cli.commands.trace import TraceSteps
from services.cli.http import get, reason_of

_GRACE_SECONDS = 30.0
"""For the node to make the file, and to send it."""


class TrackSummary(TypedDict):
    """Spans of a track, summed up."""

    name: str
    spans: int
    busy_milliseconds: float
    share: float
    """Of the trace's time."""


class TraceSummary(TypedDict):
    """Content of a trace, summed up."""

    steps: int
    wanted_steps: int
    ended_by: str
    """steps, time or spans."""
    milliseconds: float
    """From the first span's begin to the last one's end."""
    tracks: list[TrackSummary]


def run_trace(options: TraceSteps) -> None:
    """Have a trace recorded, write it, draw it, and print what its tracks did.

    Raises:
        PeerUnavailableError: nothing answers there, or it is no decode node's metrics endpoint.
        FluxionError: the node records another trace, or did no step in the time.
        ConfigError: a file cannot be written, or matplotlib is not installed.
    """
    text = fetch_trace(options.address, options.steps, options.seconds)
    out, png, console = options.out, options.png, options.console()
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None
    file: TraceFile = json.loads(text)
    summary = summarize(file, options.steps)
    _print(summary, console)
    console.print(f"{out}: open it in ui.perfetto.dev or chrome://tracing", highlight=False)
    if png is not None:
        about = file["otherData"]
        title = f"{about.get('model', '')} on {about.get('device', '')}, {about['steps']} steps"
        try:
            draw_trace(file, png, title=title)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--png {png}: {error}") from None
        console.print(f"{png}: the same as a picture", highlight=False)
    options.write(summary)


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


def summarize(file: TraceFile, wanted_steps: int) -> TraceSummary:
    """Sum up how busy each track was, as plain data."""
    tracks = tracks_of(file)
    work = [event for events in tracks.values() for event in events if event["ph"] == "X"]
    begin = min(event["ts"] for event in work)
    length = max(event["ts"] + event["dur"] for event in work) - begin
    busy = {track: busy_microseconds(events) for track, events in tracks.items()}
    return {
        "steps": int(file["otherData"]["steps"]),
        "wanted_steps": wanted_steps,
        "ended_by": str(file["otherData"]["ended_by"]),
        "milliseconds": length / 1e3,
        "tracks": [
            {
                "name": track,
                "spans": len(events),
                "busy_milliseconds": busy[track] / 1e3,
                "share": busy[track] / length,
            }
            for track, events in tracks.items()
        ],
    }


def _print(summary: TraceSummary, console: Console) -> None:
    why = {"steps": "", "time": ": the time was over", "spans": ": as many spans as are kept"}
    console.print(
        f"{summary['steps']} of {summary['wanted_steps']} steps in "
        f"{summary['milliseconds']:.1f} ms{why[summary['ended_by']]}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("track", "spans", "busy ms", "of the time"):
        table.add_column(heading, justify="left" if heading == "track" else "right")
    for track in summary["tracks"]:
        table.add_row(
            track["name"],
            f"{track['spans']:,}",
            f"{track['busy_milliseconds']:.1f}",
            f"{track['share'] * 100:.0f} %",
        )
    console.print(table)


def busy_microseconds(events: list[TraceEvent]) -> float:
    """Time that the spans of a track cover; those that lie in others count once."""
    busy, reached = 0.0, float("-inf")
    for event in events:
        if event["ph"] == "X":
            end = event["ts"] + event["dur"]
            busy += max(0.0, end - max(reached, event["ts"]))
            reached = max(reached, end)
    return busy
