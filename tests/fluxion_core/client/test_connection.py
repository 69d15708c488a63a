"""What is wrong with an address or a file is told when a client is made; TLS and tokens work."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxion_core.client import AsyncClient, Client, ClientSettings, ClientTlsSettings
from fluxion_core.errors import AuthenticationError, ConfigError
from tests.certificates import Authority, write_secret
from tests.fluxion_core.client.conftest import TOKEN, SecretNode


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_malformed_address_is_refused_when_the_client_is_made(kind: type):
    with pytest.raises(ConfigError, match=r"address 'http://a:1' is not HOST:PORT"):
        kind("http://a:1")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (ClientSettings(token_file=Path("absent")), "client.token_file absent: No such file"),
        (
            ClientSettings(tls=ClientTlsSettings(authority=Path("absent"))),
            "client.tls.authority absent: No such file",
        ),
    ],
)
def test_a_file_that_is_not_there_is_told_when_the_client_is_made(kind: type, settings, words):
    with pytest.raises(ConfigError, match=words):
        kind("127.0.0.1:1", settings)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_token_does_not_travel_in_the_clear(kind: type, tmp_path: Path):
    token = write_secret(tmp_path / "token", TOKEN)
    with pytest.raises(ConfigError, match="would travel to node:7420 unencrypted"):
        kind("node:7420", ClientSettings(token_file=token))


def client_settings(node: SecretNode, **changes) -> ClientSettings:
    certificate, key = changes.pop("pair", node.client_pair)
    tls = {"authority": node.authority.path, "certificate": certificate, "key": key}
    return ClientSettings(tls=ClientTlsSettings(**tls | changes), token_file=node.token)


async def refusals(node: SecretNode, settings: ClientSettings) -> list[str]:
    """What both clients say."""
    said = []
    async with AsyncClient(node.address, settings) as client:
        with pytest.raises(AuthenticationError) as refused:
            await client.load()
        said.append(str(refused.value))
    # The node runs on this loop: the blocking client has a thread.
    with Client(node.address, settings) as client:
        with pytest.raises(AuthenticationError) as refused:
            await node.in_thread(client.load)
        said.append(str(refused.value))
    return said


async def test_both_clients_call_over_mutual_tls_with_a_token(secret_node: SecretNode):
    settings = client_settings(secret_node)
    async with AsyncClient(secret_node.address, settings) as client:
        answer = await client.generate("a")
        assert not (await client.load()).is_draining
    with Client(secret_node.address, settings) as client:
        assert (await secret_node.in_thread(client.generate, "a")).text == answer.text
        assert not (await secret_node.in_thread(client.load)).is_draining


async def test_who_is_not_let_in_is_told_why(secret_node: SecretNode, tmp_path: Path):
    node, other = secret_node, Authority(tmp_path, "other")
    for settings, words in (
        (client_settings(node, certificate=None, key=None), "wants a certificate"),
        (client_settings(node, pair=other.issue("stranger")), "does not accept the certificate"),
        (client_settings(node, authority=other.path), "is not accepted by tls.authority"),
        (
            client_settings(node).model_copy(
                update={"token_file": write_secret(tmp_path / "wrong", TOKEN[::-1])}
            ),
            "wrong bearer token",
        ),
    ):
        for said in await refusals(node, settings):
            assert words in said
