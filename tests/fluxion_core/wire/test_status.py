"""Every error of ours has one status, and comes back as the same kind."""

from __future__ import annotations

import grpc
import pytest

from fluxion_core import errors
from fluxion_core.wire.status import (
    RemoteError,
    RemoteUnavailableError,
    error_from_rpc,
    sent_metadata,
    status_of,
)

INTERNAL_ON_PURPOSE = {"FluxionError", "ConfigError", "ShapeError"}


def all_errors(root: type[Exception] = errors.FluxionError) -> list[type[Exception]]:
    return [root, *(e for child in root.__subclasses__() for e in all_errors(child))]


def bare(error_type: type[Exception]) -> errors.FluxionError:
    error = error_type.__new__(error_type)
    assert isinstance(error, errors.FluxionError)
    return error


@pytest.mark.parametrize("error_type", [e for e in all_errors() if e.__module__ == errors.__name__])
def test_the_table_is_complete(error_type: type[Exception]):
    is_internal = status_of(bare(error_type)) is grpc.StatusCode.INTERNAL
    assert is_internal == (error_type.__name__ in INTERNAL_ON_PURPOSE)


def test_the_tree_in_the_docstring_is_the_tree():
    assert errors.__doc__ is not None
    for error_type in all_errors():
        if error_type.__module__ == errors.__name__:
            assert error_type.__name__ in errors.__doc__


class Failed(grpc.RpcError):
    def __init__(self, status: grpc.StatusCode, details: str, *metadata: tuple[str, str]) -> None:
        self._status, self._details, self._metadata = status, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata


@pytest.mark.parametrize("status", [s for s in grpc.StatusCode if s is not grpc.StatusCode.OK])
def test_what_comes_back_keeps_status_and_sentence(status: grpc.StatusCode):
    sent = sent_metadata(errors.DrainingError())
    error = error_from_rpc(Failed(status, "what the node said", sent))
    assert status_of(error) is status
    assert "what the node said" in str(error)
    assert isinstance(error, RemoteError) == (
        status
        in {
            grpc.StatusCode.UNKNOWN,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.ALREADY_EXISTS,
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.ABORTED,
            grpc.StatusCode.OUT_OF_RANGE,
            grpc.StatusCode.UNIMPLEMENTED,
            grpc.StatusCode.INTERNAL,
        }
    )


def test_what_a_node_sent_is_told_from_a_connection_that_broke():
    sent = sent_metadata(errors.DrainingError("this node is draining"))
    assert sent == ("fluxion-error", "DrainingError")
    unavailable = grpc.StatusCode.UNAVAILABLE
    answered = error_from_rpc(Failed(unavailable, "this node is draining", sent))
    assert type(answered) is RemoteUnavailableError
    assert str(answered) == "this node is draining"
    broken = error_from_rpc(Failed(unavailable, "recvmsg:Connection reset by peer"))
    assert type(broken) is errors.PeerUnavailableError
    assert str(broken) == "the connection could not be made, or it broke (Connection reset)"


def test_a_bug_is_a_status_that_was_sent():
    assert sent_metadata(ZeroDivisionError())[1] == "InternalError"


@pytest.mark.parametrize(
    ("status", "details", "words"),
    [
        (
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: "
            "ipv4:127.0.0.1:9: Failed to connect to remote host: Connection refused",
            "the connection could not be made, or it broke (Connection refused)",
        ),
        (grpc.StatusCode.UNAVAILABLE, "Stream removed", "it broke (no reason known)"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", "the deadline passed"),
        (grpc.StatusCode.CANCELLED, "Locally cancelled by application!", "was cancelled"),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", "the right kind of node?"),
        (grpc.StatusCode.UNKNOWN, "Stream removed", "is this the address of a node?"),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM", "is this the address of a node?"),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "SERVER: Received message larger than max (17000005 vs. 16777216)",
            "a message has 17000005 B; its receiver takes 16777216 B",
        ),
    ],
)
def test_what_grpc_says_does_not_reach_the_user(status, details: str, words: str):
    error = error_from_rpc(Failed(status, details))
    assert status_of(error) is status
    assert words in str(error)
    assert details not in str(error)
