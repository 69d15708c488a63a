"""Threads of our own: started, or an error that says what the system's limit is."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path

from fluxion_core.errors import ThreadLimitError


def start_thread(name: str, target: Callable[[], object]) -> threading.Thread:
    """A thread that does not keep the process from ending.

    Raises:
        ThreadLimitError: the system lets this process have no further one.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    start(thread)
    return thread


def start(thread: threading.Thread) -> None:
    """Start a thread that was made before.

    Raises:
        ThreadLimitError: the system lets this process have no further one.
    """
    try:
        thread.start()
    except RuntimeError as error:
        if (limit := thread_limit(error)) is None:
            raise
        raise limit from None


def thread_limit(error: BaseException) -> ThreadLimitError | None:
    """Our error for Python's or the C++ library's of a thread that could not be started, if it is
    that: both come as a RuntimeError with a text."""
    text = str(error)
    if not isinstance(error, RuntimeError) or (
        "can't start new thread" not in text and "Resource temporarily unavailable" not in text
    ):
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    return ThreadLimitError(
        user_limit=None if soft == resource.RLIM_INFINITY else soft, group_limit=_group_limit()
    )


def _group_limit() -> int | None:
    """Threads that the control group (a container's) may have; None if it has no limit."""
    try:
        limit = Path("/sys/fs/cgroup/pids.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(limit) if limit.isdigit() else None
