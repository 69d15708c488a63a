"""The examples run as they stand against a node, and say what their descriptions promise."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from tests.fluxion_core.client.conftest import toy_node

__all__ = ["toy_node"]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DOCUMENT = "A handbook of an invented observatory. " * 20

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def run(example: str, *arguments: str, stdin: str = "") -> tuple[str, str]:
    """What an example prints, and what it says on stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLES / example), *arguments),
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, said = await process.communicate(stdin.encode())
    assert process.returncode == 0, said.decode()
    return printed.decode(), said.decode()


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT)
    return str(path)


async def test_an_answer_is_streamed(toy_node: str):
    printed, said = await run("stream.py", toy_node, "Why?")
    assert printed.strip()
    assert "128 tokens, length" in said


async def test_follow_ups_find_the_text_stored(toy_node: str, document: str):
    printed, _ = await run("chat_over_document.py", toy_node, document, stdin="What?\nWhy?\n")
    stored = [int(count) for count in re.findall(r"\[(\d+) of \d+ prompt tokens", printed)]
    assert stored[0] == 0
    # Slabs of 128 tokens; a token is a byte here.
    assert stored[1] >= len(DOCUMENT) // 128 * 128


async def test_questions_on_one_text_share_its_kv(toy_node: str, document: str):
    printed, _ = await run("batch_questions.py", toy_node, document, "What?", "Why?", "How?")
    stored = [int(count) for count in re.findall(r"\? \[(\d+) of", printed)]
    assert stored[0] == 0
    assert min(stored[1:]) >= len(DOCUMENT) // 128 * 128


async def test_every_level_of_the_node_answers(toy_node: str, document: str):
    printed, _ = await run("quality_levels.py", toy_node, document, "Why?")
    assert re.findall(r"^(\w+) = ", printed, re.MULTILINE) == [
        *("exact", "accurate", "balanced", "fast")
    ]


def lines_of_code(example: Path) -> int:
    return len([line for line in example.read_text().splitlines() if line.strip()])


async def test_every_example_is_short_and_in_the_list():
    listed = re.findall(r"^\| \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(file.name for file in EXAMPLES.glob("*.py"))
    assert max(map(lines_of_code, EXAMPLES.glob("*.py"))) <= 35
