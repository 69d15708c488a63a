"""Sources of settings: flags, environment variables, a TOML file. Each is read here into
values by dotted name, with where each came from; what is no setting is refused with the nearest.

What the values mean is checked by the settings' own types (setting_types.py).
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fluxion_core.errors import ConfigError

ENV_PREFIX = "FLUXION_"
CONFIG_VARIABLE = "FLUXION_CONFIG"

_OTHER_VARIABLES = frozenset(
    # The settings file; then what this project's tests read.
    {CONFIG_VARIABLE, "FLUXION_NATIVE", "FLUXION_TEST_MODEL"}
)
_SERVICE_LINK = re.compile(
    r".*_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
"""What Kubernetes tells each pod about the services of its namespace, some of which may be called
fluxion-something."""


@dataclass(frozen=True)
class SourcedValue:
    """A value as it was written, and where."""

    value: object
    """Text from flags and variables; what TOML makes of it from a file."""
    where: str
    """The flag, the variable, or the file."""


class UnknownSettingError(ConfigError):
    """A name that no setting has."""

    def __init__(self, name: str, where: str, known: Sequence[str]) -> None:
        self.name = name
        nearest = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"the nearest is {nearest[0]}" if nearest else "see --help"
        super().__init__(f"{where}there is no setting {name}; {hint}")


def settings_of(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every single setting by its dotted name, sections first to last."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if (section := _section_of(field)) is not None:
            found |= settings_of(section, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field
    return found


def read_flags(
    settings: type[BaseModel], flags: Sequence[str], program: str
) -> dict[str, SourcedValue]:
    """Values of flags, as `--store.host-kv-bytes 8GiB` or `--store.host-kv-bytes=8GiB`.

    Raises:
        ConfigError: a flag is unknown, or has no value.
        SystemExit: `--help` was asked for.
    """
    parser = _parser(settings, program)
    values, left = parser.parse_known_args(flags)
    if left:
        known = [_flag(name) for name in settings_of(settings)]
        name = left[0].partition("=")[0]
        if name.startswith("-"):
            raise UnknownSettingError(name, "", known)
        raise ConfigError(f"{left[0]!r} follows no flag")
    return {name: SourcedValue(value, _flag(name)) for name, value in vars(values).items()}


def read_environment(
    settings: type[BaseModel], environment: Mapping[str, str]
) -> dict[str, SourcedValue]:
    """Values of variables, as `FLUXION_STORE__HOST_KV_BYTES=8GiB`.

    Raises:
        UnknownSettingError: a variable that begins like ours is none.
    """
    names = {_variable(name): name for name in settings_of(settings)}
    found: dict[str, SourcedValue] = {}
    for variable, value in environment.items():
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        name = variable.upper()
        if name in names:
            found[names[name]] = SourcedValue(value, variable)
        elif name not in _OTHER_VARIABLES and not _is_service_link(name, value):
            raise UnknownSettingError(name, "environment: ", list(names))
    return found


def variables_of(settings: type[BaseModel]) -> frozenset[str]:
    """Names of the variables that these settings know."""
    return frozenset(_variable(name) for name in settings_of(settings))


def read_file(settings: type[BaseModel], path: Path) -> dict[str, SourcedValue]:
    """Values of a TOML file, a table for each section.

    Raises:
        ConfigError: it cannot be read, is no TOML, or has a name that is unknown.
    """
    try:
        tables = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"settings file {path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"settings file {path} is no TOML: {error}") from None
    return {
        name: SourcedValue(value, str(path))
        for name, value in _flattened(settings, tables, path, list(settings_of(settings)))
    }


def nested(values: Mapping[str, object]) -> dict[str, object]:
    """Values by dotted name as one table in another."""
    result: dict[str, object] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        table = result
        for section in sections:
            inner = table.setdefault(section, {})
            assert isinstance(inner, dict), "a section is no setting"
            table = inner
        table[last] = value
    return result


def _flattened(
    model: type[BaseModel],
    table: Mapping[str, object],
    path: Path,
    known: list[str],
    prefix: str = "",
) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        field = model.model_fields.get(key)
        if field is None:
            raise UnknownSettingError(name, f"settings file {path}: ", known)
        section = _section_of(field)
        if section is None:
            yield name, value
        elif isinstance(value, dict):
            yield from _flattened(section, value, path, known, f"{name}.")
        else:
            raise ConfigError(
                f"settings file {path}: {name} is a section; write [{name}] and its settings below"
            )


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _is_service_link(name: str, value: str) -> bool:
    is_port = name.endswith("_PORT") and re.match(r"(tcp|udp|sctp)://", value) is not None
    return "__" not in name and (is_port or _SERVICE_LINK.fullmatch(name) is not None)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return ENV_PREFIX + name.replace(".", "__").upper()


class _Parser(argparse.ArgumentParser):
    """Its errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser(settings: type[BaseModel], program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        usage="%(prog)s [--config FILE] [--SECTION.SETTING VALUE] …",
        description=settings.__doc__,
        epilog=f"Each is also a variable ({ENV_PREFIX}SECTION__SETTING) and a line of a TOML file "
        f"(--config FILE, or {CONFIG_VARIABLE}).",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in settings_of(settings).items():
        section = name.rpartition(".")[0]
        group = groups.get(section) or parser.add_argument_group(section)
        groups[section] = group
        about = (field.description or "").replace("%", "%%").replace("\n", " ")
        kind = _plain_type(field.annotation)
        if kind is bool:
            group.add_argument(
                _flag(name), dest=name, action=argparse.BooleanOptionalAction, help=about
            )
            continue
        default = "" if field.default in (None, "", ()) else f" (default: {_shown(field.default)})"
        choices = "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""
        is_list = get_origin(kind) is tuple
        group.add_argument(
            _flag(name),
            dest=name,
            metavar=choices or _METAVARS.get(kind, "TEXT"),
            help=about + default.replace("%", "%%"),
            nargs="+" if is_list else None,
            action="extend" if is_list else "store",
        )
    return parser


def _shown(default: object) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


_METAVARS: dict[object, str] = {int: "NUMBER", float: "NUMBER", Path: "FILE"}


def _plain_type(annotation: object) -> object:
    """What a value is, without what is said about it and without None."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _plain_type(next(one for one in get_args(annotation) if one is not type(None)))
    return annotation
