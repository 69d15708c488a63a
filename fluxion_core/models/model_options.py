"""Options of every command that is about a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fluxion_core.models.locate import default_models_dir, locate_model


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that a command is about."""

    model: str = "smollm2-135m"
    """A pulled model's name, a GGUF file or a model directory."""
    models_dir: Path | None = None
    """Where pulled models are; the user's data directory if not given."""

    def locate(self) -> Path:
        """The model's file or directory.

        Raises:
            ModelNotFoundError: there is no such model; the text says how to get it.
        """
        return locate_model(self.model, self.models_dir or default_models_dir())
