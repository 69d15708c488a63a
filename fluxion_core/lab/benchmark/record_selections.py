"""Record which units a real model's heads read on real texts, for `recorded_selections.py`.

    python -m fluxion_core.lab.benchmark.record_selections --model MODEL --texts "FILE,FILE+FILE"
    --policies "fixed(16, 5 %),threshold(0.215)" --tokens 24576 --steps 160 --folder FOLDER

A prompt is the beginning of a text, and what follows in the text is what is decoded, so that all
policies read for the same tokens. A text of two files changes its topic: its prompt is a beginning
of each, and it goes on with the second one for half of the steps, then with the first. Runs on the
CPU; head profiles are those of the prompt alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor

from fluxion_core.config.command_options import Texts
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.host.step import HostStep
from fluxion_core.decode.step import StepReads, StepRow
from fluxion_core.errors import ConfigError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.recorded_selections import RecordedSelections
from fluxion_core.lab.held_prompt import HeldPrompt, PromptMaker
from fluxion_core.lab.provenance import Provenance
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.model_options import ModelOptions
from fluxion_core.models.weights import load_model
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import PlannerWeights, shipped_planner_weights
from fluxion_core.planning.policy import Policy, parse_policy
from fluxion_core.pool.cpu_pool import CpuPool


@dataclass(frozen=True)
class RecordedText:
    """A prompt, and the tokens that are decoded after it."""

    name: str
    prompt: list[int]
    following: list[int]
    """One for each step."""
    change: int
    """Step at which the topic changes; -1: it does not."""


@dataclass
class _Selections:
    """Selections of one text: as RecordedSelections has them, less the first dimension."""

    bits: list[npt.NDArray[np.uint8]]
    levels: list[npt.NDArray[np.int8]]
    regions: list[tuple[int, int]]


class _RecordingAttention(HostAttention):
    """Attention of steps of one row that keeps what was read."""

    kept: _Selections
    """Takes the steps; set before the first one."""
    num_bytes: int
    """Of a head's bits."""

    def begin_step(self, rows: Sequence[StepRow]) -> None:
        """Prepare a step of one row."""
        super().begin_step(rows)
        assert self.work is not None
        (row,), (region,) = rows, self.work.regions
        self._geometry = geometry = row.sequence.store.geometry
        heads = (geometry.num_layers, geometry.num_kv_heads)
        group = self._num_heads // geometry.num_kv_heads
        self._units = np.zeros((*heads, group, self.num_bytes * 8), np.bool_)
        self._levels = np.zeros(heads, np.int8)
        self._slabs = row.sequence.slab_table.numpy().copy()
        self._slab_order = np.argsort(self._slabs)
        self.kept.regions.append((region.start // BLOCK_TOKENS, region.stop // BLOCK_TOKENS))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in one layer, and note what each group read."""
        output = super().attend(layer, query, key, value)
        assert self.work is not None
        for kv_head in range(self._geometry.num_kv_heads):
            self._levels[layer, kv_head] = self.work.tasks.plan(0, kv_head)[0]
            self._note(layer, kv_head, self._units[layer, kv_head])
        return output

    def _note(self, layer: int, kv_head: int, units: npt.NDArray[np.bool_]) -> None:
        geometry = self._geometry
        assert self.work is not None
        runs = np.array(self.work.tasks.runs(0, kv_head), np.int64).reshape(-1, 4)
        ordered = self._slabs[self._slab_order]
        place = np.searchsorted(ordered, runs[:, 0], side="right") - 1
        inside = runs[:, 0] - ordered[place] - geometry.kv_offset(layer, kv_head)
        first = self._slab_order[place] * geometry.slab_blocks + inside // geometry.block_bytes
        begin, end = self.kept.regions[-1]
        for start, (_, count, heads, _) in zip(first, runs, strict=True):
            for head in range(len(units)):
                if heads >> head & 1:
                    units[head, max(begin, start) : min(end, start + count)] = True

    def end_step(self) -> list[StepReads]:
        """Count the new token, and keep the step."""
        self.kept.bits.append(np.packbits(self._units, axis=-1, bitorder="little"))
        self.kept.levels.append(self._levels)
        return super().end_step()


class SelectionRecorder:
    """A model on the CPU that decodes given texts under a policy.

    Args:
        decoder: the model, on the CPU; it cannot be used any more.
        planner: of the model.
        texts: all that are recorded; their prompts are of one length, and so are the steps.
        held: their prompts' KV.
    """

    def __init__(
        self,
        decoder: Decoder,
        planner: Planner,
        texts: Sequence[RecordedText],
        held: Sequence[HeldPrompt],
    ) -> None:
        self._planner, self._texts, self._held = planner, texts, held
        geometry = held[0].geometry
        steps = len(texts[0].following)
        slabs = sum(geometry.slabs_for(len(text.prompt) + steps) for text in texts)
        self._store = HostKvStore(geometry, slabs * (geometry.slab_bytes + 4096), model_key=b"")
        pool = CpuPool(torch.get_num_threads())
        self._attention = _RecordingAttention(
            self._store,
            WindowSpec(),
            num_heads=decoder.config.num_heads,
            pool=pool,
            planner=planner,
        )
        longest = ceil_div(len(texts[0].prompt) + steps, BLOCK_TOKENS)
        self._attention.num_bytes = ceil_div(longest, 8)
        self._step = HostStep(HostDecoder(decoder, pool), self._attention)

    def record(self, policy: Policy, about: Provenance) -> RecordedSelections:
        """Decode every text under the policy."""
        kept = [
            self._decode(text, held, policy)
            for text, held in zip(self._texts, self._held, strict=True)
        ]
        return RecordedSelections(
            str(policy),
            tuple(text.name for text in self._texts),
            tuple(text.change for text in self._texts),
            about.as_json(),
            np.stack([np.stack(one.bits) for one in kept]),
            np.stack([np.stack(one.levels) for one in kept]),
            np.array([one.regions for one in kept], np.int32),
        )

    def _decode(self, text: RecordedText, held: HeldPrompt, policy: Policy) -> _Selections:
        kept = self._attention.kept = _Selections([], [], [])
        sequence = held.store_into(self._store, text.prompt, len(text.following))
        state = self._planner.new_state(held.profiles)
        slot = self._step.join(sequence)
        for token in text.following:
            self._step.run([StepRow(sequence, slot, token, policy, state)])
        self._step.leave(slot)
        sequence.release()
        return kept


def read_text(name: str, tokenizer: Tokenizer, tokens: int, steps: int) -> RecordedText:
    """A text of one file, or of two with + between them; see the module.

    Raises:
        ConfigError: a file is too short.
    """
    ids = [tokenizer.encode(Path(file).read_text()) for file in name.split("+")]
    title = " + ".join(Path(file).stem for file in name.split("+"))
    part = tokens // len(ids)
    # Halves of an odd number of tokens would not be the prompt's length.
    parts = [tokens - part * (len(ids) - 1), *[part] * (len(ids) - 1)]
    if short := [one for one, own in zip(ids, parts, strict=True) if len(one) < own + steps]:
        raise ConfigError(f"{title}: a text of {len(short[0])} tokens is too short")
    prompt = [token for one, own in zip(ids, parts, strict=True) for token in one[:own]]
    if len(ids) == 1:
        return RecordedText(title, prompt, ids[0][tokens : tokens + steps], -1)
    first, last = ids[0][parts[0] :], ids[-1][parts[-1] :]
    change = steps // 2
    return RecordedText(title, prompt, last[:change] + first[: steps - change], change)


@dataclass(frozen=True, kw_only=True)
class RecordSelections(ModelOptions, Command):
    """Record which units a real model's heads read on real texts."""

    texts: Texts
    """Files of texts; two with + between them for one that changes its topic."""
    policies: Texts = ("fixed(16, 5 %)", "threshold(0.215)", "marginal(0.3)")
    """Recorded, each into a file of its own."""
    folder: Path
    """Takes the files; must be there."""
    tokens: Annotated[int, within(1)] = 24_576
    """Of each prompt."""
    steps: Annotated[int, within(1)] = 160
    """After each prompt."""

    def __call__(self) -> None:
        """Write a file for each policy."""
        console = Console(width=160)
        path = self.locate()
        model = load_model(path, device=torch.device("cpu"), dtype=torch.bfloat16)
        config = model.config
        tokenizer = Tokenizer.load(path)
        texts = [read_text(name, tokenizer, self.tokens, self.steps) for name in self.texts]
        geometry = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
        held = _computed(PromptMaker(model.decoder, geometry), texts, console)
        weights = shipped_planner_weights(model.revision_hash)
        planner = Planner(
            weights or PlannerWeights.training_free(config.num_layers, config.num_heads),
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        about = Provenance.here(
            model.name, model.revision_hash, weights.fingerprint if weights else "training-free"
        )
        recorder = SelectionRecorder(model.decoder, planner, texts, held)
        for name in self.policies:
            recorded = recorder.record(parse_policy(name), about)
            file = self.folder / f"{name.translate(_NOT_IN_NAMES)}.npz"
            recorded.save(file)
            console.print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB", highlight=False)


_NOT_IN_NAMES = str.maketrans({"(": "-", ")": "", ",": "-", " ": "", "%": ""})


def _computed(
    maker: PromptMaker, texts: Sequence[RecordedText], console: Console
) -> list[HeldPrompt]:
    held = []
    for text in texts:
        started = time.perf_counter()
        held.append(maker.make(text.prompt, profile_window=WindowSpec()))
        seconds = time.perf_counter() - started
        console.print(f"{text.name}: prompt computed in {seconds:.0f} s", highlight=False)
    return held


if __name__ == "__main__":
    sys.exit(run_module(RecordSelections))
