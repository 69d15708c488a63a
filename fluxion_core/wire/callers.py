"""Callers: checked before a call's message is read, and named for limits and logs."""

from __future__ import annotations

from urllib.parse import unquote

import grpc

from fluxion_core.config.settings import ServerSettings
from fluxion_core.errors import AuthenticationError
from fluxion_core.wire.credential_files import WatchedFiles
from fluxion_core.wire.tokens import read_token_table

_TOKEN_SETTING = "server.auth.token_file"


class Callers:
    """Checks tokens and certificates' names.

    Args:
        settings: of the server; its TLS has verified certificates already.

    Raises:
        ConfigError: the token file cannot be used.
    """

    def __init__(self, settings: ServerSettings) -> None:
        path = settings.auth.token_file
        self._tokens = (
            None
            if path is None
            else WatchedFiles([path], lambda: read_token_table(path, _TOKEN_SETTING))
        )
        self._certificate_names = frozenset(settings.auth.certificate_names)

    def client_of(self, context: grpc.aio.ServicerContext) -> str:
        """The caller's name: its token's, else its certificate's, else its address.

        Raises:
            AuthenticationError: the call has no known token, or no certificate with a name that
                may call.
        """
        identity = self._identity(context)
        return peer_host(context.peer()) if identity is None else identity[1]

    def domain_of(self, context: grpc.aio.ServicerContext) -> str:
        """Identity of a caller, so that what is its own can be kept from others.

        Empty for all who show neither a token nor a certificate: an address tells nobody apart.

        Raises:
            AuthenticationError: see `client_of`.
        """
        identity = self._identity(context)
        return "" if identity is None else " ".join(identity)

    def _identity(self, context: grpc.aio.ServicerContext) -> tuple[str, str] | None:
        """Kind and name of what the caller has shown."""
        names = _certificate_names(context)
        if self._certificate_names and not self._certificate_names.intersection(names):
            raise AuthenticationError(
                "none of the names in the peer's certificate is in server.auth.certificate_names"
            )
        if self._tokens is not None:
            return "token", self._token_name(context)
        return ("certificate", names[0]) if names else None

    def _token_name(self, context: grpc.aio.ServicerContext) -> str:
        given = [
            value for key, value in context.invocation_metadata() or () if key == "authorization"
        ]
        if not given:
            raise AuthenticationError("no bearer token; send one as `authorization: Bearer TOKEN`")
        assert self._tokens is not None
        name = self._tokens.current().name_of(given[0]) if len(given) == 1 else None
        if name is None:
            raise AuthenticationError("wrong bearer token")
        return name


def peer_host(peer: str) -> str:
    """Address of a gRPC peer, without its port: `ipv4:10.0.0.7:4711` is 10.0.0.7."""
    _, _, address = peer.partition(":")
    return unquote(address).rpartition(":")[0].strip("[]") or peer


def _certificate_names(context: grpc.aio.ServicerContext) -> list[str]:
    """Names in the peer's verified certificate, alternative names first; none without mTLS."""
    found = context.auth_context()
    entries = [
        *found.get("x509_subject_alternative_name", ()),
        *found.get("x509_common_name", ()),
    ]
    return [entry.decode(errors="replace") for entry in entries]
