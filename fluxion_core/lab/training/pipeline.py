"""`fluxion train`: from documents to weights with a report. Every stage can be resumed or repeated.

documents ─► pieces ─► samples (one shard each) ─► priors, cost model, head weights, network
                                                     └─► assessment and curve on test documents
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxion_core.errors import FluxionError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.geometry import WindowSpec
from fluxion_core.lab.training import corpus
from fluxion_core.lab.training.assessment import ablate, assess_network, network_loss
from fluxion_core.lab.training.collect import Samples, collect
from fluxion_core.lab.training.curve import Method, MethodResult, PlannedMethod
from fluxion_core.lab.training.curve_errand import CurveErrand, run_curve_errand
from fluxion_core.lab.training.direct import DirectMlp, fit_direct
from fluxion_core.lab.training.fit import TrainingSet, fit, fit_cost, fit_priors, with_priors
from fluxion_core.lab.training.frontier import (
    NETWORK,
    figures,
    relative_bytes_at_reference,
    standard_ways,
)
from fluxion_core.lab.training.losses import loss_report
from fluxion_core.lab.training.options import DEFAULT_LEVELS, TrainRun
from fluxion_core.lab.training.pieces import cut
from fluxion_core.lab.training.sensitivity import measure_sensitivity
from fluxion_core.lab.training.workers import Workers
from fluxion_core.observe.log import event
from fluxion_core.planning.network import HeadProfileMlp
from fluxion_core.planning.planner_weights import PlannerWeights
from fluxion_core.planning.policy import parse_policy

_log = logging.getLogger(__name__)

VALIDATION_PIECES = 12
COMPARED_PRICE = 1.0
"""Policy marginal at this price is compared with the oracle head by head."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainRun):
    """A run, with what is the same in all that users ask for."""

    model: Path
    """GGUF file or model directory."""
    sensitivity_pieces: int = 48
    assessed_documents: int = 10
    """Test documents whose labels are compared, over prompts of all lengths."""
    curve_starts: tuple[int, ...] = (4000, 5000, 6000, 7000)
    """Prompt lengths of the curve; each is followed by 8 steps."""
    direct_thresholds: tuple[float, ...] = (0.1, 0.2, 0.3)
    """Thresholds at which the paper's own form of the predictor is trained and compared."""
    levels: tuple[tuple[str, str], ...] = DEFAULT_LEVELS
    """What the weights' quality levels mean; choose them by `fluxion eval`."""

    @property
    def device_name(self) -> str:
        """cpu or cuda."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device


class Training:
    """One run.

    Args:
        options: what to do.
        on_progress: called with a stage's name, what is done and of how much.
    """

    def __init__(self, options: TrainOptions, on_progress: Callable[[str, int, int], None]) -> None:
        self._options, self._progress = options, on_progress
        self._device = torch.device(options.device_name)
        self._window = WindowSpec()
        self._workers = Workers(options.workers, options.model, options.device_name)
        self._model = self._workers.loaded()
        self._tokenizer = Tokenizer.load(options.model)
        self._report: dict[str, Any] = {}

    def run(self) -> Path:
        """Everything; returns the weights' path.

        Raises:
            FluxionError: there are no documents, or the model cannot be used.
        """
        options = self._options
        pieces = self._pieces("train")
        shards = self._samples("train", pieces, options.collect_seconds)
        validation = self._samples("validation", self._pieces("validation")[:VALIDATION_PIECES])
        tests = self._texts("test", minimum=max(options.curve_starts) + 200)
        if not shards or not validation or not tests:
            raise FluxionError(f"{options.documents} has no documents long enough; gather more")
        assessed = self._samples("test", tests[: options.assessed_documents])
        self._progress("head weights", 0, 1)
        texts = [ids for _, ids in pieces[: options.sensitivity_pieces]]
        sensitivity = measure_sensitivity(self._workers, texts, self._window)
        cost, priors = fit_cost(shards), fit_priors(shards)
        data = with_priors(shards, self._device)
        network = fit(
            data,
            epochs=options.epochs,
            on_step=lambda step, steps, _: self._progress("network", step, steps),
        )
        head_weights = sensitivity / sensitivity.mean()
        weights = PlannerWeights(
            network=network,
            priors=priors,
            head_weights=head_weights,
            cost=cost,
            levels={name: parse_policy(text) for name, text in options.levels},
            model_name=options.model.stem,
            revision_hash=self._model.revision_hash,
        )
        path = options.output / "weights.safetensors"
        weights.save(path)
        self._report |= {
            "model": options.model.stem,
            "parameters": network.num_parameters,
            "head_steps": data.features.shape[0],
            "shards": len(shards),
            "spread": cost.spread,
            "sensitivity": sensitivity.tolist(),
        }
        self._assess(weights, data, validation, assessed)
        self._write_report()
        direct = {
            f"direct {threshold:g}": fit_direct(data, threshold)
            for threshold in options.direct_thresholds
        }
        self._curve(tests, weights, {NETWORK: network} | direct)
        self._write_report()
        return path

    def _assess(
        self,
        weights: PlannerWeights,
        data: TrainingSet,
        validation: Sequence[Samples],
        assessed: Sequence[Samples],
    ) -> None:
        """Compare the network's labels with true ones, and with networks of fewer features."""
        network, priors = weights.network, weights.priors
        assert network is not None
        self._report["validation"] = network_loss(network, validation, priors)
        self._report["assessment"] = assess_network(network, assessed, priors)
        if self._options.ablation:
            self._report["ablation"] = ablate(
                data,
                validation,
                assessed,
                priors,
                epochs=self._options.epochs / 5,
                on_done=lambda done, total: self._progress("ablation", done, total),
            )

    def _pieces(self, split: str) -> list[tuple[str, list[int]]]:
        def encode(text: str) -> list[int]:
            return self._tokenizer.encode(text, add_special_tokens=False)

        return [(piece.name, piece.token_ids) for piece in cut(self._texts(split), encode)]

    def _texts(self, split: str, minimum: int = 0) -> list[tuple[str, list[int]]]:
        """Documents of a split; with a minimum of tokens, taking turns among the kinds."""
        context = self._model.config.context_tokens
        by_kind: dict[str, list[tuple[str, list[int]]]] = {}
        for document, text in corpus.load(self._options.documents, split):
            ids = self._tokenizer.encode(text)
            if minimum:
                ids = ids[:context]
            if len(ids) >= minimum:
                by_kind.setdefault(document.kind, []).append((document.name, ids))
        columns = by_kind.values()
        deepest = max((len(column) for column in columns), default=0)
        return [column[row] for row in range(deepest) for column in columns if row < len(column)]

    def _samples(
        self,
        split: str,
        documents: Sequence[tuple[str, Sequence[int]]],
        seconds: float = float("inf"),
    ) -> list[Samples]:
        paths = collect(
            self._workers,
            documents,
            self._window,
            self._options.output / "samples" / split,
            lambda done, total: self._progress(f"{split} samples", done, total),
            seconds=seconds,
        )
        return [Samples.load(path) for path in paths]

    def _curve(
        self,
        tests: Sequence[tuple[str, list[int]]],
        weights: PlannerWeights,
        networks: dict[str, HeadProfileMlp | DirectMlp],
    ) -> None:
        ways = standard_ways(self._options.direct_thresholds)
        chosen = tests[: self._options.curve_documents]
        errands = [
            CurveErrand(
                ids,
                self._options.curve_starts,
                self._window,
                ways,
                {name: copy.deepcopy(network).cpu() for name, network in networks.items()},
                weights.priors,
                weights.cost,
                {"marginal": weights.head_weights},
            )
            for _, ids in chosen
        ]
        documents: list[dict[Method, MethodResult]] = []
        kinds: list[tuple[str, Tensor, int]] = []
        for (name, _), (results, copied) in zip(
            chosen, self._workers.map(run_curve_errand, errands), strict=True
        ):
            documents.append(results)
            kinds.append((name.split("-")[0], copied, len(self._options.curve_starts)))
            self._progress("curve", len(documents), len(chosen))
        self._report["curve"] = {
            "documents": [name for name, _ in chosen],
            "steps": sum(next(iter(d.values())).kl.numel() for d in documents),
            "figures": [asdict(figure) for figure in figures(documents)],
            "bytes_at_reference_kl": relative_bytes_at_reference(documents),
        }
        predicted = PlannedMethod("marginal", COMPARED_PRICE, NETWORK)
        self._report["losses"] = asdict(
            loss_report(documents, predicted, weights.head_weights, _kinds_of_steps(kinds))
        )

    def _write_report(self) -> None:
        path = self._options.output / "report.json"
        path.write_text(json.dumps(self._report, indent=1) + "\n")
        _log.info(event("report written", path=path))


def _kinds_of_steps(documents: Sequence[tuple[str, Tensor, int]]) -> dict[str, Tensor]:
    """Masks over the steps of all documents: kinds of text, copies, a prompt's first step.

    Args:
        documents: kind of text, which steps are copies, and runs of each.
    """
    names = [kind for kind, copied, _ in documents for _ in range(copied.numel())]
    copied = torch.cat([copied for _, copied, _ in documents])
    first = torch.cat([torch.arange(copied.numel()) < runs for _, copied, runs in documents])
    kinds = {
        f"text: {kind}": torch.tensor([name == kind for name in names])
        for kind in sorted(set(names))
    }
    return kinds | {
        "next token copies the region": copied,
        "next token does not": ~copied,
        "first step of a prompt": first,
        "later steps": ~first,
    }
