"""Which instruction set is used, and that code of different ones cannot mix."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fluxion_core.kernels import isa

NATIVE = Path(isa.__file__).parent / "native"


def test_the_best_is_used_and_others_can_be_forced(each_isa: str):
    assert isa.current_isa() == each_isa
    assert isa.available_isas()[0] == "scalar"


def test_an_unknown_isa_is_refused():
    with pytest.raises(ValueError, match="nonsense"):
        isa.set_isa("nonsense")


def target_flags() -> dict[str, list[str]]:
    """Compiler flags of every ISA, as CMakeLists.txt has them."""
    text = (NATIVE / "CMakeLists.txt").read_text()
    found = dict(re.findall(r"set\(TARGET_FLAGS_(\w+) (.*)\)", text))
    flags = {}
    for name, value in found.items():
        whole = re.sub(r"\$\{TARGET_FLAGS_(\w+)\}", lambda other: found[other[1]], value)
        flags[name] = whole.replace('"', "").split()
    return flags


@pytest.mark.parametrize("name", sorted(target_flags()))
def test_isa_objects_share_no_weak_symbols(name: str, tmp_path: Path):
    # A weak symbol is one that the linker merges with its namesake of another ISA. Without
    # optimisation none is hidden by inlining, and compiling takes a tenth of the time.
    target = tmp_path / f"{name}.o"
    command = ["c++", "-std=c++17", "-O0", "-w", "-fno-exceptions", "-fno-rtti"]
    source = NATIVE / "operations" / "targets" / f"{name}.cpp"
    subprocess.run(
        [*command, *target_flags()[name], f"-I{NATIVE}", "-c", source, "-o", target], check=True
    )
    symbols = subprocess.run(["nm", target], check=True, capture_output=True, text=True)
    kinds = {line.split()[-2] for line in symbols.stdout.splitlines()}
    assert not kinds & {"W", "w", "V", "v", "u"}, symbols.stdout
