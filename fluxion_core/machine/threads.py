"""Threads of our own: started, or an error that says what the system's limit is."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path

from fluxion_core.errors import ThreadLimitError


def start_thread(name: str, target: Callable[[], object]) -> threading.Thread:
    """Start a thread that does not keep the process from ending.

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


def check_threads(count: int) -> None:
    """Find out whether so many threads more may be started, before libraries need them that end the
    process without a word of ours where they may not (gRPC, OpenMP).

    Raises:
        ThreadLimitError: they may not.
    """
    enough = threading.Event()
    threads = []
    try:
        for number in range(count):
            threads.append(start_thread(f"probe-{number}", enough.wait))
    finally:
        enough.set()
        for thread in threads:
            thread.join()


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
    limits = []
    for path in _group_files():
        try:
            limits.append(path.read_text(encoding="ascii").strip())
        except OSError:
            continue
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def _group_files() -> list[Path]:
    """Where the limit may stand, with version 1 and 2 of control groups, in a container or not."""
    root = Path("/sys/fs/cgroup")
    own = [root / "pids.max", root / "pids" / "pids.max"]
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return own
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "pids"):
            own.append(root / controllers / group.lstrip("/") / "pids.max")
    return own
