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
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter, UnusedCliTokensError
from cyclopts.validators import Number

from fluxion_core.config.command_checks import check_arguments
from fluxion_core.config.command_help import CommandHelp, shown_default
from fluxion_core.errors import FluxionError

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
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """Base of every command, with the options that all of them have."""

    log_level: LogLevel | None = None
    """Lowest level of log lines on stderr; warning if not given."""

    @abstractmethod
    def __call__(self) -> int | None:
        """Do it.

        Returns:
            The exit status; None for 0.

        Raises:
            FluxionError: it cannot be done; the text is all that the user sees.
        """


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
        help_formatter=CommandHelp(),
        default_parameter=Parameter(negative_iterable=(), show_default=shown_default),
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


def _parse_and_run(app: App, arguments: Sequence[str]) -> int:
    has_delimiter = "--" in arguments

    def check(_: App, __: tuple[str, ...], given: ArgumentCollection) -> None:
        check_arguments(given, may_begin_with_hyphen=has_delimiter)

    app.config = check
    _learn_what_is_listed(app, arguments)
    chosen, bound, _ = app.parse_args(list(arguments), exit_on_error=False, print_error=False)
    made = chosen(*bound.args, **bound.kwargs)
    if isinstance(made, Command):
        with _log_lines(made.log_level or "warning"):
            return made() or OK
    # Help or the version was printed: as an answer, or because nothing was asked.
    is_answer = any(one in (*_HELP_FLAGS, *app.version_flags) for one in arguments)
    return OK if is_answer else WRONG_USAGE


@contextmanager
def _log_lines(level: LogLevel) -> Iterator[None]:
    """Log lines from this level on go to stderr."""
    root = logging.getLogger()
    handler, before = logging.StreamHandler(sys.stderr), root.level
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    root.addHandler(handler)
    root.setLevel(level.upper())
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


def _learn_what_is_listed(app: App, arguments: Sequence[str]) -> None:
    """Import the commands of a group whose help is shown: it tells what each of them is."""
    _, apps, _ = app.parse_commands([one for one in arguments if one not in _HELP_FLAGS])
    if apps[-1].default_command is None:
        apps[-1].resolved_commands()


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
