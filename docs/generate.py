"""Write what the reference pages take from the code; with --check, say whether it is fresh.

A page is written by hand but for its regions, each between two comments:

    <!-- generated: NAME -->
    …
    <!-- end -->

What stands in a region comes from the function of that name in `REGIONS`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "protos"), str(HERE)]

from generators import api, commands, metrics, settings  # noqa: E402

REGIONS: dict[str, Callable[[], str]] = (
    settings.REGIONS | commands.REGIONS | metrics.REGIONS | api.REGIONS
)

_REGION = re.compile(r"(<!-- generated: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fresh(page: str) -> str:
    """The page with its regions made anew."""
    return _REGION.sub(lambda region: f"{region[1]}\n{REGIONS[region[2]]()}\n{region[3]}", page)


def main(arguments: list[str]) -> int:
    """Write, or compare; returns the exit status."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    stale = []
    for path in sorted(HERE.glob("reference/*.md")):
        text = path.read_text()
        if (made := fresh(text)) != text:
            stale.append(path.name)
            if not arguments:
                path.write_text(made)
    if stale and arguments:
        print(f"not fresh: {', '.join(stale)}; run python docs/generate.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
