"""Certificates and keys: what gRPC is given, checked first, so that what is wrong is told at start.

A server's files are read again at the next connection after they changed; a client's when a
channel is opened, and PrefillNodes opens new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from fluxion_core.config.settings import ClientTlsSettings, ServerTlsSettings
from fluxion_core.errors import ConfigError
from fluxion_core.wire.credential_files import WatchedFiles, read_public, read_secret


@dataclass(frozen=True)
class TlsFiles:
    """Checked content, PEM."""

    chain: bytes | None
    """Own certificate, then those above it."""
    key: bytes | None
    """Of the first certificate."""
    authority: bytes | None
    """Whom peers must be signed by."""


def server_credentials(settings: ServerTlsSettings) -> grpc.ServerCredentials | None:
    """Credentials of a listener, or None without TLS.

    Raises:
        ConfigError: a file is missing, is not PEM, can be read by others, has expired, or the key
            does not belong to the certificate.
    """
    if settings.certificate is None:
        return None
    watched = WatchedFiles(
        (settings.certificate, settings.key, settings.client_authority),
        lambda: read_tls_files(
            settings.certificate, settings.key, settings.client_authority, "server.tls"
        ),
    )
    used = watched.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        found = watched.current()
        if found is used:
            return None
        used = found
        return _configuration(found)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(used),
        changed,
        require_client_authentication=settings.client_authority is not None,
    )


def channel_credentials(
    settings: ClientTlsSettings, section: str, *, must_be_valid: bool
) -> grpc.ChannelCredentials | None:
    """Credentials of a channel, or None without TLS.

    Args:
        settings: the files.
        section: what the errors call them.
        must_be_valid: refuse what has expired, rather than leave that to the other side.

    Raises:
        ConfigError: see `server_credentials`.
    """
    if settings.authority is None:
        return None
    files = read_tls_files(
        settings.certificate,
        settings.key,
        settings.authority,
        section,
        must_be_valid=must_be_valid,
    )
    return grpc.ssl_channel_credentials(files.authority, files.key, files.chain)


def watched_channel_credentials(
    settings: ClientTlsSettings, section: str
) -> WatchedFiles[grpc.ChannelCredentials | None]:
    """Credentials for channels that are opened while a node runs: others once the files change.

    Raises:
        ConfigError: see `server_credentials`; what has expired is left to the other side.
    """
    return WatchedFiles(
        (settings.authority, settings.certificate, settings.key),
        lambda: channel_credentials(settings, section, must_be_valid=False),
    )


def read_tls_files(
    certificate: Path | None,
    key: Path | None,
    authority: Path | None,
    section: str,
    *,
    must_be_valid: bool = True,
) -> TlsFiles:
    """Read and check what is given; a certificate and its key go together.

    Raises:
        ConfigError: see `server_credentials`.
    """
    chain_pem = key_pem = authority_pem = None
    if authority is not None:
        name = f"{section}.{'client_' if section == 'server.tls' else ''}authority"
        authority_pem = read_public(authority, name)
        # A bundle may hold old ones beside those in use.
        expired = [_why_not_valid(each) for each in _certificates(authority_pem, authority, name)]
        if must_be_valid and all(expired):
            raise ConfigError(f"{name} {authority}: {expired[0]}")
    if certificate is not None and key is not None:
        name = f"{section}.certificate"
        chain_pem = read_public(certificate, name)
        own = _certificates(chain_pem, certificate, name)[0]
        if must_be_valid and (why := _why_not_valid(own)):
            raise ConfigError(f"{name} {certificate}: {why}")
        key_pem = read_secret(key, f"{section}.key")
        if _public_bytes(_private_key(key_pem, key, section).public_key()) != _public_bytes(
            own.public_key()
        ):
            raise ConfigError(
                f"{section}.key {key} does not belong to the certificate in {certificate}"
            )
    return TlsFiles(chain_pem, key_pem, authority_pem)


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.chain)], files.authority)


def _certificates(pem: bytes, path: Path, setting: str) -> Sequence[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError(f"{setting} {path} holds no certificates in PEM form") from None


def _private_key(pem: bytes, path: Path, section: str):  # type: ignore[no-untyped-def]
    try:
        return load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, NotImplementedError):
        raise ConfigError(
            f"{section}.key {path} holds no private key in PEM form without a passphrase"
        ) from None


def _public_bytes(key) -> bytes:  # type: ignore[no-untyped-def]
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _why_not_valid(certificate: x509.Certificate) -> str:
    """Why a certificate cannot be used now; empty if it can."""
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        return f"the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if now < certificate.not_valid_before_utc:
        return (
            f"the certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; "
            f"check this machine's clock"
        )
    return ""
