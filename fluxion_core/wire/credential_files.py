"""Files with keys, certificates and tokens: read, checked for who else may read them, read again.

Errors name the setting and the file, never what is in it.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from fluxion_core.errors import ConfigError
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")

MAX_FILE_BYTES = 1 << 20
"""More is no key, bundle of authorities or list of tokens."""


def read_public(path: Path, setting: str) -> bytes:
    """The content of a file that others may read.

    Raises:
        ConfigError: it is not there, cannot be read, or is larger than such files are.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{setting} {path}: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{setting} {path} is larger than {MAX_FILE_BYTES} B")
    return content


def read_secret(path: Path, setting: str) -> bytes:
    """The content of a file that only this process' user, or root, may write or read.

    A file of root's may be readable by its group, as mounted secrets are.

    Raises:
        ConfigError: as for `read_public`, or others can read or change it.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{setting} {path}: {error.strerror}") from None
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{setting} {path} belongs to another user; chown it to this node's user")
    allowed = 0o750 if status.st_uid == 0 else 0o700
    mode = stat.S_IMODE(status.st_mode)
    if mode & ~allowed:
        raise ConfigError(
            f"{setting} {path} has mode {mode:04o}: others can read or change it; chmod 600 it"
        )
    return read_public(path, setting)


class WatchedFiles(Generic[ValueT]):
    """Content of some files, read again together when one of them changes. Thread-safe.

    A change that cannot be used, such as a certificate whose key is not there yet, is logged, and
    what was read last stays.

    Args:
        paths: the files.
        read: reads and checks them.

    Raises:
        ConfigError: they cannot be used now.
    """

    def __init__(self, paths: Sequence[Path | None], read: Callable[[], ValueT]) -> None:
        self._paths = [path for path in paths if path is not None]
        self._read = read
        self._lock = threading.Lock()
        self._seen = self._look()
        self._value = read()

    def current(self) -> ValueT:
        """Content of the files now."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                self._seen = seen
                names = ",".join(path.name for path in self._paths)
                try:
                    self._value = self._read()
                    _log.info(event("credentials read again", files=names))
                except ConfigError as error:
                    _log.warning(event("changed credentials not used", error=str(error)))
            return self._value

    def _look(self) -> list[tuple[int, int, int] | None]:
        """What tells one state of the files from another."""
        return [_identity(path) for path in self._paths]


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
