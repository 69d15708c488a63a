"""Loading gives way when the node is to end, and the node ends at once."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fluxion_core.errors import ConfigError, ThreadLimitError
from services import node
from services.loading import EndedWhileLoadingError, load
from services.prefill.config import PrefillNodeSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def blocked():
    """Work that lasts until the test is over."""
    release = threading.Event()
    yield release.wait
    release.set()


async def test_what_was_loaded_comes_back_and_so_do_errors():
    ending = asyncio.Event()
    assert await load(lambda: 42, ending) == 42

    def fail() -> None:
        raise ConfigError("no such device")

    with pytest.raises(ConfigError, match="no such device"):
        await load(fail, ending)


async def test_loading_is_left_when_the_node_is_to_end(blocked):
    ending = asyncio.Event()
    loading = asyncio.ensure_future(load(blocked, ending))
    await asyncio.sleep(0)
    ending.set()
    with pytest.raises(EndedWhileLoadingError):
        await loading


async def test_nothing_is_begun_that_nobody_wants():
    ending = asyncio.Event()
    ending.set()
    with pytest.raises(EndedWhileLoadingError):
        await load(lambda: pytest.fail("begun"), ending)


async def test_a_thread_that_cannot_start_is_an_error_with_a_remedy(monkeypatch):
    def refuse(self) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ThreadLimitError, match="raise the limit of the user or the container"):
        await load(lambda: 42, asyncio.Event())


def test_a_node_that_may_not_start_its_threads_says_so_before_libraries_do(monkeypatch, caplog):
    async def serve(settings, ending) -> None:
        pytest.fail("begun")

    def too_many(count: int) -> None:
        assert count > node.THREADS
        raise ThreadLimitError(user_limit=None, group_limit=20)

    monkeypatch.setattr(node, "configure_logging", lambda *_: None)
    monkeypatch.setattr(node, "check_threads", too_many)
    assert node.run_node("prefill", PrefillNodeSettings, [], serve) == 1
    assert "cannot run" in caplog.text
    assert "pids.max 20" in caplog.text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/models/x"), "/models/x: Permission denied"),
        (RuntimeError("can't start new thread"), "no further thread can be started"),
        (ConfigError("no such device"), "no such device"),
    ],
)
def test_what_keeps_a_node_from_running_is_one_line(monkeypatch, caplog, error, words: str):
    async def serve(settings, ending) -> None:
        raise error

    monkeypatch.setattr(node, "configure_logging", lambda *_: None)
    assert node.run_node("prefill", PrefillNodeSettings, [], serve) == 1
    assert words in caplog.text
    assert "Traceback" not in caplog.text


NODE = """
import sys, threading
from services.loading import load
from services.node import run_node
from services.prefill.config import PrefillNodeSettings

async def serve(settings, ending):
    print("loading", flush=True)
    await load(threading.Event().wait, ending)

sys.exit(run_node("prefill", PrefillNodeSettings, [], serve))
"""


def test_a_node_that_loads_ends_at_once_when_asked():
    with subprocess.Popen(
        [sys.executable, "-c", NODE],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGTERM)
        # Its thread would never end.
        _, log = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "ended while loading" in log
