"""Credentials that cannot be used are told apart at start; changed ones are read again."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from pathlib import Path

import pytest

from fluxion_core.config.settings import (
    ClientSettings,
    ClientTlsSettings,
    ServerTlsSettings,
    load_settings,
)
from fluxion_core.errors import ConfigError
from fluxion_core.wire.channel import check_client
from fluxion_core.wire.credential_files import WatchedFiles, read_secret
from fluxion_core.wire.tls import read_tls_files, server_credentials
from fluxion_core.wire.tokens import TokenTable, read_token, read_token_table
from services.decode.config import DecodeSettings
from tests.certificates import Authority, write_secret

TOKEN, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_whole_credentials_are_taken(authority: Authority):
    certificate, key = authority.issue("node")
    files = read_tls_files(certificate, key, authority.path, "server.tls")
    assert files.chain == certificate.read_bytes()
    assert files.key == key.read_bytes()
    assert server_credentials(ServerTlsSettings()) is None
    settings = ServerTlsSettings(certificate=certificate, key=key, client_authority=authority.path)
    assert server_credentials(settings) is not None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no certificate", r"server\.tls\.certificate .*node\.pem: No such file"),
        ("no key", r"server\.tls\.key .*node\.key: No such file"),
        ("no authority", r"server\.tls\.client_authority .*authority\.pem: No such file"),
        ("another key", r"server\.tls\.key .* does not belong to the certificate in .*node\.pem"),
        ("garbage", r"server\.tls\.certificate .*node\.pem holds no certificates in PEM form"),
        ("garbage key", r"server\.tls\.key .*node\.key holds no private key in PEM form"),
        ("readable key", r"server\.tls\.key .*node\.key has mode 0644: others can read"),
        ("expired", r"server\.tls\.certificate .*node\.pem: the certificate expired on \d{4}-"),
        (
            "not yet valid",
            r"node\.pem: the certificate is valid from .* check this machine's clock",
        ),
        ("large", r"node\.pem is larger than 1048576 B"),
    ],
)
def test_what_is_wrong_is_named(authority: Authority, fault: str, words: str):
    valid_for = {"expired": timedelta(minutes=-1), "not yet valid": timedelta(days=30)}
    certificate, key = authority.issue("node", valid_for=valid_for.get(fault, timedelta(days=1)))
    match fault:
        case "no certificate":
            certificate.unlink()
        case "no key":
            key.unlink()
        case "no authority":
            authority.path.unlink()
        case "another key":
            write_secret(key, authority.issue("other")[1].read_text())
        case "garbage":
            certificate.write_text("-----BEGIN CERTIFICATE-----\nxyz\n")
        case "garbage key":
            write_secret(key, certificate.read_text())
        case "readable key":
            key.chmod(0o644)
        case "large":
            certificate.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(ConfigError, match=words) as failure:
        server_credentials(
            ServerTlsSettings(certificate=certificate, key=key, client_authority=authority.path)
        )
    assert "PRIVATE" not in str(failure.value)


def test_a_secret_of_roots_may_be_read_by_its_group(tmp_path: Path, monkeypatch):
    path = write_secret(tmp_path / "secret", "text")
    if os.geteuid() == 0:
        path.chmod(0o640)
        assert read_secret(path, "setting") == b"text"
        path.chmod(0o660)
    else:
        path.chmod(0o640)
    with pytest.raises(ConfigError, match="others can read or change it"):
        read_secret(path, "setting")


def test_a_secret_of_another_user_is_refused(tmp_path: Path, monkeypatch):
    path = write_secret(tmp_path / "secret", "text")
    owner = path.stat().st_uid
    if owner == 0:
        os.chown(path, 4711, -1)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        read_secret(path, "setting")


def test_changed_files_are_read_again_and_bad_ones_are_not_used(tmp_path: Path, caplog):
    path = write_secret(tmp_path / "tokens", f"alice {TOKEN}\n")
    watched = WatchedFiles([path], lambda: read_token_table(path, "setting"))
    assert watched.current() is watched.current()
    write_secret(path, f"# nobody else\nalice {TOKEN}\nbob {OTHER}\n")
    assert watched.current().name_of(f"Bearer {OTHER}") == "bob"
    with caplog.at_level(logging.WARNING):
        write_secret(path, "alice short\n")
        assert watched.current().name_of(f"Bearer {TOKEN}") == "alice"
        path.unlink()
        assert watched.current().name_of(f"Bearer {TOKEN}") == "alice"
    assert "changed credentials not used" in caplog.text
    write_secret(path, f"bob {OTHER}\n")
    assert watched.current().name_of(f"Bearer {TOKEN}") is None
    assert TOKEN not in caplog.text
    assert "short" not in caplog.text.replace("at least", "").replace("shorter", "")


def test_a_token_belongs_to_one_name():
    table = TokenTable({"alice": TOKEN, "bob": OTHER})
    assert table.name_of(f"Bearer {TOKEN}") == "alice"
    assert table.name_of(f"bearer {OTHER}") == "bob"
    for wrong in (
        "",
        "Bearer ",
        TOKEN,
        f"Basic {TOKEN}",
        # As long as the right scheme, so that the token begins where one is looked for.
        f"Digest {TOKEN}",
        f"Bearer:{TOKEN}",
        f"Bearer {TOKEN} ",
        f"Bearer {TOKEN[:-1]}",
    ):
        assert table.name_of(wrong) is None
    assert table.name_of(f"Bearer {TOKEN}".encode()) is None
    assert TOKEN not in repr(vars(table))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no token"),
        ("# alice\n\n", "holds no token"),
        (f"{TOKEN}\n", "line 1: must be NAME TOKEN"),
        (f"alice {TOKEN} more\n", "line 1: must be NAME TOKEN"),
        (f"al/ice {TOKEN}\n", "line 1: must be NAME TOKEN"),
        (f"alice {TOKEN}\nalice {OTHER}\n", "line 2: this name or token came before"),
        (f"alice {TOKEN}\nbob {TOKEN}\n", "line 2: this name or token came before"),
        ("alice 0123456789\n", "line 1: the token has 10 characters"),
        ("alice 0123456789abcdé\n", "line 1: a token is one word"),
        ("alice \xff\n".encode("latin-1"), "is not text"),
    ],
)
def test_a_token_file_that_cannot_be_used_names_the_line(tmp_path: Path, content, words: str):
    path = write_secret(tmp_path / "tokens", "")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words) as failure:
        read_token_table(path, "server.auth.token_file")
    assert "0123456789" not in str(failure.value)


def test_a_clients_file_holds_one_token(tmp_path: Path):
    path = write_secret(tmp_path / "token", f"{TOKEN}\n")
    assert read_token(path, "token_file") == TOKEN
    for wrong in ("", "short", f"alice {TOKEN}", f"{TOKEN}\n{OTHER}"):
        write_secret(path, wrong)
        with pytest.raises(ConfigError, match="token"):
            read_token(path, "token_file")


def test_a_token_goes_over_tls_or_stays_on_this_machine(tmp_path: Path, authority: Authority):
    plain = ClientSettings(token_file=write_secret(tmp_path / "token", TOKEN))
    check_client(plain, ["127.0.0.1:7070", "localhost:7070", "[::1]:7070"], "client")
    for address in ("10.0.0.7:7070", "node:7070", "[2001:db8::7]:7070"):
        with pytest.raises(ConfigError, match="unencrypted"):
            check_client(plain, [address], "client")
    tls = ClientTlsSettings(authority=authority.path)
    check_client(plain.model_copy(update={"tls": tls}), ["node:7070"], "client")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--server.tls.certificate", "a"], "certificate and key go together"),
        (["--server.tls.client-authority", "a"], "client_authority needs a certificate"),
        (["--server.auth.certificate-names", "a"], "needs tls.client_authority"),
        (
            ["--listen", "0.0.0.0:1", "--server.auth.token-file", "a"],
            "tokens could be read on the way",
        ),
        (["--prefill.client.tls.key", "a"], "certificate and key go together"),
        (
            ["--prefill.client.tls.key", "a", "--prefill.client.tls.certificate", "b"],
            "needs an authority",
        ),
        (["--server.client-limits.requests-in-flight", "-1"], "must be at least 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        load_settings(DecodeSettings, flags, program="test")


def test_settings_of_tls_and_tokens_come_from_a_file(tmp_path: Path):
    config = tmp_path / "decode.toml"
    config.write_text(
        '[server]\nlisten = "0.0.0.0:7420"\n'
        '[server.tls]\ncertificate = "c.pem"\nkey = "k.pem"\nclient_authority = "a.pem"\n'
        '[server.auth]\ntoken_file = "tokens"\ncertificate_names = ["decode-1"]\n'
        "[server.client_limits]\nrequests_in_flight = 8\nwaiting_tokens = 100000\n"
        '[prefill.client]\ntoken_file = "token"\n'
        '[prefill.client.tls]\nauthority = "a.pem"\ncertificate = "c.pem"\nkey = "k.pem"\n'
    )
    settings = load_settings(DecodeSettings, ["--config", str(config)], program="test")
    assert settings.server.tls.client_authority == Path("a.pem")
    assert settings.server.auth.certificate_names == ("decode-1",)
    assert settings.server.client_limits.waiting_tokens == 100_000
    assert settings.prefill.client.tls.key == Path("k.pem")
