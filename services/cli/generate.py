"""`fluxion generate`: a prompt in, tokens out as they arrive, timings on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from fluxion_core.client import (
    NO_RETRIES,
    AsyncClient,
    AsyncGenerationStream,
    ChatMessage,
    Delta,
    Generation,
    GenerationOptions,
    KvReads,
    Progress,
    Prompt,
    Usage,
)
from fluxion_core.config.command_checks import check_text
from fluxion_core.errors import InvalidRequestError
from services.cli.commands.generate import Generate
from services.cli.waiting import WaitingNote


def read_prompt(prompt: str | None, file: Path | None, stdin: TextIO) -> str:
    """The prompt from the argument, from `file` followed by the argument, or from `stdin`.

    Raises:
        InvalidRequestError: there is none, it is empty, or it is not UTF-8 text.
    """
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8")
            text = text if prompt is None else f"{text.rstrip()}\n\n{prompt}"
        elif prompt is not None and prompt != "-":
            text = prompt
        elif stdin.isatty():
            raise InvalidRequestError(
                "no prompt; give one as an argument, with --file FILE, or on standard input"
            )
        else:
            text = stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{file or 'standard input'} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    except OSError as error:
        raise InvalidRequestError(
            f"--file {file}: {error.strerror}; give a text file that can be read"
        ) from None
    check_text(text, "standard input" if file is None and prompt in (None, "-") else "the prompt")
    if not text.strip():
        raise InvalidRequestError("the prompt is empty; give at least one word")
    return text


async def run_generate(command: Generate) -> None:
    """Stream the answer to stdout; timings, if they are wanted, go to stderr at the end.

    Until there is text, a terminal at stderr shows how far the prompt is.

    Raises:
        FluxionError: see `AsyncClient`.
    """
    console = Console(stderr=True)
    text = read_prompt(command.prompt, command.file, sys.stdin)
    options = replace(options_of(command), report_progress=console.is_terminal)
    waiting = WaitingNote(console, f"waiting for {command.address}", as_lines=False)
    write = _write_nothing if command.is_on_standard_output else write_now
    with waiting:
        client = command.connection.settings()
        async with AsyncClient(command.address, client, retry=NO_RETRIES) as node:
            stream = node.stream(_as_prompt(command, text), options)
            generation = await show_answer(stream, waiting, write=write)
    if not generation.text.endswith("\n"):
        write("\n")
    if command.timings:
        console.print(timings_table(generation))
    command.write(asdict(generation))


def options_of(command: Generate) -> GenerationOptions:
    """Options of the request: the command's options have the names of the client's."""
    known = {field.name for field in fields(GenerationOptions)}
    given = {field.name: getattr(command, field.name) for field in fields(command)}
    same = {name: value for name, value in given.items() if name in known}
    return GenerationOptions(stop_strings=command.stop, **same)


def _as_prompt(command: Generate, text: str) -> Prompt:
    """The user's message after the system's, or, without `chat`, the text as it stands."""
    if not command.chat:
        return text
    user = ChatMessage("user", text)
    return [user] if command.system is None else [ChatMessage("system", command.system), user]


def _write_nothing(_: str) -> None:
    pass


async def show_answer(
    stream: AsyncGenerationStream,
    waiting: WaitingNote,
    before_progress: str = "",
    *,
    write: Callable[[str], None] | None = None,
) -> Generation:
    """Write the text as it comes; until there is any, say how far the prompt is.

    Args:
        stream: the answer.
        waiting: shows the progress, and stops at the first text.
        before_progress: stands before it.
        write: takes the text; None for stdout.

    Raises:
        FluxionError: see `AsyncClient`.
    """
    async for event in stream:
        if isinstance(event, Progress):
            waiting.text = f"{before_progress}{event}"
        elif isinstance(event, Delta) and event.text:
            waiting.stop()
            (write or write_now)(event.text)
    return await stream.result()


def write_now(text: str) -> None:
    """Write to stdout without waiting for a line to be full; what it cannot show is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="backslashreplace").decode(encoding))
    sys.stdout.flush()


