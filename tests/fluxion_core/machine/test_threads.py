"""A thread that cannot start is an error of ours, whoever wanted it."""

from __future__ import annotations

import threading

import pytest

from fluxion_core.errors import ThreadLimitError
from fluxion_core.machine import threads
from fluxion_core.machine.threads import check_threads, start, start_thread, thread_limit


@pytest.fixture
def few(monkeypatch) -> list[threading.Thread]:
    """Three threads may start, and no more."""
    started: list[threading.Thread] = []
    real = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(self)
        real(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    return started


def test_the_limits_are_named_with_the_remedy(few, monkeypatch):
    monkeypatch.setattr(threads, "_group_limit", lambda: 77)
    for _ in range(3):
        start_thread("works", lambda: None)
    with pytest.raises(ThreadLimitError, match=r"pids\.max 77\); raise the limit") as failure:
        start(threading.Thread(target=lambda: None))
    assert failure.value.group_limit == 77


def test_a_look_whether_threads_may_start_leaves_none_behind(few):
    check_threads(3)
    few.clear()
    with pytest.raises(ThreadLimitError):
        check_threads(4)
    assert len(few) == 3
    assert not any(thread.is_alive() for thread in few)


@pytest.mark.parametrize(
    ("error", "is_limit"),
    [
        (RuntimeError("can't start new thread"), True),
        # As std::system_error comes through the bindings.
        (RuntimeError("Resource temporarily unavailable"), True),
        (RuntimeError("something else"), False),
        (OSError(11, "Resource temporarily unavailable"), False),
    ],
)
def test_pythons_and_the_native_codes_errors_are_told_from_others(error, is_limit: bool):
    assert (thread_limit(error) is not None) == is_limit


@pytest.mark.parametrize(("text", "limit"), [("max\n", None), ("512\n", 512)])
def test_the_limit_of_the_control_group_is_read(monkeypatch, tmp_path, text: str, limit):
    (tmp_path / "pids.max").write_text(text)
    monkeypatch.setattr(threads, "_group_files", lambda: [tmp_path / "none", tmp_path / "pids.max"])
    assert threads._group_limit() == limit
