"""`fluxion completion`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

from fluxion_core.config.commands import Command


@dataclass(frozen=True, kw_only=True)
class Completion(Command):
    """Print what a shell needs to complete commands, flags and their values.

    bash: eval "$(fluxion completion bash)". zsh: fluxion completion zsh > "${fpath[1]}/_fluxion".
    fish: fluxion completion fish > ~/.config/fish/completions/fluxion.fish.
    """

    shell: Literal["bash", "zsh", "fish"] = field(kw_only=False)
    """Which one."""

    def __call__(self) -> None:
        """The script goes to stdout."""
        from services.cli.main import make_fluxion

        sys.stdout.write(make_fluxion().generate_completion(shell=self.shell))