def timings_table(generation: Generation) -> Table:
    """The request's figures: seconds as the client saw them, and as the node accounts for them."""
    usage = generation.usage
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    cached = f"{usage.cached_tokens:,} of them already held" if usage.cached_tokens else ""
    table.add_row("prompt", f"{usage.prompt_tokens:,} tokens", cached)
    table.add_row(
        "generated", f"{usage.generated_tokens:,} tokens", f"ended by {generation.finish_reason}"
    )
    table.add_row(
        "time to first token",
        f"{generation.first_token_seconds:.2f} s",
        f"queue {usage.queue_seconds:.2f} s, prefill {usage.prefill_seconds:.2f} s",
    )
    if generation.seconds_per_token is not None:
        table.add_row(
            "time per output token",
            f"{generation.seconds_per_token * 1000:.1f} ms",
            f"{1 / max(generation.seconds_per_token, 1e-9):.1f} tokens/s",
        )
    table.add_row("hand-off", *handoff_cells(generation))
    table.add_row(
        "KV in host memory",
        f"{usage.kv_bytes_in_host_memory / 1e6:.1f} MB",
        "digests included",
    )
    if usage.kv_reads.policy:
        reads = usage.kv_reads
        table.add_row("policy", reads.policy, f"{reads.streaming_share:.0%} of heads streaming")
        table.add_row("KV read per token", *kv_read_cells(usage))
        if reads.resident_bytes_per_token:
            table.add_row("of it in device memory", *resident_cells(reads))
        if blocks := chosen_blocks(usage.kv_reads):
            table.add_row("block sizes", "", blocks)
    table.add_row("total", f"{generation.total_seconds:.2f} s", "")
    return table


def kv_read_cells(usage: Usage) -> tuple[str, str]:
    """Bytes of a step, and what they are of what other policies read."""
    reads = usage.kv_reads
    read = f"{usage.kv_bytes_read_per_token / 1e6:.3g} MB"
    if not reads.share_of_exact:
        return read, "all of the text was in the default window"
    fixed = f"{reads.share_of_fixed_estimate:.2f} of fixed(16, 5 %), estimated"
    return read, f"{reads.share_of_exact:.1%} of exact, {fixed}"


def resident_cells(reads: KvReads) -> tuple[str, str]:
    """Bytes of a step that lay in device memory, and their share of K and V."""
    resident = f"{reads.resident_bytes_per_token / 1e6:.3g} MB"
    return resident, f"{reads.resident_share:.1%} of K and V"


def chosen_blocks(reads: KvReads) -> str:
    """Shares of groups by the block size that they chose; empty if none chose."""
    sizes = zip(("16", "32", "64", "128"), reads.groups_by_block_size, strict=False)
    counts = {f"{size} tokens": count for size, count in sizes}
    if not any(counts.values()):
        return ""
    counts |= {"nothing": reads.groups_nothing, "everything": reads.groups_everything}
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.0%}" for name, count in counts.items() if count)


def handoff_cells(generation: Generation) -> tuple[str, str]:
    """Rate of the KV hand-off, and what it is made of.

    Frames leave while later layers are computed, so the rate is the slower of prefill and wire;
    `fluxion bench handoff` measures the wire alone.
    """
    usage = generation.usage
    if usage.local_prompt_tokens:
        return "none", f"the node computed {usage.local_prompt_tokens} tokens of the prompt itself"
    if not usage.handoff_bytes or not usage.handoff_seconds:
        return "none", "the node held all of the prompt's KV"
    rate = usage.handoff_bytes / usage.handoff_seconds
    return (
        f"{rate / 1e9:.3g} GB/s",
        f"{usage.handoff_bytes / 1e6:.1f} MB in {usage.handoff_seconds:.2f} s, as prefill made it",
    )
