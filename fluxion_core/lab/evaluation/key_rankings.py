"""Rankings of blocks against each other: what each has to read, and what it loses.

    python -m fluxion_core.lab.evaluation.key_rankings --texts FILE,FILE --tokens 5120 --json OUT

A text is computed once; some of its positions are decode steps (training/replay.py). Two figures a
ranking, both at blocks of 16 tokens with the default window dense:

- along exact steps, how many of its best blocks a head needs until its output error is at most 0.1
  or 0.2, as a share of the region;
- the KL of the next token's distribution from the exact one, when every head of every layer reads
  the same share of the region by this ranking.

Coded keys rank a block by the logarithm of the sum of exp(q.k / sqrt(head_dim)) over its tokens.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from torch import Tensor

from fluxion_core.config.command_options import JsonOption, Numbers, Texts
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.errors import ConfigError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import BLOCK_TOKENS, WindowSpec
from fluxion_core.lab.provenance import Provenance
from fluxion_core.lab.training.replay import DocumentKv, prefill, replay
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.model_options import ModelOptions
from fluxion_core.models.weights import load_model
from fluxion_core.planning.layer_step import LayerStep

ERRORS = (0.1, 0.2)
"""Head output errors that blocks are counted for."""

GAUSSIAN_STEP = 0.9957
"""Distance of four evenly spaced levels that suits a normal distribution best, in deviations."""

_REFITS = 2

Blocks = Callable[[int, LayerStep], Tensor]
"""Scores [rows, kv_heads, group, blocks] of a layer's steps, natural logarithms or bounds."""


