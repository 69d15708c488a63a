"""Commands made of dataclasses: how one is declared, read from a command line, run, and fails.

A command is a dataclass: its docstring says what the command does, its fields are the options, the
docstring under a field is the option's help, and calling it does the work.

    @dataclass(frozen=True, kw_only=True)
    class Greet(Command):
        \"\"\"Say hello.\"\"\"

        times: Annotated[int, within(1, 9)] = 1
        \"\"\"How often.\"\"\"

        def __call__(self) -> None:
            print("hello " * self.times)

Exit statuses of every command: 0 if it did its work, 1 for an error of ours, told in one sentence,
2 for wrong usage, 130 for Ctrl-C. Anything else is a bug, and stays a traceback.
"""

from __future__ import annotations

import io
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cyclopts import (
    App,
    ArgumentCollection,
    CycloptsError,
    Parameter,
    Token,
    UnknownOptionError,
    UnusedCliTokensError,
)
from cyclopts.annotations import resolve_optional
from cyclopts.exceptions import CoercionError
from cyclopts.validators import Number

from fluxion_core.config.limits import MAX_SECONDS
from fluxion_core.errors import ConfigError, FluxionError, InvalidRequestError

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

OK = 0
"""Exit status of a command that did its work."""
FAILED = 1
"""Exit status of an error that is ours."""
WRONG_USAGE = 2
"""Exit status of arguments that do not fit the command."""
INTERRUPTED = 130
"""Exit status of Ctrl-C: 128 and the number of SIGINT."""

LogLevel = Literal["debug", "info", "warning", "error"]

_HELP_FLAGS = ("--help", "-h")
_WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*", re.ASCII)
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True, kw_only=True)
class Command:
    """Base of every command, with the options that all of them have."""

    log_level: LogLevel | None = None
    """Lowest level of log lines on stderr; warning if not given."""

    def __call__(self) -> int | None:
        """Do it.

        Returns:
            The exit status; None for 0.

        Raises:
            FluxionError: it cannot be done; the text is all that the user sees.
        """
        raise NotImplementedError


def within(
    at_least: float | None = None, at_most: float | None = None, *, name: str = "N"
) -> Parameter:
    """Bounds of a number, or of each of several, for its annotation; its help shows them.

    Args:
        at_least: the smallest that is allowed.
        at_most: the largest.
        name: what stands for the number where there is one bound only.
    """
    if at_least is not None and at_most is not None:
        shown = f"{at_least}..{at_most}"
    else:
        shown = f"{name}>={at_least}" if at_most is None else f"{name}<={at_most}"
    return Parameter(validator=Number(gte=at_least, lte=at_most), metavar=shown)


def flag(*, otherwise: str | None = None) -> Parameter:
    """A switch that is off until it is given; or, with `otherwise`, the flag that turns it off."""
    return Parameter(negative=() if otherwise is None else otherwise)


def make_app(
    name: str, about: str | None = None, *, version: Callable[[], str] | None = None
) -> App:
    """A command line without commands: add each with `app.command(CLASS, name=NAME)`.

    Args:
        name: of the program, or of the group of commands.
        about: its help; for a program of one command, that command's if None.
        version: what `--version` tells, asked for when it is wanted.
    """
    return App(
        name=name,
        help=about,
        version=version,
        version_flags=() if version is None else ("--version",),
        help_flags=_HELP_FLAGS,
        help_format="plaintext",
        help_formatter=_Help(),
        default_parameter=Parameter(negative_iterable=(), show_default=_shown_default),
        print_error=False,
        exit_on_error=False,
    )


def run_app(app: App, arguments: Sequence[str]) -> int:
    """Run the command that the arguments name; tell on stderr what went wrong.

    Returns:
        The exit status.
    """
    program = app.name[0]
    try:
        return _parse_and_run(app, arguments)
    except CycloptsError as error:
        words = " ".join((program, *(error.command_chain or ())))
        _complain(f"{program}: {_sentence_of(error)} (see `{words} --help`)")
        return WRONG_USAGE
    except FluxionError as error:
        _complain(f"{program}: {error}")
        return FAILED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing is left to say to it.
        sys.stdout = None
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        # A file or directory that was named, or a place of the user's; anything else is a bug.
        if error.filename is None:
            raise
        _complain(f"{program}: {error.filename}: {error.strerror}")
        return FAILED


