"""What a client learns of another's prompts by its own usage: nothing, unless all share."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from fluxion_core.config.settings import AuthSettings
from services.decode.cache_domain import cache_domain
from tests.certificates import write_secret
from tests.services.conftest import decode_node, decode_settings, generation_stub, running_node
from tests.services.decode.test_sessions import request_of

PROMPT = [*range(3, 203)]
"""200 tokens of the toy model: a full slab and a tail."""


@pytest.fixture
def start_shared(toy_model_path, tmp_path):
    """A stub of a decode node that knows alice and mallory; `share_prefixes` as given."""
    names = ("alice", "mallory")
    tokens = write_secret(
        tmp_path / "tokens", "".join(f"{name} {name}-0123456789abcdef\n" for name in names)
    )

    @asynccontextmanager
    async def start(share_prefixes: str, *, knows_callers: bool = True):
        settings = decode_settings(toy_model_path, local_prefill_tokens=1000)
        auth = AuthSettings(token_file=tokens if knows_callers else None)
        server = settings.server.model_copy(update={"auth": auth})
        store = settings.store.model_copy(update={"share_prefixes": share_prefixes})
        settings = settings.model_copy(update={"server": server, "store": store})
        async with (
            running_node(decode_node.serve, settings) as node,
            generation_stub(node.address) as stub,
        ):
            yield stub

    return start


async def ask(stub, name: str, token_ids: list[int], salt: str = "") -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were found."""
    call = stub.Generate(
        request_of(token_ids, max_new_tokens=4, cache_salt=salt),
        metadata=[("authorization", f"Bearer {name}-0123456789abcdef")],
    )
    responses = [response async for response in call]
    answer = [token for response in responses for token in response.token_ids]
    return answer, responses[-1].usage.cached_tokens


async def test_a_client_finds_nothing_of_anothers_session_and_takes_nothing_of_it(start_shared):
    async with start_shared("client") as stub:
        answer, _ = await ask(stub, "alice", PROMPT)
        following = [*PROMPT, *answer, 1]
        # A guess of all that was said, asked twice: the second finds the first, no more.
        assert await ask(stub, "mallory", PROMPT) == (answer, 0)
        assert (await ask(stub, "mallory", [*PROMPT[:128], 9, 9]))[1] == 128
        expected, found = await ask(stub, "alice", following)
        assert found == len(following) - 2
        assert await ask(stub, "mallory", following) == (expected, len(following) - 2)


async def test_a_salt_divides_a_clients_requests(start_shared):
    async with start_shared("client") as stub:
        assert [
            (await ask(stub, name, PROMPT, salt))[1]
            for name, salt in (
                ("alice", "a"),
                ("alice", "b"),
                ("alice", ""),
                ("mallory", "a"),
                ("alice", "a"),
            )
        ] == [0, 0, 0, 0, 128]


async def test_where_all_trust_each_other_all_find_it_but_for_a_salt(start_shared):
    async with start_shared("all") as stub:
        found = [
            (await ask(stub, name, PROMPT, salt))[1]
            for name, salt in (("alice", ""), ("mallory", ""), ("alice", "a"), ("mallory", "a"))
        ]
        assert found == [0, 128, 0, 128]


async def test_who_cannot_be_told_apart_shares(start_shared):
    async with start_shared("client", knows_callers=False) as stub:
        assert [(await ask(stub, name, PROMPT))[1] for name in ("alice", "mallory")] == [0, 128]


def test_no_two_pairs_of_caller_and_salt_are_one_domain():
    callers, salts = ("", "a", "a ", "1 a", "token a"), ("", "b", " b", "1 b", "a b")
    names = {cache_domain("client", caller, salt) for caller in callers for salt in salts}
    assert len(names) == len(callers) * len(salts)
    assert len({cache_domain("all", caller, salt) for caller in callers for salt in salts}) == 5
    assert cache_domain("all", "a", "") == cache_domain("client", "", "") == ""
