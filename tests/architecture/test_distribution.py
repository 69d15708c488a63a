"""What pip knows the project as, and that its types come with it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from fluxion_core import DISTRIBUTION

ROOT = Path(__file__).parents[2]


def test_hints_name_the_distribution_that_pyproject_makes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
    assert set(project["scripts"]) == {"fluxion"}


def test_nobody_is_told_to_install_somebody_elses_package():
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    files += [*(ROOT / "fluxion_core").rglob("*.py"), *(ROOT / "services").rglob("*.py")]
    wrong = re.compile(r"pip install '?fluxion['\[ ]|version\(.fluxion.\)")
    assert [file for file in files if wrong.search(file.read_text())] == []


def test_packages_that_clients_import_are_marked_as_typed():
    for package in ("fluxion_core", "protos/fluxion_proto"):
        assert (ROOT / package / "py.typed").is_file()
