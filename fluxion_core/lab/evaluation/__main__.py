"""`python -m fluxion_core.lab.evaluation BENCHMARK NAME=VALUE …`: evaluations without the CLI.

For machines that lack what the `fluxion` command needs beside torch. Names are the fields of
EvaluationOptions; lists are separated by commas, policies by semicolons:

    python -m fluxion_core.lab.evaluation ruler model=PATH lengths=4096,8192 policies='exact;fast'
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fluxion_core.errors import ConfigError, FluxionError
from fluxion_core.lab.evaluation.evaluate import evaluate
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.work import Answer

PROGRESS_SECONDS = 10.0


def parse_arguments(arguments: Sequence[str]) -> EvaluationOptions:
    """Options from a benchmark's name and NAME=VALUE pairs.

    Raises:
        ConfigError: an unknown name, or a value of the wrong type.
    """
    if not arguments:
        raise ConfigError(f"no benchmark named\n{__doc__}")
    benchmark, *pairs = arguments
    types = {field.name: str(field.type) for field in fields(EvaluationOptions)}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or name not in types or name == "benchmark":
            known = ", ".join(sorted(types.keys() - {"benchmark"}))
            raise ConfigError(f"argument {pair!r}; NAME=VALUE with one of: {known}")
        try:
            values[name] = _value(types[name], text, ";" if name == "policies" else ",")
        except (ValueError, KeyError):
            raise ConfigError(f"argument {pair!r}: no {types[name]}") from None
    return EvaluationOptions(benchmark, **values)


def _value(kind: str, text: str, separator: str) -> object:
    if kind.startswith("tuple"):
        items = [item.strip() for item in text.split(separator) if item.strip()]
        return tuple(int(item) for item in items) if "int" in kind else tuple(items)
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()]
    if kind.startswith("Path"):
        return Path(text)
    return {"int": int, "float": float, "str": str}[kind](text)


def main(arguments: Sequence[str]) -> int:
    """Run it with plain lines as progress; returns the exit status."""
    last = 0.0

    def report(done: int, total: int, answer: Answer) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > PROGRESS_SECONDS:
            last = now
            print(f"{done}/{total} {answer.case_name} {answer.way}", file=sys.stderr, flush=True)

    try:
        print(evaluate(parse_arguments(arguments), report))
    except FluxionError as error:
        print(f"fluxion_core.lab.evaluation: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
