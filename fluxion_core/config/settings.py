"""Settings shared by both nodes, and the one place where they are read.

A setting comes, in falling precedence, from a flag (`--store.host-kv-bytes 8GiB`), an environment
variable (`FLUXION_STORE__HOST_KV_BYTES=8GiB`), a TOML file (`--config FILE`, or `FLUXION_CONFIG`)
or its default. Nothing else in the project reads `argv`, the environment or settings files.
Each node's own root model lives with the node: services/{prefill,decode}/config.py.

How sources are read: setting_sources.py. What single settings may be: setting_types.py.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fluxion_core.config.addresses import is_loopback
from fluxion_core.config.carriers import Carrier
from fluxion_core.config.setting_errors import problems_of
from fluxion_core.config.setting_sources import (
    CONFIG_VARIABLE,
    nested,
    read_environment,
    read_file,
    read_flags,
)
from fluxion_core.config.setting_types import (
    Count,
    FilePath,
    ListenAddress,
    MessageBytes,
    Names,
    OptionalListenAddress,
    Seconds,
    Ways,
)
from fluxion_core.errors import ConfigError
from fluxion_core.machine.cpus import num_usable_cpus


class Section(BaseModel):
    """A group of settings. Immutable; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ServerTlsSettings(Section):
    """TLS of the gRPC listener; off without a certificate. Changed files are read again."""

    certificate: FilePath | None = None
    """PEM chain, the node's own certificate first; with key turns TLS on."""
    key: FilePath | None = None
    """PEM key of the certificate, without a passphrase; others must not be able to read it."""
    client_authority: FilePath | None = None
    """PEM authority: who has no certificate signed by it cannot connect (mutual TLS)."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together; set both or neither")
        if self.client_authority is not None and self.certificate is None:
            raise ValueError("client_authority needs a certificate and a key of this node")
        return self


class AuthSettings(Section):
    """Callers that are let in: without any of it everybody. Health checks are always answered."""

    token_file: FilePath | None = None
    """File of lines NAME TOKEN: each call must send one of the tokens as `authorization: Bearer
    TOKEN`. Names appear in logs, tokens never. Read again when it changes."""
    certificate_names: Names = ()
    """With mutual TLS: names in the certificates of those who may call; empty for all whom the
    authority signed."""


class ClientLimitSettings(Section):
    """Limits of what one client asks for at a time; 0 for none.

    A client is a token's name, else the name in a certificate, else an address.
    """

    requests_in_flight: Count = 0
    """Calls that are not over yet."""
    requests_per_minute: Count = 0
    """Calls begun in any 60 seconds."""
    waiting_tokens: Count = 0
    """Prompt tokens of requests that have not got their first token yet."""


class ServerSettings(Section):
    """The listener of a node: its address, who may call, and its limits."""

    listen: ListenAddress = "127.0.0.1:0"
    """host:port for gRPC; port 0 takes a free one."""
    health_listen: OptionalListenAddress = ""
    """host:port that answers health checks only, always without TLS; empty for none."""
    metrics_listen: OptionalListenAddress = ""
    """host:port of the Prometheus endpoint, plain HTTP for everybody; empty for none."""
    max_request_bytes: MessageBytes = 16 << 20
    """Largest request message. A million token ids take about 3 MiB; text takes more."""
    max_metadata_bytes: MessageBytes = Field(default=16 << 10, ge=1024)
    """Largest metadata of a call."""
    max_streams_per_connection: Count = Field(default=512, gt=0)
    """Calls at a time on one connection; further ones wait on the client's side."""
    max_connections: Count = Field(default=4096, gt=0)
    """Connections at a time; further ones are closed at once."""
    request_seconds: Seconds = Field(default=60.0, gt=0)
    """A call's message has this long to arrive."""
    unread_seconds: Seconds = Field(default=20.0, gt=0)
    """A client that does not take a message of its answer for so long has its call ended, and what
    was made for it is thrown away."""
    grace_seconds: Seconds = 30.0
    """After SIGTERM, running requests have this long to finish."""
    tls: ServerTlsSettings = ServerTlsSettings()
    """Encryption, and certificates of peers."""
    auth: AuthSettings = AuthSettings()
    """Tokens and names of those who may call."""
    client_limits: ClientLimitSettings = ClientLimitSettings()
    """What one client may ask for."""

    @model_validator(mode="after")
    def _check_auth(self) -> Self:
        if self.auth.certificate_names and self.tls.client_authority is None:
            raise ValueError("auth.certificate_names needs tls.client_authority")
        if self.auth.token_file and self.tls.certificate is None and not is_loopback(self.listen):
            raise ValueError(
                f"auth.token_file without tls on {self.listen}: tokens could be read on the way; "
                f"set tls.certificate and tls.key, or listen on 127.0.0.1"
            )
        return self


class ClientTlsSettings(Section):
    """TLS towards a node; off without an authority."""

    authority: FilePath | None = None
    """PEM authority of the node's certificate; turns TLS on."""
    certificate: FilePath | None = None
    """PEM chain shown to the node (mutual TLS)."""
    key: FilePath | None = None
    """PEM key of the certificate; others must not be able to read it."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together; set both or neither")
        if self.certificate is not None and self.authority is None:
            raise ValueError("a certificate needs an authority, which turns TLS on")
        return self


class ClientSettings(Section):
    """Calls of a node, or of the command, to another node."""

    connect_seconds: Seconds = Field(default=5.0, gt=0)
    """Time to reach a node before it counts as unavailable."""
    tls: ClientTlsSettings = ClientTlsSettings()
    """Encryption, and the caller's certificate."""
    token_file: FilePath | None = None
    """File of one token, sent as `authorization: Bearer TOKEN`; only over TLS, or to this machine.
    Read again when it changes."""


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name, re.ASCII):
        raise ValueError(f"{name!r} is no device; use auto, cpu, cuda or cuda:N, as cuda:0")
    return name


