"""Traces of a model over texts.

python -m fluxion_core.lab.unseen.collect MODEL OUTPUT TEXTS...
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

from fluxion_core.config.commands import Command, flag, run_module, within
from fluxion_core.errors import ConfigError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import BLOCK_SIZES, WindowSpec, ceil_div
from fluxion_core.lab.training.replay import prefill
from fluxion_core.lab.unseen.traces import asking, trace_prompt
from fluxion_core.models.weights import load_model


@dataclass(frozen=True, kw_only=True)
class Collect(Command):
    """Write a trace for each text that has none yet; weights in bfloat16, on the CPU."""

    model: Path = field(kw_only=False)
    """GGUF file or model directory."""
    output: Path = field(kw_only=False)
    """Takes NAME-plain.safetensors or NAME-ask.safetensors; made if it is not there."""
    texts: tuple[Path, ...] = field(kw_only=False)
    """Plain texts."""
    asks: Annotated[bool, flag()] = False
    """Write facts into the prompts; the steps ask for them."""
    prompt_tokens: Annotated[int, within(2048)] = 3072
    """Of every prompt."""
    steps: Annotated[int, within(1)] = 64
    """After each prompt."""
    every_layer: Annotated[int, within(1)] = 2
    """Look at every so many layers."""

    def __call__(self) -> None:
        """Collect them, one after the other."""
        self.output.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.load(self.model)
        missing = [text for text in self.texts if not self._path(text).is_file()]
        prompts = {text: self._token_ids(text, tokenizer) for text in missing}
        if not missing:
            return
        decoder = load_model(self.model, device=torch.device("cpu"), dtype=torch.bfloat16).decoder
        for text, token_ids in prompts.items():
            kv = prefill(decoder, token_ids)
            trace = trace_prompt(
                decoder,
                kv,
                self.prompt_tokens,
                self.steps,
                WindowSpec(),
                every_layer=self.every_layer,
            )
            trace.save(self._path(text))
            print(self._path(text).name, flush=True)

    def _path(self, text: Path) -> Path:
        return self.output / f"{text.stem}-{'ask' if self.asks else 'plain'}.safetensors"

    def _token_ids(self, text: Path, tokenizer: Tokenizer) -> Sequence[int]:
        needed = ceil_div(self.prompt_tokens + self.steps, BLOCK_SIZES[-1]) * BLOCK_SIZES[-1]
        ids = tokenizer.encode(text.read_text("utf-8"))
        if len(ids) < needed:
            raise ConfigError(f"{text} has {len(ids)} tokens; {needed} are needed")
        if not self.asks:
            return ids[:needed]
        encode = partial(tokenizer.encode, add_special_tokens=False)
        return asking(ids[:needed], self.prompt_tokens, encode, zlib.crc32(text.stem.encode()))


if __name__ == "__main__":
    sys.exit(run_module(Collect))
