"""Log lines in one terminal."""

from __future__ import annotations

import io
import logging

from rich.console import Console

from fluxion_core.observe.log import KeyValueFormatter
from services.cli.logs import LogPrinter, render_log_line


def test_a_log_line_loses_its_date_and_its_info():
    line = "2026-01-31T12:00:00.123Z INFO decode request finished tokens=64"
    assert (
        render_log_line("decode", line).plain == "decode  │ 12:00:00.123 request finished tokens=64"
    )


def test_a_warning_keeps_its_level():
    line = "2026-01-31T12:00:00.123Z WARNING prefill slow"
    assert render_log_line("prefill", line).plain == "prefill │ 12:00:00.123 WARNING slow"


def test_what_the_nodes_really_print_is_understood():
    record = logging.LogRecord("fluxion", logging.INFO, "", 0, "ready port=%d", (7,), None)
    text = render_log_line("decode", KeyValueFormatter("decode").format(record)).plain
    assert text.startswith("decode  │ ")
    assert text.endswith(" ready port=7")
    assert "INFO" not in text


def test_other_lines_are_kept_whole_and_markup_is_not_read():
    output = io.StringIO()
    print_line = LogPrinter(Console(file=output, width=20))
    line = 'File "[bold]x.py", line 1, in a function with a name longer than the terminal'
    print_line("decode", line)
    assert output.getvalue() == f"decode  │ {line}\n"