def run_module(command: Callable[..., Command], arguments: Sequence[str] | None = None) -> int:
    """Run a module's one command, for `python -m MODULE --option value`.

    Args:
        command: the class, whose module names the program.
        arguments: this process' own if not given.

    Returns:
        The exit status.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = command.__module__ if spec is None else spec.name
    app = make_app(f"python -m {module.removesuffix('.__main__')}")
    app.default(command)
    show_what_the_terminal_can()
    return run_app(app, sys.argv[1:] if arguments is None else arguments)


def show_what_the_terminal_can() -> None:
    """Escape what a terminal cannot show, in place of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_text(text: str, what: str) -> None:
    """Refuse what came in as bytes that are no UTF-8, which Python keeps in a form of its own.

    Raises:
        InvalidRequestError: the text says which byte.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = len(text[: error.start].encode())
        raise InvalidRequestError(
            f"{what} is not UTF-8 text (byte {place}); convert it first"
        ) from None


def _parse_and_run(app: App, arguments: Sequence[str]) -> int:
    has_delimiter = "--" in arguments

    def check(_: App, __: tuple[str, ...], given: ArgumentCollection) -> None:
        _check_arguments(given, may_begin_with_hyphen=has_delimiter)

    app.config = check
    _learn_what_is_listed(app, arguments)
    chosen, bound, _ = app.parse_args(list(arguments), exit_on_error=False, print_error=False)
    made = chosen(*bound.args, **bound.kwargs)
    if isinstance(made, Command):
        level = (made.log_level or "warning").upper()
        logging.basicConfig(level=level, format=_LOG_FORMAT, stream=sys.stderr, force=True)
        return made() or OK
    # Help or the version was printed: as an answer, or because nothing was asked.
    is_answer = any(one in (*_HELP_FLAGS, *app.version_flags) for one in arguments)
    return OK if is_answer else WRONG_USAGE


def _learn_what_is_listed(app: App, arguments: Sequence[str]) -> None:
    """Import the commands of a group whose help is shown: it tells what each of them is."""
    _, apps, _ = app.parse_commands([one for one in arguments if one not in _HELP_FLAGS])
    if apps[-1].default_command is None:
        apps[-1].resolved_commands()


class _Help:
    """Help as the library prints it, but the lines of a docstring are one paragraph.

    What it needs is imported when help is printed.
    """

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print a group of options or commands."""
        from cyclopts.help import DefaultFormatter
        from rich.text import Text

        for entry in panel.entries:
            text = getattr(entry.description, "primary_renderable", None)
            if isinstance(text, Text):
                entry.description.primary_renderable = Text(" ".join(text.plain.split()))
        DefaultFormatter()(console, options, panel)

    def render_usage(self, console: Console, options: ConsoleOptions, usage: object) -> None:
        """Print how the command is called."""
        from cyclopts.help import DefaultFormatter

        DefaultFormatter().render_usage(console, options, usage)


def _check_arguments(given: ArgumentCollection, *, may_begin_with_hyphen: bool) -> None:
    """Check what was written, before it becomes values: text is text, numbers are finite.

    Raises:
        InvalidRequestError: a text is not UTF-8.
        ConfigError: a number is not finite, or a duration is longer than any that makes sense.
        CycloptsError: a whole number is none, or a flag is unknown.
    """
    for argument in given:
        kind = resolve_optional(argument.hint)
        has_own_form = argument.parameter.converter is not None
        for token in argument.tokens:
            if argument.parameter.allow_leading_hyphen and not may_begin_with_hyphen:
                _check_hyphen(token, given)
            if kind in (str, tuple[str, ...]):
                check_text(token.value, f"argument {argument.field_info.name.upper()}")
            elif kind in (float, tuple[float, ...]):
                _check_number(token.value, argument.name)
            elif kind in (int, tuple[int, ...]) and not has_own_form:
                _check_whole(token.value, argument.name)


def _check_hyphen(token: Token, given: ArgumentCollection) -> None:
    """A lone `-` is a value; what only begins like a flag is one that nobody knows."""
    if token.value.startswith("-") and token.value != "-":
        raise UnknownOptionError(
            token=Token(keyword=token.value, source="cli"), argument_collection=given
        )


def _check_number(text: str, name: str) -> None:
    try:
        value = float(text)
    except ValueError:
        return  # It is told which number was wanted where it would become one.
    if not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be a finite number")
    if name.endswith("seconds") and value > MAX_SECONDS:
        raise ConfigError(f"{name} is {value:g}; it must be at most {MAX_SECONDS:g}, a week")


def _check_whole(text: str, name: str) -> None:
    """Without this, 3.7 would become 4."""
    if not _WHOLE.fullmatch(text.strip()):
        raise CoercionError(f'Invalid value "{text}" for {name}: not a whole number.')


def _shown_default(value: object) -> str | None:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or None
    return None if value is None or isinstance(value, bool) else str(value)


def _sentence_of(error: CycloptsError) -> str:
    if isinstance(error, UnusedCliTokensError):
        return f"{' '.join(error.unused_tokens or ())!r} is more than the command takes"
    error.verbose = False
    return str(error).strip().removesuffix(".")


def _complain(sentence: str) -> None:
    """Print one line on stderr, red on a terminal."""
    if sys.stderr.isatty():
        sentence = f"\x1b[31m{sentence}\x1b[0m"
    print(sentence, file=sys.stderr)
