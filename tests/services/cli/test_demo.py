"""The demo's document, and the demo with fake nodes; with real ones it is in tests/e2e."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from services.cli import demo, waiting
from services.cli.health import DECODE_SERVICE, PREFILL_SERVICE
from services.cli.node_plans import NodePlan
from tests.services.cli.command_line import invoke


def test_the_fact_stands_once_near_the_middle_of_the_document():
    document = demo.load_document()
    assert re.findall(r"\d{5,}", document) == [demo.FACT]
    assert 0.4 < document.index(demo.FACT) / len(document) < 0.6
    assert demo.FACT not in demo.QUESTION


def test_no_paragraph_of_the_document_is_repeated():
    paragraphs = [p for p in demo.load_document().split("\n\n") if not p.startswith("#")]
    assert len(paragraphs) == len(set(paragraphs)) > 80


@pytest.mark.model
def test_the_prompt_is_7000_tokens_and_leaves_room_for_the_answer(smollm2_path: Path):
    from fluxion_core.generation.chat import ChatMessage
    from fluxion_core.generation.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(smollm2_path)
    chat = tokenizer.render_chat([ChatMessage(role="user", content=demo.build_prompt())])
    num_tokens = len(tokenizer.encode(chat, add_special_tokens=False))
    assert 6900 <= num_tokens <= 7200
    assert num_tokens + 64 <= 8192


@pytest.fixture
def demo_with_fake_nodes(monkeypatch: pytest.MonkeyPatch, plan_fake_node: Callable[..., NodePlan]):
    """Runs the demo with fake nodes whose decode node gives the answer passed in."""

    def run(answer: str):
        def plan(_: object) -> tuple[NodePlan, NodePlan]:
            return (
                plan_fake_node("prefill", PREFILL_SERVICE),
                plan_fake_node("decode", DECODE_SERVICE, "--answer", answer),
            )

        monkeypatch.setattr(demo, "_pull_if_absent", lambda *_: None)
        monkeypatch.setattr(demo, "plan_nodes", plan)
        monkeypatch.setattr(waiting, "TICK_SECONDS", 0.001)
        return invoke(["demo", "--logs"])

    return run


def test_an_answer_with_the_fact_is_status_0(demo_with_fake_nodes: Callable[[str], object]):
    result = demo_with_fake_nodes(f"The code is {demo.FACT}.")
    assert result.exit_code == 0, result.output
    assert f"The code is {demo.FACT}." in result.stdout
    figures = ("time to first token", "time per output token", "2 GB/s", "160.0 MB", "found")
    for figure in figures:
        assert figure in result.stdout
    for phase in ("Starting a prefill node and a decode node", "Ending both nodes"):
        assert f"\n{phase}" in f"\n{result.stderr}"
    assert "decode  │ drained" in result.stderr
    assert "prefill │ drained" in result.stderr


def test_an_answer_without_the_fact_is_status_1(demo_with_fake_nodes: Callable[[str], object]):
    result = demo_with_fake_nodes("I would rather not say.")
    assert result.exit_code == 1
    assert "NOT found" in result.stdout
    assert "prefill │ drained" in result.stderr
