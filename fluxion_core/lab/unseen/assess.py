"""Rules of reading on models that nothing was fitted to, from traces.

    python -m fluxion_core.lab.unseen.assess OUTPUT FOLDER...

Each folder is of one model, as collect.py writes it. Texts are in two halves, by name: networks for
the one are trained on the other, so that no text and, where it says so, no model was seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.lab.provenance import Provenance
from fluxion_core.lab.unseen import curves
from fluxion_core.lab.unseen.outcomes import Outcome, gain, outcome
from fluxion_core.lab.unseen.second_look import second_look
from fluxion_core.lab.unseen.traces import LAST, SPREAD, STEPS, Trace
from fluxion_core.lab.unseen.universal import CorrectionMlp, fit_universal, samples_of, universal
from fluxion_core.planning.constants import SMALL_BUDGET
from fluxion_core.planning.features import PRIORS
from fluxion_core.planning.head_profile import log_squared_errors
from fluxion_core.planning.planner_weights import SHIPPED, PlannerWeights, load_planner_weights

Rule = Callable[[Trace], Outcome]


def training_free_rules() -> dict[str, Rule]:
    """Rules that need the sequence alone, and the oracle."""

    def mean(rows: slice, policy: str) -> Rule:
        return lambda trace: outcome(trace, curves.prompt_mean(trace, rows), policy)

    def evident(base: Callable[[Trace], Tensor]) -> Rule:
        def rule(trace: Trace) -> Outcome:
            known = base(trace)
            return outcome(trace, lambda price: curves.with_evidence(trace, known, price))

        return rule

    return {
        "oracle": lambda trace: outcome(trace, curves.oracle(trace), scans_coarse=False),
        "last 16, threshold": mean(LAST, "threshold"),
        "last 16, price": mean(LAST, "price"),
        "spread 128, threshold": mean(SPREAD, "threshold"),
        "spread 128, price": mean(SPREAD, "price"),
        "spread 128, evidence": evident(lambda trace: curves.prompt_mean(trace, SPREAD)),
        "ridge": lambda trace: outcome(trace, curves.ridge(trace)),
        "ridge of 64": lambda trace: outcome(trace, curves.ridge(trace, every_query=2)),
        "ridge of 32": lambda trace: outcome(trace, curves.ridge(trace, every_query=4)),
        "ridge, slopes of a layer": lambda trace: outcome(
            trace, curves.ridge(trace, of_layer=True)
        ),
        "ridge, evidence": evident(curves.ridge),
        "ridge, second look": second_look,
    }


def shipped_rules(weights: PlannerWeights) -> dict[str, Rule]:
    """The shipped network with its own priors, and with the prompt's in their place."""

    def rule(trace: Trace, *, of_prompt: bool) -> Outcome:
        assert weights.network is not None
        seen = trace.features[STEPS].clone()
        mean = curves.prompt_mean(trace, SPREAD)[0]
        small = mean[..., SMALL_BUDGET]
        growth = (small[..., -1] - small[..., 0]) / (len(BLOCK_SIZES) - 1)
        of_sequence = torch.stack((mean[..., 0, 0], small[..., 0], growth), -1)
        seen[..., PRIORS] = of_sequence if of_prompt else weights.priors[trace.layers]
        with torch.no_grad():
            return outcome(trace, log_squared_errors(weights.network(seen)))

    rules: dict[str, Rule] = {"shipped network, the prompt's priors": partial(rule, of_prompt=True)}
    return rules | {"shipped network, its own priors": partial(rule, of_prompt=False)}


def universal_rule(network: CorrectionMlp, *, with_ridge: bool) -> Rule:
    """A network for all models."""
    return lambda trace: outcome(trace, universal(trace, network, with_ridge=with_ridge))


@dataclass(frozen=True, kw_only=True)
class Assess(Command):
    """Compare rules by bytes and squared errors, beside fixed(16, 5 %)."""

    output: Path = field(kw_only=False)
    """Takes the figures, as JSON."""
    folders: tuple[Path, ...] = field(kw_only=False)
    """Of a model's traces each; its name is the model's."""
    own: str = "smollm2-135m"
    """Folder of the model that the shipped network was trained for."""
    weights: Path = SHIPPED / "smollm2-135m.safetensors"
    """The shipped network."""
    updates: Annotated[int, within(1)] = 200
    """Of each universal network."""
    hidden: Annotated[int, within(1)] = 64
    """Width of the universal networks."""
    batch: Annotated[int, within(1)] = 4096
    """Rows of an update."""
    threads: Annotated[int, within(1)] = 1
    """Of torch."""

    def __call__(self) -> None:
        """Train, compare, write."""
        torch.set_num_threads(self.threads)
        weights = load_planner_weights(self.weights)
        models = {folder.name: _read(folder) for folder in self.folders}
        texts = sorted({text for of in models.values() for text in of})
        figures = {}
        for model, traces in models.items():
            rules = training_free_rules() | shipped_rules(weights)
            if model != self.own:
                del rules["shipped network, its own priors"]
            found = {
                name: {text: rule(trace) for text, trace in traces.items()}
                for name, rule in rules.items()
            }
            for fold in (set(texts[::2]), set(texts[1::2])):
                unseen = sorted(fold & set(traces))
                if not unseen:
                    continue
                for name, rule in self._universal(models, model, fold).items():
                    found.setdefault(name, {}).update({text: rule(traces[text]) for text in unseen})
            figures[model] = {name: gain(of).as_json() for name, of in found.items()}
        about = Provenance.here(", ".join(models), weights=weights.fingerprint)
        report = {"about": about.as_json(), "figures": figures}
        self.output.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")

    def _universal(
        self, models: Mapping[str, Mapping[str, Trace]], model: str, fold: Collection[str]
    ) -> dict[str, Rule]:
        """Networks for one model's texts of a fold, trained on texts outside of it."""
        others = [name for name in models if name != model]
        sets = {"of the model": [model], "of other models": others, "of all models": list(models)}
        rules = {}
        for with_ridge in (False, True):
            samples = {
                name: samples_of(rest, with_ridge=with_ridge)
                for name, traces in models.items()
                if (rest := [trace for text, trace in traces.items() if text not in fold])
            }
            for title, members in sets.items():
                if not members or not set(members) <= set(samples):
                    continue
                network = fit_universal(
                    [samples[name] for name in members],
                    steps=self.updates,
                    batch=self.batch,
                    hidden=self.hidden,
                )
                name = f"network {title}{', on the ridge' if with_ridge else ''}"
                rules[name] = universal_rule(network, with_ridge=with_ridge)
        return rules


def _read(folder: Path) -> dict[str, Trace]:
    """Traces by the name of their text."""
    return {path.stem: Trace.load(path) for path in sorted(folder.glob("*.safetensors"))}


if __name__ == "__main__":
    sys.exit(run_module(Assess))
