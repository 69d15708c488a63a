"""Who a caller is known to be: by token, by certificate, or not at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fluxion_core.config.settings import AuthSettings, ServerSettings
from fluxion_core.errors import AuthenticationError
from fluxion_core.wire.callers import Callers
from tests.certificates import write_secret

TOKEN = "alice-0123456789abcdef"


def context(*, token: str | None = None, names: tuple[str, ...] = ()):
    metadata = [("authorization", f"Bearer {token}")] if token else []
    return SimpleNamespace(
        peer=lambda: "ipv4:10.0.0.7:4711",
        invocation_metadata=lambda: metadata,
        auth_context=lambda: {"x509_subject_alternative_name": [name.encode() for name in names]},
    )


def test_who_shows_nothing_has_a_name_for_limits_and_no_domain_of_its_own():
    callers = Callers(ServerSettings())
    assert callers.client_of(context()) == "10.0.0.7"
    assert callers.domain_of(context()) == ""


def test_a_certificates_name_and_a_tokens_are_two_domains_though_they_read_alike(tmp_path):
    by_certificate = Callers(ServerSettings())
    tokens = write_secret(tmp_path / "tokens", f"alice {TOKEN}\n")
    by_token = Callers(ServerSettings(auth=AuthSettings(token_file=tokens)))
    shown = context(names=("alice", "other")), context(token=TOKEN, names=("gateway",))
    both = list(zip((by_certificate, by_token), shown, strict=True))
    assert [callers.client_of(one) for callers, one in both] == ["alice", "alice"]
    assert [callers.domain_of(one) for callers, one in both] == ["certificate alice", "token alice"]


def test_who_may_not_call_has_no_domain(tmp_path):
    tokens = write_secret(tmp_path / "tokens", f"alice {TOKEN}\n")
    callers = Callers(ServerSettings(auth=AuthSettings(token_file=tokens)))
    with pytest.raises(AuthenticationError):
        callers.domain_of(context())