@dataclass(frozen=True)
class KeyCode:
    """Keys as small integers: low + step * code, with low and step per channel of some tokens."""

    bits: int
    tokens: int
    """That share low and step."""
    fit: str
    """range: lowest to highest; spread: by mean and deviation; refit: least squares from range."""
    low_dtype: torch.dtype = torch.float16

    @property
    def bytes_a_channel(self) -> float:
        """Bytes of a token: its code, and its share of low and step."""
        return self.bits / 8 + 4 / self.tokens

    def __str__(self) -> str:
        low = "" if self.low_dtype == torch.float16 else ", bfloat16 low"
        return f"{self.bits} bits, {self.tokens} tokens, {self.fit}{low}"

    def approximate(self, keys: Tensor) -> Tensor:
        """Keys as they are read from their codes.

        Args:
            keys: [..., tokens, head_dim] float32; whole groups.
        """
        grouped = torch.unflatten(keys, -2, (-1, self.tokens))
        levels = 2**self.bits - 1
        low, step = self._map(grouped, levels)
        codes = self._codes(grouped, low, step, levels)
        if self.fit == "refit":
            for _ in range(_REFITS):
                low, step = self._rounded(*_least_squares(grouped, codes, low, step))
                codes = self._codes(grouped, low, step, levels)
        approximate: Tensor = (low + step * codes).flatten(-3, -2)
        return approximate

    def _map(self, grouped: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        low = grouped.amin(-2, keepdim=True)
        step = (grouped.amax(-2, keepdim=True) - low) / levels
        if self.fit == "spread":
            deviation, mean = torch.std_mean(grouped, dim=-2, correction=0, keepdim=True)
            step = GAUSSIAN_STEP * deviation * 3 / levels
            low = mean - step * levels / 2
        return self._rounded(low, step)

    def _rounded(self, low: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return low.to(self.low_dtype).float(), step.half().float()

    @staticmethod
    def _codes(grouped: Tensor, low: Tensor, step: Tensor, levels: int) -> Tensor:
        codes: Tensor = ((grouped - low) / step.clamp(min=1e-30)).round().clamp(0, levels)
        return codes


def _least_squares(
    grouped: Tensor, codes: Tensor, low: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """The line through keys over their codes; what was, where all codes are the same."""
    mean_code = codes.mean(-2, keepdim=True)
    mean = grouped.mean(-2, keepdim=True)
    centred = codes - mean_code
    square = centred.square().sum(-2, keepdim=True)
    fitted = (centred * (grouped - mean)).sum(-2, keepdim=True) / square.clamp(min=1e-9)
    slope = torch.where(square > 0, fitted, step)
    return torch.where(square > 0, mean - slope * mean_code, low), slope


CODES = (
    KeyCode(2, 64, "range"),
    KeyCode(2, 64, "range", torch.bfloat16),
    KeyCode(2, 64, "spread"),
    KeyCode(2, 64, "refit"),
    KeyCode(2, 32, "range"),
    KeyCode(2, 128, "range"),
    KeyCode(3, 64, "range"),
)
"""The first one is the engine's (kernels/key_index)."""


def rankings(kv: DocumentKv) -> dict[str, Blocks]:
    """Scores of blocks of a text's layers, by ranking."""

    def coded(approximate: Callable[[Tensor], Tensor]) -> Blocks:
        return lambda layer, step: key_scores(step, approximate(kv.keys[layer]))

    named: dict[str, Blocks] = {
        "box, radius 0.3": lambda _, step: step.bounds[0],
        "box, Quest's bound": lambda _, step: step.by_quest().bounds[0],
    }
    named.update({str(code): coded(code.approximate) for code in CODES})
    return named | {"exact keys": coded(lambda keys: keys)}


def key_scores(step: LayerStep, keys: Tensor) -> Tensor:
    """Log of the sum of exp(q.k / sqrt(head_dim)) of each block's tokens.

    Args:
        step: whose queries ask.
        keys: [kv_heads, tokens, head_dim].

    Returns:
        [rows, kv_heads, group, blocks]; -inf outside the region.
    """
    query = step.query
    logits = torch.einsum("nkgd,ktd->nkgt", query, keys) / math.sqrt(query.shape[-1])
    scores = torch.unflatten(logits, -1, (-1, BLOCK_TOKENS)).logsumexp(-1)
    return scores.masked_fill(~step.in_region[:, None, None], -math.inf)


def needed_blocks(step: LayerStep, scores: Tensor, errors: Sequence[float]) -> Tensor:
    """Fewest of the best blocks with which each head's output error is at most each of some errors.

    Args:
        step: some rows.
        scores: [rows, kv_heads, group, blocks].
        errors: head output errors.

    Returns:
        [errors, rows, kv_heads, group] int64.
    """
    count = int(step.in_region.sum(-1).max())
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    inside = step.in_region[:, None, None].expand_as(step.mass).gather(-1, order)
    mass = (step.mass.gather(-1, order) * inside).cumsum(-1)
    index = order[..., None].expand(*order.shape, step.weighted.shape[-1])
    sums = (step.weighted.gather(-2, index) * inside[..., None]).cumsum_(-2)
    sums += step.window_sum[..., None, :]
    sums /= (step.window_mass[..., None] + mass)[..., None]
    lost = torch.linalg.vector_norm(sums - step.full_output[..., None, :], dim=-1)
    lost /= step.norm[:, None, None, None]
    window = step.window_sum / step.window_mass[..., None]
    nothing = torch.linalg.vector_norm(window - step.full_output, dim=-1)
    lost = torch.cat([(nothing / step.norm[:, None, None])[..., None], lost], -1)
    # With all blocks the error is 0 but for rounding.
    lost[..., -1] = 0
    return torch.stack([(lost <= error).int().argmax(-1) for error in errors])


def best_blocks(step: LayerStep, scores: Tensor, share: float) -> Tensor:
    """The best share of the region's blocks of each head: bool [rows, kv_heads, group, blocks]."""
    counts = step.counts(torch.tensor(share).expand(step.rows), 0)[:, None, None, None]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    numbers = torch.arange(order.shape[-1]).expand_as(order)
    ranks = torch.empty_like(order).scatter_(-1, order, numbers)
    return (ranks < counts) & step.in_region[:, None, None]


@dataclass(frozen=True)
class RankingFigure:
    """One ranking on one text; means over positions, layers and heads."""

    text: str
    ranking: str
    needed: list[float]
    """Blocks of the region with which an error of ERRORS is kept, as a share of it."""
    divergences: dict[str, list[float]]
    """KL of the next token in nats, of each position, by share of the region that heads read."""


class RankingStudy:
    """A model on the CPU, and texts that are ranked one after the other.

    Args:
        decoder: the model.
        positions: decode steps of a text, spread over its second half.
        percents: of the region, that every head reads.
    """

    def __init__(self, decoder: Decoder, positions: int, percents: Sequence[float]) -> None:
        self._decoder, self._positions, self._percents = decoder, positions, percents

    @torch.inference_mode()
    def run(self, text: str, token_ids: Sequence[int]) -> list[RankingFigure]:
        """Figures of all rankings on one text."""
        kv = prefill(self._decoder, token_ids)
        tokens = len(kv.token_ids)
        spread = torch.linspace(0, tokens // 2 - 2, self._positions).round().long()
        self._kv, self._at = kv, tokens // 2 + spread
        ranked = rankings(kv)
        exact, needed = self._exact(ranked)
        figures = []
        for name, blocks in ranked.items():
            lost = {f"{p:g} %": self._divergences(blocks, p / 100, exact) for p in self._percents}
            figures.append(RankingFigure(text, name, needed[name], lost))
        return figures

    def _exact(self, ranked: dict[str, Blocks]) -> tuple[Tensor, dict[str, list[float]]]:
        """Exact log-probabilities [positions, vocab], and what each ranking needs along them."""
        found: dict[str, list[Tensor]] = {name: [] for name in ranked}

        def attend(layer: int, step: LayerStep) -> Tensor:
            region = step.in_region.sum(-1).clamp(min=1)[:, None, None]
            for name, blocks in ranked.items():
                counts = needed_blocks(step, blocks(layer, step), ERRORS)
                found[name].append((counts / region).flatten(1).mean(1))
            return step.full_output.flatten(1, 2)

        return self._log_probabilities(attend), {
            name: torch.stack(parts).mean(0).tolist() for name, parts in found.items()
        }

    def _divergences(self, blocks: Blocks, share: float, exact: Tensor) -> list[float]:
        def attend(layer: int, step: LayerStep) -> Tensor:
            output, _ = step.attend(best_blocks(step, blocks(layer, step), share))
            return output

        own = self._log_probabilities(attend)
        kl: list[float] = (exact.exp() * (exact - own)).sum(-1).tolist()
        return kl

    def _log_probabilities(self, attend: Callable[[int, LayerStep], Tensor]) -> Tensor:
        dtype = self._decoder.embedding.dtype
        hidden = replay(
            self._decoder,
            self._kv,
            self._at,
            WindowSpec(),
            lambda layer, step: attend(layer, step).to(dtype),
        )
        return self._decoder.logits(hidden).float().log_softmax(-1)


@dataclass(frozen=True, kw_only=True)
class KeyRankings(ModelOptions, JsonOption, Command):
    """Compare rankings of blocks on a model and some texts. On the CPU."""

    texts: Texts
    """Files of texts."""
    tokens: Annotated[int, within(1024)] = 5120
    """Of each text."""
    positions: Annotated[int, within(1)] = 32
    """Decode steps of each text."""
    percents: Numbers = (1, 2, 5)
    """Of the region, that every head reads."""
    bfloat16: bool = False
    """Hold the model in bfloat16; in float32 if not."""

    def __call__(self) -> None:
        """Print figures as they come; keep them."""
        console = self.console(width=160)
        path = self.locate()
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32
        model = load_model(path, device=torch.device("cpu"), dtype=dtype)
        tokenizer = Tokenizer.load(path)
        study = RankingStudy(model.decoder, self.positions, self.percents)
        figures: list[RankingFigure] = []
        report: dict[str, object] = {
            "about": Provenance.here(model.name, model.revision_hash).as_json(),
            "options": {
                "tokens": self.tokens,
                "positions": self.positions,
                "dtype": str(dtype).removeprefix("torch."),
            },
            "bytes_a_token_and_channel": {str(c): c.bytes_a_channel for c in CODES},
        }
        for name in self.texts:
            token_ids = tokenizer.encode(Path(name).read_text())[: self.tokens]
            if len(token_ids) < self.tokens:
                raise ConfigError(f"{name}: {len(token_ids)} tokens, {self.tokens} are needed")
            started = time.perf_counter()
            figures += study.run(Path(name).stem, token_ids)
            console.print(f"{name}: {time.perf_counter() - started:.0f} s", highlight=False)
            _print_figures(console, figures[-len(CODES) - 3 :])
            report["figures"] = [asdict(figure) for figure in figures]
            if not self.is_on_standard_output:
                # A text takes minutes to an hour: what is there is kept.
                self.write(report)
        self.write(report)


def _print_figures(console: Console, figures: Sequence[RankingFigure]) -> None:
    for figure in figures:
        needed = " ".join(f"{share:6.2%}" for share in figure.needed)
        lost = " ".join(f"{sum(kl) / len(kl):.4f}" for kl in figure.divergences.values())
        console.print(f"{figure.ranking:40s} needs {needed}  KL {lost}", highlight=False)


if __name__ == "__main__":
    sys.exit(run_module(KeyRankings))