class ModelSettings(Section):
    """The model, and how it is held."""

    model: str = "smollm2-135m"
    """Name that `fluxion pull` knows, or a path: a GGUF file or a safetensors directory."""
    models_dir: FilePath | None = None
    """Where pulled models are; none for the user's data directory."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """Where the dense part runs: cpu, cuda or cuda:N; auto is the first CUDA device, if there is
    one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights and activations; auto is bfloat16 on a GPU, and on a CPU that has
    instructions for it (AVX-512 BF16, AMX), else float32."""
    threads: Count = Field(default=0, le=4096)
    """Threads of torch, which computes a prefill node's prompts on a CPU; 0 for one per usable
    CPU, an eighth of them left to others from 4 CPUs on. A decode node's own work has
    engine.attention_threads."""


class HandoffSettings(Section):
    """KV between nodes: what it travels on, beside the call that asks for it."""

    ways: Ways = (Carrier.SHARED_MEMORY, Carrier.SOCKETS, Carrier.GRPC)
    """Ways that may be used: shared_memory (both nodes on one machine), sockets, grpc (the call's
    own stream). The prefill node takes the first of its own that the decode node names too and
    that is possible. One that fails is not replaced by another."""
    connections: Count = Field(default=4, ge=1, le=16)
    """Connections of one hand-off, by sockets or shared memory: the fewer of both nodes'."""
    threads: Count | None = Field(default=None, ge=1, le=64)
    """Threads that move KV over sockets and shared memory; if not given, one for every four usable
    CPUs, at least 2 (1 on a single CPU) and at most 4."""

    @property
    def num_threads(self) -> int:
        """Threads that move KV: those given, else those that suit the machine."""
        if self.threads is not None:
            return self.threads
        cpus = num_usable_cpus()
        # One alone is often put on the CPU of a sender that wakes it, and then they take turns.
        return max(min(2, cpus), min(4, cpus // 4))


class LogSettings(Section):
    """The log that the node prints."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level printed."""


class NodeSettings(Section):
    """Root of a node's settings; subclasses add sections. Read it with `load_settings`."""

    server: ServerSettings = ServerSettings()
    """Listening address and limits."""
    model: ModelSettings = ModelSettings()
    """The model and its device."""
    log: LogSettings = LogSettings()
    """Logging."""


SettingsT = TypeVar("SettingsT", bound=NodeSettings)

_SHORTHANDS = {
    "--listen": "--server.listen",
    "--metrics-listen": "--server.metrics-listen",
    "--model": "--model.model",
    "--models-dir": "--model.models-dir",
    "--device": "--model.device",
    "--lanes": "--engine.lanes",
    "--prefill-addresses": "--prefill.addresses",
}
"""Short flags for what is given most; each stands for one setting."""


def load_settings(
    settings_type: type[SettingsT],
    arguments: Sequence[str],
    *,
    program: str,
    environment: Mapping[str, str] | None = None,
) -> SettingsT:
    """Read flags, environment and a TOML file into one checked object.

    Args:
        settings_type: a subclass of NodeSettings.
        arguments: command line without the program's name.
        program: name for `--help`.
        environment: variables; this process' own if not given.

    Raises:
        ConfigError: a value is missing, malformed or out of range, a name is unknown, or the
            file cannot be read; the text names every setting whose value is wrong.
        SystemExit: `--help` was asked for.
    """
    environment = os.environ if environment is None else environment
    config_file, flags = _split_config_flag(arguments, environment)
    try:
        given = {} if config_file is None else read_file(settings_type, config_file)
        given |= read_environment(settings_type, environment)
        given |= read_flags(settings_type, flags, program)
    except ConfigError as error:
        raise ConfigError(f"{error} (see `{program} --help`)") from None
    try:
        return settings_type.model_validate(
            nested({name: one.value for name, one in given.items()})
        )
    except ValidationError as error:
        problems = "; ".join(problems_of(error, given))
        raise ConfigError(f"{problems} (see `{program} --help`)") from None


def _split_config_flag(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[Path | None, list[str]]:
    """Take `--config FILE` out of the flags, and expand the shorthands in the rest."""
    config, where = environment.get(CONFIG_VARIABLE) or None, CONFIG_VARIABLE
    flags: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        name, equals, value = argument.partition("=")
        if name == "--config":
            config, where = (value if equals else next(pending, None)), "--config"
            if not config:
                raise ConfigError("--config needs a file name")
        else:
            flags.append(_SHORTHANDS.get(name, name) + equals + value)
    if config is None:
        return None, flags
    path = Path(config)
    if not path.is_file():
        raise ConfigError(f"{where} {config}: no such file")
    return path, flags


def exit_on_config_error(error: ConfigError, program: str) -> None:
    """Print one sentence to stderr and leave with status 2."""
    print(f"{program}: {error}", file=sys.stderr)
    raise SystemExit(2)
