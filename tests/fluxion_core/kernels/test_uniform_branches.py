"""Branches that all threads of a program take alike: else only some of them come to a barrier.

A load tells each warp what is there when it looks. Where others write meanwhile, as a volatile load
says, two warps may be told two things. The interpreter knows no warps, so that no run shows this
without a GPU, and on one it is rare.
"""

from __future__ import annotations

import ast
from pathlib import Path

import fluxion_core.kernels

ROOT = Path(fluxion_core.kernels.__file__).parent

OF_ONE_WARP = {"await_answer", "await_missing"}
"""What one warp runs, whose threads load together; or several, with no barrier behind it."""


def _is_volatile(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and any(
        keyword.arg == "volatile" for keyword in node.keywords
    )


def _branching_by_volatile_loads(source: str) -> set[str]:
    """Functions in which a branch or a loop depends on one, there or by a name."""
    found = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(ast.walk(function))
        seen = {
            target.id
            for node in nodes
            if isinstance(node, ast.Assign) and any(map(_is_volatile, ast.walk(node.value)))
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in nodes:
            if isinstance(node, ast.If | ast.While) and any(
                _is_volatile(part) or (isinstance(part, ast.Name) and part.id in seen)
                for part in ast.walk(node.test)
            ):
                found.add(function.name)
    return found


def test_only_programs_of_one_warp_branch_by_what_others_write():
    found = {
        name
        for path in ROOT.rglob("*.py")
        for name in _branching_by_volatile_loads(path.read_text())
    }
    assert found == OF_ONE_WARP


def test_a_branch_by_a_name_is_seen():
    source = """
def one(p):
    if tl.load(p, volatile=True) < 3:
        pass

def two(p):
    count = tl.load(p, volatile=True)
    while count < 3:
        pass

def three(p, other):
    count = tl.load(p, volatile=True)
    if other:
        pass
"""
    assert _branching_by_volatile_loads(source) == {"one", "two"}
