"""Options of an evaluation, whoever asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from fluxion_core.config.command_options import JsonOption, JsonPath, Numbers, Texts
from fluxion_core.config.commands import flag, within
from fluxion_core.errors import ConfigError
from fluxion_core.models.model_options import ModelOptions

Benchmark = Literal["ruler", "collect", "longbench", "leval", "agreement", "divergence"]
Device = Literal["auto", "cpu", "cuda"]
Step = Literal["host", "device"]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(ModelOptions, JsonOption):
    """One run. Checked when made.

    Raises:
        ConfigError: a value is out of its range.
    """

    benchmark: Benchmark = field(kw_only=False)
    """What the model is asked."""
    lengths: Numbers = (4096, 8192)
    """Tokens of prompt and answer together (ruler, collect, agreement, divergence)."""
    cases: Annotated[int, within(1)] = 50
    """Of each task and length; documents for agreement and divergence."""
    tasks: Texts = ()
    """By name; all if not given."""
    policies: Texts = ("exact", "accurate", "balanced", "fast", "fixed(16, 5 %)")
    """Quality levels (accurate, balanced, fast) or policies by name; exact among them."""
    weights: Path | None = None
    """Predictor weights; without, the package's for this model, or none (training-free)."""
    seed: Annotated[int, within(0)] = 0
    """The same seed makes the same cases."""
    chat: Annotated[bool, flag(otherwise="--raw")] = True
    """Through the model's chat template, if it has one, or not."""
    data: Path | None = None
    """Directory: files of longbench or leval, documents of agreement and divergence."""
    prose: Path | None = None
    """Directory of texts for the prose of ruler and collect; generated if not given."""
    squad: Path | None = None
    """SQuAD-like file, for ruler's qa_1."""
    hotpot: Path | None = None
    """HotpotQA-like file, for ruler's qa_2."""
    pilot_cases: Annotated[int, within(0)] = 10
    """First cases of a task of ruler or collect, with exact alone; a task far from possible is
    given up there. 0 gives none up."""
    new_tokens: Annotated[int, within(1)] = 128
    """Generated of each document, for agreement; of each text fed, for divergence."""
    minimum_tokens: Annotated[int, within(0)] = 0
    """Shorter prompts are left out (longbench, leval)."""
    batch: Annotated[int, within(1)] = 16
    """Sequences decoded together."""
    host_kv_gib: Annotated[float, within(0)] = 0.0
    """Memory for KV, GiB; 0 for what the batch needs."""
    device: Device = "auto"
    """Where prompts are computed."""
    step: Step = "host"
    """What decodes: the CPUs alone, or a CUDA device with them."""
    dtype: Dtype = "auto"
    """Of the model; auto is float32 for step host, bfloat16 for step device, as nodes have it."""
    stop_after_seconds: Annotated[float, within(0)] = 0.0
    """Begin no case after this, s; what is begun is finished, the rest left for a resumed run. 0
    for no limit."""
    journal: Path | None = None
    """Keep every answer in this file of JSON lines."""
    resume: Annotated[bool, flag()] = False
    """Go on with the journal."""
    json: JsonPath = None
    """Keep {title, about, settings, report}, or {title, about, settings, rows, notes} of agreement
    and divergence, in this file; - is standard output."""
    markdown: Path | None = None
    """Write the report into this file."""
    commit: str = ""
    """Of the code, for the results, where it does not lie in a repository."""
    plot: Path | None = None
    """Draw the figures into this PNG or SVG file."""

    def __post_init__(self) -> None:
        if self.benchmark not in get_args(Benchmark):
            known = ", ".join(get_args(Benchmark))
            raise ConfigError(f"benchmark {self.benchmark!r}; one of {known}")
        for name in ("cases", "batch", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least 1")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"lengths are {self.lengths}; at least one, all positive")
        if self.resume and self.journal is None:
            raise ConfigError("resume needs the journal to go on with")
        if self.device not in get_args(Device):
            raise ConfigError(f"device {self.device!r}; one of auto, cpu, cuda")
        if self.step not in get_args(Step):
            raise ConfigError(f"step {self.step!r}; one of {', '.join(get_args(Step))}")
        if self.dtype not in get_args(Dtype):
            raise ConfigError(f"dtype {self.dtype!r}; one of {', '.join(get_args(Dtype))}")

    @property
    def device_name(self) -> str:
        """cpu or cuda.

        Raises:
            ConfigError: cuda is asked for and not there.
        """
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device cuda: torch finds no CUDA device; use cpu")
        return self.device

    @property
    def dtype_name(self) -> str:
        """float32 or bfloat16."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.step == "device" else "float32"
