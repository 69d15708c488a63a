"""`fluxion demo`: a question about a 7,000-token document, answered through two processes.

The document is demo_document.md, written for this project: the handbook of an invented
observatory, with one seven-digit code in one sentence near its middle. The answer counts only if
that code is in it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fluxion_core.client import (
    NO_RETRIES,
    AsyncClient,
    ChatMessage,
    Generation,
    GenerationOptions,
)
from fluxion_core.errors import FluxionError, ModelNotFoundError
from services.cli.commands.demo import Demo
from services.cli.commands.up import Up
from services.cli.generate import handoff_cells, show_answer, write_now
from services.cli.logs import LogPrinter, render_log_line
from services.cli.node_plans import plan_nodes
from services.cli.processes import NodeGroup, finished_before, stop_signals
from services.cli.up import bring_up
from services.cli.waiting import WaitingNote

MODEL = "smollm2-135m"
QUESTION = "What is the access code for the plate vault at Skerrow Observatory?"
FACT = "7402958"
"""What the answer must hold; it stands in the document once."""

_READY_SECONDS = 300.0
_DEADLINE_SECONDS = 900.0
"""Prefill of the document takes half a minute on two slow cores."""


def load_document() -> str:
    """The demo's document, without a final line end."""
    return (resources.files("services.cli") / "demo_document.md").read_text("utf-8").strip()


def build_prompt() -> str:
    """The user's message: the document, an empty line, the question."""
    return f"{load_document()}\n\n{QUESTION}"


async def run_demo(options: Demo) -> int:
    """Pull the model if it is absent, run both nodes, ask, print the figures, end everything.

    Returns:
        0 if the planted fact is in the answer, 1 if not, 130 if stopped by a signal.

    Raises:
        FluxionError: the model could not be had, a node failed, or the request did.
    """
    console = Console(stderr=True)
    _pull_if_absent(options.models_dir, console)
    log = _DemoLog(console, show=options.logs)
    nodes = NodeGroup(log)
    with stop_signals(nodes.kill) as stop_requested:
        try:
            async with nodes:
                asking = asyncio.create_task(_ask(nodes, options, console))
                if not await finished_before(asking, stop_requested):
                    return 130
                generation = asking.result()
                with WaitingNote(console, "Ending both nodes"):
                    await nodes.stop()
        except FluxionError:
            log.show_recent()
            raise
    is_found = FACT in generation.text
    Console().print(figures_table(generation, is_found=is_found))
    return 0 if is_found else 1


async def _ask(nodes: NodeGroup, options: Demo, console: Console) -> Generation:
    document = load_document()
    plans = plan_nodes(
        Up(
            model=MODEL,
            models_dir=options.models_dir,
            decode_listen="127.0.0.1:0",
            log_level=options.log_level,
        )
    )
    with WaitingNote(console, "Starting a prefill node and a decode node, which load the model"):
        await bring_up(nodes, plans, ready_seconds=_READY_SECONDS)
    prefill, decode = plans
    console.print(
        f"Prefill node at {prefill.address}, decode node at {decode.address}", highlight=False
    )
    title = document.splitlines()[0].lstrip("# ")
    console.print(f"Document: {title}, {len(document.split()):,} words", highlight=False)
    console.print(f"Question: {QUESTION}", style="bold", highlight=False)
    waiting = WaitingNote(console, "Asking the decode node")
    asked = GenerationOptions(
        max_new_tokens=options.max_new_tokens,
        deadline_seconds=_DEADLINE_SECONDS,
        report_progress=True,
    )
    with waiting:
        async with AsyncClient(decode.address, retry=NO_RETRIES) as client:
            stream = client.stream([ChatMessage("user", build_prompt())], asked)
            generation = await show_answer(stream, waiting, "The document's KV: ")
    write_now("\n\n")
    return generation


def figures_table(generation: Generation, *, is_found: bool) -> Table:
    """Figures of the demo: latencies, hand-off rate, host memory, and whether the fact came."""
    usage = generation.usage
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    per_token = generation.seconds_per_token
    table.add_row(
        "prompt", f"{usage.prompt_tokens:,} tokens", f"{usage.generated_tokens} generated"
    )
    table.add_row(
        "time to first token",
        f"{generation.first_token_seconds:.2f} s",
        f"of it prefill {usage.prefill_seconds:.2f} s",
    )
    table.add_row(
        "time per output token",
        "none" if per_token is None else f"{per_token * 1000:.1f} ms",
        "mean after the first token",
    )
    table.add_row("KV hand-off", *handoff_cells(generation))
    table.add_row(
        "KV in host memory",
        f"{usage.kv_bytes_in_host_memory / 1e6:.1f} MB",
        f"{usage.kv_bytes_in_host_memory:,} bytes, digests included",
    )
    if is_found:
        table.add_row("planted fact", "found", f"{FACT} is in the answer", style="green")
    else:
        table.add_row("planted fact", "NOT found", f"{FACT} is not in the answer", style="red")
    return table


def _pull_if_absent(models_dir: Path | None, console: Console) -> None:
    from fluxion_core.models.locate import default_models_dir, locate_model
    from services.cli.pull import pull_model

    directory = models_dir or default_models_dir()
    try:
        locate_model(MODEL, directory)
    except ModelNotFoundError:
        # On a terminal it shows itself how far it is.
        with WaitingNote(console, f"Fetching {MODEL}", in_place=False):
            pull_model(MODEL, directory, console)


class _DemoLog:
    """Keeps the nodes' last lines for a failure; prints them as they come only if asked to."""

    def __init__(self, console: Console, *, show: bool, keep_lines: int = 40) -> None:
        self._console = console
        self._printer = LogPrinter(console) if show else None
        self._recent: deque[tuple[str, str]] = deque(maxlen=keep_lines)

    def __call__(self, node: str, line: str) -> None:
        self._recent.append((node, line))
        if self._printer is not None:
            self._printer(node, line)

    def show_recent(self) -> None:
        """Print the lines kept, unless they were printed already."""
        if self._printer is None:
            for node, line in self._recent:
                self._console.print(render_log_line(node, line), soft_wrap=True, highlight=False)
