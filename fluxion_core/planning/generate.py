"""Writes the numbers that C++ and Triton share with Python, from where Python has them.

    python -m fluxion_core.planning.generate           writes
    python -m fluxion_core.planning.generate --check   says whether they are fresh

Both files are checked in, so that building the native module needs no Python package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from fluxion_core.geometry import (
    BLOCK_SIZES,
    BLOCK_TOKENS,
    MAX_GROUP,
    MAX_HEAD_DIM,
    SPAN_TOKENS,
    TILE_BLOCKS,
)
from fluxion_core.kernels import lane_task
from fluxion_core.kernels.packed_weight import PANEL_COLUMNS
from fluxion_core.kernels.tier import constants as tier
from fluxion_core.planning import constants
from fluxion_core.planning.constants import BUDGETS, FEATURE_NAMES, GROWTH_OF_BUDGET

_KERNELS = Path(__file__).parents[1] / "kernels"
HEADER = _KERNELS / "native" / "operations" / "constants.h"
CONSTEXPRS = _KERNELS / "head_plan" / "constants.py"

_ORIGIN = "Written by `python -m fluxion_core.planning.generate`; the numbers are chosen in"
_SOURCES = (
    "fluxion_core/geometry.py and fluxion_core/planning/constants.py, where they are explained."
)


def header() -> str:
    """The C++ header: sizes of blocks, and all of planning/constants.py."""
    return "\n".join(_header_lines()) + "\n"


def constexprs() -> str:
    """The Python module with what the GPU's planner needs, as Triton's compile-time constants."""
    return "\n".join(_constexpr_lines()) + "\n"


def main() -> int:
    """Write both files, or with --check say which of them is stale."""
    parser = argparse.ArgumentParser(description=__doc__, prog="fluxion_core.planning.generate")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stale")
    check = parser.parse_args().check
    stale = [
        (path, text)
        for path, text in ((HEADER, header()), (CONSTEXPRS, constexprs()))
        if not path.exists() or path.read_text() != text
    ]
    for path, text in stale:
        print(f"{path} is {'stale' if check else 'written'}")
        if not check:
            path.write_text(text)
    if check and stale:
        print("run: python -m fluxion_core.planning.generate", file=sys.stderr)
    return int(check and bool(stale))


def _header_lines() -> Iterator[str]:
    yield f"// {_ORIGIN}"
    yield f"// {_SOURCES}"
    yield "// clang-format off"
    yield "#pragma once"
    yield ""
    yield "#include <cstdint>"
    yield ""
    yield "namespace fluxion {"
    yield ""
    yield from _size_lines()
    yield from _curve_lines()
    yield from _place_lines()
    yield "}  // namespace fluxion"


def _size_lines() -> Iterator[str]:
    for name, value in (
        ("BlockTokens", BLOCK_TOKENS),
        ("Levels", len(BLOCK_SIZES)),
        ("CoarseLevel", len(BLOCK_SIZES) - 1),
        ("CoarseTokens", BLOCK_SIZES[-1]),
        ("TileBlocks", TILE_BLOCKS),
        ("SpanBlocks", SPAN_TOKENS // BLOCK_TOKENS),
        ("MaxHeadDim", MAX_HEAD_DIM),
        ("MaxGroup", MAX_GROUP),
        ("PanelColumns", PANEL_COLUMNS),
    ):
        yield f"constexpr int k{name} = {value};"
    yield ""
    yield f"constexpr int32_t kReadAll = {constants.READ_ALL};"
    yield f"constexpr int32_t kReadNothing = {constants.READ_NOTHING};"
    yield ""
    for name, value in (
        ("Budgets", len(BUDGETS)),
        ("Everything", len(BUDGETS)),
        ("SmallBudget", constants.SMALL_BUDGET),
        ("Growths", constants.NUM_GROWTHS),
        ("ProfileOutputs", constants.NUM_OUTPUTS),
        ("Priors", constants.NUM_PRIORS),
        ("KvStatistics", constants.NUM_KV_STATISTICS),
        ("Features", constants.NUM_FEATURES),
    ):
        yield f"constexpr int k{name} = {value};"
    yield ""


def _curve_lines() -> Iterator[str]:
    yield "constexpr float kBudgetShares[kBudgets + 1] = {"
    yield from (f"    {_float(share)}," for share in (*BUDGETS, 1.0))
    yield "};"
    yield ""
    yield "// -1: it does not grow."
    growths = ", ".join(str(growth if share else -1) for share, growth in _growths())
    yield f"constexpr int kGrowthOfBudget[kBudgets] = {{{growths}}};"
    yield ""
    for name, number in (
        ("ErrorFloor", constants.ERROR_FLOOR),
        ("Clip", constants.CLIP),
        ("ClipDeviations", constants.CLIP_DEVIATIONS),
        ("Tiny", constants.TINY),
        ("TinyMass", constants.TINY_MASS),
        ("NoShareLog2", constants.NO_SHARE_LOG2),
    ):
        yield f"constexpr float k{name} = {_float(number)};"
    yield ""


def _place_lines() -> Iterator[str]:
    yield "// Places in a row of features."
    yield "namespace feature {"
    yield from (f"constexpr int k{_camel(name)} = {at};" for at, name in enumerate(FEATURE_NAMES))
    yield "}  // namespace feature"
    yield ""
    yield "constexpr const char* kFeatureNames[kFeatures] = {"
    yield from (f'    "{name}",' for name in FEATURE_NAMES)
    yield "};"
    yield ""
    yield "// Words of a task of the GPU lane: fluxion_core/kernels/lane_task.py."
    yield "namespace lane_word {"
    for name in lane_task.HOST_WORDS:
        yield f"constexpr int k{_camel(name)} = {getattr(lane_task, name).value};"
    yield "}  // namespace lane_word"
    yield ""
    yield "// What the device tier counts of a group: fluxion_core/kernels/tier/constants.py."
    yield "namespace tier_count {"
    for name in ("SELECTED", "RESIDENT", "COUNT_WORDS"):
        yield f"constexpr int k{_camel(name)} = {getattr(tier, name).value};"
    yield "}  // namespace tier_count"
    yield ""


def _constexpr_lines() -> Iterator[str]:
    yield '"""Numbers that the GPU\'s planner shares with the others, as compile-time constants.'
    yield ""
    yield _ORIGIN
    yield _SOURCES
    yield '"""'
    yield ""
    yield "import triton.language as tl"
    yield ""
    firsts = [GROWTH_OF_BUDGET.index(growth) for growth in range(1, constants.NUM_GROWTHS)]
    for name, value in (
        ("COARSE_LEVEL", len(BLOCK_SIZES) - 1),
        ("COARSE_TOKENS", BLOCK_SIZES[-1]),
        ("EVERYTHING", len(BUDGETS)),
        *((f"GROWTH_{growth}_FROM", first) for growth, first in enumerate(firsts, 1)),
        ("READ_ALL", constants.READ_ALL),
        ("READ_NOTHING", constants.READ_NOTHING),
        ("CLIP", constants.CLIP),
        ("CLIP_DEVIATIONS", constants.CLIP_DEVIATIONS),
        ("TINY", constants.TINY),
        ("NO_SHARE_LOG2", constants.NO_SHARE_LOG2),
        ("NUM_PRIORS", constants.NUM_PRIORS),
        ("NUM_KV_STATISTICS", constants.NUM_KV_STATISTICS),
    ):
        yield f"{name} = tl.constexpr({value!r})"
    yield ""
    yield "# Places in a row of features."
    yield from (f"{name.upper()} = tl.constexpr({at})" for at, name in enumerate(FEATURE_NAMES))


def _growths() -> Iterator[tuple[float, int]]:
    return zip(BUDGETS, GROWTH_OF_BUDGET, strict=True)


def _float(number: float) -> str:
    return f"{number!r}f"


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.lower().split("_"))


if __name__ == "__main__":
    sys.exit(main())
