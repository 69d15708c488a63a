"""Connection of a command to a node: options that all commands that call one share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fluxion_core.config.commands import within
from fluxion_core.errors import ConfigError

if TYPE_CHECKING:
    from fluxion_core.config.settings import ClientSettings


@Parameter(name="*", group="Connection")
@dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """Time, encryption and credentials of a call."""

    connect_seconds: Annotated[float, within(0.1)] = 5.0
    """Time to reach the node before giving up, s."""
    tls_ca: Path | None = None
    """PEM authority of the node's certificate; turns TLS on."""
    tls_cert: Path | None = None
    """PEM chain shown to the node (mutual TLS)."""
    tls_key: Path | None = None
    """PEM key of --tls-cert; mode 600."""
    token_file: Path | None = None
    """File of the token to send; mode 600. Only over TLS, or to this machine."""

    def settings(self) -> ClientSettings:
        """Settings of the connection, as a client takes them.

        Raises:
            ConfigError: flags that go together were not given together.
        """
        from pydantic import ValidationError

        from fluxion_core.config.setting_errors import problems_of
        from fluxion_core.config.settings import ClientSettings, ClientTlsSettings

        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together; give both or neither")
        if self.tls_cert is not None and self.tls_ca is None:
            raise ConfigError("--tls-cert needs --tls-ca, which turns TLS on")
        try:
            return ClientSettings(
                connect_seconds=self.connect_seconds,
                tls=ClientTlsSettings(
                    authority=self.tls_ca, certificate=self.tls_cert, key=self.tls_key
                ),
                token_file=self.token_file,
            )
        except ValidationError as error:
            raise ConfigError("; ".join(problems_of(error, {}))) from None
