"""What an evaluation is told, whoever asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fluxion_core.errors import ConfigError

BENCHMARKS = ("ruler", "longbench", "leval", "agreement")


@dataclass(frozen=True)
class EvaluationOptions:
    """One run. Checked when made.

    Raises:
        ConfigError: a value is out of its range.
    """

    benchmark: str
    """One of BENCHMARKS."""
    model: str = "smollm2-135m"
    """A pulled model's name, a GGUF file or a model directory."""
    models_dir: Path | None = None
    lengths: tuple[int, ...] = (4096, 8192)
    """Tokens of prompt and answer together: RULER and agreement."""
    cases: int = 50
    """Of each task and length; documents for agreement."""
    tasks: tuple[str, ...] = ()
    """By name; none for all."""
    policies: tuple[str, ...] = ("exact", "fixed(16, 5 %)")
    """Quality levels (accurate, balanced, fast) or policies by name; `exact` among them."""
    weights: Path | None = None
    """Predictor weights; else the package's for this model, else training-free."""
    seed: int = 0
    chat: bool = True
    """Through the model's chat template, if it has one."""
    data: Path | None = None
    """LongBench's or L-Eval's files, or the documents of agreement."""
    prose: Path | None = None
    """Text files to make RULER's prose of; generated if not given."""
    squad: Path | None = None
    """SQuAD-like file for RULER's qa_1."""
    hotpot: Path | None = None
    """HotpotQA-like file for RULER's qa_2."""
    pilot_cases: int = 10
    """RULER: first cases of a task, with `exact` alone; a task far from possible ends there. 0: all
    cases in all ways."""
    new_tokens: int = 128
    """Agreement: tokens generated of each document."""
    minimum_tokens: int = 0
    """LongBench and L-Eval: shorter prompts are left out."""
    batch: int = 16
    """Sequences decoded together."""
    host_kv_gib: float = 0.0
    """Of the KV store; 0 for what the batch needs."""
    device: str = "auto"
    """Where prompts are computed: auto, cpu or cuda."""
    stop_after_seconds: float = 0.0
    """No case is begun after this; what is begun is finished, the rest left for a resumed run. 0:
    never."""
    journal: Path | None = None
    """JSON lines of all answers."""
    resume: bool = False
    """Go on with the journal."""
    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if self.benchmark not in BENCHMARKS:
            raise ConfigError(f"benchmark {self.benchmark!r}; one of {', '.join(BENCHMARKS)}")
        for name in ("cases", "batch", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least 1")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"lengths are {self.lengths}; at least one, all positive")
        if self.resume and self.journal is None:
            raise ConfigError("resume needs the journal to go on with")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device {self.device!r}; one of auto, cpu, cuda")

    @property
    def device_name(self) -> str:
        """cpu or cuda.

        Raises:
            ConfigError: cuda is asked for and not there.
        """
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device cuda: torch finds no CUDA device; use cpu")
        return self.device
