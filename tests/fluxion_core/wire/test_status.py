"""Every error of ours has one status, and comes back as the same kind."""

from __future__ import annotations

import grpc
import pytest

from fluxion_core import errors
from fluxion_core.wire.status import RemoteError, error_from_rpc, status_of

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
    def __init__(self, status: grpc.StatusCode) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return "what the node said"


@pytest.mark.parametrize("status", [s for s in grpc.StatusCode if s is not grpc.StatusCode.OK])
def test_what_comes_back_keeps_status_and_sentence(status: grpc.StatusCode):
    error = error_from_rpc(Failed(status))
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
