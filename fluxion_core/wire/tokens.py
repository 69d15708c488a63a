"""Bearer tokens: the file that a server knows them from, and the file that a client sends one from.

A server's file has a line NAME TOKEN for each client; empty lines and lines that begin with # are
skipped. A client's file holds its token alone. Names may be shown anywhere, tokens nowhere.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from fluxion_core.errors import ConfigError
from fluxion_core.wire.credential_files import read_secret

MIN_TOKEN_CHARACTERS = 16
"""A shorter one could be guessed."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
_SCHEME = "bearer "


class TokenTable:
    """Tokens and whose they are. Holds hashes only.

    Args:
        tokens: token of each name.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self._hashes = [(name, sha256(token.encode()).digest()) for name, token in tokens.items()]

    def name_of(self, authorization: str | bytes) -> str | None:
        """The name that belongs to an `authorization` entry, or None.

        Takes the same time whichever token is given, known or not.
        """
        text = authorization if isinstance(authorization, str) else ""
        is_bearer = text[: len(_SCHEME)].lower() == _SCHEME
        given = sha256(text[len(_SCHEME) :].encode(errors="replace")).digest()
        found = None
        for name, known in self._hashes:
            if hmac.compare_digest(given, known) and is_bearer:
                found = name
        return found


def read_token_table(path: Path, setting: str) -> TokenTable:
    """A server's token file.

    Raises:
        ConfigError: it is missing, others can read it, it holds no token, or a line is malformed,
            short or repeated; the text has the line's number.
    """
    tokens: dict[str, str] = {}
    for number, line in enumerate(_text(path, setting).splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"{setting} {path}, line {number}"
        if len(words) != 2 or not _NAME.fullmatch(words[0]):
            raise ConfigError(
                f"{where}: must be NAME TOKEN; a name has up to 64 letters, digits, . _ and -"
            )
        name, token = words
        _check_token(token, where)
        if name in tokens or token in tokens.values():
            raise ConfigError(f"{where}: this name or token came before; each client has its own")
        tokens[name] = token
    if not tokens:
        raise ConfigError(f"{setting} {path} holds no token; write a line NAME TOKEN per client")
    return TokenTable(tokens)


def read_token(path: Path, setting: str) -> str:
    """A client's token file.

    Raises:
        ConfigError: it is missing, others can read it, or it does not hold one token.
    """
    token = _text(path, setting).strip()
    _check_token(token, f"{setting} {path}")
    return token


def _text(path: Path, setting: str) -> str:
    try:
        return read_secret(path, setting).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{setting} {path} is not text") from None


def _check_token(token: str, where: str) -> None:
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"{where}: a token is one word of up to 4096 visible ASCII characters")
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise ConfigError(
            f"{where}: the token has {len(token)} characters and could be guessed; at least "
            f"{MIN_TOKEN_CHARACTERS}, say of `openssl rand -hex 32`"
        )
