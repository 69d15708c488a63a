"""How a command reaches a node, of the flags that commands share."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from fluxion_core.config.setting_errors import problems_of
from fluxion_core.config.settings import ClientSettings, ClientTlsSettings
from fluxion_core.errors import ConfigError


def client_settings(
    connect_seconds: float,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    token_file: Path | None,
) -> ClientSettings:
    """Settings of the flags that commands share.

    Raises:
        ConfigError: flags that go together were not given together.
    """
    if (tls_cert is None) != (tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together; give both or neither")
    if tls_cert is not None and tls_ca is None:
        raise ConfigError("--tls-cert needs --tls-ca, which turns TLS on")
    try:
        return ClientSettings(
            connect_seconds=connect_seconds,
            tls=ClientTlsSettings(authority=tls_ca, certificate=tls_cert, key=tls_key),
            token_file=token_file,
        )
    except ValidationError as error:
        raise ConfigError("; ".join(problems_of(error, {}))) from None
