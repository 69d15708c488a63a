"""Record which units a real model's heads read on real texts, for `recorded_selections.py`.

    python -m fluxion_core.lab.benchmark.record_selections --model MODEL --texts "FILE,FILE+FILE"
    --policies "fixed(16, 5 %),threshold(0.215)" --tokens 24576 --steps 160 --folder FOLDER

A prompt is the beginning of a text, and what follows in the text is what is decoded, so that all
policies read for the same tokens. A text of two files changes its topic: its prompt is a beginning
of each, and it goes on with the second one for half of the steps, then with the first. Steps run on
the CPU, all texts under all policies at once; head profiles are those of the prompt alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from fluxion_core.kvstore.sequence import SequenceKv
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
    """Attention of steps that keeps what was read, row by row."""

    kept: list[_Selections]
    """Of each row; takes the steps. Set before the first one."""
    num_bytes: int
    """Of a head's bits."""

    def begin_step(self, rows: Sequence[StepRow]) -> None:
        """Prepare a step of as many rows as `kept` has."""
        super().begin_step(rows)
        assert self.work is not None
        geometry = self._geometry = rows[0].sequence.store.geometry
        heads = (len(rows), geometry.num_layers, geometry.num_kv_heads)
        group = self._num_heads // geometry.num_kv_heads
        self._units = np.zeros((*heads, group, self.num_bytes * 8), np.bool_)
        self._levels = np.zeros(heads, np.int8)
        self._places = [_SlabPlaces(row.sequence) for row in rows]
        for kept, region in zip(self.kept, self.work.regions, strict=True):
            kept.regions.append((region.start // BLOCK_TOKENS, region.stop // BLOCK_TOKENS))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in one layer, and note what each group read."""
        output = super().attend(layer, query, key, value)
        assert self.work is not None
        for row, kv_head in np.ndindex(len(self.kept), self._geometry.num_kv_heads):
            self._levels[row, layer, kv_head] = self.work.tasks.plan(row, kv_head)[0]
            runs = np.array(self.work.tasks.runs(row, kv_head), np.int64).reshape(-1, 4)
            first = self._places[row].units(runs[:, 0], layer, kv_head)
            units = self._units[row, layer, kv_head]
            begin, end = self.kept[row].regions[-1]
            for start, (_, count, heads, _) in zip(first, runs, strict=True):
                for head in range(len(units)):
                    if heads >> head & 1:
                        units[head, max(begin, start) : min(end, start + count)] = True
        return output

    def end_step(self) -> list[StepReads]:
        """Count the new tokens, and keep the step."""
        bits = np.packbits(self._units, axis=-1, bitorder="little")
        for row, kept in enumerate(self.kept):
            kept.bits.append(bits[row])
            kept.levels.append(self._levels[row])
        return super().end_step()


class _SlabPlaces:
    """Units of a sequence by their addresses."""

    def __init__(self, sequence: SequenceKv) -> None:
        slabs = sequence.slab_table.numpy().copy()
        self._geometry = sequence.store.geometry
        self._ordinals = np.argsort(slabs)
        self._slabs = slabs[self._ordinals]

    def units(
        self, addresses: npt.NDArray[np.int64], layer: int, kv_head: int
    ) -> npt.NDArray[np.int64]:
        """Units that begin at these addresses."""
        geometry = self._geometry
        place = np.searchsorted(self._slabs, addresses, side="right") - 1
        inside = addresses - self._slabs[place] - geometry.kv_offset(layer, kv_head)
        first = self._ordinals[place] * geometry.slab_blocks
        return np.asarray(first + inside // geometry.block_bytes, np.int64)


class SelectionRecorder:
    """A model on the CPU that decodes given texts under some policies.

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
        self._pool = CpuPool(torch.get_num_threads())
        self._num_heads = decoder.config.num_heads
        self._decoder = HostDecoder(decoder, self._pool)

    def record(self, policies: Sequence[Policy], about: Provenance) -> list[RecordedSelections]:
        """Decode every text under every policy, all at once."""
        rows = [(policy, index) for policy in policies for index in range(len(self._texts))]
        kept = self._decode(rows)
        num_texts = len(self._texts)
        return [
            RecordedSelections(
                str(policy),
                tuple(text.name for text in self._texts),
                tuple(text.change for text in self._texts),
                about.as_json(),
                np.stack([np.stack(one.bits) for one in own]),
                np.stack([np.stack(one.levels) for one in own]),
                np.array([one.regions for one in own], np.int32),
            )
            for number, policy in enumerate(policies)
            for own in [kept[number * num_texts : (number + 1) * num_texts]]
        ]

    def _decode(self, rows: Sequence[tuple[Policy, int]]) -> list[_Selections]:
        geometry = self._held[0].geometry
        prompt, steps = len(self._texts[0].prompt), len(self._texts[0].following)
        # Rows of one text share the prompt's full slabs.
        own_slabs = geometry.slabs_for(steps) + 2
        slabs = len(self._texts) * geometry.slabs_for(prompt) + len(rows) * own_slabs
        store = HostKvStore(geometry, slabs * (geometry.slab_bytes + 4096), model_key=b"")
        attention = _RecordingAttention(
            store,
            WindowSpec(),
            num_heads=self._num_heads,
            pool=self._pool,
            planner=self._planner,
        )
        attention.kept = [_Selections([], [], []) for _ in rows]
        attention.num_bytes = ceil_div(ceil_div(prompt + steps, BLOCK_TOKENS), 8)
        step = HostStep(self._decoder, attention)
        decoded = []
        for policy, index in rows:
            held, text = self._held[index], self._texts[index]
            sequence = held.store_into(store, text.prompt, steps)
            state = self._planner.new_state(held.profiles)
            decoded.append((text, StepRow(sequence, step.join(sequence), 0, policy, state)))
        for number in range(steps):
            step.run([replace(row, token_id=text.following[number]) for text, row in decoded])
        return attention.kept


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

    prompt_device: str = "cpu"
    """Computes the prompts: cpu or cuda, in bfloat16. Steps are the CPU's."""

    def __call__(self) -> None:
        """Write a file for each policy."""
        console = Console(width=160)
        policies = [parse_policy(name) for name in self.policies]
        path = self.locate()
        tokenizer = Tokenizer.load(path)
        texts = [read_text(name, tokenizer, self.tokens, self.steps) for name in self.texts]
        device = torch.device(self.prompt_device)
        model = load_model(path, device=device, dtype=torch.bfloat16)
        config = model.config
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
        recorder = SelectionRecorder(model.decoder.to("cpu"), planner, texts, held)
        for recorded in recorder.record(policies, about):
            file = self.folder / f"{recorded.policy.translate(_NOT_IN_NAMES)}.npz"
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
