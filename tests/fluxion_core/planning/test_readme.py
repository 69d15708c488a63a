"""The list of features says where each is computed, and every function that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

from fluxion_core.planning.features import FEATURES

CORE = Path(__file__).parents[3] / "fluxion_core"
ROWS = re.findall(
    r"^\| (\w+) \| `?(\w+)`? \| (.+) \| (.+) \|$",
    (CORE / "planning" / "README.md").read_text().split("## The features")[1],
    re.MULTILINE,
)


def test_every_feature_is_listed_in_the_networks_order():
    names = [feature for feature, *_ in ROWS if feature != "feature"]
    assert names == [feature.name for feature in FEATURES]


def test_every_function_that_is_named_is_in_its_language():
    native = "".join(path.read_text() for path in (CORE / "kernels" / "native").rglob("*.[chi]*"))
    in_torch = (CORE / "planning" / "features.py").read_text()
    kernels = (CORE / "kernels" / "head_plan" / "triton.py").read_text()
    in_native = {name for _, _, text, _ in ROWS for name in re.findall(r"`(\w+)`", text)}
    in_kernels = {name for *_, text in ROWS for name in re.findall(r"`(\w+)`", text)}
    by_torch = {name for _, name, *_ in ROWS[1:]}
    assert len(by_torch) == 7
    assert [name for name in by_torch if f"\ndef {name}(" not in in_torch] == []
    assert {"features_of", "bound_statistics"} <= in_native
    assert {"scan", "see_window", "see_heads"} == in_kernels
    assert [name for name in in_native if not re.search(rf"\b{name}\(", native)] == []
    assert [name for name in in_kernels if f"\ndef {name}(" not in kernels] == []
