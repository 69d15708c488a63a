"""Programs that tests need and Python packages do not bring.

Where one is missing, a person's tests are skipped and say why; where the environment sets CI they
fail, so that nothing goes untried unnoticed. Not here: hardware, whose absence is always a skip,
and Python packages, all of which the extra `test` has.
"""

from __future__ import annotations

import os
import shutil

import pytest


def require_program(name: str, *, package: str) -> None:
    """Skip the test or fixture that calls, or fail it where CI is set, unless `name` is on PATH.

    `package` is the one of Debian that has it.
    """
    if shutil.which(name) is not None:
        return
    reason = f"{name} is not installed; it comes with Debian's {package}"
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set: .ci/run installs it", pytrace=False)
    pytest.skip(reason)
